"""Reading at memory addresses: rows of mapped files, wherever they lie, in a few vectorised calls.

Arrow's `take` copies rows from one contiguous column, and is slow across several. The process has
one address space, so rows of many columns are rows of one column that begins at the lowest of them.
The caller vouches that all addresses lie in buffers that stay alive meanwhile.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def read_at(addresses: np.ndarray, dtype: type[np.generic]) -> np.ndarray:
    """Return the values at addresses (int64 [N], N > 0) that are multiples of `dtype`'s size."""
    size = np.dtype(dtype).itemsize
    lowest = int(addresses.min())
    memory = pa.foreign_buffer(lowest, int(addresses.max()) - lowest + size)
    return np.frombuffer(memory, dtype)[(addresses - lowest) // size]


def gather_at(starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Copy the bytes from `starts[i]` up to `stops[i]` next to each other.

    Args:
        starts: int64 [N] addresses, N > 0, in any order.
        stops: int64 [N] addresses, none below its start.

    Returns:
        uint8 [sum(stops - starts)].
    """
    lowest = int(starts.min())
    span = int(stops.max()) - lowest
    # Rows 1, 3, 5 … are the pieces, the others what lies between them. Arrow makes room for the
    # mean length of all rows; the first and the last bound are chosen so that it is the right one.
    bounds = np.empty(2 * len(starts) + 2, np.int64)
    bounds[0] = 0
    np.subtract(starts, lowest, out=bounds[1:-1:2])
    np.subtract(stops, lowest, out=bounds[2:-1:2])
    bounds[-1] = min(2 * int((stops - starts).sum()), span)
    column = pa.Array.from_buffers(
        pa.large_binary(),
        len(bounds) - 1,
        [None, pa.py_buffer(bounds), pa.foreign_buffer(lowest, span)],
        null_count=0,
    )
    pieces = pc.take(column, pa.array(np.arange(1, len(bounds) - 1, 2)), boundscheck=False)
    return np.frombuffer(pieces.buffers()[2], np.uint8)
