"""Marks: rows of the map phase that keep their equals out of a shard.

Whether a record is excluded or held out may depend on more than its residues: on its id, on the
protein that a window was cut from, on the cluster that it belongs to. Records with equal residues
could then have different fates, on ranks that know nothing of each other. So whoever excludes a
record or holds it out leaves a mark in the shard where its equals will be, and the reduce phase
obeys: excluded wins over held out, held out wins over training.

A mark is a row that has the key, no id, and for residues one byte that is no residue.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa

from preprocessing.columns import parts, to_binary
from preprocessing.keysets import KeySet

EXCLUDED, IN_HOLDOUT = ord("-"), ord("+")

_FIRST_LETTER = ord("A")


def mark_residues(count: int, mark: int) -> pa.Array:
    """Return the residues, binary [count], of marks."""
    return to_binary(np.arange(count + 1, dtype=np.int32), np.full(count, mark, np.uint8))


def mark_rows(residues: pa.Array) -> np.ndarray:
    """Return which rows, int64 [M], of residues, binary [N], are marks."""
    offsets, values = parts(residues)
    short = np.flatnonzero(np.diff(offsets) == 1)
    return short[values[offsets[short]] < _FIRST_LETTER]


def obey_marks(keys: np.ndarray, residues: pa.Array) -> tuple[np.ndarray, Counter[str]]:
    """Find the records that stay.

    Args:
        keys: uint8 [N, 16], of records and marks that include all with any of these keys.
        residues: binary [N].

    Returns:
        The rows that are no marks and that no mark keeps out, int64 [M], rising; and how many
        records and residues were kept out: `excluded.records`, `in_holdout.records` and so on.
    """
    offsets, values = parts(residues)
    lengths = np.diff(offsets)
    marks = mark_rows(residues)
    stays = np.ones(len(keys), bool)
    stays[marks] = False
    counts: Counter[str] = Counter()
    for reason, mark in {"excluded": EXCLUDED, "in_holdout": IN_HOLDOUT}.items():
        marked = KeySet.of(keys[marks[values[offsets[marks]] == mark]])
        gone = stays & marked.contains(keys)
        counts[f"{reason}.records"] = int(np.count_nonzero(gone))
        counts[f"{reason}.residues"] = int(lengths[gone].sum())
        stays &= ~gone
    return np.flatnonzero(stays), counts
