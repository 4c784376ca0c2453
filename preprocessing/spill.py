"""The map phase's last step: records are put into buckets and written as runs.

A rank collects parsed records until each bucket has enough of them for a segment that a disk reads
well, or until its memory budget is used; then it sorts them by bucket and appends them to its run.
A run ends with the end of a unit of work. It gets its name when it is whole and on the disk, so
that a restart finds whole units only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from preprocessing.columns import cut_by_size, key_array, key_column, parts, to_binary
from preprocessing.errors import InputError
from preprocessing.files import Background, publish
from preprocessing.keys import Placement
from preprocessing.runs import RUN_COLUMNS, DamagedRun, RunReader, RunWriter, Table

_RUN_BYTES = 512 * 2**20
"""A run ends with the first unit that makes it as long (or as long as the collected records may
be): a restart repeats about this much, and a job has one file for as much of its input."""

_SEGMENT_BYTES = 128 * 2**10
"""As much of each bucket is collected, memory permitting: disks and parallel file systems read
pieces of this size nearly as fast as long ones."""

_GROUP_BYTES = 2**20
"""As much is put in order at a time: it then stays in the cache until it is written."""

_ROW_BYTES = 48
"""Memory that a row costs besides its values: bucket 8, and while rows are sorted their order,
buckets in order, and running sums of their bytes, 40."""

_BUFFER_SHARE = 0.5
"""Share of the memory budget for collected records; the rest is for what is being parsed and
written."""


@dataclass(kw_only=True)
class UnitResult:
    """What became of a unit of work."""

    unit: int
    counts: Counter[str] = field(default_factory=Counter)
    block_hashes: list[str] = field(default_factory=list)
    stretch: dict[str, Any] | None = None
    """`compressed.Stretch` of a compressed file that the unit has read."""


@dataclass(kw_only=True)
class Run:
    """A finished run file."""

    name: str
    parts: int
    """Buckets of a shard."""
    finished: list[UnitResult]
    """The units of which it holds the records."""


def total_counts(runs: Iterable[Run]) -> Counter[str]:
    """Return what the units that runs finish counted, together."""
    counts: Counter[str] = Counter()
    for run in runs:
        for result in run.finished:
            counts.update(result.counts)
    return counts


class Spiller:
    """Collects the records of one rank and writes them as runs."""

    def __init__(
        self,
        directory: Path,
        placement: Placement,
        memory: int,
        *,
        parts: int = 1,
        schema: pa.Schema = RUN_COLUMNS,
    ) -> None:
        """Begin.

        Args:
            directory: where runs are written.
            placement: of the records.
            memory: bytes to be used, about.
            parts: buckets of a shard.
            schema: columns of the runs, see `RUN_COLUMNS`.
        """
        self._directory = directory
        self._placement = placement
        self._parts = parts
        self._memory = int(memory * _BUFFER_SHARE)
        self._capacity = min(self._memory, len(placement) * parts * _SEGMENT_BYTES)
        fixed = [0 if pa.types.is_binary(f.type) else f.type.byte_width for f in schema]
        self._row_bytes = _ROW_BYTES + sum(width or 8 for width in fixed)
        rows = self._capacity // self._row_bytes + 1
        # Memory that is not written to costs nothing, so each column may reserve all of it.
        self._columns: list[_Texts | _Values] = [
            _Values(rows, width) if width else _Texts(rows, self._capacity) for width in fixed
        ]
        self._buckets = np.empty(rows, np.int64)
        self._rows = 0
        self._unit = 0
        self._run: RunWriter | None = None
        self._finished: list[UnitResult] = []
        self._background = Background()
        self._runs: list[Run] = []

    def add(self, unit: int, columns: Sequence[pa.Array], shards: np.ndarray) -> None:
        """Add records of the unit at work.

        Args:
            unit: its number.
            columns: [N] each, as the schema says.
            shards: int64 [N], where each belongs; within a split they follow the keys.

        Raises:
            InputError: if one of them is more than the memory budget.
        """
        self._unit = unit
        table = Table(tuple(columns))
        buckets = self._placement.bucket_of(table.keys, shards, self._parts)
        size = self._row_bytes * table.rows + sum(map(_text_bytes, columns))
        if size > self._memory:
            raise InputError(
                f"records of {size:,} bytes do not fit the memory budget ({self._memory:,} bytes "
                "of it are for them): raise --memory"
            )
        if self._used() + size > self._capacity:
            self._write_collected()
        if size > self._capacity // 2:
            self._write(table, buckets)
            return
        for mine, column in zip(self._columns, columns, strict=True):
            mine.append(self._rows, column)
        self._buckets[self._rows : self._rows + table.rows] = buckets
        self._rows += table.rows

    def end_unit(self, result: UnitResult) -> None:
        """Take note that all records of a unit were added."""
        self._finished.append(result)
        written = self._run.bytes if self._run is not None else 0
        if written + self._used() >= min(_RUN_BYTES, self._memory):
            self._end_run()

    def flush(self) -> list[Run]:
        """Write what is left; return all runs, which are then on the disk."""
        if self._finished:
            self._end_run()
        self._background.wait()
        return self._runs

    def close(self) -> None:
        """Write nothing any more."""
        self._background.close()

    def _used(self) -> int:
        texts = sum(column.bytes(self._rows) for column in self._columns)
        return self._rows * self._row_bytes + texts

    def _write_collected(self) -> None:
        if self._rows:
            table = Table(tuple(column.column(self._rows) for column in self._columns))
            self._write(table, self._buckets[: self._rows])
            self._rows = 0

    def _write(self, table: Table, buckets: np.ndarray) -> None:
        """Append rows to the run, sorted by bucket."""
        run = self._open_run()
        order = np.argsort(buckets)
        sorted_buckets = buckets[order]
        borders = np.flatnonzero(sorted_buckets[1:] != sorted_buckets[:-1]) + 1
        for first, last in cut_by_size(_text_sizes(table)[order], _GROUP_BYTES):
            inside = borders[np.searchsorted(borders, first, "right") :]
            starts = [first, *inside[: np.searchsorted(inside, last)].tolist()]
            run.write(
                table.take(order[first:last]),
                sorted_buckets[starts].tolist(),
                [start - first for start in (*starts, last)],
            )

    def _open_run(self) -> RunWriter:
        if self._run is None:
            self._run = RunWriter(self._path().with_suffix(".tmp"))
        return self._run

    def _path(self) -> Path:
        first = self._finished[0].unit if self._finished else self._unit
        return self._directory / f"run-{first:06d}.run"

    def _end_run(self) -> None:
        self._write_collected()
        run, path, finished = self._open_run(), self._path(), self._finished
        run.close({"parts": self._parts, "finished": [vars(result) for result in finished]})
        self._background.submit(lambda: publish(path.with_suffix(".tmp"), path))
        self._runs.append(Run(name=path.name, parts=self._parts, finished=finished))
        self._run, self._finished = None, []


class _Values:
    """A column of values of fixed width that grows in memory reserved beforehand."""

    def __init__(self, rows: int, width: int) -> None:
        self._values = np.empty((rows, width), np.uint8)

    def bytes(self, rows: int) -> int:
        return 0  # counted by the row

    def append(self, rows: int, column: pa.Array) -> None:
        """Add values behind the first `rows`."""
        self._values[rows : rows + len(column)] = key_array(column)

    def column(self, rows: int) -> pa.Array:
        """Return the first `rows` values, without a copy."""
        return key_column(self._values[:rows])


class _Texts:
    """A column of texts that grows in memory reserved beforehand."""

    def __init__(self, rows: int, capacity: int) -> None:
        self._offsets = np.zeros(rows + 1, np.int32 if capacity < 2**31 else np.int64)
        self._values = np.empty(capacity, np.uint8)

    def bytes(self, rows: int) -> int:
        return int(self._offsets[rows])

    def append(self, rows: int, column: pa.Array) -> None:
        """Add texts behind the first `rows`."""
        offsets, values = parts(column)
        first, last, start = int(offsets[0]), int(offsets[-1]), self.bytes(rows)
        self._values[start : start + last - first] = values[first:last]
        self._offsets[rows + 1 : rows + len(offsets)] = offsets[1:] + (start - first)

    def column(self, rows: int) -> pa.Array:
        """Return the first `rows` texts, without a copy."""
        return to_binary(self._offsets[: rows + 1], self._values[: self.bytes(rows)])


def _text_sizes(table: Table) -> np.ndarray:
    """Return the bytes of all texts of each row, int64 [N]."""
    sizes = np.zeros(table.rows, np.int64)
    for column in table.columns:
        if not pa.types.is_fixed_size_binary(column.type):
            sizes += np.diff(parts(column)[0])
    return sizes


def _text_bytes(column: pa.Array) -> int:
    if pa.types.is_fixed_size_binary(column.type):
        return 0
    offsets, _ = parts(column)
    return int(offsets[-1]) - int(offsets[0])


def parts_of(runs: Sequence[Run]) -> int:
    """Return the number of buckets of a shard in the runs of a job."""
    return runs[0].parts if runs else 1


def usable_runs(directory: Path) -> list[Run]:
    """Read which runs of an interrupted job can be used, and remove the others."""
    for path in directory.glob("run-*.tmp"):
        path.unlink()
    runs = []
    for path in sorted(directory.glob("run-*.run")):
        run = _read_about(path)
        if run is None:  # its units are done again
            path.unlink()
        else:
            runs.append(run)
    return runs


def _read_about(path: Path) -> Run | None:
    try:
        about = RunReader(path).about
        finished = [UnitResult(**unit) for unit in about["finished"]]
        run = Run(name=path.name, parts=about["parts"], finished=finished)
    except (DamagedRun, KeyError, TypeError):
        return None
    for unit in finished:
        unit.counts = Counter(unit.counts)
    return run
