"""Binary Arrow columns as NumPy arrays and back, without copies and without per-row Python."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def to_binary(offsets: np.ndarray, values: np.ndarray) -> pa.Array:
    """Wrap rows `values[offsets[i]:offsets[i + 1]]` as an Arrow column; nothing is copied.

    Args:
        offsets: int32 [N + 1] (gives `binary`) or int64 [N + 1] (gives `large_binary`), rising.
        values: uint8, at least `offsets[-1]` bytes.
    """
    kind = pa.binary() if offsets.dtype == np.int32 else pa.large_binary()
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(values)]
    return pa.Array.from_buffers(kind, len(offsets) - 1, buffers, null_count=0)


def parts(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return views `(offsets [N + 1], values)` of a binary, string or list<uint8> column.

    Row i is `values[offsets[i]:offsets[i + 1]]`; offsets need not start at 0 in a sliced column.
    Offsets are int64 for the large kinds, else int32; values are uint8.
    """
    large = (
        pa.types.is_large_binary(column.type)
        or pa.types.is_large_string(column.type)
        or pa.types.is_large_list(column.type)
    )
    dtype = np.int64 if large else np.int32
    if len(column) == 0:  # Arrow allows the offsets of an empty column to be absent
        return np.zeros(1, dtype), np.empty(0, np.uint8)
    buffers = column.buffers()
    offsets = np.frombuffer(buffers[1], dtype)[column.offset : column.offset + len(column) + 1]
    values = buffers[-1]
    return offsets, np.empty(0, np.uint8) if values is None else np.frombuffer(values, np.uint8)


def gather(values: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> pa.Array:
    """Copy the pieces `values[starts[i]:stops[i]]` next to each other, as a `binary` column.

    The pieces must rise and not overlap (`starts[i] <= stops[i] <= starts[i + 1]`). They and the
    gaps between them are the rows of one zero-copy column, of which every other row is taken.
    """
    if len(starts) == 0:
        return pa.array([], pa.binary())
    bounds = np.empty(2 * len(starts), np.int32)
    bounds[0::2] = starts
    bounds[1::2] = stops
    return take(to_binary(bounds, values), np.arange(0, len(bounds), 2))


def take(column: pa.Array, rows: np.ndarray) -> pa.Array:
    """Return the given rows (int [M]) of a column; the caller vouches for the bounds."""
    return pc.take(column, pa.array(rows), boundscheck=False)


def cut_by_size(sizes: np.ndarray, limit: int) -> list[tuple[int, int]]:
    """Cut N rows into ranges, in order, each of one row or of about `limit` bytes.

    Args:
        sizes: int64 [N], bytes of each row.
        limit: bytes.
    """
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.searchsorted(ends, np.arange(limit, total, limit)) + 1
    return list(pairwise(np.unique([0, *cuts, len(sizes)]).tolist()))


def key_column(keys: np.ndarray) -> pa.Array:
    """Wrap keys, uint8 [N, K] and contiguous, as fixed_size_binary(K); nothing is copied."""
    kind = pa.binary(keys.shape[1])
    return pa.Array.from_buffers(kind, len(keys), [None, pa.py_buffer(keys)], null_count=0)


def key_array(column: pa.Array) -> np.ndarray:
    """Return a view, uint8 [N, K], of a fixed_size_binary(K) column."""
    width = column.type.byte_width
    values = np.frombuffer(column.buffers()[1], np.uint8) if len(column) else np.empty(0, np.uint8)
    return values[: (column.offset + len(column)) * width].reshape(-1, width)[column.offset :]


def map_file(path: Path) -> pa.Buffer:
    """Map a file into memory.

    The mapping lives as long as the buffer or any array made of it; no file stays open, so that
    thousands can be read side by side.

    Raises:
        OSError: if it cannot be opened.
    """
    with pa.memory_map(str(path)) as file:
        return file.read_buffer()


def open_arrow(path: Path) -> pa.ipc.RecordBatchFileReader:
    """Open an Arrow IPC file by mapping it into memory, as `map_file` does.

    Raises:
        OSError: if it cannot be opened.
        pyarrow.ArrowInvalid: if it is no whole Arrow file.
    """
    return pa.ipc.open_file(pa.BufferReader(map_file(path)))
