"""Runs: what the map phase leaves for the reduce phase.

A rank collects parsed records up to its memory budget, then writes them as one *run*: an Arrow
file, sorted by shard and key, in which no record batch has rows of two shards. A run says in its
schema which units of work it finishes. It gets its name when it is whole and on the disk. What it
says of itself and each of its batches have a checksum, so that nothing that went bad on the disk
gets into a shard.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from preprocessing.columns import key_column, open_arrow, parts, take, to_binary
from preprocessing.errors import InputError
from preprocessing.files import publish
from preprocessing.keys import KEY_BYTES, Placement, halves

RUN_COLUMNS = [
    pa.field("key", pa.binary(KEY_BYTES), nullable=False),
    pa.field("id", pa.large_binary(), nullable=False),
    pa.field("residues", pa.large_binary(), nullable=False),
]

_ROWS_PER_BATCH = 4096
"""As many rows are put in order at a time: they then stay in the cache until they are written."""

_ROW_BYTES = 80
"""Memory that a row costs besides its text: key 16, two offsets 16, shard 4, and while a run is
sorted the key's halves, the shard again and the order, 44."""

_BUFFER_SHARE = 0.75
"""Share of the memory budget for collected records; the rest is for what is being written."""


@dataclass(kw_only=True)
class UnitResult:
    """What became of a unit of work."""

    unit: int
    pieces: int = 0
    """Runs that hold only records of this unit and were written before its end."""
    counts: Counter[str] = field(default_factory=Counter)
    block_hashes: list[str] = field(default_factory=list)
    stretch: dict[str, Any] | None = None
    """`compressed.Stretch` of a compressed file that the unit has read."""


@dataclass(kw_only=True)
class Run:
    """A finished run file."""

    name: str
    finished: list[UnitResult]
    """Units of which this run holds the last records; empty in a piece of a long unit."""


def total_counts(runs: Iterable[Run]) -> Counter[str]:
    """Return what the units that runs finish counted, together."""
    counts: Counter[str] = Counter()
    for run in runs:
        for result in run.finished:
            counts.update(result.counts)
    return counts


class Spiller:
    """Collects the records of one rank and writes them as runs."""

    def __init__(self, directory: Path, placement: Placement, memory: int) -> None:
        self._directory = directory
        self._placement = placement
        self._capacity = int(memory * _BUFFER_SHARE)
        rows = self._capacity // _ROW_BYTES + 1
        # Memory that is not written to costs nothing, so each column may reserve all of it.
        self._keys = np.empty((rows, KEY_BYTES), np.uint8)
        self._shards = np.empty(rows, np.int32)
        self._ids = _Texts(rows, self._capacity)
        self._residues = _Texts(rows, self._capacity)
        self._rows = 0
        self._finished: list[UnitResult] = []
        self._finished_rows = 0
        self._pieces = 0
        self.runs: list[Run] = []
        """The runs written so far."""

    def add(
        self, unit: int, keys: np.ndarray, ids: pa.Array, sequences: pa.Array, shards: np.ndarray
    ) -> None:
        """Add records of the unit at work.

        Args:
            unit: number of the unit.
            keys: uint8 [N, 16].
            ids: binary [N].
            sequences: binary [N].
            shards: int [N], where each belongs; within a split they follow the keys.

        Raises:
            InputError: if they alone are more than the memory budget.
        """
        id_offsets, id_values = parts(ids)
        offsets, residues = parts(sequences)
        size = _ROW_BYTES * len(keys) + sum(
            int(bounds[-1]) - int(bounds[0]) for bounds in (id_offsets, offsets)
        )
        if self._used() + size > self._capacity:
            if self._finished_rows:
                self._write_finished()
            if self._used() + size > self._capacity and self._rows:
                self._write(f"run-{unit:06d}-{self._pieces:04d}.arrow", self._rows, [])
                self._pieces += 1
            if size > self._capacity:
                raise InputError(
                    f"records of {size:,} bytes do not fit the memory budget "
                    f"({self._capacity:,} bytes of it are for them): raise --memory"
                )
        self._keys[self._rows : self._rows + len(keys)] = keys
        self._shards[self._rows : self._rows + len(keys)] = shards
        self._ids.append(self._rows, id_offsets, id_values)
        self._residues.append(self._rows, offsets, residues)
        self._rows += len(keys)

    def end_unit(self, result: UnitResult) -> None:
        """Take note that all records of a unit were added."""
        result.pieces = self._pieces
        self._finished.append(result)
        self._finished_rows = self._rows
        if self._pieces:  # the run with its last records holds no other unit
            self._write_finished()
            self._pieces = 0

    def flush(self) -> None:
        """Write what the finished units left."""
        if self._finished:
            self._write_finished()

    def _used(self) -> int:
        return (
            self._rows * _ROW_BYTES + self._ids.bytes(self._rows) + self._residues.bytes(self._rows)
        )

    def _write_finished(self) -> None:
        name = f"run-{self._finished[0].unit:06d}-{self._pieces:04d}.arrow"
        self._write(name, self._finished_rows, self._finished)
        self._finished, self._finished_rows = [], 0

    def _write(self, name: str, rows: int, finished: list[UnitResult]) -> None:
        """Write the first `rows` rows and keep the others."""
        run = Run(name=name, finished=finished)
        keys = self._keys[:rows]
        ids, residues = self._ids.column(rows), self._residues.column(rows)
        order, bounds = sort_into_shards(keys, self._shards[:rows], self._placement)
        starts = [range(a, b, _ROWS_PER_BATCH) for a, b in pairwise(bounds.tolist())]
        about = {
            "name": name,
            "finished": [vars(result) for result in finished],
            "batches": [len(of_shard) for of_shard in starts],
        }
        text = json.dumps(about).encode()
        schema = pa.schema(RUN_COLUMNS, {"run": text, "checksum": xxhash.xxh3_64_hexdigest(text)})
        path = self._directory / name
        temporary = path.with_suffix(".tmp")
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for number, (start, stop) in enumerate(pairwise([*chain(*starts), rows])):
                these = order[start:stop]
                columns = [key_column(keys[these]), take(ids, these), take(residues, these)]
                batch = pa.record_batch(columns, schema=schema)
                writer.write_batch(batch, {"checksum": _checksum(number, batch)})
        publish(temporary, path)
        self.runs.append(run)
        left = self._rows - rows
        self._keys[:left] = self._keys[rows : self._rows]
        self._shards[:left] = self._shards[rows : self._rows]
        self._ids.discard(rows, self._rows)
        self._residues.discard(rows, self._rows)
        self._rows = left


def _checksum(number: int, batch: pa.RecordBatch) -> str:
    """Return the xxh3-64 (hex) of a run's batch and its place."""
    hasher = xxhash.xxh3_64(f"{number} {batch.num_rows}".encode())
    for column in batch.columns:
        for buffer in column.buffers()[1:]:  # the first is for nulls, and there are none
            hasher.update(buffer)
    return hasher.hexdigest()


class RunReader:
    """A run file, mapped into memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reader = open_arrow(path)
        about = json.loads(self._reader.schema.metadata[b"run"])
        self._first_batch = [0, *accumulate(about["batches"])]

    def of_shard(self, number: int) -> list[pa.RecordBatch]:
        """Return the records of a shard (columns `RUN_COLUMNS`), each batch sorted by key.

        Raises:
            InputError: if they are not what was written; the run is then removed, so that the
                next attempt makes it anew.
        """
        first, last = self._first_batch[number : number + 2]
        try:
            return [self._checked(batch) for batch in range(first, last)]
        except (pa.ArrowException, OSError, ValueError, LookupError, TypeError) as error:
            self._path.unlink(missing_ok=True)
            raise InputError(
                f"{self._path}: went bad on the disk ({error}) and was removed: run the same "
                "command again, it makes the file anew; check the disk if this comes back"
            ) from error

    def _checked(self, number: int) -> pa.RecordBatch:
        batch, about = self._reader.get_batch_with_custom_metadata(number)
        if about[b"checksum"].decode() != _checksum(number, batch):
            raise ValueError(f"batch {number} has another checksum")
        return batch


class _Texts:
    """A column of texts that grows in memory reserved beforehand."""

    def __init__(self, rows: int, capacity: int) -> None:
        self._offsets = np.zeros(rows + 1, np.int64)
        self._values = np.empty(capacity, np.uint8)

    def bytes(self, rows: int) -> int:
        return int(self._offsets[rows])

    def append(self, rows: int, offsets: np.ndarray, values: np.ndarray) -> None:
        """Add texts behind the first `rows`."""
        first, start = int(offsets[0]), self.bytes(rows)
        stop = start + int(offsets[-1]) - first
        self._values[start:stop] = values[first : int(offsets[-1])]
        self._offsets[rows + 1 : rows + len(offsets)] = offsets[1:].astype(np.int64) + (
            start - first
        )

    def column(self, rows: int) -> pa.Array:
        """Return the first `rows` texts as large_binary, without a copy."""
        return to_binary(self._offsets[: rows + 1], self._values[: self.bytes(rows)])

    def discard(self, first: int, rows: int) -> None:
        """Drop the first texts of `rows`."""
        start, stop = self.bytes(first), self.bytes(rows)
        self._values[: stop - start] = self._values[start:stop]
        self._offsets[: rows - first + 1] = self._offsets[first : rows + 1] - start


def sort_into_shards(
    keys: np.ndarray, shard: np.ndarray, placement: Placement
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows, int64 [N], by shard and key, and where each shard begins, [shards + 1]."""
    high, low = halves(keys)
    order = np.argsort(high)
    held = shard[order] >= placement.shards
    order = np.concatenate([order[~held], order[held]])
    if np.any(np.diff(shard[order]) < 0):  # keys that differ in the low half, across a border
        order = np.lexsort((low, high, shard))
    return order, np.searchsorted(shard[order], np.arange(len(placement) + 1))


def usable_runs(directory: Path) -> list[Run]:
    """Read which runs of an interrupted job can be used, and remove the others."""
    found = {path.name: _read_about(path) for path in directory.glob("run-*.arrow")}
    usable: dict[str, Run] = {}
    for name, run in found.items():
        if run is None or not run.finished:
            continue
        first = run.finished[0]
        pieces = [f"run-{first.unit:06d}-{number:04d}.arrow" for number in range(first.pieces)]
        if all(found.get(piece) is not None for piece in pieces):
            usable |= {piece: found[piece] for piece in [*pieces, name]}  # type: ignore[misc]
    for name in found.keys() - usable.keys():
        (directory / name).unlink()
    return [usable[name] for name in sorted(usable)]


def _read_about(path: Path) -> Run | None:
    try:
        schema = open_arrow(path).schema
        text = schema.metadata[b"run"]
        if xxhash.xxh3_64_hexdigest(text).encode() != schema.metadata[b"checksum"]:
            return None
        about = json.loads(text)
        finished = [UnitResult(**unit) for unit in about["finished"]]
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
        return None  # damaged: its units are done again
    for unit in finished:
        unit.counts = Counter(unit.counts)
    return Run(name=about["name"], finished=finished)
