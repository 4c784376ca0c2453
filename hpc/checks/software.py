"""Checks of software: versions, engines, and the programs that search for similar proteins."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from importlib import metadata
from typing import Any

from hpc.checks.child import describe
from hpc.checks.findings import Check, Finding, Measured, Situation, group, places, where
from hpc.checks.programs import ask, version_in

_NEEDED = ("torch", "numpy", "pyarrow")
_SHOWN = ("prothpc", *_NEEDED, "mpi4py", "deepspeed", "horovod", "apex")

# Imported in processes of their own: a broken build may crash, and each changes torch.
_PROBES = {
    "deepspeed": "import deepspeed; print(json.dumps(deepspeed.__version__))",
    "horovod": (
        "import horovod, horovod.torch as hvd; built = {'MPI': hvd.mpi_built(), "
        "'gloo': hvd.gloo_built(), 'NCCL': bool(hvd.nccl_built())}; print(json.dumps("
        "horovod.__version__ + ' with ' + ', '.join(name for name in built if built[name])))"
    ),
    "apex": "from apex.optimizers import FusedLAMB; print(json.dumps('fused optimisers'))",
}
_INSTALL = {
    "deepspeed": "pip install deepspeed==0.19.8",
    "horovod": "make horovod",
}
_NO_APEX = "not installed, torch's own kernels do its work; conda-forge has it as nvidia-apex"


def _measure_versions(situation: Situation) -> dict[str, Any]:
    return {
        "python": sys.version.split()[0],
        "versions": {name: _version(name) for name in _SHOWN},
        "broken": {name: reason for name in _NEEDED if (reason := _import_error(name))},
        "cuda": _cuda(),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _import_error(name: str) -> str | None:
    try:
        importlib.import_module(name)
    except Exception as error:
        return describe(error)
    return None


def _cuda() -> str:
    """Say which CUDA or ROCm torch was built for, and NCCL; nothing for a torch without."""
    torch = sys.modules.get("torch")
    if torch is None:
        return ""
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    if not torch.version.cuda:
        return ""
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return f"CUDA {torch.version.cuda}, NCCL {nccl}"


def _judge_versions(measured: Sequence[Measured]) -> Iterator[Finding]:
    texts = group(measured, _versions_text)
    if len(texts) > 1:
        differences = "; ".join(f"{places(ranks)}: {text}" for text, ranks in texts.items())
        yield Finding(
            check="versions",
            level="fail",
            text=f"they differ between ranks: {differences}",
            advice="give all nodes the same environment",
        )
    else:
        yield Finding(check="versions", level="ok", text=next(iter(texts)))
    for broken, ranks in group(measured, lambda one: tuple(one.values["broken"].items())).items():
        for name, reason in broken:
            version = ranks[0].values["versions"][name]
            yield Finding(
                check=name,
                level="fail",
                text=f"{'cannot be imported' if version else 'is missing'} ({reason})"
                f"{where(ranks, measured)}",
                advice=f"pip install --force-reinstall {name}" if version else "make install",
            )


def _versions_text(one: Measured) -> str:
    versions: dict[str, str | None] = one.values["versions"]
    shown = {"python": one.values["python"], **versions}
    parts = [f"{name} {version}" for name, version in shown.items() if version]
    if one.values["cuda"]:
        parts.insert(parts.index(f"torch {versions['torch']}") + 1, one.values["cuda"])
    return ", ".join(parts)


VERSIONS = Check(
    name="versions",
    measure=_measure_versions,
    judge=_judge_versions,
    advice="import torch, numpy and pyarrow by hand to see which of them does this",
)


def _measure_engines(situation: Situation) -> dict[str, Any]:
    commands = {
        name: [sys.executable, "-c", f"import json; {code}"] for name, code in _PROBES.items()
    }
    return {
        "torch": _backends(),
        "installed": [name for name in _PROBES if _version(name)],
        "answers": ask(commands, situation.timeout),
    }


def _backends() -> list[str]:
    try:
        from torch import distributed
    except Exception:  # the versions tell
        return []
    known = {"gloo": distributed.is_gloo_available, "nccl": distributed.is_nccl_available}
    return [name for name, available in known.items() if available()]


def _judge_engines(measured: Sequence[Measured]) -> Iterator[Finding]:
    for backends, ranks in group(measured, lambda one: tuple(one.values["torch"])).items():
        if backends:
            over = " and ".join(backends)
            text = f"works, over {over}{where(ranks, measured)}"
            yield Finding(check="torch", level="ok", text=text)
    for engine in _PROBES:
        for text, ranks in group(measured, partial(_engine, engine)).items():
            works, what = text
            optional = engine == "apex" and what == _NO_APEX
            yield Finding(
                check=engine,
                level="ok" if works or optional else "note",
                text=what + where(ranks, measured),
                advice="" if works or optional else _engine_advice(engine, what),
                lacks=() if works else (engine,),
            )


def _engine(engine: str, one: Measured) -> tuple[bool, str]:
    """Whether it works, and the words for it."""
    if engine not in one.values["installed"]:
        return False, _NO_APEX if engine == "apex" else _NOT_INSTALLED
    answer = one.values["answers"][engine]
    if "trouble" in answer:
        return False, f"is installed but cannot be imported ({answer['trouble']})"
    # A library may print what it likes before.
    return True, f"works, {json.loads(answer['output'].splitlines()[-1])}"


_NOT_INSTALLED = "not installed"


def _engine_advice(engine: str, what: str) -> str:
    if engine == "apex":
        # The package of that name on PyPI is something else.
        return "if it came from PyPI, pip uninstall apex: NVIDIA's is built from its sources"
    if what == _NOT_INSTALLED:
        return _INSTALL[engine]
    return f"python -c 'import {engine}' tells more; {_INSTALL[engine]} makes it anew"


ENGINES = Check(
    name="engines",
    measure=_measure_engines,
    judge=_judge_engines,
    once_per_node=True,
)

_SEARCH_TOOLS = {
    # Their names for --require and in conda, and what asks their programs for the version.
    "BLAST+": ("blastp", "blast", {"blastp": "-version", "makeblastdb": "-version"}),
    "MMseqs2": ("mmseqs", "mmseqs2", {"mmseqs": "version"}),
}


def _measure_search(situation: Situation) -> dict[str, Any]:
    programs = {
        program: [program, argument]
        for _, _, arguments in _SEARCH_TOOLS.values()
        for program, argument in arguments.items()
    }
    return {"answers": ask(programs, situation.timeout)}


def _judge_search(measured: Sequence[Measured]) -> Iterator[Finding]:
    for tool, (requirement, package, programs) in _SEARCH_TOOLS.items():
        for text, ranks in group(measured, partial(_tool, tuple(programs))).items():
            works, what = text
            yield Finding(
                check=tool,
                level="ok" if works else "note",
                text=what + where(ranks, measured),
                advice=""
                if works
                else "needed to filter against test sets: load the site's module, or "
                f"conda install -c conda-forge -c bioconda {package}",
                lacks=() if works else (requirement,),
            )


def _tool(programs: tuple[str, ...], one: Measured) -> tuple[bool, str]:
    answers = {program: one.values["answers"][program] for program in programs}
    missing = [program for program, answer in answers.items() if not answer]
    if missing:
        return False, f"{' and '.join(missing)} not found on PATH"
    for answer in answers.values():
        if "trouble" in answer:
            return False, f"{answer['path']} does not run ({answer['trouble']})"
    first = next(iter(answers.values()))
    line = first["output"].partition("\n")[0]
    return True, f"{version_in(line) or line} ({first['path']})"


SEARCH_TOOLS = Check(
    name="search tools",
    measure=_measure_search,
    judge=_judge_search,
    once_per_node=True,
)
