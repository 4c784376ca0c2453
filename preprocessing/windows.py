"""Overlapping windows of long proteins."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from preprocessing.columns import parts, take, to_binary

_MAX_INT32 = 2**31 - 1


def cut_windows(
    ids: pa.Array, sequences: pa.Array, length: int, overlap: int
) -> tuple[pa.Array, pa.Array, np.ndarray]:
    """Cut every sequence into windows of `length` residues.

    A window begins `length - overlap` residues after the one before; the last one ends with the
    sequence, and so may overlap the one before by more.

    Args:
        ids: binary [N].
        sequences: binary [N], each longer than `length`.
        length: residues of a window.
        overlap: residues that a window shares with the next, at least; below `length`.

    Returns:
        The windows' ids, binary [W]: `ID/FIRST-LAST`, counted from 1; their residues, binary or
        large_binary [W]; and the row that each was cut from, int64 [W].
    """
    offsets, values = parts(sequences)
    excess = np.diff(offsets).astype(np.int64) - length
    step = length - overlap
    counts = 1 + -(-excess // step)
    parents = np.repeat(np.arange(len(counts)), counts)
    place = np.arange(len(parents)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.minimum(place * step, excess[parents])

    rows = np.lib.stride_tricks.sliding_window_view(values, length)[offsets[parents] + starts]
    bounds = np.arange(len(rows) + 1) * length
    if bounds[-1] <= _MAX_INT32:
        bounds = bounds.astype(np.int32)
    ranges = pc.binary_join_element_wise(_decimal(starts + 1), _decimal(starts + length), b"-")
    names = pc.binary_join_element_wise(take(ids, parents), ranges, b"/")
    return names, to_binary(bounds, rows.reshape(-1)), parents


def _decimal(numbers: np.ndarray) -> pa.Array:
    return pa.array(numbers).cast(pa.string()).cast(pa.binary())
