"""LSF scripts: each obeys the documented grammar, and runs to its end under stand-ins.

The stand-ins are not LSF: they show that the scripts do what they should where bsub, jsrun and
their variables are as documented.
"""

import contextlib
import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cases import every_combination, request, text_of, variants
from lsf_grammar import GrammarError, directives, jsrun, options

from hpc.metrics import read_metrics
from jobs.render import render

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LSF = {
    name: case
    for name, case in {**every_combination(), **variants()}.items()
    if case.profile.site.scheduler == "lsf"
}


def jsrun_lines(script: str) -> list[list[str]]:
    """The words after each jsrun of a script."""
    lines = [line for line in script.splitlines() if re.search(r"(^|run )jsrun ", line.strip())]
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        found.append(words[words.index("jsrun") + 1 :])
    return found


@pytest.mark.parametrize("name", LSF)
def test_every_script_obeys_the_grammar(name: str) -> None:
    script, case = text_of(LSF[name]), LSF[name]
    asked = directives(script)
    assert asked["-W"] == ("24:00" if "936" in name else "2:00")
    assert ("-w" in asked) is False
    assert ("-P" in asked) == (case.profile.name == "summit")
    lines = jsrun_lines(script)
    assert bool(lines) == (case.profile.name == "summit")
    for words in lines:
        of_sets = jsrun(words)
        on_all = of_sets.ranks == case.ranks
        once = of_sets.ranks == case.nodes
        assert on_all or once, words


def test_936_nodes_are_5616_ranks_in_52_whole_racks() -> None:
    script = text_of(LSF["summit-train-936-racks"])
    assert directives(script)["-n"] == "39313"
    assert "maxcus=52]" in directives(script)["-R"]
    assert {jsrun(words).ranks for words in jsrun_lines(script)} == {5616}
    assert "PROTHPC_RANKS=5616 run jsrun -n 936 -r 1 -g 6 -a 6 -c 42 -b packed:7" in script


@pytest.mark.parametrize(
    "line",
    [
        "#BSUB -W 02:00:00",
        "#BSUB -W 2:00 -W 3:00",
        "#BSUB \u2013nnodes 2",
        "#BSUB -wa USR2",
        "#BSUB -alloc_flags gpumps,nvme",
        "#BSUB -Q 85,86",
        "#BSUB -x",
        "#BSUB -J",
        '#BSUB -R "span[hosts=1"',
        "#BSUB -wa USR2 -wt 5 -W 0:05",
    ],
)
def test_the_checker_is_strict(line: str) -> None:
    with pytest.raises(GrammarError):
        directives(line)


def test_the_checker_knows_what_fits_a_host() -> None:
    for words in ("-n 2 -r 2 -g 6 prog", "-n 1 -c 43 prog", "-n 1 -a 6 -c 42 -b packed:8 prog"):
        with pytest.raises(GrammarError):
            jsrun(words.split())
    with pytest.raises(GrammarError):
        options(["-w", "done(1), exit(2)"])


class StandIns:
    """Programs named bsub, jsrun and so on, in front on PATH."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.home = folder / "lsf"
        self.home.mkdir()
        programs = folder / "programs"
        self.environment = {
            **environment,
            "LSF_STAND_IN": str(self.home),
            "LSF_STAND_IN_PROGRAMS": str(programs),
            "USER": "someone",
        }
        code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import lsf_programs as p, pathlib; "
        code += f"p.install(pathlib.Path({str(programs)!r}))"
        subprocess.run([sys.executable, "-c", code], env=self.environment, check=True)
        self.own = folder / "own"
        self.own.mkdir()
        self.environment["PATH"] = f"{programs}:{self.own}:{environment['PATH']}"

    def run(self, *words: object, stdin: str | None = None) -> str:
        done = subprocess.run(
            [str(word) for word in words],
            cwd=self.folder,
            env=self.environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def program(self, text: str) -> None:
        """Put another prothpc in front."""
        path = self.own / "prothpc"
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)

    def wait(self, job: str, state: str) -> None:
        deadline = time.monotonic() + 100
        while f'"STAT": "{state}"' not in (
            shown := self.run("bjobs", "-o", "JOBID STAT EXIT_REASON", "-json", "-a", job)
        ):
            logs = [path.read_text() for path in self.folder.rglob("*.log")]
            assert time.monotonic() < deadline, f"{shown}\n{logs}"
            time.sleep(0.1)


@pytest.fixture
def lsf(tmp_path: Path, rank_environment: dict[str, str]) -> Iterator[StandIns]:
    stand_ins = StandIns(tmp_path, rank_environment)
    yield stand_ins
    for note in stand_ins.home.glob("*.json"):
        content = json.loads(note.read_text())
        if content["state"] in ("RUN", "PEND"):
            note.write_text(json.dumps({**content, "state": "EXIT"}))
            with contextlib.suppress(ProcessLookupError):
                if "pid" in content:
                    os.killpg(content["pid"], signal.SIGKILL)


NOTE_RANKS = """
echo "$JSM_NAMESPACE_RANK of $JSM_NAMESPACE_SIZE, $PROTHPC_RANKS wanted: $*" >> "$PWD/ranks"
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LSF if "936" not in name])
def test_every_script_runs_to_its_end(lsf: StandIns, name: str) -> None:
    """With a prothpc that only notes how it was started."""
    lsf.program(NOTE_RANKS)
    changes: dict[str, Any] = {"working_directory": lsf.folder}
    case = LSF[name]
    if case.tasks:
        changes["ranks_per_node"] = 1
    if case.environment is not None:
        (lsf.folder / "env" / "bin").mkdir(parents=True)
        subprocess.run(["tar", "-cf", "env.tar", "env"], cwd=lsf.folder, check=True)
        changes["environment"] = lsf.folder / "env.tar"
    case = dataclasses.replace(case, **changes)
    job_dir = lsf.folder / "batch"
    job_dir.mkdir()
    script = render(case, job_dir).replace("/mnt/bb/$USER", str(lsf.folder / "nvme"))
    script = re.sub(r"export PATH=\S+/bin:\$PATH", "", script)
    (job_dir / "job.sh").write_text(script)
    if case.profile.site.submit.stdin:
        answer = lsf.run("bsub", stdin=script)
    else:
        answer = lsf.run("bsub", job_dir / "job.sh")
    match = re.fullmatch(r"Job <(\d+)> is submitted to queue <\w+>\.\n", answer)
    assert match is not None
    lsf.wait(match[1], "DONE")
    (log,) = job_dir.glob("*.log") if not case.tasks else [next(iter(job_dir.glob("*_10.log")))]
    assert "finished" in log.read_text()
    lines = (lsf.folder / "ranks").read_text().splitlines()
    stage = [line for line in lines if f": {case.stage.name} " in line]
    assert len(stage) == case.ranks * max(1, case.tasks)
    if case.profile.name == "summit":
        numbers = {int(line.split()[0]) for line in stage}
        assert numbers == set(range(case.ranks))
        assert all(f"of {case.ranks}, {case.ranks} wanted" in line for line in stage)


WANTS_TO_GO_ON = """
[[ $1 == train ]] || exit 0
trap 'exit 85' USR2
mkdir -p runs/a/checkpoints
count=$(find runs/a/checkpoints -name 'step-*' | wc -l)
((count < 2)) || exit 0
[[ $JSM_NAMESPACE_RANK != 0 ]] || touch "runs/a/checkpoints/step-$count"
sleep 60 &
wait $!
"""


@pytest.mark.slow
@pytest.mark.parametrize("chain", [1, 4])
def test_the_warning_signal_requeues_or_starts_the_successor(lsf: StandIns, chain: int) -> None:
    """-wa and -wt, then -Q 85, or the job that waits for this one's failure."""
    lsf.program(WANTS_TO_GO_ON)
    lsf.environment["LSF_STAND_IN_MINUTE"] = "0.5"
    case = request(
        *("summit", "train"),
        nodes=1,
        seconds=600,
        ranks_per_node=2,
        chain=chain,
        preflight=False,
        working_directory=lsf.folder,
    )
    job_dir = lsf.folder / "batch"
    job_dir.mkdir()
    script = re.sub(r"export PATH=\S+/bin:\$PATH", "", render(case, job_dir))
    (job_dir / "job.sh").write_text(script)
    lsf.run("bsub", job_dir / "job.sh")
    last = "3" if chain > 1 else "1"
    deadline = time.monotonic() + 60
    while not (lsf.home / f"{last}.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    lsf.wait(last, "DONE")
    text = "".join(path.read_text() for path in sorted(job_dir.glob("*.log")))
    assert text.count("the warning signal") == 2
    assert re.findall(r"attempt (\d)", text) == ["1", "2", "3"]
    if chain > 1:
        assert "link 3 of 4; job 4 would go on" in text
        lsf.wait("4", "EXIT")
        assert not (job_dir / "4.log").exists(), "the third job has cancelled its successor"


@pytest.mark.slow
def test_training_runs_as_on_summit_from_submission_to_end(
    lsf: StandIns, recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real prothpc under a jsrun that sets what the real one sets."""
    words = ("train", recipe_file, "train.run_dir=run", "train.stop_at_step=3")
    python = (sys.executable, "-m", "hpc.cli")
    printed = lsf.run(
        *(*python, "submit", *words, "--site", "summit", "--project", "ABC123", "--nodes", "1"),
        *("--time", "00:10:00", "--ranks-per-node", "2", "--no-preflight"),
    )
    match = re.match(r"job (\d+): prothpc train on summit, 1 node with 2 ranks each", printed)
    assert match is not None, printed
    lsf.wait(match[1], "DONE")
    log = (lsf.folder / "run" / "batch" / "0001-train" / f"{match[1]}.log").read_text()
    assert "on 2 ranks (jsrun, cpu" in log
    assert read_metrics(lsf.folder / "run")[-1]["step"] == 3
    shown = lsf.run(*python, "jobs", "run")
    assert f"job {match[1]}: completed; finished (exit code 0)" in shown
    assert os.environ.get("LSB_JOBID") is None
