"""Overlapping windows of long proteins."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from preprocessing.columns import parts, take, to_binary

_BATCH_BYTES = 2**24
"""About as many residues are cut at a time, so that one huge protein needs no more memory."""


def cut_windows(
    ids: pa.Array, sequences: pa.Array, length: int, overlap: int
) -> Iterator[tuple[pa.Array, pa.Array, np.ndarray]]:
    """Cut every sequence into windows of `length` residues.

    A window begins `length - overlap` residues after the one before; the last one ends with the
    sequence, and so may overlap the one before by more.

    Args:
        ids: binary [N].
        sequences: binary [N], each longer than `length`.
        length: residues of a window.
        overlap: residues that a window shares with the next, at least; below `length`.

    Yields:
        The ids of W windows, binary [W]: `ID/FIRST-LAST`, counted from 1; their residues, binary
        [W]; and the row that each was cut from, int64 [W].
    """
    offsets, values = parts(sequences)
    excess = np.diff(offsets).astype(np.int64) - length
    step = length - overlap
    counts = count_windows(excess + length, length, overlap)
    parents = np.repeat(np.arange(len(counts)), counts)
    place = np.arange(len(parents)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.minimum(place * step, excess[parents])

    views = np.lib.stride_tricks.sliding_window_view(values, length)
    batch = max(1, _BATCH_BYTES // length)
    for first in range(0, len(parents), batch):
        start, parent = starts[first : first + batch], parents[first : first + batch]
        residues = views[offsets[parent] + start].reshape(-1)
        bounds = np.arange(len(parent) + 1, dtype=np.int32) * np.int32(length)
        ranges = pc.binary_join_element_wise(_decimal(start + 1), _decimal(start + length), b"-")
        names = pc.binary_join_element_wise(take(ids, parent), ranges, b"/")
        yield names, to_binary(bounds, residues), parent


def count_windows(lengths: np.ndarray, length: int, overlap: int) -> np.ndarray:
    """Return the number of windows, int [N], of sequences longer than a window, int [N]."""
    return 1 + -(-(lengths - length) // (length - overlap))


def _decimal(numbers: np.ndarray) -> pa.Array:
    return pa.array(numbers).cast(pa.string()).cast(pa.binary())
