"""The directory of a search: what it is for, what is prepared, and which chunks are done.

Several processes may be at work in it, the tasks of a job array: preparing is done by one while
the others wait, and a chunk belongs to whoever holds its lock.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa

from preprocessing.columns import open_arrow
from preprocessing.errors import InputError
from preprocessing.files import explaining_no_room, publish, read_checked, sync, write_checked
from preprocessing.filtering.hits import Hits
from preprocessing.filtering.programs import ProgramError
from preprocessing.filtering.sequences import Side, Totals
from preprocessing.locks import Held, locked
from preprocessing.records import RUN, WORK
from preprocessing.workspace import difference

SUMMARY = "summary.json"
"""Written last: it makes a search a finished one."""

_PLAN, _LOCK = "plan.json", "lock"
_PREPARED, _TOTALS = "prepared", "prepared.json"

Commands = list[list[str]]
"""Argument lists, in the order in which they ran, each once."""


@dataclass(frozen=True)
class Prepared:
    """What all chunks share; the database's name is that of `tools.DATABASE`, in `directory`."""

    directory: Path
    queries: Totals
    targets: Totals
    commands: Commands

    def side(self, name: str) -> Side:
        """Map "queries" or "targets"."""
        return Side(side_path(self.directory, name))


@dataclass(frozen=True)
class ChunkResult:
    """What was found for a chunk of the queries."""

    hits: Hits
    cut_short: int
    """Queries that had more hits than were asked for at most."""
    commands: Commands


def side_path(directory: Path, name: str) -> Path:
    """Return where a side lies: "queries" or, if it is another set, "targets"."""
    path = directory / f"{name}.arrow"
    return path if path.exists() or name == "queries" else directory / "queries.arrow"


class FilterWork:
    """An output directory, and `.work` in it for what does not belong to the finished search."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.work = output / WORK
        self.chunks = 0
        """Chunks of the queries, once the directory is entered."""

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until no other process enters, prepares or merges, and keep them waiting.

        Raises:
            InputError: if the directory holds something else.
        """
        if self.output.exists() and not self.output.is_dir():
            raise InputError(f"{self.output}: not a directory: choose another output")
        if not self.work.is_dir() and self.output.exists() and any(self.output.iterdir()):
            raise InputError(
                f"{self.output}: not empty, and what is in it is not an unfinished search: choose "
                "another output directory"
            )
        self.work.mkdir(parents=True, exist_ok=True)
        with locked(self.work / _LOCK, wait=True):
            yield

    def is_finished(self, plan: dict[str, Any]) -> bool:
        """Whether the search is finished already; if so, remove what may be left of the work.

        Args:
            plan: JSON of all that the result depends on: `tool` (name and version), `inputs` and
                `options`.

        Raises:
            InputError: if another search was finished here.
        """
        if not (self.output / SUMMARY).exists():
            return False
        self._compare(json.loads((self.output / RUN).read_bytes())["plan"], plan, "a finished")
        self.clear()
        return True

    def enter(self, plan: dict[str, Any], chunks: int | None) -> None:
        """Begin a search, or go on with it.

        Args:
            plan: see `is_finished`.
            chunks: parts of the queries; None: as many as there were before, or to be chosen.

        Raises:
            InputError: if the directory holds another search.
        """
        path = self.work / _PLAN
        if path.exists():
            started = self._read_plan(path)
            self._compare(started["plan"], plan, "an unfinished")
            self.chunks = started["chunks"]
            if chunks is not None and self.chunks not in (0, chunks):
                raise InputError(
                    f"--chunks {chunks}: the search in {self.output} was begun with "
                    f"{self.chunks}: repeat that, or leave --chunks out"
                )
        self.set_chunks(plan, chunks or self.chunks)

    def set_chunks(self, plan: dict[str, Any], chunks: int) -> None:
        """Write down what is done here; 0 chunks are not chosen yet."""
        self.chunks = chunks
        write_checked(self.work / _PLAN, {"plan": plan, "chunks": chunks})
        sync(self.output)

    def prepared(self) -> Prepared | None:
        """Return what was prepared, if it was."""
        directory = self.work / _PREPARED
        try:
            noted = read_checked(directory / _TOTALS)
        except FileNotFoundError:
            return None
        queries, targets = (Totals(**noted[name]) for name in ("queries", "targets"))
        return Prepared(directory, queries, targets, noted["commands"])

    @contextmanager
    def preparing(self) -> Iterator[Path]:
        """Give a directory to prepare in; it counts once `set_prepared` was called."""
        with self._attempt(self.work / _PREPARED, "preparing") as directory:
            yield directory

    def set_prepared(
        self, directory: Path, queries: Totals, targets: Totals, commands: Commands
    ) -> None:
        """Note that everything is prepared in `directory`, and give it its name."""
        noted = {"queries": asdict(queries), "targets": asdict(targets), "commands": commands}
        write_checked(directory / _TOTALS, noted)
        directory.rename(self.work / _PREPARED)
        sync(self.work)

    def is_done(self, chunk: int) -> bool:
        """Whether a chunk is done."""
        return self._chunk_path(chunk).exists()

    @contextmanager
    def working(self, chunk: int) -> Iterator[Path]:
        """Give a directory to search a chunk in.

        Raises:
            InputError: if another process is at work on the chunk; or for what a program said.
        """
        name = self._chunk_path(chunk).stem
        try:
            with (
                locked(self.work / f"{name}.lock"),
                self._attempt(self.work / name, f"chunk {chunk}") as directory,
            ):
                yield directory
        except Held as error:
            raise InputError(
                f"{self.output}: another process is at work on chunk {chunk} ({error}): run this "
                "again when it is done"
            ) from error

    def set_done(self, chunk: int, result: ChunkResult) -> None:
        """Note what was found for a chunk."""
        noted = {
            "commands": json.dumps(result.commands),
            "cut_short": str(result.cut_short),
        }
        columns = {field.name: getattr(result.hits, field.name) for field in fields(Hits)}
        table = pa.table(columns).replace_schema_metadata(noted)
        temporary = self._chunk_path(chunk).with_suffix(".part")
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, table.schema) as file:
            file.write_table(table)
        publish(temporary, self._chunk_path(chunk))

    def result(self, chunk: int) -> ChunkResult:
        """Return what was found for a chunk that is done."""
        table = open_arrow(self._chunk_path(chunk)).read_all()
        noted = table.schema.metadata
        return ChunkResult(
            hits=Hits(*(table.column(field.name).to_numpy() for field in fields(Hits))),
            cut_short=int(noted[b"cut_short"]),
            commands=json.loads(noted[b"commands"]),
        )

    def clear(self) -> None:
        """Remove what only an unfinished search needs."""
        shutil.rmtree(self.work, ignore_errors=True)

    def _chunk_path(self, chunk: int) -> Path:
        return self.work / f"chunk-{chunk:05d}.arrow"

    @contextmanager
    def _attempt(self, path: Path, what: str) -> Iterator[Path]:
        """Give a directory of this attempt alone: a program of a killed one may still write."""
        for left in path.parent.glob(f"{path.name}.*-attempt"):
            shutil.rmtree(left, ignore_errors=True)
        failed = path.with_name(f"{path.name}.failed")
        shutil.rmtree(failed, ignore_errors=True)
        directory = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}-attempt")
        try:
            with explaining_no_room(self.output):
                directory.mkdir()
                yield directory
        except ProgramError as error:
            directory.rename(failed)
            raise InputError(
                f"{what}: {error}. Its files are kept in {failed}; run the same command again: "
                "what is done is not repeated"
            ) from error
        shutil.rmtree(directory, ignore_errors=True)

    def _read_plan(self, path: Path) -> Any:
        try:
            return read_checked(path)
        except ValueError as error:
            raise InputError(
                f"{path}: damaged, so nothing is known of the work in {self.output}: delete this "
                "directory and run the command again"
            ) from error

    def _compare(self, old: dict[str, Any], new: dict[str, Any], state: str) -> None:
        if old["tool"] != new["tool"]:
            how = "{name} {version}".format_map
            raise InputError(
                f"{self.output}: holds {state} search with {how(old['tool'])}, this is "
                f"{how(new['tool'])}: use that, or choose another output directory"
            )
        if old != new:
            raise InputError(
                f"{self.output}: holds {state} search of other inputs or options "
                f"({difference(old, new)}): repeat that command, choose another output directory, "
                "or delete this one"
            )


def merge_commands(lists: list[Commands]) -> Commands:
    """Return the commands of several processes, each once."""
    unique = dict.fromkeys(tuple(command) for commands in lists for command in commands)
    return [list(command) for command in unique]
