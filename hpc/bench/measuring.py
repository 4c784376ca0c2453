"""Measuring commands: each one a process of its own, its time, CPU time and memory; results kept.

Samples are added to a JSON file after each measurement, so that a benchmark can be made in portions
and nothing is lost when it is cut short. A file belongs to one machine, a part of it to one commit.
"""

import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from preprocessing.errors import InputError
from preprocessing.files import write_whole

_ROOT = Path(__file__).resolve().parents[2]
_POLL_SECONDS = 0.01
_BLOCK_BYTES = 512  # of st_blocks, whatever the file system's blocks are


@dataclass(frozen=True, kw_only=True)
class Case:
    """A command to be measured."""

    part: str
    name: str
    command: Sequence[str | Path]
    bytes: int = 0
    """Of FASTA text that it works on."""
    makes: Path | None = None
    """What it writes: must not be there, and is removed afterwards."""
    keeps: bool = False
    """What it writes stays for cases after it."""
    reports: bool = False
    """It times itself and prints JSON with `seconds`; start-up is left out."""
    watch_memory: bool = False
    """Sample its anonymous memory while it runs."""
    environment: dict[str, str] = field(default_factory=dict)


class Results:
    """The JSON file of a benchmark.

    Args:
        path: where it is, or will be.
        about: what has to be equal for samples to be comparable.
        commit: what is measured; has to be equal for the samples of a part.

    Raises:
        InputError: if the file holds results of something else.
    """

    def __init__(self, path: Path, about: dict[str, Any], commit: str) -> None:
        self._path, self._commit = path, commit
        self.content: dict[str, Any] = {**about, "commands": [], "samples": []}
        if path.exists():
            self.content = read_results(path)
            for name, value in about.items():
                if self.content.get(name) != value:
                    raise InputError(
                        f"{path}: holds results with another {name} ({self.content.get(name)}; now "
                        f"{value}): choose another --output"
                    )
        command = " ".join(["prothpc", *sys.argv[1:]])
        if command not in self.content["commands"]:
            self.content["commands"].append(command)

    def note(self, name: str, value: Any) -> None:
        """Keep a fact that is no sample."""
        self.content[name] = value

    def check_part(self, part: str) -> None:
        """See that a part can be added to.

        Raises:
            InputError: if it was measured at another commit.
        """
        for sample in self.content["samples"]:
            if sample["part"] == part and sample["commit"] != self._commit:
                raise InputError(
                    f"{self._path}: its part {part} was measured at commit {sample['commit']}, "
                    f"this is {self._commit}: choose another --output"
                )

    def add(self, case: Case, sample: dict[str, Any]) -> None:
        """Add a sample and write the file."""
        about = {"part": case.part, "case": case.name, "bytes": case.bytes, "commit": self._commit}
        self.content["samples"].append(about | sample)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._path, (json.dumps(self.content, indent=1) + "\n").encode())


def read_results(path: Path) -> dict[str, Any]:
    """Return the content of a results file.

    Raises:
        InputError: if it is none.
    """
    try:
        content = json.loads(path.read_bytes())
        content["samples"], content["commands"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a file of 'prothpc bench' ({error})") from error
    return content


def measure(case: Case) -> dict[str, Any]:
    """Run a case once.

    Raises:
        InputError: if it fails; with the end of what it said.
    """
    if case.makes is not None:
        remove(case.makes)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    process = subprocess.Popen(
        list(map(str, case.command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment(), **case.environment},
    )
    try:
        peak = _watch(process) if case.watch_memory else None
        output, errors = process.communicate()
    except BaseException:  # a job of many processes is not left behind
        process.terminate()
        process.wait()
        raise
    seconds = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        end = "\n".join(errors.splitlines()[-8:])
        raise InputError(
            f"{case.part}, {case.name}: failed with code {process.returncode}: "
            f"{' '.join(map(str, case.command))}\n{end}"
        )
    sample: dict[str, Any] = {
        "seconds": seconds,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    }
    if peak is not None:
        sample["peak_anonymous"] = peak
    if case.makes is not None:
        sample["written"] = size_of(case.makes)
        if not case.keeps:
            remove(case.makes)
    if case.reports:
        sample |= {"whole_seconds": seconds} | json.loads(output.splitlines()[-1])
    return {name: round(v, 4) if isinstance(v, float) else v for name, v in sample.items()}


def run_rounds(cases: Sequence[Case], results: Results, rounds: int) -> None:
    """Measure every case once a round; neighbours change places from round to round."""
    for number in range(rounds):
        for case in cases if number % 2 == 0 else reversed(cases):
            sample = measure(case)
            results.add(case, sample)
            print(
                f"round {number + 1}/{rounds}  {case.part:12} {case.name:28} "
                f"{sample['seconds']:8.2f} s",
                flush=True,
            )


def median(samples: Iterable[dict[str, Any]], what: str = "seconds") -> float | None:
    """Return the median of one figure, or None if there are no samples."""
    values = [sample[what] for sample in samples if what in sample]
    return statistics.median(values) if values else None


def describe_machine() -> dict[str, Any]:
    """Return what figures depend on: processor, cores, memory, system."""
    cpus = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in cpus if line.startswith("model name")]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(pages / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def describe_versions(packages: Sequence[str], site: Path | None = None) -> dict[str, str]:
    """Return the installed versions of packages, those in `site` first."""
    from importlib.metadata import distributions

    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if site is not None:
        for one in distributions(path=[str(site)]):
            if one.name.lower() in packages:
                found[one.name.lower()] = one.version
    return found


def describe_commit() -> str:
    """Return the commit that is measured, marked if files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(_ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=9", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def environment() -> dict[str, str]:
    """Return the environment of measured processes: one thread each, this prothpc."""
    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def remove(path: Path) -> None:
    """Delete a file or directory, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def size_of(path: Path) -> int:
    """Return the bytes that a file, or all files under a directory, take; holes take none."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_blocks for file in files) * _BLOCK_BYTES


def _watch(process: subprocess.Popen[str]) -> int:
    """Return the peak of a process's anonymous memory, in bytes."""
    peak, status = 0, Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        try:
            for line in status.read_text().splitlines():
                if line.startswith("RssAnon:"):
                    peak = max(peak, int(line.split()[1]) * 1024)
        except OSError:
            break
        time.sleep(_POLL_SECONDS)
    return peak
