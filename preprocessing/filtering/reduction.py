"""A non-redundant subset: go through the sequences, keep each that resembles none kept before."""

from __future__ import annotations

import numpy as np

from preprocessing.columns import key_array
from preprocessing.filtering.hits import Hits, join
from preprocessing.filtering.options import Keep
from preprocessing.filtering.sequences import Side
from preprocessing.keys import halves


def reduce_greedily(side: Side, hits: Hits, prefer: Keep) -> Hits:
    """Choose what is kept of a set, and name for each of the others the kept one it resembles.

    A hit counts in both directions, whichever of the two was the query. Sequences with equal
    residues are one; of its ids the first in the input is kept.

    Args:
        side: the set.
        hits: of the set with itself.
        prefer: the order in which sequences are tried.

    Returns:
        A row for each sequence that is not kept: it as the query, the one kept as the target; of
        several the one tried first.
    """
    keys, lengths = _keys_and_lengths(side)
    first_equal = _first_equal(keys)
    both = join([hits, Hits(hits.target, hits.query, hits.identity, hits.coverage, hits.evalue)])

    unique = np.unique(first_equal)
    if prefer == "longest":
        high, low = halves(keys[unique])
        unique = unique[np.lexsort((low, high, -lengths[unique]))]
    place = np.empty(len(side), np.int64)
    place[unique] = np.arange(len(unique))

    one, other = place[first_equal[both.query]], place[first_equal[both.target]]
    keeper = _keepers(one, other, len(unique))
    return _evidence(both, first_equal, unique[keeper[place[first_equal]]])


def _keepers(one: np.ndarray, other: np.ndarray, count: int) -> np.ndarray:
    """Return for each place, int64 [count], that of the kept one before it, or its own."""
    later = one > other
    order = np.lexsort((other[later], one[later]))
    places, partners = one[later][order], other[later][order]
    starts = np.searchsorted(places, np.arange(count + 1))
    keeper = np.arange(count)
    for number in np.unique(places).tolist():
        before = partners[starts[number] : starts[number + 1]]
        kept = before[keeper[before] == before]
        if len(kept):
            keeper[number] = kept[0]
    return keeper


def _evidence(both: Hits, first_equal: np.ndarray, keeper_of: np.ndarray) -> Hits:
    """Return a row for each sequence that is not its own keeper: the best alignment of the two.

    Args:
        both: hits, each in both directions.
        first_equal: int64 [N], of each sequence the first of those equal to it.
        keeper_of: int64 [N], of each sequence the kept one, perhaps itself.
    """
    one = first_equal[both.query]
    joins = np.flatnonzero(first_equal[both.target] == keeper_of[one])
    joins = joins[both.take(joins).similarity_order(one[joins])]
    leaders, first = np.unique(one[joins], return_index=True)
    removed = np.flatnonzero(keeper_of != np.arange(len(keeper_of)))
    best = joins[first[np.searchsorted(leaders, first_equal[removed])]]
    return Hits(
        removed, keeper_of[removed], both.identity[best], both.coverage[best], both.evalue[best]
    )


def _keys_and_lengths(side: Side) -> tuple[np.ndarray, np.ndarray]:
    batches = list(side.read(0, len(side)))
    keys = np.concatenate([key_array(batch.column("key")) for batch in batches])
    return keys, np.concatenate([batch.column("length").to_numpy() for batch in batches])


def _first_equal(keys: np.ndarray) -> np.ndarray:
    """Return for each key, uint8 [N, 16], the number of the first that is equal."""
    _, first, inverse = np.unique(keys.view("V16").ravel(), return_index=True, return_inverse=True)
    return first[inverse.ravel()]
