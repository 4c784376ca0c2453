"""Stand-ins for bsub, bjobs, bkill, brequeue, jsrun and mpirun. THIS IS NOT LSF.

They read what `lsf_grammar` knows, run scripts on this machine with the variables that LSF sets,
and keep their notes in `$LSF_STAND_IN`. A minute lasts `$LSF_STAND_IN_MINUTE` seconds.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from lsf_grammar import GrammarError, directives, jsrun, minutes, options

HOME = Path(os.environ["LSF_STAND_IN"])
MINUTE = float(os.environ.get("LSF_STAND_IN_MINUTE", "60"))
SLOTS = 42


def install(folder: Path) -> None:
    """Put the stand-ins into a directory for PATH."""
    folder.mkdir(parents=True)
    for name in ("bsub", "bjobs", "bkill", "brequeue", "jsrun", "mpirun"):
        program = folder / name
        program.write_text(f'#!/bin/bash\nexec {sys.executable} {__file__} {name} "$@"\n')
        program.chmod(0o755)


def note(job: int) -> Path:
    return HOME / f"{job}.json"


def read(job: int) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(note(job).read_text())
    return content


def write(job: int, **changes: Any) -> None:
    content = {**(read(job) if note(job).exists() else {}), **changes}
    part = note(job).with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(content))
    part.replace(note(job))


def bsub(words: list[str]) -> None:
    given = options(words[:2] if words[:1] == ["-w"] else [])
    rest = words[2:] if given else words
    script = Path(rest[0]).read_text() if rest else sys.stdin.read()
    asked = {**directives(script), **given}
    queue = asked.get("-q", "normal")
    job = 1 + max([0, *(int(path.stem) for path in HOME.glob("*.json"))])
    write(job, asked=asked, script=script, state="PEND", cwd=os.getcwd())
    print(f"Job <{job}> is submitted to queue <{queue}>.")
    sys.stdout.flush()
    if os.fork() == 0:
        os.setsid()
        log = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(log, descriptor)
        dispatch(job)
    os._exit(0)


def dispatch(job: int) -> None:
    """Wait for the dependency, run the job, and again where its exit code asks for that."""
    asked = read(job)["asked"]
    while not met(asked.get("-w", "")):
        if read(job)["state"] == "EXIT":
            os._exit(0)
        time.sleep(0.05)
    array = re.search(r"\[(\d+)-(\d+)\]", asked["-J"])
    tasks = range(int(array[1]), int(array[2]) + 1) if array else [0]
    worst, restarts, code = 0, 0, 1
    for task in tasks:
        while read(job)["state"] != "EXIT":
            code = run(job, task, restarts)
            if read(job)["state"] == "EXIT" or str(code) not in asked.get("-Q", "").split():
                break
            restarts += 1
        worst = worst or code
    write(job, state="EXIT" if worst else "DONE")
    os._exit(0)


def met(condition: str) -> bool:
    for kind, number in re.findall(r"(\w+)\((\d+)\)", condition):
        state = read(int(number))["state"]
        wanted = {"done": ["DONE"], "exit": ["EXIT"], "ended": ["DONE", "EXIT"]}
        if state not in wanted[kind]:
            return False
    return True


def run(job: int, task: int, restarts: int) -> int:
    content = read(job)
    asked = content["asked"]
    nodes = int(asked.get("-nnodes", 0)) or max(1, int(asked.get("-n", 1)) // SLOTS)
    names = [f"a26n{number:02d}" for number in range(1, nodes + 1)]
    hosts = HOME / f"{job}.hosts"
    hosts.write_text(
        "".join(f"{name}\n" for name in ["batch1", *(n for n in names for _ in range(SLOTS))])
    )
    script = HOME / f"{job}.sh"
    script.write_text(content["script"])
    log = asked["-o"].replace("%J", str(job)).replace("%I", str(task))
    environment = {
        **os.environ,
        "LSB_JOBID": str(job),
        "LSB_JOBINDEX": str(task),
        "LSB_JOBNAME": asked["-J"],
        "LSB_QUEUE": asked.get("-q", "normal"),
        "LSB_PROJECT_NAME": asked.get("-P", "default"),
        "LSB_MCPU_HOSTS": " ".join(["batch1 1", *(f"{name} {SLOTS}" for name in names)]),
        "LSB_DJOB_HOSTFILE": str(hosts),
        "LSB_DJOB_RANKFILE": str(hosts),
        "LSB_DJOB_NUMPROC": str(1 + SLOTS * nodes),
        "LS_SUBCWD": content["cwd"],
        **({"LSB_RESTART": "Y"} if restarts else {}),
    }
    with open(log, "a") as output:
        process = subprocess.Popen(
            ["bash", script],
            cwd=content["cwd"],
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        write(job, state="RUN", pid=process.pid)
        if "-wt" in asked:
            before = (minutes(asked["-W"]) - int(asked["-wt"])) * MINUTE
            try:
                return process.wait(timeout=before)
            except subprocess.TimeoutExpired:
                os.kill(process.pid, signal.Signals[f"SIG{asked['-wa']}"])
        return process.wait()


def bjobs(words: list[str]) -> None:
    assert words[:4] == ["-o", "JOBID STAT EXIT_REASON", "-json", "-a"]
    records = [
        {"JOBID": job, "STAT": read(int(job))["state"], "EXIT_REASON": ""} for job in words[4:]
    ]
    print(json.dumps({"COMMAND": "bjobs", "JOBS": len(records), "RECORDS": records}))


def bkill(words: list[str]) -> None:
    for job in words:
        content = read(int(job))
        write(int(job), state="EXIT")
        if content["state"] == "RUN":
            os.kill(content["pid"], signal.SIGTERM)
        print(f"Job <{job}> is being terminated")


def brequeue(words: list[str]) -> None:
    for job in words:
        os.kill(read(int(job))["pid"], signal.SIGKILL)
        print(f"Job <{job}> is being requeued")


_RANK = """
export JSM_NAMESPACE_RANK=$OMPI_COMM_WORLD_RANK JSM_NAMESPACE_SIZE=$OMPI_COMM_WORLD_SIZE
export JSM_NAMESPACE_LOCAL_RANK=$((OMPI_COMM_WORLD_RANK % $1)) JSM_NAMESPACE_LOCAL_SIZE=$1
export OMPI_COMM_WORLD_LOCAL_RANK=$JSM_NAMESPACE_LOCAL_RANK OMPI_COMM_WORLD_LOCAL_SIZE=$1
shift
exec "$@"
"""


def under_mpirun(ranks: int, command: list[str]) -> None:
    """Become the real mpirun, further down on PATH."""
    mine = os.environ["LSF_STAND_IN_PROGRAMS"]
    os.environ["PATH"] = os.pathsep.join(
        folder for folder in os.environ["PATH"].split(os.pathsep) if folder != mine
    )
    words = ["mpirun", "--oversubscribe", "--bind-to", "none", "-n", str(ranks), *command]
    os.execvp("mpirun", words)


def main(name: str, words: list[str]) -> None:
    if name == "jsrun":
        asked = jsrun(words)
        rank = ["bash", "-c", _RANK, "rank", str(asked.ranks_per_host), *asked.command]
        under_mpirun(asked.ranks, rank)
    elif name == "mpirun":
        assert words[0] == "-n"
        assert re.fullmatch(r"ppr:\d+:node(:PE=\d+)?", words[3])
        under_mpirun(int(words[1]), words[4:])
    else:
        {"bsub": bsub, "bjobs": bjobs, "bkill": bkill, "brequeue": brequeue}[name](words)


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2:])
    except GrammarError as error:
        sys.exit(f"{error}. Job not submitted.")
