"""What checks measure here and how they judge; children that hang or crash are told about."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hpc.checks import collectives, launchers, machine, software, storage
from hpc.checks.child import Child, ChildError
from hpc.checks.findings import Check, Finding, Measured, Situation, places
from hpc.doctor import REQUIRABLE
from hpc.world import World
from preprocessing.errors import InputError

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, node=0, launcher="alone")


def situation(**changes: Any) -> Situation:
    values = {"world": ALONE, "directory": Path(), "size": 2**16, "timeout": 20.0, **changes}
    return Situation(**values)


def judged(check: Check, *values: dict[str, Any], hosts: str = "") -> list[Finding]:
    """Judge these values as those of rank 0, 1, …, on the nodes that the letters name."""
    measured = [
        Measured(rank=rank, host=f"node{host}", values=one)
        for rank, (one, host) in enumerate(zip(values, hosts or "a" * len(values), strict=True))
    ]
    return list(check.findings(measured))


def program(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def test_every_requirement_is_known_to_some_check() -> None:
    lacking = {name for finding in everything_missing() for name in finding.lacks}
    assert lacking == set(REQUIRABLE)


def everything_missing() -> Iterator[Finding]:
    gone = {"torch": ["gloo"], "installed": [], "answers": {}}
    yield from judged(software.ENGINES, gone)
    yield from judged(
        software.SEARCH_TOOLS, {"answers": {"blastp": {}, "makeblastdb": {}, "mmseqs": {}}}
    )
    library = {"path": "python", "trouble": "No module named 'mpi4py'"}
    answers = {"mpirun": {}, "srun": {}, "plugins": {}, "library": library}
    none = {"answers": answers, "found": [], "several": False, "beside_python": False}
    yield from judged(launchers.LAUNCHERS, none)
    yield from judged(machine.DEVICES, devices([]))


@pytest.mark.parametrize(
    ("text", "family", "version", "manager"),
    [
        ("Open MPI v5.0.11, package: Open MPI x Distribution", "Open MPI", "5.0.11", "PMIx"),
        ("mpirun (Open MPI) 4.1.4\n\nReport bugs to", "Open MPI", "4.1.4", "PMIx"),
        ("mpiexec (OpenRTE) 4.0.3", "Open MPI", "4.0.3", "PMIx"),
        ("MPICH Version:\t4.0.2\nMPICH Release date:", "MPICH", "4.0.2", "Hydra"),
        ("HYDRA build details:\n    Version:      4.0.2\n", "MPICH (Hydra)", "4.0.2", "Hydra"),
        ("MPI VERSION    : CRAY MPICH version 8.1.28.2 (ANL", "CRAY MPICH", "8.1.28.2", "Hydra"),
        ("MVAPICH2 Version      :\t2.3.7\n", "MVAPICH", "2.3.7", "Hydra"),
        (
            "Intel(R) MPI Library for Linux* OS, Version 2021.10 Build 20230619 (id: c2e)",
            *("Intel MPI", "2021.10", "Hydra"),
        ),
    ],
)
def test_mpi_families_are_told_apart(text: str, family: str, version: str, manager: str) -> None:
    assert launchers.identify(text) == (family, version, manager)


@pytest.mark.parametrize(
    ("mpirun", "srun", "level"),
    [
        ("HYDRA build details:\n    Version: 4.0.2", None, "fail"),
        ("HYDRA build details:\n    Version: 4.0.2", "slurm 23.11.4", "note"),
        ("mpirun (Open MPI) 1.10.7", None, "note"),
        ("something else", None, "ok"),
    ],
    ids=["another family", "another family, but srun", "another major version", "unknown"],
)
def test_an_mpirun_of_another_mpi_is_found_on_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mpirun: str, srun: str | None, level: str
) -> None:
    program(tmp_path, "mpirun", f"echo '{mpirun}'")
    if srun:
        program(tmp_path, "srun", f"echo '{srun}'")
    monkeypatch.setenv("PATH", str(tmp_path))
    values = launchers.LAUNCHERS.measure(situation())
    if "trouble" in values["answers"]["library"]:
        pytest.skip("mpi4py has no library here")
    finding = judged(launchers.LAUNCHERS, values)[1]
    assert (finding.check, finding.level) == ("MPI", level)
    if level != "ok":
        assert str(tmp_path / "mpirun") in finding.text
        assert finding.advice


def test_srun_without_pmix_cannot_start_open_mpi() -> None:
    library = {"path": "python", "output": "Open MPI v5.0.11, package"}
    for plugins, level in (("none\n\tpmi2", "note"), ("none\n\tpmix\n\tpmi2", "ok")):
        listed = {"path": "srun", "output": f"MPI plugin types are...\n\t{plugins}"}
        srun = {"path": "srun", "output": "slurm 22.05.8"}
        answers = {"mpirun": {}, "srun": srun, "plugins": listed, "library": library}
        values = {"answers": answers, "found": [], "several": False, "beside_python": False}
        assert judged(launchers.LAUNCHERS, values)[1].level == level


def test_a_directory_that_cannot_be_written_says_why() -> None:
    # The kernel refuses files there to root as well.
    values = storage.DIRECTORY.values(situation(directory=Path("/proc/self/fd"), size=1))
    (finding,) = judged(storage.DIRECTORY, values)
    assert finding.level == "fail"
    assert re.fullmatch(r"/proc/\d+/fd: \w.*", finding.text), finding.text
    assert finding.advice == "name another with --dir"


def test_a_directory_without_room_is_not_filled(tmp_path: Path) -> None:
    values = storage.DIRECTORY.values(situation(directory=tmp_path, size=2**60))
    (finding,) = judged(storage.DIRECTORY, values)
    assert finding.level == "fail"
    assert "free, too little to write" in finding.text
    assert list(tmp_path.iterdir()) == []


def devices(gpus: list[str], *, own: int = 0, cores: int = 8) -> dict[str, Any]:
    return {
        "gpus": [{"name": "H200", "memory": 140 * 2**30, "id": identity} for identity in gpus],
        "gpu": own if gpus else None,
        "driver": False,
        "torch": "2.13.0",
        "for_gpus": True,
        "cores": list(range(cores)),
        "threads": 1,
        "threads_are_set": True,
    }


def test_ranks_that_share_a_gpu_or_have_none_are_named() -> None:
    sound = judged(machine.DEVICES, devices(["A", "B"]), devices(["A", "B"], own=1))
    assert [finding.level for finding in sound] == ["ok", "ok"]
    # The same number on two nodes is two GPUs, on one node it is one.
    far = judged(machine.DEVICES, devices(["A"]), devices(["A"]), hosts="ab")
    assert far[0].level == "ok"
    near = judged(machine.DEVICES, devices(["A"]), devices(["A"]), devices(["B"]))
    assert near[0].level == "fail"
    assert "ranks 0-1 on nodea" in near[0].text
    mixed = judged(machine.DEVICES, devices(["A"]), devices([]), hosts="ab")
    assert mixed[0].level == "fail"
    assert "no GPU for rank 1 on nodeb" in mixed[0].text


def test_fewer_cores_than_ranks_or_threads_are_noted() -> None:
    assert judged(machine.DEVICES, *[devices([], cores=1)] * 2)[-1].level == "note"
    assert judged(machine.DEVICES, *[devices([], cores=1)] * 2, hosts="ab")[-1].level == "ok"
    busy = {**devices([], cores=4), "threads": 4}
    assert "more threads than cores" in judged(machine.DEVICES, busy, busy)[-1].text
    assert judged(machine.DEVICES, *[{**busy, "threads_are_set": False}] * 2)[-1].level == "ok"


def test_limits_that_bite_say_whether_they_can_be_raised() -> None:
    sound = {
        **{"files": 1024, "most_files": 4096, "files_needed": 600, "infiniband": False},
        **{"address_space": -1, "locked": 65536},
    }
    assert [finding.level for finding in judged(machine.LIMITS, sound)] == ["ok"]
    for change, said in (
        ({"files_needed": 2000}, "ulimit -n 2000"),
        ({"files_needed": 9000}, "hard limit of 4096"),
        ({"infiniband": True}, "ulimit -l unlimited"),
        ({"address_space": 2**32}, "ulimit -v unlimited"),
    ):
        (finding,) = judged(machine.LIMITS, {**sound, **change})
        assert finding.level == "note"
        assert said in finding.advice


def test_different_versions_on_two_nodes_fail_and_are_named() -> None:
    values = software.VERSIONS.measure(situation())
    other = {**values, "versions": {**values["versions"], "torch": "1.0"}}
    (finding,) = judged(software.VERSIONS, values, other, values, hosts="aba")
    assert finding.level == "fail"
    assert re.search(r"rank 1 on nodeb: .*torch 1\.0", finding.text)


def reductions(*results: tuple[float, bool]) -> dict[str, Any]:
    sizes = zip(collectives.SIZES_MIB, results, strict=False)
    return {
        "over": "gloo",
        "results": [{"mib": m, "gb_per_second": s, "correct": c} for m, (s, c) in sizes],
    }


def test_a_wrong_sum_fails_and_a_slow_network_is_noted() -> None:
    good, slow = reductions((1.0, True), (9.0, True)), reductions((0.01, True), (0.02, True))
    (finding,) = judged(collectives.ALL_REDUCE, good, reductions((1.0, True), (9.0, False)))
    assert (finding.level, finding.text) == ("fail", "wrong sums on rank 1 on nodea")
    (finding,) = judged(collectives.ALL_REDUCE, good, slow, hosts="ab")
    assert finding.level == "note"
    assert "1 MiB at 0.01, 16 MiB at 0.02 GB/s" in finding.text, "the slowest rank counts"
    # Ranks of one node do not use the network.
    assert judged(collectives.ALL_REDUCE, good, slow)[0].level == "ok"


def test_a_clock_that_is_off_is_named() -> None:
    clocks = [{"stamps": [100.0 + skew, 200.0 + skew]} for skew in (0, 0.01, -7.5)]
    (finding,) = judged(collectives.CLOCKS, *clocks, hosts="abc")
    assert finding.level == "note"
    assert "rank 2 on nodec is -7.5 s" in finding.text
    assert judged(collectives.CLOCKS, *clocks[:2], hosts="ab")[0].level == "ok"


def test_places_name_ranks_and_nodes_briefly() -> None:
    ranks = [Measured(rank=rank, host=f"n{rank // 2}", values={}) for rank in range(12)]
    assert places(ranks[3:4]) == "rank 3 on n1"
    assert places([ranks[0], ranks[1], ranks[3]]) == "ranks 0-1, 3 on 2 nodes: n0, n1"
    assert places(ranks) == "ranks 0-11 on 6 nodes: n0, n1, n2, n3, ..."


# The tests before have started threads of numpy's, which Python 3.12 warns of; doctor has none.
ignore_threads = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


@ignore_threads
def test_a_child_tells_how_it_ended() -> None:
    def work(receive: Callable[[], Any]) -> Iterator[Any]:
        how = receive()
        yield "begun"
        os.write(1, b"some words\n")
        if how == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "hang":
            time.sleep(1000)
        if how == "refuse":
            raise InputError("no such\nthing")
        if how == "leave":
            os._exit(7)

    for how, said in (
        ("crash", "was killed by SIGKILL, after: some words"),
        ("hang", "no answer within 0.5 s"),
        ("refuse", "no such thing"),
        ("leave", "exited with 7"),
    ):
        with Child(work) as child:
            child.send(how)
            assert child.receive(20) == "begun"
            with pytest.raises(ChildError, match=said) as caught:
                child.receive(0.5 if how == "hang" else 20)
            assert caught.value.refused is (how == "refuse")
            assert caught.value.output.startswith("some words")
    with Child(work) as child:
        child.send("well")
        assert [child.receive(20), child.receive(20)] == ["begun", None]


@ignore_threads
def test_nothing_outlives_a_child_that_is_given_up() -> None:
    def work(_: Callable[[], Any]) -> Iterator[Any]:
        grandchild = subprocess.Popen(["sleep", "1000"])
        yield [os.getpid(), grandchild.pid]
        time.sleep(1000)

    with Child(work) as child:
        ids = child.receive(20)
    deadline = time.monotonic() + 10
    while any(alive(process) for process in ids):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
