"""Site profiles: what a batch script has to know of a machine, as data.

A profile is a TOML file. Those in `jobs/sites/` come with prothpc; a user's own, in
`~/.config/prothpc/sites/` or anywhere by its path, inherits from one of them and says what differs.
Every fact has a source, under the same name in `[sources]`, or is called unverified there.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from jobs import quoting
from jobs.times import parse_time
from preprocessing.errors import InputError
from preprocessing.strict import build

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PLACEHOLDERS = (
    *("nodes", "ranks", "ranks_per_node", "cores", "cores_per_rank", "gpus", "racks"),
    *("total_cores", "total_cores_and_one"),
)
"""What a launch line or directive may hold in braces."""


@dataclass(frozen=True, kw_only=True)
class NodeShape:
    """What a job gets of one node."""

    cores: int = 0
    """Cores that a job may use; 0: not known."""
    gpus: int = 0
    """GPUs, as many as ranks can have one each; 0: none, or not known."""


@dataclass(frozen=True, kw_only=True)
class SubmitConfig:
    """How a script is handed to the scheduler, and what has to stand in it."""

    project: Literal["required", "optional"] = "optional"
    """Whether the site refuses jobs without --project."""
    time: Literal["required", "optional"] = "required"
    """Whether a job has to say its wall time."""
    stdin: bool = False
    """LSF: `bsub < script` rather than `bsub script`."""
    allocation: Literal["nodes", "slots"] = "nodes"
    """LSF: whether a job asks for nodes (`-nnodes`) or for slots (`-n` with `span[ptile=]`)."""
    queue_option: str = "--partition"
    """Slurm: the option that names the queue."""
    directives: list[str] = field(default_factory=list)
    """Further directives of every job."""
    corpus: list[str] = field(default_factory=list)
    """Further directives of stages that work on FASTA and records, with MPI on CPUs."""
    training: list[str] = field(default_factory=list)
    """Further directives of stages that compute with the model."""


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """The words before a command that start it on all ranks."""

    mpi: str = ""
    """For ranks that speak MPI: preprocess, verify."""
    torch: str = ""
    """For training with the engine torch."""
    deepspeed: str = ""
    """For training with the engine deepspeed."""
    horovod: str = ""
    """For training with the engine horovod."""
    each_node: str = ""
    """Runs a command once on each node."""
    broadcast: str = ""
    """Copies a file, named next, to a place on each node, named last; empty: each node reads it."""
    container: str = "apptainer exec"
    """Runs a command, named after the image, inside a container image."""


@dataclass(frozen=True, kw_only=True)
class Bin:
    """How long jobs of some size may run."""

    nodes: int
    """Largest number of nodes."""
    time: str
    """Longest wall time."""


@dataclass(frozen=True, kw_only=True)
class Queue:
    """A queue (partition, QOS) and its limits."""

    bins: tuple[Bin, ...] = ()
    """Limits by size, smallest first; none: not known."""
    chain: bool = True
    """Whether jobs may submit their successors."""


@dataclass(frozen=True, kw_only=True)
class BurstBuffer:
    """A disk in each node."""

    path: str = ""
    """The user's directory there; empty: the site has none."""
    directives: list[str] = field(default_factory=list)
    """What a job that wants it has to ask for."""


@dataclass(frozen=True, kw_only=True)
class Racks:
    """How to ask for whole racks."""

    nodes: int = 0
    """Nodes of a rack; 0: not known, so whole racks cannot be asked for."""
    directives: list[str] = field(default_factory=list)
    """What asks for them; with `replaces_nodes` they also say how many nodes."""
    replaces_nodes: bool = False
    """Whether the directives stand in the place of the number of nodes."""


@dataclass(frozen=True, kw_only=True)
class StopConfig:
    """How a job is told that its time is nearly up."""

    signal: Literal["USR2", "USR1"] = "USR2"
    """The warning signal."""
    lead: str = "00:05:00"
    """How long before the end it comes: a checkpoint and a minute; short jobs use a quarter."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """A machine."""

    title: str
    """What it is, in a line."""
    scheduler: Literal["slurm", "lsf", "local"]
    """What takes the jobs."""
    inherits: str = ""
    """Profile that says what this one leaves out."""
    queue: str = ""
    """Queue of jobs that name none; empty: the scheduler's own default."""
    modules: list[str] = field(default_factory=list)
    """Environment modules to load."""
    node: NodeShape = field(default_factory=NodeShape)
    submit: SubmitConfig = field(default_factory=SubmitConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    queues: dict[str, Queue] = field(default_factory=dict)
    burst_buffer: BurstBuffer = field(default_factory=BurstBuffer)
    racks: Racks = field(default_factory=Racks)
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of the job: network interfaces and the like."""
    stop: StopConfig = field(default_factory=StopConfig)
    sources: dict[str, str] = field(default_factory=dict)
    """Where a fact, or a section of facts, comes from; or `unverified`."""

    def __post_init__(self) -> None:
        for where, text in self._lines():
            _check_placeholders(where, text)
        for name in self.environment:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"environment.{name} is no name of a variable")
        for name, queue in self.queues.items():
            quoting.plain(name, "queues:")
            for limit in queue.bins:
                parse_time(limit.time, f"queues.{name}.bins: time")
            if [limit.nodes for limit in queue.bins] != sorted(limit.nodes for limit in queue.bins):
                raise ValueError(f"queues.{name}.bins: begin with the smallest")
        parse_time(self.stop.lead, "stop.lead")

    def _lines(self) -> Iterator[tuple[str, str]]:
        """Name and text of all launch lines and directives."""
        for name in ("mpi", "torch", "deepspeed", "horovod", "each_node", "broadcast", "container"):
            yield f"launch.{name}", getattr(self.launch, name)
        for section in ("submit", "burst_buffer", "racks"):
            for text in getattr(self, section).directives:
                yield f"{section}.directives", text
        for name in ("corpus", "training"):
            for text in getattr(self.submit, name):
                yield f"submit.{name}", text

    def engine_line(self, kind: str) -> str:
        """Return the launch line of a kind of ranks.

        Raises:
            InputError: the profile has none.
        """
        line: str = getattr(self.launch, kind)
        if not line and self.scheduler != "local":
            raise InputError(
                f"the site's profile has no launch.{kind}: add it to a profile of your own"
            )
        return line


@dataclass(frozen=True)
class Profile:
    """A site and where its facts come from."""

    name: str
    """As given to --site; of a file, its name without the ending."""
    site: Site
    document: Mapping[str, Any]
    """The facts that it and those it inherits from state."""
    sources: Mapping[str, str]
    """Where each fact comes from."""
    files: tuple[str, ...]
    """Where it was read from, its own file first."""

    def facts(self) -> Iterator[tuple[str, str, str]]:
        """Give name, value and source of each fact."""
        for name, value in _facts(self.document):
            yield name, _in_toml(value), self.sources[name]


def built_in() -> list[str]:
    """Return the names of the profiles that come with prothpc."""
    folder = resources.files("jobs") / "sites"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name[-5:] == ".toml")


def own_directory() -> Path:
    """Return where the user's own profiles lie."""
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(home) / "prothpc" / "sites"


def own() -> list[str]:
    """Return the names of the user's own profiles."""
    return sorted(path.stem for path in own_directory().glob("*.toml"))


def load_profile(name: str) -> Profile:
    """Read a profile.

    Args:
        name: of one that comes with prothpc or lies in `own_directory`, or the path of a file.

    Raises:
        InputError: no such profile, or one that cannot be read or says what it cannot mean.
    """
    path = _find(name)
    document, sources, files = _read(path)
    site = build(Site, document, where=str(path))
    return Profile(path.stem, site, document, sources, tuple(files))


def _find(name: str) -> Path:
    quoted = quoting.check_typed(name, "--site")
    if "/" in quoted or quoted.endswith(".toml"):
        path = Path(quoted)
        if not path.is_file():
            raise InputError(f"--site {name}: no such file")
        return path
    for folder in (own_directory(), Path(str(resources.files("jobs") / "sites"))):
        if (folder / f"{name}.toml").is_file():
            return folder / f"{name}.toml"
    known = [*own(), *built_in()]
    near = difflib.get_close_matches(name, known, 1)
    meant = f"did you mean {near[0]}? " if near else ""
    raise InputError(
        f"--site {name}: no such profile: {meant}there are {', '.join(known)}; your own go into "
        f"{own_directory()}, or give the path of one"
    )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Return a profile's facts with those it inherits, their sources, and the files."""
    built_in_folder = Path(str(resources.files("jobs") / "sites"))
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: cannot be read as TOML: {error}") from error
    parent = document.get("inherits")
    if parent is None and path.parent != built_in_folder:
        raise InputError(
            f'{path}: say what it begins with: inherits = "generic-slurm", or another of '
            f"{', '.join(built_in())}"
        )
    if parent is None:
        return document, _sources(document, {}, path), [str(path)]
    if parent not in built_in():
        raise InputError(f"{path}: inherits = {parent!r}: choose one of {', '.join(built_in())}")
    base, inherited, files = _read(built_in_folder / f"{parent}.toml")
    merged = _merge(base, document)
    # What the parent says of its own facts is not about these.
    merged["sources"] = document.get("sources", {})
    return merged, inherited | _sources(document, inherited, path), [str(path), *files]


def _sources(
    document: Mapping[str, Any], inherited: Mapping[str, str], path: Path
) -> dict[str, str]:
    """Return the source of each fact that a file states, or says something of."""
    named: Any = document.get("sources", {})
    if not isinstance(named, Mapping):
        raise InputError(f"{path}: sources must be a section, [sources]")
    own = [name for name, _ in _facts(document)]
    sources = dict.fromkeys(own, str(named.get("all", path)))
    for name in [*own, *inherited]:
        parts = name.split(".")
        for length in range(len(parts), 0, -1):
            if ".".join(parts[:length]) in named:
                sources[name] = str(named[".".join(parts[:length])])
                break
    return sources


def _facts(document: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in _leaves(document):
        if name.split(".")[0] not in ("sources", "inherits", "title"):
            yield name, value


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        both = isinstance(value, Mapping) and isinstance(old, Mapping)
        merged[key] = _merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def _leaves(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in document.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _in_toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_in_toml, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key} = {_in_toml(item)}' for key, item in value.items())}}}"
    return f'"{value}"' if isinstance(value, str) else str(value)


def _check_placeholders(where: str, text: str) -> None:
    for name in re.findall(r"\{(\w*)\}", text):
        if name not in PLACEHOLDERS:
            raise ValueError(
                f"{where}: {{{name}}} is none of {', '.join(f'{{{p}}}' for p in PLACEHOLDERS)}"
            )
