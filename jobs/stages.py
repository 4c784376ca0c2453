"""The stages of prothpc that can be jobs, as `stages.toml` describes them."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Literal

from preprocessing.strict import build

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = "batch"
"""Directory, or ending of one, that holds scripts, logs and notes of jobs."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage as a job; `stages.toml` explains the keys."""

    name: str
    launch: Literal["mpi", "training"]
    work: Literal["corpus", "training"]
    directory: str
    jobs: Literal["inside", "beside"]
    on_warning: Literal["save", "end", "none"]
    requires: list[str] = field(default_factory=list)
    progress: list[str] = field(default_factory=list)
    array: list[str] = field(default_factory=list)
    merge: list[str] = field(default_factory=list)
    program: list[str] = field(default_factory=lambda: ["prothpc"])
    """Words before the stage's name and arguments."""

    @property
    def restarts(self) -> bool:
        """Whether another attempt goes on where one ended."""
        return self.on_warning != "none"

    def jobs_directory(self, directory: Path) -> Path:
        """Return where its jobs keep their files.

        Args:
            directory: what the stage makes.
        """
        if self.jobs == "inside":
            return directory / FOLDER
        return directory.with_name(f"{directory.name}.{FOLDER}")


@cache
def stages() -> dict[str, Stage]:
    """Return all stages by name."""
    path = Path(str(resources.files("jobs") / "stages.toml"))
    document = tomllib.loads(path.read_text(encoding="utf-8"))
    return {
        name: build(Stage, {"name": name, **entry}, where=str(path), section=name)
        for name, entry in document.items()
    }
