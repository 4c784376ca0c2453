"""The output directory while a record set is made in it: lock, plan, and what is done already."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash

from preprocessing.errors import InputError, as_typed
from preprocessing.files import (
    Background,
    explaining_no_room,
    hash_file,
    publish_all,
    read_checked,
    sync,
    write_checked,
    write_whole,
)
from preprocessing.locks import Held, take_lock
from preprocessing.records import MANIFEST, RUN, WORK, canonical_json, read_manifest, seal
from preprocessing.runs import Bucket, RunSet
from preprocessing.shards import Compression, Shard, build_shard, piece_bytes
from preprocessing.spill import Run, parts_of, usable_runs

_log = logging.getLogger(__name__)

_PLAN = "plan.json"
_LOCK = "lock"
_PUBLISH_BYTES, _PUBLISH_SHARDS = 32 * 2**20, 64
"""Shards are put on the disk and noted in groups of as many: one by one, thousands of small ones
took most of the time."""


class Workspace:
    """An output directory, and `.work` in it for what does not belong to the finished set.

    `enter`, `finish`, `discard` and `leave` are for rank 0, the others for all ranks.
    """

    def __init__(self, output: Path, plan: dict[str, Any]) -> None:
        """Describe the workspace.

        Args:
            output: the directory.
            plan: JSON of all that the record set depends on, `inputs` (each with a `path`) and
                `options`; and `spill`, the directory for spills, None for `.work`.
        """
        self.output = output
        self.work = output / WORK
        self.spills = self.work
        """Where the runs are."""
        if plan["spill"] is not None:
            # Nobody else's, and no other job's that this output was begun with and deleted.
            job = canonical_json({"output": str(output.resolve()), "plan": plan})
            self.spills = Path(plan["spill"]) / f"prothpc-{xxhash.xxh3_64_hexdigest(job)}"
        self._plan = plan
        self._lock: int | None = None
        self._background = Background()
        self._built: list[tuple[Path, Shard]] = []
        self._noted: dict[str, Shard] = {}

    def is_finished(self) -> bool:
        """Return whether there is a finished record set, of whatever plan."""
        return (self.output / MANIFEST).exists()

    def enter(self) -> bool:
        """Take possession of the directory.

        Returns:
            Whether the record set is finished already.

        Raises:
            InputError: if the directory holds something else, or another process is at work in it.
        """
        if self.output.exists() and not self.output.is_dir():
            raise InputError(f"{self.output}: not a directory: choose another output")
        self.output.mkdir(parents=True, exist_ok=True)
        if self.is_finished():
            self._compare_finished()
            return True
        if not self.work.is_dir() and any(self.output.iterdir()):
            raise InputError(
                f"{self.output}: not empty, and what is in it is not an unfinished record set: "
                "choose another output directory"
            )
        self.work.mkdir(exist_ok=True)
        self._take_lock()
        if self.is_finished():  # the process that had the lock has just finished
            self._compare_finished()
            return True
        path = self.work / _PLAN
        if path.exists():
            started = self._read_plan()
            if started != self._plan:
                raise InputError(
                    f"{self.output}: holds unfinished work for other inputs or options "
                    f"({difference(started, self._plan)}): repeat that command, choose another "
                    f"output directory, or delete this one"
                )
            if not self.spills.is_dir():
                _log.warning(
                    "%s: the spills of the earlier attempt are not on this node (%s): all inputs "
                    "are read again", self.spills.parent, socket.gethostname(),
                )  # fmt: skip
        else:
            self._clear()
            with self.writing():
                write_checked(path, self._plan)
                sync(self.output)
        with self.writing():
            self.spills.mkdir(exist_ok=True)
        return False

    def writing(self) -> AbstractContextManager[None]:
        """Turn an error for lack of room into a sentence for the user."""
        return explaining_no_room(self.output)

    @contextmanager
    def building(self) -> Iterator[None]:
        """Wait at the end until all shards that were built are on the disk.

        After an error no shard is published any more: another job may begin.
        """
        with closing(self._background), self.writing():
            yield
            self.wait()

    def wait(self) -> None:
        """Wait until what was built is on the disk."""
        self._publish_built()
        self._background.wait()

    def usable_runs(self) -> list[Run]:
        """Return the runs that an earlier attempt left; remove what is left of units cut short."""
        return usable_runs(self.spills)

    def read_notes(self) -> None:
        """Read which shards an earlier attempt finished."""
        for path in self.work.glob("*-*.json"):
            with suppress(OSError, ValueError, TypeError, KeyError):  # a damaged note: made anew
                self._noted |= {note["name"]: Shard(**note) for note in read_checked(path)}

    def finished_shard(self, name: str) -> Shard | None:
        """Return what the notes say of a shard, if it is still what it was."""
        shard = self._noted.get(name)
        try:
            found = hash_file(self.output / name) if shard is not None else None
        except OSError:
            return None
        return shard if shard is not None and found == (shard.bytes, shard.xxh3_128) else None

    def build_shard(
        self,
        name: str,
        buckets: Iterable[Bucket],
        *,
        dedup: bool,
        marks: bool,
        metadata: bool,
        compression: Compression,
    ) -> Shard:
        """Make a shard; it is finished, and noted to be, after `building`."""
        temporary = self.work / f"{name}.tmp"
        shard = build_shard(
            self.output / name,
            temporary,
            buckets,
            dedup=dedup,
            marks=marks,
            metadata=metadata,
            compression=compression,
        )
        self._built.append((temporary, shard))
        size = sum(built.bytes for _, built in self._built)
        if size >= _PUBLISH_BYTES or len(self._built) >= _PUBLISH_SHARDS:
            self._publish_built()
        return shard

    def open_runs(self, runs: Sequence[Run], memory: int, schema: pa.Schema) -> RunSet:
        """Open run files with these columns for a memory budget."""
        paths = [self.spills / run.name for run in runs]
        return RunSet(paths, parts=parts_of(runs), limit=piece_bytes(memory), schema=schema)

    def finish(self, manifest: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
        """Write what makes the record set a finished one; return the manifest as it now reads."""
        with self.writing():
            write_whole(self.output / RUN, canonical_json(seal(run)))
            write_whole(self.output / MANIFEST, canonical_json(seal(manifest)))
        self.discard()
        return read_manifest(self.output)[0]

    def discard(self) -> None:
        """Remove what does not belong to a finished set."""
        shutil.rmtree(self.spills, ignore_errors=True)
        shutil.rmtree(self.work, ignore_errors=True)

    def leave(self) -> None:
        """Let other processes in."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _clear(self) -> None:
        """Remove what an attempt left that was refused, and so belongs to no plan."""
        for path in self.work.iterdir():
            if path.name != _LOCK:
                path.unlink()

    def _read_plan(self) -> Any:
        path = self.work / _PLAN
        try:
            return read_checked(path)
        except ValueError as error:
            raise InputError(
                f"{path}: damaged, so nothing is known of the work in {self.output}: delete this "
                "directory and run the command again"
            ) from error

    def _publish_built(self) -> None:
        if self._built:
            built, self._built = self._built, []
            self._background.submit(lambda: self._publish(built))

    def _publish(self, built: list[tuple[Path, Shard]]) -> None:
        publish_all([(temporary, self.output / shard.name) for temporary, shard in built])
        note = self.work / Path(built[0][1].name).with_suffix(".json")
        write_checked(note, [asdict(shard) for _, shard in built])

    def _take_lock(self) -> None:
        try:
            self._lock = take_lock(self.work / _LOCK)
        except Held as holder:
            raise InputError(
                f"{self.output}: another process is at work here ({holder}): wait for it, or "
                "choose another output directory"
            ) from holder

    def _compare_finished(self) -> None:
        try:
            made_from = json.loads((self.output / RUN).read_bytes())["plan"]
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"{self.output}: holds a finished record set, but its {RUN} cannot be read: "
                "choose another output directory"
            ) from error
        made_from["spill"] = self._plan["spill"]  # of no consequence any more
        if made_from != self._plan:
            raise InputError(
                f"{self.output}: holds a finished record set of other inputs or options "
                f"({difference(made_from, self._plan)}): choose another output directory, or "
                "delete this one"
            )
        self.discard()


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Name one thing in which two plans differ."""
    for name in sorted(old["options"].keys() | new["options"].keys()):
        before, after = old["options"].get(name), new["options"].get(name)
        if before != after and isinstance(after, (list, dict)):
            return f"{as_typed(name)} named other files then, or their content has changed"
        if before != after:
            return f"{as_typed(name)} was {before}, is now {after}"
    if old.get("spill") != new["spill"]:
        return f"--spill was {old.get('spill')}, is now {new['spill']}"
    before, after = ({entry["path"]: entry for entry in plan["inputs"]} for plan in (old, new))
    for path in sorted(before.keys() | after.keys()):
        if path not in after:
            return f"{path} was an input, is none now"
        if path not in before:
            return f"{path} was no input, is one now"
        if before[path] != after[path]:
            return f"{path} has changed since"
    return "another version of prothpc"
