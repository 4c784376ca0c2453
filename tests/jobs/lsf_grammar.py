"""The grammar of bsub and jsrun, as documented, read strictly.

After IBM's LSF 10.1 reference (bsub) and the jsrun manual page that the OLCF publishes. What these
do not know is an error here, as an unknown option is to the real programs; LSF itself this is not.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

_MINUTES = r"(?:\d+:[0-5]\d|\d+)"
_NAME = r"[A-Za-z0-9_.-]+"
_ARRAY_NAME = rf"{_NAME}(?:\[\d+-\d+\](?:%\d+)?)?"
_CONDITION = r"(?:done|ended|exit|started)\(\d+\)"
_PATH = r"[^\s]+"
_WITH_VALUE = {
    "-P": _NAME,
    "-q": _NAME,
    "-W": _MINUTES,
    "-nnodes": r"[1-9]\d*",
    "-n": r"[1-9]\d*",
    "-J": _ARRAY_NAME,
    "-o": _PATH,
    "-e": _PATH,
    "-wa": r"USR1|USR2|URG",
    "-wt": r"[1-9]\d*",
    "-Q": r"(?:[1-9]\d*)(?: [1-9]\d*)*",
    "-w": rf"{_CONDITION}(?: (?:&&|\|\|) {_CONDITION})*",
    "-csm": r"y|n",
    "-R": r".+",
    "-alloc_flags": r"(?:gpumps|gpudefault|smt[124]|nvme|maximizegpfs)"
    r"(?: (?:gpumps|gpudefault|smt[124]|nvme|maximizegpfs))*",
}
_FLAGS = {"-r", "-rn"}
_RESOURCE = re.compile(
    r"span\[ptile=\d+\]"
    r"|1\*\{select\[\(\(LN\)&&\(type==any\)\)\]order\[r15s:pg\]span\[hosts=1\]"
    r"cu\[type=rack:pref=config\]\}"
    r"\+(?P<slots>\d+)\*\{select\[\(\(CN\)&&\(type==any\)\)\]order\[r15s:pg\]"
    r"span\[ptile=(?P<ptile>\d+)\]cu\[type=rack:maxcus=(?P<racks>\d+)\]\}"
)


class GrammarError(ValueError):
    """The real program would refuse this."""


def directives(script: str) -> dict[str, str]:
    """Read the #BSUB lines of a script."""
    words: list[str] = []
    for number, line in enumerate(script.splitlines(), 1):
        if line.startswith("#BSUB"):
            if not line.isascii():
                raise GrammarError(f"line {number}: {line!r} is not ASCII")
            if not line.startswith("#BSUB "):
                raise GrammarError(f"line {number}: {line!r} has no blank after #BSUB")
            words += shlex.split(line.removeprefix("#BSUB "))
    return options(words)


def options(words: list[str]) -> dict[str, str]:
    """Read options of bsub."""
    found: dict[str, str] = {}
    position = 0
    while position < len(words):
        name = words[position]
        if name in found:
            raise GrammarError(f"{name} is there twice")
        if name in _FLAGS:
            found[name] = ""
            position += 1
            continue
        if name not in _WITH_VALUE:
            raise GrammarError(f"{name}: Bad option")
        if position + 1 == len(words):
            raise GrammarError(f"{name}: option requires an argument")
        value = words[position + 1]
        if not re.fullmatch(_WITH_VALUE[name], value):
            raise GrammarError(f"{name} {value!r}: bad value")
        found[name] = value
        position += 2
    _check_together(found)
    return found


def minutes(value: str) -> int:
    """Minutes of `-W`."""
    hours, _, rest = value.rpartition(":")
    return int(hours or 0) * 60 + int(rest)


def _check_together(found: dict[str, str]) -> None:
    if ("-wa" in found) != ("-wt" in found):
        raise GrammarError("-wa and -wt are used together")
    if "-wt" in found and int(found["-wt"]) >= minutes(found.get("-W", "0")):
        raise GrammarError("-wt is not before the end")
    if "-r" in found and "-rn" in found:
        raise GrammarError("-r and -rn exclude each other")
    if "-nnodes" in found and ("-n" in found or "-csm" in found):
        raise GrammarError("-nnodes excludes -n and -csm")
    if "-R" in found:
        match = _RESOURCE.fullmatch(found["-R"])
        if match is None:
            raise GrammarError(f"-R {found['-R']!r}: bad resource requirement")
        if match["slots"] is not None:
            if found.get("-csm") != "y" or int(found.get("-n", 0)) != int(match["slots"]) + 1:
                raise GrammarError("-n is not the launch node and the slots of -R")
            if int(match["slots"]) % int(match["ptile"]):
                raise GrammarError("the slots are no whole nodes")


@dataclass(frozen=True)
class Jsrun:
    """What a jsrun line asks for."""

    sets: int
    sets_per_host: int
    tasks: int
    cores: int
    gpus: int
    command: tuple[str, ...]

    @property
    def ranks(self) -> int:
        """Ranks in all."""
        return self.sets * self.tasks

    @property
    def ranks_per_host(self) -> int:
        """Ranks of a host."""
        return self.sets_per_host * self.tasks


def jsrun(words: list[str], *, cores: int = 42, gpus: int = 6) -> Jsrun:
    """Read the words after `jsrun`; resource sets have to fit a host."""
    patterns = {
        "-n": r"[1-9]\d*",
        "-r": r"[1-9]\d*",
        "-a": r"[1-9]\d*",
        "-c": r"[1-9]\d*",
        "-g": r"\d+",
        "-b": r"none|rs|packed:[1-9]\d*",
        "-d": r"packed|cyclic|plane:\d+",
        "-l": r"(?:cpu|gpu|memory)(?:-(?:cpu|gpu))?",
        "-E": r"[A-Za-z_]\w*(?:=.*)?",
    }
    found: dict[str, str] = {}
    rest = list(words)
    while rest and rest[0].startswith("-"):
        name = rest.pop(0)
        if re.fullmatch(r"--smpiargs=\S+", name):
            continue
        if name not in patterns or name in found:
            raise GrammarError(f"jsrun {name}: bad option")
        value = rest.pop(0) if rest else ""
        if not re.fullmatch(patterns[name], value):
            raise GrammarError(f"jsrun {name} {value!r}: bad value")
        found[name] = value
    if not rest:
        raise GrammarError("jsrun has no program")
    of_set = Jsrun(
        sets=int(found["-n"]),
        sets_per_host=int(found.get("-r", 1)),
        tasks=int(found.get("-a", 1)),
        cores=int(found.get("-c", 1)),
        gpus=int(found.get("-g", 0)),
        command=tuple(rest),
    )
    if of_set.sets_per_host * of_set.cores > cores or of_set.sets_per_host * of_set.gpus > gpus:
        raise GrammarError(f"jsrun: {of_set} does not fit a host of {cores} cores, {gpus} GPUs")
    kind, _, bound = found.get("-b", "").partition(":")
    if kind == "packed" and int(bound) * of_set.tasks > of_set.cores:
        raise GrammarError(f"jsrun: -b {found['-b']} of {of_set} binds to more than its cores")
    return of_set
