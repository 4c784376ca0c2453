"""Faults while records are made: the same command then gives the same bytes, or names the damage.

`python faults.py` runs cases of three kinds, each decided by its seed alone (but for what the
machine's timing decides):

- `kill`: SIGKILL to a random rank, or to all, at a random time or just before a random operation
  on a file of the output directory; up to three times, on other numbers of ranks each time;
- `fill`: the disk (a small tmpfs) is full from a random operation on;
- `damage`: a file that a killed job left is cut short, or a bit of it is flipped.

`python faults.py --case kill-7` repeats one case.
"""

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from fault_jobs import (
    MEMORY,
    UNIT_BYTES,
    Failure,
    Laboratory,
    Reference,
    attempt,
    content,
    expect,
    phase,
    scratch,
)

from preprocessing.errors import InputError
from preprocessing.generate import generate
from preprocessing.options import PreprocessOptions
from preprocessing.records import RecordSet
from preprocessing.verify import verify

MOST_KILLS = 3
MOST_FAILURES = 10
TMPFS_BYTES = 48 * 2**20


def check_result(output: Path, reference: Reference) -> None:
    """Fail unless a record set is whole, is the undisturbed one, and nothing else is there."""
    expect(not (output / ".work").exists(), ".work is still there")
    made = content(output)
    expect(made.keys() == reference.files.keys(), "other files", sorted(made))
    different = [name for name, value in made.items() if value != reference.files[name]]
    expect(not different, "other bytes", different)
    verify(output)


def check_stopped(output: Path, reference: Reference) -> None:
    """Fail if an unfinished record set can be taken for a finished one."""
    if (output / "manifest.json").exists():
        made = content(output)
        expect(made == reference.files, "there is a manifest, but other bytes")
        return
    try:
        RecordSet(output)
    except InputError:
        return
    raise Failure("an unfinished record set can be read")


def draw_job(case: random.Random, inputs: dict[str, Path]) -> tuple[tuple[str, ...], float]:
    """Choose the inputs and whether there is a hold-out."""
    names = tuple(sorted(case.sample(sorted(inputs), case.randint(1, 3))))
    return names, case.choice([0.0, 0.15])


def draw_operation(case: random.Random, reference: Reference) -> tuple[str, int]:
    """Choose a kind of operation, and one among those of the kind."""
    operation = case.choice(sorted(reference.operations))
    return operation, case.randint(1, reference.operations[operation])


def kill_case(laboratory: Laboratory, seed: int) -> list[str]:
    """Kill a job a few times and let it end; return the phases in which it was killed."""
    case = random.Random(f"kill-{seed}")
    inputs, holdout = draw_job(case, laboratory.inputs)
    reference = laboratory.reference(inputs, holdout)
    told, phases = [f"{'+'.join(inputs)}, hold-out {holdout}"], []
    with scratch(laboratory.root) as folder:
        output = folder / "set"
        for _ in range(case.randint(1, MOST_KILLS)):
            ranks, whom = case.randint(1, 4), case.choice(["one", "all"])
            job, kill = laboratory.job(inputs, holdout, output), None
            if case.random() < 0.6:
                operation, number = draw_operation(case, reference)
                job["moment"] = [operation, number, f"kill {whom}"]
                when = f"before {operation} no. {number}"
            else:
                seconds = case.uniform(0, 1.1 * reference.seconds)
                kill = (seconds, None if whom == "all" else case.randrange(ranks))
                when = f"after {seconds:.3f} s"
            outcome = attempt(job, ranks, folder, kill)
            if not outcome.struck:
                expect(outcome.code == 0, "fails without a fault", outcome.said)
                continue
            if not output.exists():
                phases.append("start")
            else:
                phases.append(phase(output))
                check_stopped(output, reference)
            told.append(f"{whom} of {ranks} killed {when} ({phases[-1]})")
        ranks = case.randint(1, 4)
        outcome = attempt(laboratory.job(inputs, holdout, output), ranks, folder)
        expect(outcome.code == 0, "; ".join(told), "the same command fails", outcome.said)
        check_result(output, reference)
    print(f"kill-{seed}: {'; '.join(told)}; ended by {ranks}: same bytes", flush=True)
    return phases


def fill_case(laboratory: Laboratory, seed: int) -> list[str]:
    """Fill the disk under a job, make room, and let it end."""
    case = random.Random(f"fill-{seed}")
    inputs, holdout = draw_job(case, laboratory.inputs)
    reference = laboratory.reference(inputs, holdout)
    disk = os.environ.get("FAULTS_TMPFS")
    with scratch(laboratory.root) as folder:
        home = Path(disk) if disk else folder
        shutil.rmtree(home / "set", ignore_errors=True)  # of a case that failed
        job = laboratory.job(inputs, holdout, home / "set")
        ranks = case.randint(1, 3)
        if disk:
            operation, number = draw_operation(case, reference)
            job["moment"] = [operation, number, f"fill {case.randrange(2**18)}"]
            when = f"disk full from {operation} no. {number} on"
            reason = "No space left on device"
        else:
            job["largest_file"] = case.randrange(100, 10**5)
            when = f"files limited to {job['largest_file']:,} bytes"
            reason = "File too large"
        outcome = attempt(job, ranks, folder)
        (home / "ballast").unlink(missing_ok=True)
        if outcome.code:
            lines = re.findall(r'{"refused": (".*")}', outcome.said)
            expect(len(lines) == ranks, when, "not all ranks refuse", outcome.said)
            for line in lines:
                expect(reason in line and "set" in line, when, "the message", line)
            check_stopped(home / "set", reference)
        job = laboratory.job(inputs, holdout, home / "set")
        again = attempt(job, case.randint(1, 3), folder)
        expect(again.code == 0, when, "the same command fails", again.said)
        check_result(home / "set", reference)
    result = "refused, then" if outcome.code else "had room enough:"
    print(
        f"fill-{seed}: {'+'.join(inputs)}, {ranks} ranks, {when}: {result} same bytes", flush=True
    )
    return ["refused" if outcome.code else "room enough"]


STOPS = (("rename run-N.run", 2), ("rename shard-N.json", 1), ("rename shard-N.arrow", 4))
"""Operations before which a job is killed that leaves files to be damaged."""

MAY_BE_REFUSED = ("plan.json", "indexed.json", "run-")
"""Files of an unfinished job that may be named as corrupt, where others are made anew at once."""


def damage_case(laboratory: Laboratory, seed: int) -> list[str]:
    """Damage a file that a killed job left; run the job again, as often as it asks for."""
    case = random.Random(f"damage-{seed}")
    inputs, holdout = ("crlf.fasta", "one.gz"), case.choice([0.0, 0.15])
    reference = laboratory.reference(inputs, holdout)
    with scratch(laboratory.root) as folder:
        output = folder / "set"
        shutil.copytree(stopped_job(laboratory, inputs, holdout, case.choice(STOPS)), output)
        kinds = sorted({re.sub(r"\d+", "N", path.name) for path in files_of(output)} - {"lock"})
        weights = [4 if kind.endswith((".run", ".arrow")) else 1 for kind in kinds]
        [kind] = case.choices(kinds, weights)
        path = case.choice(
            [path for path in files_of(output) if re.sub(r"\d+", "N", path.name) == kind]
        )
        what = damage(path, case)
        told = f"damage-{seed}: hold-out {holdout}: {path.relative_to(output)} {what}"
        options = PreprocessOptions(shards=5, holdout=holdout, memory=MEMORY)
        paths = [laboratory.inputs[name] for name in inputs]
        result = "made anew"
        try:
            generate(paths, output, options, unit_bytes=UNIT_BYTES)
        except InputError as error:
            result = "named"
            expect(path.name in str(error), told, "names something else", error)
            expect(path.name.startswith(MAY_BE_REFUSED), told, "should be made anew", error)
            if path.name in ("plan.json", "indexed.json"):
                shutil.rmtree(output)  # as the message says
            generate(paths, output, options, unit_bytes=UNIT_BYTES)
        except Exception as error:
            raise Failure(f"{told}: {error!r}") from error
        try:
            check_result(output, reference)
        except (Failure, InputError) as error:
            raise Failure(f"{told}: {error}") from error
    print(f"{told}: {result}", flush=True)
    return [f"{kind} {result}"]


def stopped_job(
    laboratory: Laboratory, inputs: tuple[str, ...], holdout: float, stop: tuple[str, int]
) -> Path:
    """Return the directory of a killed job; made once."""
    folder = laboratory.root / f"stopped-{holdout}-{stop}"
    if not folder.exists():
        folder.mkdir()
        job = laboratory.job(inputs, holdout, folder / "set")
        job["moment"] = [*stop, "kill one"]
        expect(attempt(job, 1, folder).struck, "the job was not stopped")
    return folder / "set"


def files_of(output: Path) -> list[Path]:
    return sorted(path for path in output.rglob("*") if path.is_file())


def damage(path: Path, case: random.Random) -> str:
    """Cut a file short or flip a bit in it; return what was done."""
    data = bytearray(path.read_bytes())
    if case.random() < 0.25 or not data:
        length = case.randrange(len(data) + 1)
        path.write_bytes(data[:length])
        return f"cut to {length:,} of {len(data):,} bytes"
    # An Arrow file begins and ends with what it says about the data between.
    first, last = case.choice([(0, len(data)), (0, 4000), (len(data) - 4000, len(data))])
    place = case.randrange(max(first, 0), min(last, len(data)))
    bit = case.randrange(8)
    data[place] ^= 1 << bit
    path.write_bytes(data)
    return f"bit {bit} of byte {place:,} of {len(data):,} flipped"


CASES = {"kill": kill_case, "fill": fill_case, "damage": damage_case}


def run(kind: str, seeds: Iterator[int], enough: int, root: Path) -> int:
    """Run cases until there were enough faults; return how many cases failed."""
    laboratory, tally, failed = Laboratory(root), Counter[str](), 0
    begin = time.monotonic()
    while tally.total() < enough and failed < MOST_FAILURES:
        seed = next(seeds, None)
        if seed is None:
            break
        try:
            tally.update(CASES[kind](laboratory, seed))
        except (Failure, InputError) as failure:
            failed += 1
            tally["FAILED"] += 1
            print(f"{kind}-{seed}: FAILED: {failure}", flush=True)
            print(f"  repeat with: --case {kind}-{seed}", flush=True)
    counts = ", ".join(f"{count} {name}" for name, count in sorted(tally.items()))
    print(f"{kind}: {counts}; {time.monotonic() - begin:.0f} s\n", flush=True)
    return failed


def run_on_small_disk(arguments: list[str]) -> int | None:
    """Run this program where FAULTS_TMPFS is a small disk; None if that cannot be had."""
    mount = 'mount -t tmpfs -o size="$0" tmpfs "$FAULTS_TMPFS" && exec "$@"'
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "FAULTS_TMPFS": folder}
        for unshare in (["unshare", "--mount"], ["unshare", "--mount", "--map-root-user"]):
            shell = [*unshare, "sh", "-c", mount, str(TMPFS_BYTES)]
            probe = subprocess.run([*shell, "true"], env=environment, capture_output=True)
            if probe.returncode == 0:
                return subprocess.run(
                    [*shell, sys.executable, __file__, *arguments], env=environment
                ).returncode
    print("NO SMALL DISK CAN BE MOUNTED: limits on file sizes stand in for it", flush=True)
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description="Faults while a record set is made.")
    parser.add_argument("--seed", type=int, help="of the first case [default: random]")
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--fills", type=int, default=10)
    parser.add_argument("--damages", type=int, default=200)
    parser.add_argument("--directory", type=Path, help="for files [default: a temporary one]")
    parser.add_argument("--case", help="repeat one case, e.g. kill-7")
    options = parser.parse_args()
    first = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    plans = {"kill": options.kills, "damage": options.damages, "fill": options.fills}
    seeds = {kind: iter(range(first, 10**9)) for kind in plans}
    if options.case:
        kind, _, seed = options.case.partition("-")
        plans, seeds = {kind: 1}, {kind: iter([int(seed)])}
    else:
        print(f"cases from {first} on: repeat all with --seed {first}\n", flush=True)
    failed = 0
    for kind, enough in plans.items():
        if not enough:
            continue
        if kind == "fill" and "FAULTS_TMPFS" not in os.environ:
            same = ["--case", options.case] if options.case else [
                "--seed", str(first), "--kills", "0", "--damages", "0", "--fills", str(enough)
            ]  # fmt: skip
            if options.directory:
                same += ["--directory", str(options.directory)]
            code = run_on_small_disk(same)
            if code is not None:
                failed += code != 0
                continue
        with scratch(options.directory or Path(tempfile.gettempdir())) as root:
            failed += run(kind, seeds[kind], enough, root)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
