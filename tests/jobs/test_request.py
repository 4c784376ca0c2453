"""What a site does not give is refused before anything is submitted, naming what would do."""

from pathlib import Path
from typing import Any

import pytest
from cases import request

from jobs.request import parse_array, parse_job_id
from jobs.times import in_lsf, in_slurm, parse_time
from preprocessing.errors import InputError

HOUR = 3600


@pytest.mark.parametrize(
    ("site", "stage", "changes", "message"),
    [
        ("summit", "train", {"project": ""}, "--project is missing: summit"),
        ("frontier", "train", {"seconds": None}, "--time is missing: frontier"),
        ("summit", "train", {"nodes": 0}, "--nodes 0"),
        ("summit", "train", {"nodes": 46, "seconds": 7 * HOUR}, "gives to 46 nodes, 06:00:00"),
        ("summit", "train", {"nodes": 46, "seconds": 7 * HOUR}, "use more than 91 nodes"),
        ("summit", "train", {"nodes": 5000}, "--nodes 5000 is more than the queue batch"),
        ("frontier", "train", {"queue": "extended", "nodes": 65}, "--nodes 65 is more than"),
        ("rhea", "preprocess", {"nodes": 65, "seconds": 4 * HOUR}, "--time 04:00:00 is more"),
        ("summit", "train", {"queue": "bach"}, "did you mean batch"),
        ("summit", "train", {"queue": "debug", "chain": 2}, "debug of summit prohibits chains"),
        ("summit", "train", {"nodes": 20, "racks": True}, "of 18 nodes: use 18 or 36"),
        ("frontier", "train", {"racks": True}, "does not say how racks are"),
        ("summit", "train", {"ranks_per_node": 7}, "more than the 6 GPUs"),
        ("summit", "preprocess", {"ranks_per_node": 43}, "more than the 42 cores"),
        ("summit", "train", {"ranks_per_node": -1}, "--ranks-per-node -1"),
        ("summit", "train", {"streams": 8}, "8 micro-batches a step"),
        ("generic-slurm", "verify", {"chain": 2}, "verify does not go on"),
        ("generic-slurm", "train", {"chain": 0}, "--chain 0"),
        ("generic-slurm", "train", {"tasks": 3}, "train shares its work among its ranks"),
        ("local", "train", {"chain": 3}, "need a scheduler"),
        ("local", "train", {"nodes": 2}, "this machine is one node"),
        ("local", "train", {"project": "A"}, "--project means nothing"),
        ("local", "train", {"queue": "A"}, "--queue means nothing"),
        ("generic-slurm", "train", {"records": Path("/r")}, "names no disk in the nodes"),
    ],
)
def test_what_the_site_does_not_give_is_refused(
    site: str, stage: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as refusal:
        request(site, stage, **changes)
    assert message in str(refusal.value)


def test_936_nodes_of_summit_are_5616_ranks_in_52_racks() -> None:
    whole = request("summit", "train", nodes=936, racks=True, seconds=24 * HOUR, streams=5616)
    assert whole.ranks == 5616
    assert whole.placeholders["racks"] == 52
    assert whole.placeholders["total_cores_and_one"] == 39313
    assert whole.cores_per_rank == 7


def test_the_warning_comes_a_quarter_before_the_end_of_short_jobs() -> None:
    assert request("generic-slurm", "train", seconds=2 * HOUR).lead == 300
    assert request("generic-slurm", "train", seconds=120).lead == 30
    assert request("generic-slurm", "verify").lead == 0
    assert request("summit", "train", seconds=300).lead == 60, "LSF counts minutes"


def test_times_have_one_meaning() -> None:
    assert parse_time("1-02:03:04") == 93784
    assert in_slurm(93784) == "1-02:03:04"
    assert in_slurm(600) == "00:10:00"
    assert in_lsf(93784) == "26:04"
    assert in_lsf(600) == "0:10"
    for text in ("2:00", "120", "2h", "00:00:00", "00:60:00", "\u0661\u0661:00:00", "", "-1:00:00"):
        with pytest.raises(InputError, match="--time"):
            parse_time(text)


def test_arrays_and_job_numbers_are_read_strictly() -> None:
    assert parse_array("10%4") == (10, 4)
    assert parse_array("10") == (10, 0)
    for text in ("0", "1-10", "10%", "10%0", "ten"):
        with pytest.raises(InputError, match="--array"):
            parse_array(text)
    assert parse_job_id("12") == "12"
    for text in ("12;rm", "", "12_3", "-1"):
        with pytest.raises(InputError, match="--after"):
            parse_job_id(text)
