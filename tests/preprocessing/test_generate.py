"""A record set is a function of its inputs and options: not of ranks, files, units or crashes."""

import gzip
import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from record_sets import DRIVER, content, sequences, smallest_ids

from preprocessing.errors import InputError
from preprocessing.generate import generate
from preprocessing.options import PreprocessOptions
from preprocessing.planning import default_shards
from preprocessing.sources import Source

Run = Callable[..., "subprocess.CompletedProcess[str]"]

RECORDS, RESIDUES = 20_000, 9_055_569
"""Of DB.fasta.gz, as its README counts them."""


OPTIONS: dict[str, Any] = {"shards": 7, "holdout": 0.05, "memory": 2**21}
UNIT_BYTES = 2**20  # eleven units in the plain file


@pytest.fixture(scope="module")
def one_rank(
    tmp_path_factory: pytest.TempPathFactory, real_fasta: Path, zipped_fasta: Path
) -> dict[str, Path]:
    """Record sets of the real proteins, plain and gzip, made by one rank."""
    made = {}
    for name, path in {"plain": real_fasta, "gzip": zipped_fasta}.items():
        made[name] = tmp_path_factory.mktemp(name) / "set"
        generate([path], made[name], PreprocessOptions(**OPTIONS), unit_bytes=UNIT_BYTES)
    return made


def test_real_proteins_are_all_there(one_rank: dict[str, Path], real_fasta: Path) -> None:
    totals = json.loads((one_rank["plain"] / "manifest.json").read_bytes())["totals"]
    assert totals["read"] == {"records": RECORDS, "residues": RESIDUES}
    for what in ("records", "residues"):
        left = totals["kept"][what] + sum(part[what] for part in totals["not_kept"].values())
        assert left == totals["read"][what]
        splits = totals["splits"]
        assert splits["train"][what] + splits["holdout"][what] == totals["kept"][what]

    train, held = (sequences(one_rank["plain"], split) for split in ("train", "holdout"))
    expected = smallest_ids(real_fasta)
    assert train | held == expected
    assert not train.keys() & held.keys()
    assert 0.03 < len(held) / len(expected) < 0.07
    assert totals["kept"]["records"] == len(expected)


def test_gzip_gives_the_same_shards(one_rank: dict[str, Path]) -> None:
    plain, zipped = (content(one_rank[name]) for name in ("plain", "gzip"))
    assert plain.keys() == zipped.keys()
    assert {name for name in plain if plain[name] != zipped[name]} == {"manifest.json"}


@pytest.mark.parametrize("size", [2, 3, 4])
def test_same_bytes_for_any_rank_count(
    size: int,
    tmp_path: Path,
    mpirun: Run,
    one_rank: dict[str, Path],
    real_fasta: Path,
    zipped_fasta: Path,
) -> None:
    jobs = [
        ([str(real_fasta)], str(tmp_path / "plain"), OPTIONS, UNIT_BYTES),
        ([str(zipped_fasta)], str(tmp_path / "gzip"), OPTIONS, UNIT_BYTES),
    ]
    result = mpirun(size, "-c", DRIVER, str(size), json.dumps(jobs))
    expected = sorted(f"rank {rank}: done" for rank in range(size) for _ in jobs)
    assert sorted(result.stdout.splitlines()) == expected, result.stderr
    for name in ("plain", "gzip"):
        assert content(tmp_path / name) == content(one_rank[name])
        assert json.loads((tmp_path / name / "run.json").read_bytes())["ranks"] == size


def test_all_ranks_raise_the_error_of_the_first_unit(tmp_path: Path, mpirun: Run) -> None:
    text = "".join(f">id{n}\nMK{'-' if n in (450, 455, 900) else 'V'}\n" for n in range(1000))
    (tmp_path / "bad.fasta").write_text(text)
    job = ([str(tmp_path / "bad.fasta")], str(tmp_path / "set"), {}, 100)
    result = mpirun(3, "-c", DRIVER, "3", json.dumps([job]), timeout=60)
    assert result.returncode == 0
    lines = sorted(result.stdout.splitlines())
    for rank, line in enumerate(lines):
        start = f"rank {rank}: {tmp_path / 'bad.fasta'}, line 902, record 'id450': character '-'"
        assert line.startswith(start)
    assert len(lines) == 3
    assert list((tmp_path / "set").iterdir()) == []  # a corrected file can be tried at once


any_records = st.lists(
    st.tuples(
        st.text("abc01|", min_size=1, max_size=3), st.sampled_from(["MK", "mkv", "W*", "ACD"])
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=25, deadline=None)
@given(
    files=st.lists(any_records, min_size=1, max_size=3),
    line_end=st.sampled_from(["\n", "\r\n", "\n\n"]),
    unit_bytes=st.integers(1, 80),
    order=st.randoms(use_true_random=False),
)
def test_same_records_for_any_order_of_files_and_any_units(
    tmp_path_factory: pytest.TempPathFactory,
    files: list[list[tuple[str, str]]],
    line_end: str,
    unit_bytes: int,
    order: Any,
) -> None:
    directory = tmp_path_factory.mktemp("any")
    options = PreprocessOptions(shards=2, holdout=0.3)

    def make(name: str, files: Sequence[list[tuple[str, str]]], unit_bytes: int) -> dict[str, Any]:
        paths = []
        for number, records in enumerate(files):
            paths.append(directory / f"{name}{number}.fasta")
            lines = [line for title, text in records for line in (f">{title} x", text)]
            paths[-1].write_text(line_end.join(lines), newline="")
        generate(paths, directory / name, options, unit_bytes=unit_bytes)
        made: dict[str, Any] = content(directory / name)
        manifest = json.loads(made["manifest.json"])
        del manifest["input_hash"], manifest["checksum"]
        for entry in manifest["inputs"]:
            del entry["hash"]  # of blocks as long as a unit; the order follows it
        manifest["inputs"].sort(key=lambda entry: sorted(entry.items()))
        made["manifest.json"] = manifest
        return made

    first = make("first", files, 10**6)
    shuffled = order.sample(files, len(files))
    assert (
        make("second", shuffled, unit_bytes)["manifest.json"]["totals"]
        == (first["manifest.json"]["totals"])
    )
    assert make("third", files, unit_bytes) == first
    again = content(directory / "second")
    assert {name for name in again if again[name] != first[name]} == {"manifest.json"}

    expected: dict[str, str] = {}
    for title, text in (record for records in files for record in records):
        text = text.upper().rstrip("*")
        expected[text] = min(title, expected.get(text, title))
    assert sequences(directory / "first") | sequences(directory / "first", "holdout") == expected


def test_manifest_does_not_depend_on_names_or_order_of_inputs(tmp_path: Path) -> None:
    texts = {"a": ">x\nMKV\n", "b": ">y\nMKW\n", "c": ">y\nM\n"}
    for names in ("abc", "cab"):
        (tmp_path / names).mkdir()
        for file, name in zip("123", names, strict=True):
            (tmp_path / names / f"{file}.fasta").write_text(texts[name])
        inputs = sorted((tmp_path / names).iterdir(), reverse=names == "cab")
        generate(inputs, tmp_path / f"set-{names}", PreprocessOptions())
    assert content(tmp_path / "set-abc") == content(tmp_path / "set-cab")


@pytest.mark.parametrize(
    ("plain", "zipped", "shards"),
    [(10**6, 0, 8), (572 * 10**9, 0, 5_959), (0, 96 * 10**8, 200), (10**14, 0, 65_536)],
)
def test_default_shards_follow_the_size_of_the_inputs(plain: int, zipped: int, shards: int) -> None:
    sources = [
        Source(path="a", bytes=plain, mtime_ns=0, kind="plain"),
        Source(path="b", bytes=zipped, mtime_ns=0, kind="gzip"),
    ]
    assert default_shards(sources, PreprocessOptions()) == shards


def test_gzip_of_several_members_is_one_file(tmp_path: Path) -> None:
    parts = [b">a\nMKV\n>b\nMK", b"W\n", b">c\nMKY"]
    (tmp_path / "in.fasta.gz").write_bytes(b"".join(gzip.compress(part) for part in parts))
    generate([tmp_path / "in.fasta.gz"], tmp_path / "set", PreprocessOptions())
    assert sequences(tmp_path / "set") == {"MKV": "a", "MKW": "b", "MKY": "c"}


def test_too_little_memory_for_a_record_says_so(tmp_path: Path) -> None:
    (tmp_path / "in.fasta").write_text(f">a\n{'M' * 2**20}\n")
    with pytest.raises(InputError, match="raise --memory"):
        generate([tmp_path / "in.fasta"], tmp_path / "set", PreprocessOptions(memory=2**20))
    generate([tmp_path / "in.fasta"], tmp_path / "set", PreprocessOptions(memory=2**22))
