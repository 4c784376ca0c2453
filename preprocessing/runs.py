"""Run files: what the map phase leaves for the reduce phase.

Rows are kept in *segments*, all rows of which belong to one *bucket*: a shard, or a part of a
shard's keys. A segment is its columns one after the other: values of fixed width as they are, and
of texts first the lengths (uint32), then the texts. An index behind the segments says where each
one lies and what its checksum is, a JSON text what else there is to know of the file. Nothing is
trusted: a file that is cut short, and a segment with a flipped bit, are noticed.
"""

from __future__ import annotations

import json
import os
import struct
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash

from preprocessing.columns import key_array, key_column, map_file, parts, take, to_binary
from preprocessing.errors import InputError
from preprocessing.files import write_all
from preprocessing.keys import KEY_BYTES

RUN_COLUMNS = pa.schema(
    [
        pa.field("key", pa.binary(KEY_BYTES), nullable=False),
        pa.field("id", pa.binary(), nullable=False),
        pa.field("residues", pa.binary(), nullable=False),
    ]
)
"""Columns of a run: texts (`binary`) and values of fixed width (`binary(width)`). The first three
are always there, in this order."""

_METADATA = pa.field("metadata", pa.binary(), nullable=False)


def run_columns(*, metadata: bool) -> pa.Schema:
    """Return the columns of the runs of a job, with or without `uniref_headers.pack_metadata`'s."""
    return RUN_COLUMNS.append(_METADATA) if metadata else RUN_COLUMNS


_BUCKET, _ROWS, _OFFSET, _CHECKSUM, _TEXTS = range(5)
"""Columns of the index, uint64; from the last one on, the bytes of each column of texts."""

_TRAILER = struct.Struct("<QQQ8s")  # segments, bytes of the JSON text, checksum of both, magic
_MAGIC = b"prothpc2"
_MAX_BUFFERS = 1000  # Linux writes 1,024 at once


class Table(NamedTuple):
    """N rows in memory."""

    columns: tuple[pa.Array, ...]
    """As in `RUN_COLUMNS`."""

    @property
    def keys(self) -> np.ndarray:
        """uint8 [N, 16]."""
        return key_array(self.columns[0])

    @property
    def ids(self) -> pa.Array:
        """Binary [N]."""
        return self.columns[1]

    @property
    def residues(self) -> pa.Array:
        """Binary [N]."""
        return self.columns[2]

    @property
    def metadata(self) -> pa.Array | None:
        """Binary [N], or None if it is not kept."""
        return self.columns[3] if len(self.columns) > len(RUN_COLUMNS) else None

    @property
    def rows(self) -> int:
        """N."""
        return len(self.columns[0])

    def take(self, rows: np.ndarray) -> Table:
        """Return a copy of some rows, int [M]."""
        return Table(tuple(take(column, rows) for column in self.columns))

    @staticmethod
    def concat(tables: Sequence[Table]) -> Table:
        """Return a copy of one or more tables, one below the other."""
        columns = zip(*(table.columns for table in tables), strict=True)
        return Table(tuple(pa.concat_arrays(column) for column in columns))


class RunWriter:
    """Writes a run file."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._index = array("Q")
        self._fields = 0
        self.bytes = 0

    def write(self, table: Table, buckets: Sequence[int], bounds: Sequence[int]) -> None:
        """Append segments.

        Args:
            table: the rows.
            buckets: the bucket of each segment.
            bounds: [segments + 1], segment i has the rows `bounds[i]` to `bounds[i + 1]`.
        """
        columns = [_Buffers(column) for column in table.columns]
        waiting: list[memoryview] = []
        for bucket, first, last in zip(buckets, bounds, bounds[1:], strict=False):
            buffers = [buffer for column in columns for buffer in column.of_rows(first, last)]
            checksum = _checksum(buffers)
            texts = [column.text_bytes(first, last) for column in columns if column.is_text]
            entry = [bucket, last - first, self.bytes, checksum, *texts]
            self._fields = len(entry)
            self._index.extend(entry)
            self.bytes += sum(buffer.nbytes for buffer in buffers)
            if len(waiting) + len(buffers) > _MAX_BUFFERS:
                write_all(self._descriptor, waiting)
                waiting = []
            waiting += buffers
        write_all(self._descriptor, waiting)

    def close(self, about: dict[str, Any]) -> None:
        """Write the index and what there is to know of the file."""
        index = np.array(self._index, "<u8").reshape(-1, self._fields or 1)
        index = index[np.argsort(index[:, _BUCKET], kind="stable")] if len(index) else index
        text = json.dumps({**about, "fields": self._fields}).encode()
        padding = bytes(-self.bytes % 8)
        entries = index.tobytes()
        trailer = _TRAILER.pack(len(index), len(text), _checksum([entries, text]), _MAGIC)
        write_all(self._descriptor, [padding, entries, text, trailer])
        os.close(self._descriptor)


class _Buffers:
    """The bytes of a column."""

    def __init__(self, column: pa.Array) -> None:
        self.is_text = not pa.types.is_fixed_size_binary(column.type)
        if self.is_text:
            self._offsets, self._values = parts(column)
            self._lengths = np.diff(self._offsets).astype("<u4")
        else:
            self._values = key_array(column)

    def of_rows(self, first: int, last: int) -> list[memoryview]:
        if not self.is_text:
            return [self._values[first:last].data]
        values = self._values[self._offsets[first] : self._offsets[last]]
        return [self._lengths[first:last].data, values.data]

    def text_bytes(self, first: int, last: int) -> int:
        return int(self._offsets[last]) - int(self._offsets[first])


def _checksum(buffers: Sequence[bytes | memoryview]) -> int:
    hasher = xxhash.xxh3_64()
    for buffer in buffers:
        hasher.update(buffer)
    return hasher.intdigest()


class DamagedRun(Exception):
    """A run file is not what was written."""


class RunReader:
    """A run file; no file stays open, so that thousands can be read side by side."""

    def __init__(self, path: Path) -> None:
        """Read what a file says of itself.

        Raises:
            DamagedRun: if it cannot be trusted.
        """
        self.path = path
        try:
            content = memoryview(map_file(path))
        except (OSError, pa.ArrowInvalid) as error:
            raise DamagedRun(str(error)) from error
        if len(content) < _TRAILER.size:
            raise DamagedRun("it is cut short")
        segments, length, checksum, magic = _TRAILER.unpack(content[-_TRAILER.size :])
        if magic != _MAGIC or length > len(content):
            raise DamagedRun("it is cut short")
        text = content[-_TRAILER.size - length : -_TRAILER.size]
        try:
            self.about: dict[str, Any] = json.loads(bytes(text))
            size = 8 * segments * self.about["fields"]
            index = content[len(content) - _TRAILER.size - length - size :][:size]
            self._index = np.frombuffer(index, "<u8").reshape(segments, -1 if segments else 1)
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedRun(f"its index is damaged ({error})") from error
        if _checksum([index, text]) != checksum:
            raise DamagedRun("its index is damaged")

    def segments(self, first: int, last: int) -> np.ndarray:
        """Return the index entries, uint64 [segments, fields], of the buckets first to last - 1."""
        bounds = np.searchsorted(self._index[:, _BUCKET], np.array([first, last], np.uint64))
        return self._index[bounds[0] : bounds[1]]


class RunSet:
    """All runs of a job, as one rank reads them."""

    def __init__(
        self, paths: Sequence[Path], *, parts: int, limit: int, schema: pa.Schema = RUN_COLUMNS
    ) -> None:
        """Open run files.

        Args:
            paths: the files.
            parts: buckets of a shard.
            limit: bytes to be read into memory at once, about.
            schema: their columns.

        Raises:
            InputError: if one is damaged.
        """
        self._parts = parts
        self._limit = limit
        self._memory = _Memory()
        self._schema = schema
        self._widths = [0 if pa.types.is_binary(f.type) else f.type.byte_width for f in schema]
        self._runs = []
        for path in paths:
            try:
                self._runs.append(RunReader(path))
            except DamagedRun as error:
                raise _gone_bad(path, error) from error

    def buckets(self, shard: int) -> Iterator[Bucket]:
        """Yield the parts of a shard in the order of their keys.

        What was read of one is overwritten when another is read.
        """
        for bucket in range(shard * self._parts, (shard + 1) * self._parts):
            found = [(run, run.segments(bucket, bucket + 1)) for run in self._runs]
            portions = self._portions([(run, entries) for run, entries in found if len(entries)])
            if portions:
                yield Bucket(self, portions)

    def _portions(self, found: list[_Segments]) -> list[list[_Segments]]:
        """Cut a list of segments so that each portion has about as many bytes as may be read."""
        portions: list[list[_Segments]] = []
        room = 0
        for run, entries in found:
            sizes = self._bytes(entries)
            start = 0
            while start < len(entries):
                if room <= 0:
                    portions.append([])
                    room = self._limit
                stop = start + max(1, int(np.searchsorted(np.cumsum(sizes[start:]), room, "right")))
                portions[-1].append((run, entries[start:stop]))
                room -= int(sizes[start:stop].sum())
                start = stop
        return portions

    def _bytes(self, entries: np.ndarray) -> np.ndarray:
        row = sum(width or 4 for width in self._widths)
        return entries[:, _ROWS].astype(np.int64) * row + entries[:, _TEXTS:].sum(1).astype(
            np.int64
        )

    def read(self, found: list[_Segments]) -> Table:
        """Read segments into memory that the next call uses again.

        Raises:
            InputError: if one is damaged; its run is removed, so that the next attempt makes it
                anew.
        """
        rows = sum(int(entries[:, _ROWS].sum()) for _, entries in found)
        texts = sum(entries[:, _TEXTS:].sum(0) for _, entries in found)
        room = _Room(self._memory, self._widths, rows, [int(size) for size in texts])
        for run, entries in found:
            try:
                self._read_run(run.path, entries, room)
            except (OSError, DamagedRun) as error:
                raise _gone_bad(run.path, error) from error
        return room.table()

    def _read_run(self, path: Path, entries: np.ndarray, room: _Room) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            # A disk that knows all that is wanted reads ahead and in the best order.
            for offset, size in zip(
                entries[:, _OFFSET].tolist(), self._bytes(entries).tolist(), strict=True
            ):
                os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_WILLNEED)
            for _, rows, offset, checksum, *texts in entries.tolist():
                buffers = room.next(rows, texts)
                got = os.preadv(descriptor, buffers, offset)
                if got != sum(buffer.nbytes for buffer in buffers):
                    raise DamagedRun("it is cut short")
                if _checksum(buffers) != checksum:
                    raise DamagedRun(f"the checksum of the segment at byte {offset:,} is wrong")
        finally:
            os.close(descriptor)


_Segments = tuple[RunReader, np.ndarray]


class Bucket(NamedTuple):
    """The rows of all runs in one part of a shard's keys."""

    runs: RunSet
    found: list[list[_Segments]]

    def portions(self) -> Iterator[Table]:
        """Yield the rows, as many at a time as memory has room for; can be done again."""
        for portion in self.found:
            yield self.runs.read(portion)

    @property
    def is_large(self) -> bool:
        """Whether there is more than one portion."""
        return len(self.found) > 1


def _gone_bad(path: Path, error: Exception) -> InputError:
    path.unlink(missing_ok=True)
    return InputError(
        f"{path}: went bad on the disk ({error}) and was removed: run the same command again, it "
        "makes the file anew; check the disk if this comes back"
    )


class _Memory:
    """Memory that is used again: fresh memory costs more than reading into it."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def cut(self, sizes: Sequence[int]) -> list[np.ndarray]:
        """Return buffers, uint8, of some sizes; those returned before lose what is in them."""
        starts = np.cumsum([0, *(size + -size % 64 for size in sizes)]).tolist()
        if starts[-1] > len(self._bytes):
            self._bytes = np.empty(0, np.uint8)  # give back before asking for more
            self._bytes = np.empty(starts[-1], np.uint8)
        return [
            self._bytes[start : start + size] for start, size in zip(starts, sizes, strict=False)
        ]


class _Room:
    """Columns in memory that are filled segment by segment."""

    def __init__(
        self, memory: _Memory, widths: Sequence[int], rows: int, texts: Sequence[int]
    ) -> None:
        text_bytes = iter(texts)
        sizes = []
        for width in widths:
            sizes += [rows * width] if width else [4 * rows, next(text_bytes)]
        self._buffers = memory.cut(sizes)
        self._widths = widths
        self._filled = [0] * len(sizes)

    def next(self, rows: int, texts: Sequence[int]) -> list[memoryview]:
        """Return the places of the next segment."""
        sizes: list[int] = []
        text_bytes = iter(texts)
        for width in self._widths:
            sizes += [rows * width] if width else [4 * rows, next(text_bytes)]
        places = []
        for number, size in enumerate(sizes):
            start = self._filled[number]
            places.append(self._buffers[number][start : start + size].data)
            self._filled[number] = start + size
        return places

    def table(self) -> Table:
        buffers = iter(self._buffers)
        columns = []
        for width in self._widths:
            if width:
                columns.append(key_column(next(buffers).reshape(-1, width)))
                continue
            lengths = next(buffers).view("<u4")
            offsets = np.zeros(len(lengths) + 1, np.int64)
            np.cumsum(lengths, out=offsets[1:])
            columns.append(to_binary(offsets.astype(np.int32), next(buffers)))
        return Table(tuple(columns))
