"""The doctor tells what works and what does not, whatever hangs, crashes, lies or is missing."""

import json
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpc.doctor import DoctorOptions, doctor

ROOT = Path(__file__).resolve().parents[2]
Prothpc = Callable[..., subprocess.CompletedProcess[str]]
LINE = re.compile(r"(ok|note|FAIL) +(\S.*?)  +(\S.*)")

TWO_OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "0",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}

# Doctor with two quick checks, on ranks of which some misbehave as the test says.
QUICK = """
import os, sys, time
from hpc import doctor
from hpc.checks.collectives import ALL_REDUCE
from hpc.checks.machine import LIMITS, MEMORY
doctor._ALONE, doctor._GRACE_SECONDS = (LIMITS, MEMORY), 1.0
rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", "0"))
def on(number, check, measure):
    if rank == number:
        object.__setattr__(check, "measure", measure)
"""
RUN = """
from hpc.cli import main
sys.argv = ["prothpc", "doctor", *sys.argv[1:]]
main()
"""


def lines(output: str) -> dict[str, tuple[str, str]]:
    """Check → level and text."""
    found = [LINE.fullmatch(line) for line in output.splitlines()]
    return {match[2]: (match[1], match[3]) for match in found if match}


def program(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PATH of our own: search tools, of which one is broken, and nothing that starts ranks."""
    folder = tmp_path_factory.mktemp("programs")
    program(folder, "blastp", "echo 'blastp: 2.16.0+'; echo ' Package: blast 2.16.0'")
    program(folder, "makeblastdb", "echo 'makeblastdb: 2.16.0+'")
    program(folder, "mmseqs", "kill -ILL $$")
    return folder


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An import path on which DeepSpeed is installed but broken, and Horovod works."""
    folder = tmp_path_factory.mktemp("engines")
    for name in ("deepspeed", "horovod"):
        (folder / f"{name}-9.9.dist-info").mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n"
        (folder / f"{name}-9.9.dist-info" / "METADATA").write_text(metadata)
    (folder / "deepspeed.py").write_text("raise ImportError('libgone.so: cannot open')")
    (folder / "horovod").mkdir()
    (folder / "horovod" / "__init__.py").write_text("__version__ = '9.9'")
    built = "mpi_built = gloo_built = lambda: True; nccl_built = lambda: 0; print('hello')"
    (folder / "horovod" / "torch.py").write_text(built)
    return folder


@pytest.fixture(scope="module")
def healthy(
    prothpc: Prothpc, programs: Path, engines: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """A run of one process, where the only thing amiss is DeepSpeed."""
    folder = tmp_path_factory.mktemp("healthy")
    result = prothpc(
        *("doctor", "--size", "1MiB", "--json", folder / "doctor.json", "--dir", folder),
        env={
            "PATH": f"{Path(sys.executable).parent}:{programs}",
            "PYTHONPATH": f"{engines}:{ROOT}",
        },
    )
    assert sorted(folder.iterdir()) == [folder / "doctor.json"], "doctor leaves nothing behind"
    return result, json.loads((folder / "doctor.json").read_text())


def test_one_line_for_each_check_and_exit_code_0_with_notes(healthy: tuple[Any, Any]) -> None:
    result, _ = healthy
    assert result.returncode == 0, result.stdout + result.stderr
    title, *checks, summary = result.stdout.splitlines()
    assert title.startswith("prothpc doctor on ")
    assert all(LINE.fullmatch(line) for line in checks), result.stdout
    found = lines(result.stdout)
    assert {
        *("ranks", "versions", "devices", "cores", "memory", "limits", "torch", "deepspeed"),
        *("horovod", "launchers", "MPI", "BLAST+", "MMseqs2", "directory", "all-reduce"),
    } <= set(found)
    assert found["versions"][1].startswith("python 3.")
    assert "prothpc " in found["versions"][1]
    assert found["MPI"][0] == "ok"
    assert re.search(r"\d+ ok, \d+ to note, 0 failed", summary)
    assert result.stderr == ""


def test_no_escape_codes_where_nobody_looks_at_a_terminal(healthy: tuple[Any, Any]) -> None:
    assert "\x1b" not in healthy[0].stdout
    assert "\r" not in healthy[0].stdout


def test_engines_are_really_imported(healthy: tuple[Any, Any]) -> None:
    found = lines(healthy[0].stdout)
    level, text = found["deepspeed"]
    assert level == "note"
    assert "libgone.so: cannot open" in text
    assert "-> python -c 'import deepspeed'" in text
    assert found["horovod"] == ("ok", "works, 9.9 with MPI, gloo")


def test_search_programs_are_really_run(healthy: tuple[Any, Any], programs: Path) -> None:
    found = lines(healthy[0].stdout)
    assert found["BLAST+"] == ("ok", f"2.16.0+ ({programs}/blastp)")
    level, text = found["MMseqs2"]
    assert level == "note"
    assert "killed by SIGILL" in text


def test_json_has_every_line_and_what_was_measured(healthy: tuple[Any, Any]) -> None:
    result, report = healthy
    names = {"ok": "ok", "note": "note", "FAIL": "fail"}
    printed = [(names[level], check) for check, (level, _) in lines(result.stdout).items()]
    assert printed == [(one["level"], one["check"]) for one in report["findings"]]
    assert report["failed"] is False
    (directory,) = report["measured"]["directory"]
    assert directory["rank"] == 0
    assert directory["values"]["bytes"] == 2**20
    assert directory["values"]["write_seconds"] > 0


def test_what_is_required_and_missing_fails(
    prothpc: Prothpc, programs: Path, engines: Path, tmp_path: Path
) -> None:
    result = prothpc(
        *("doctor", "--require", "deepspeed,gpu", "--require", "mpirun", "--timeout", "20"),
        *("--dir", tmp_path / "missing"),
        # No GPU even where there is one; a shell is all that the programs need.
        env={
            "PATH": str(programs),
            "PYTHONPATH": f"{engines}:{ROOT}",
            "CUDA_VISIBLE_DEVICES": "",
        },
    )
    found = lines(result.stdout)
    assert result.returncode == 1
    assert {check for check, (level, _) in found.items() if level == "FAIL"} == {
        *("deepspeed", "devices", "launchers", "directory")
    }
    assert "--require asks for mpirun" in found["launchers"][1]
    assert "no working mpirun, srun or jsrun on PATH" in found["launchers"][1]
    assert "missing is no directory -> name another with --dir" in found["directory"][1]
    assert "4 failed: devices, deepspeed, launchers, directory" in result.stdout.splitlines()[-1]
    assert "Traceback" not in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("claim", "said"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_RANK is not set"),
        (TWO_OPEN_MPI, "started 2 copies that do not see one another"),
    ],
    ids=["contradictory variables", "rank 0 of 1 in MPI"],
)
def test_singletons_fail(
    rank_environment: dict[str, str], claim: dict[str, str], said: str
) -> None:
    done = quick("", "--timeout", "20", env={**rank_environment, **claim})
    found = lines(done.stdout)
    assert done.returncode == 1
    assert found["ranks"][0] == "FAIL"
    assert said in found["ranks"][1]
    assert found["limits"][0] == "ok", "rank 0 still tells about itself"
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
def test_ranks_of_mpirun_meet_and_add_up_in_both_ways(prothpc: Prothpc, engines: Path) -> None:
    env = {"PYTHONPATH": f"{engines}:{ROOT}"}
    result = prothpc("doctor", "--size", "1MiB", "--require", "mpi", ranks=2, env=env)
    found = lines(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    assert found["ranks"][1].startswith("2 started by openmpi, met on one node")
    for check, over in (("all-reduce", "gloo"), ("MPI ranks", "MPI")):
        sizes = r"1 MiB at [\d.]+, 16 MiB at [\d.]+, 64 MiB at [\d.]+ GB/s"
        assert re.fullmatch(rf"right over {over} and 2 ranks: {sizes}", found[check][1]), found
    assert result.stdout.count("prothpc doctor on") == 1, "only rank 0 prints"


@pytest.mark.slow
def test_ranks_of_torchrun_meet_without_mpi(
    rank_environment: dict[str, str], tmp_path: Path
) -> None:
    script = tmp_path / "quick.py"
    script.write_text(QUICK + RUN)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", script],
        env=rank_environment,
        timeout=120,
        capture_output=True,
        text=True,
        check=False,
    )
    found = lines(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert found["ranks"][1].startswith("2 started by torchrun, met on one node")
    assert found["all-reduce"][0] == "ok"
    assert found["MPI ranks"][0] == "note"
    assert "torchrun starts no MPI ranks" in found["MPI ranks"][1]


@pytest.mark.slow
def test_ranks_that_crash_or_hang_are_named_and_cost_their_line_only(
    mpirun: Prothpc, tmp_path: Path
) -> None:
    script = tmp_path / "quick.py"
    script.write_text(
        QUICK
        + "on(1, LIMITS, lambda _: os.kill(os.getpid(), 11))\n"
        + "on(0, LIMITS, lambda _: time.sleep(1000))\n"
        + "on(1, ALL_REDUCE, lambda _: time.sleep(1000))\n"
        + RUN
    )
    began = time.monotonic()
    done = mpirun(2, str(script), "--timeout", "6", timeout=90)
    assert time.monotonic() - began < 60
    assert done.returncode == 1
    failed = re.findall("^FAIL +(.*)$", done.stdout, re.MULTILINE)
    assert len(failed) == 3, done.stdout + done.stderr
    assert re.search(r"limits +no answer within 7 s \(rank 0 on ", failed[0])
    assert re.search(r"limits +the process was killed by SIGSEGV.* \(rank 1 on ", failed[1])
    assert re.search(r"all-reduce +no answer any more from rank 1 on ", failed[2])
    assert lines(done.stdout)["ranks"][0] == lines(done.stdout)["memory"][0] == "ok"
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
def test_a_rank_that_never_comes_ends_in_a_line_not_in_a_hang(
    rank_environment: dict[str, str], tmp_path: Path
) -> None:
    """MPI_Init itself would wait for ever, and no thread of Python's could run meanwhile."""
    script = tmp_path / "quick.py"
    script.write_text(QUICK + RUN)
    doctors = ["-n", "1", sys.executable, script, "--timeout", "4"]
    began = time.monotonic()
    done = subprocess.run(
        ["mpirun", "--oversubscribe", *doctors, ":", "-n", "1", "sleep", "100"],
        env=rank_environment,
        timeout=90,
        capture_output=True,
        text=True,
        check=False,
    )
    assert time.monotonic() - began < 40
    found = lines(done.stdout)
    assert done.returncode == 1
    assert found["ranks"][0] == "FAIL"
    assert "MPI did not start within 4 s -> look for a rank that died" in found["ranks"][1]
    assert found["limits"][0] == "ok"
    assert "Traceback" not in done.stdout + done.stderr


def quick(breakage: str, *arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", QUICK + breakage + RUN, *arguments],
        env=env,
        timeout=60,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("setting", "coloured"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)],
    ids=["terminal", "NO_COLOR", "dumb terminal"],
)
def test_colours_on_a_terminal_only(
    rank_environment: dict[str, str], setting: dict[str, str], coloured: bool
) -> None:
    ours, theirs = pty.openpty()
    environment = {key: value for key, value in rank_environment.items() if key != "NO_COLOR"}
    process = subprocess.Popen(
        [sys.executable, "-c", QUICK + RUN],
        env={**environment, "TERM": "xterm", **setting},
        stdout=theirs,
    )
    os.close(theirs)
    seen = b""
    try:
        while data := os.read(ours, 1 << 16):
            seen += data
    except OSError:  # what Linux says at the end of a terminal
        pass
    os.close(ours)
    assert process.wait(30) == 0
    assert (b"\x1b[32mok" in seen) is coloured
    assert (b"\x1b[33mnote" in seen) is coloured
    assert b"ok " in seen


def test_an_unwritable_json_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        doctor(DoctorOptions(json_file=tmp_path / "missing" / "doctor.json"))
