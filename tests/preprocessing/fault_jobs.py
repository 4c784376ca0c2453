"""Jobs that make record sets and meet faults: inputs, how they are run, how far they got."""

import contextlib
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import zstandard
from Bio import bgzf

from preprocessing.options import PreprocessOptions
from preprocessing.synthetic import SynthesisOptions, synthesize

HERE = Path(__file__).resolve().parent
RANK_PROGRAM = HERE / "fault_rank.py"

RECORDS = 2500
UNIT_BYTES = 150_000
MEMORY = 2**20  # about ten runs
ATTEMPT_SECONDS = 120


class Failure(AssertionError):
    """A case in which prothpc does not keep its word."""


@dataclass(frozen=True)
class Reference:
    """The undisturbed record set."""

    files: dict[str, bytes]
    operations: dict[str, int]
    """How often each kind of operation on its files happens."""
    seconds: float


class Outcome(NamedTuple):
    """How an attempt ended."""

    code: int
    struck: bool
    said: str
    seconds: float


def expect(truth: bool, *what: Any) -> None:
    """Fail unless `truth`."""
    if not truth:
        raise Failure(": ".join(map(str, what)))


class Laboratory:
    """A directory with inputs, and jobs that are run on them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.inputs = make_inputs(root)
        self.reference = lru_cache(maxsize=None)(self._reference)

    def job(self, inputs: tuple[str, ...], holdout: float, output: Path) -> dict[str, Any]:
        """Describe a job for `fault_rank.py`."""
        options = PreprocessOptions(shards=5, holdout=holdout, memory=MEMORY)
        return {
            "inputs": [str(self.inputs[name]) for name in inputs],
            "output": str(output),
            "options": asdict(options),
            "unit_bytes": UNIT_BYTES,
            "moment": None,
            "largest_file": None,
        }

    def _reference(self, inputs: tuple[str, ...], holdout: float) -> Reference:
        with scratch(self.root) as folder:
            outcome = attempt(self.job(inputs, holdout, folder / "set"), 1, folder)
            if outcome.code:
                raise RuntimeError(f"the undisturbed job fails: {outcome.said}")
            operations = {
                path.name: path.stat().st_size
                for path in (folder / "watch" / "operations").iterdir()
            }
            return Reference(content(folder / "set"), operations, outcome.seconds)


def make_inputs(root: Path) -> dict[str, Path]:
    """Write some proteins, many of them twice, in every kind of file."""
    names = ["lf.fasta", "crlf.fasta", "one.gz", "many.gz", "bgzf.gz", "zst"]
    texts = {}
    for number, name in enumerate(names):
        plain = root / "plain.fasta"
        options = SynthesisOptions(records=RECORDS, seed=number // 2, median_length=150)
        synthesize(plain, options, overwrite=True)
        texts[name] = plain.read_bytes() + b">same\nMKVLAAGIVGLLLAQWERTY"
    paths = {name: root / f"in.{name}" for name in texts}
    paths["lf.fasta"].write_bytes(texts["lf.fasta"])
    paths["crlf.fasta"].write_bytes(texts["crlf.fasta"].replace(b"\n", b"\r\n"))
    paths["one.gz"].write_bytes(gzip.compress(texts["one.gz"]))
    pieces = [texts["many.gz"][start : start + 99_999] for start in range(0, 10**6, 99_999)]
    paths["many.gz"].write_bytes(b"".join(map(gzip.compress, pieces)))
    with bgzf.BgzfWriter(str(paths["bgzf.gz"])) as file:
        file.write(texts["bgzf.gz"])
    paths["zst"].write_bytes(zstandard.compress(texts["zst"]))
    return paths


def content(directory: Path) -> dict[str, bytes]:
    """Everything in a finished record set but run.json."""
    files = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    files.pop("run.json", None)
    return files


@contextlib.contextmanager
def scratch(root: Path) -> Iterator[Path]:
    """Make a directory for a while."""
    with tempfile.TemporaryDirectory(dir=root) as folder:
        yield Path(folder)


def attempt(
    job: dict[str, Any], ranks: int, folder: Path, kill: tuple[float, int | None] | None = None
) -> Outcome:
    """Run a job.

    Args:
        job: as `Laboratory.job` makes it.
        ranks: how many.
        folder: for what is noted about the attempt.
        kill: seconds after the start, and the rank (None: all) to be killed then.
    """
    watch = folder / "watch"
    shutil.rmtree(watch, ignore_errors=True)
    (watch / "operations").mkdir(parents=True)
    (watch / "job.json").write_text(
        json.dumps(job | {"ranks": ranks, "watch": str(watch / "operations")})
    )
    launcher = ["mpirun", "--oversubscribe", "--bind-to", "none", "-n", str(ranks)]
    process = subprocess.Popen(
        [*(launcher if ranks > 1 else []), sys.executable, str(RANK_PROGRAM), watch / "job.json"],
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(HERE.parents[1]),
            "OMP_NUM_THREADS": "1",
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        if kill is not None:
            strike_in_time(process, watch, *kill)
        said, _ = process.communicate(timeout=ATTEMPT_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        raise Failure(f"{ranks} ranks hang: {said}") from None
    finally:
        wait_until_gone(rank_processes(watch))
    seconds = [float(value) for value in re.findall(r'"seconds": ([\d.]+)', said)]
    struck = (watch / "struck").exists()
    return Outcome(process.returncode, struck, said, max(seconds, default=0.0))


def rank_processes(watch: Path) -> list[int]:
    """Return the ids of an attempt's ranks."""
    return [int(path.name[4:]) for path in watch.glob("pid-*")]


def strike_in_time(
    process: subprocess.Popen[str], watch: Path, seconds: float, rank: int | None
) -> None:
    """Wait for the start and some more; then kill."""
    give_up = time.monotonic() + ATTEMPT_SECONDS
    while not (watch / "started").exists() and process.poll() is None:
        expect(time.monotonic() < give_up, "the ranks do not start")
        time.sleep(0.002)
    time.sleep(seconds)
    victims = sorted(rank_processes(watch))
    for victim in victims if rank is None else victims[rank : rank + 1]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
            (watch / "struck").touch()


def wait_until_gone(processes: list[int]) -> None:
    """Wait until no rank is left that could write to the output."""
    give_up = time.monotonic() + ATTEMPT_SECONDS
    while any(is_alive(process) for process in processes):
        expect(time.monotonic() < give_up, "a rank outlives its job")
        time.sleep(0.01)


def is_alive(process: int) -> bool:
    """Tell whether a process is there and no zombie."""
    try:
        return ") Z" not in Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False


def phase(output: Path) -> str:
    """Say how far a job came."""
    if (output / "manifest.json").exists():
        return "clean-up" if (output / ".work").exists() else "end"
    if any(output.glob("*.arrow")):
        return "reduce"
    return "map" if any(output.glob(".work/run-*")) else "start"
