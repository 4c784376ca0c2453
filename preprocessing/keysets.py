"""Sets of 128-bit keys, sorted and mapped into memory: all ranks of a node share one copy."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from preprocessing.files import publish
from preprocessing.keys import halves


class KeySet:
    """A set of keys that answers for many at a time, by binary search."""

    def __init__(self, words: np.ndarray) -> None:
        """Take sorted keys.

        Args:
            words: uint64 [2, N], the high and the low halves of keys that rise.
        """
        self._high, self._low = words

    @classmethod
    def of(cls, keys: np.ndarray) -> KeySet:
        """Return the set of keys uint8 [N, 16], in any order."""
        return cls(_sorted_words(keys))

    @classmethod
    def load(cls, path: Path) -> KeySet:
        """Map a set that `save` wrote."""
        return cls(np.load(path, mmap_mode="r"))

    @staticmethod
    def save(path: Path, keys: np.ndarray) -> None:
        """Write the set of keys uint8 [N, 16] to a file, which is there once it is whole."""
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            np.save(file, _sorted_words(keys))
        publish(temporary, path)

    def __len__(self) -> int:
        return len(self._high)

    def contains(self, keys: np.ndarray) -> np.ndarray:
        """Return bool [N]: which of the keys uint8 [N, 16] are in the set."""
        found = np.zeros(len(keys), bool)
        if len(self) == 0:
            return found
        high, low = halves(keys)
        place = np.searchsorted(self._high, high)
        candidates = np.flatnonzero(self._high[np.minimum(place, len(self) - 1)] == high)
        while len(candidates):  # once, unless keys of the set share their high halves
            at = place[candidates]
            found[candidates] = self._low[at] == low[candidates]
            place[candidates] += 1
            more = ~found[candidates] & (at + 1 < len(self))
            candidates = candidates[more]
            candidates = candidates[self._high[place[candidates]] == high[candidates]]
        return found


def _sorted_words(keys: np.ndarray) -> np.ndarray:
    high, low = halves(keys)
    order = np.lexsort((low, high))
    words = np.stack([high[order], low[order]])
    new = np.ones(len(order), bool)
    new[1:] = (words[:, 1:] != words[:, :-1]).any(axis=0)
    return np.ascontiguousarray(words[:, new])
