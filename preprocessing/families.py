"""The families of one FASTA file: how many members each has, and in what portions they are made."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from preprocessing.homologs import Ancestors, make_ancestors, random_lengths
from preprocessing.philox import RandomStream
from preprocessing.uniref_fasta import PROTEIN_NAMES, expected_bytes

_BLOCK_FAMILIES = 1024  # planned, and held in memory, at a time
_BATCH_RESIDUES = 1 << 18  # made at a time: enough for NumPy, few enough for the cache


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What one FASTA file is to hold."""

    amount: int
    """Records or bytes."""
    in_records: bool
    families: int
    first_family: int = 0
    """Its first family's number in the whole corpus."""
    first_record: int = 0
    """Its first record's number in the whole corpus."""
    hidden: bool = False

    def left(self, tally: Tally) -> int:
        """Return how many records or bytes are missing."""
        return self.amount - (tally.records if self.in_records else tally.bytes)


@dataclass
class Tally:
    """What one FASTA file holds so far."""

    records: int = 0
    residues: int = 0
    bytes: int = 0
    families: int = 0
    duplicates: int = 0
    annotated: int = 0


@dataclass(frozen=True, kw_only=True)
class Block:
    """Families that follow one another."""

    first_family: int
    ancestors: Ancestors
    sizes: list[int]
    """Members of each."""
    names: list[str]
    """Protein name of each."""

    def batches(self) -> Iterator[np.ndarray]:
        """Yield portions of all members: intp [members], the index of each one's family."""
        families: list[int] = []
        room = _BATCH_RESIDUES
        lengths = self.ancestors.lengths.tolist()
        for family, (length, size) in enumerate(zip(lengths, self.sizes, strict=True)):
            while size:
                members = min(size, max(1, room // length))
                families += [family] * members
                size -= members
                room -= members * length
                if room < length:
                    yield np.array(families)
                    families, room = [], _BATCH_RESIDUES
        if families:
            yield np.array(families)


def plan_families(
    random: RandomStream, goal: Goal, tally: Tally, median_length: int
) -> Iterator[Block]:
    """Yield all families, the last of them with members without end.

    Family sizes follow Zipf's law in every block: the family of rank r has a share of 1 / r of the
    block's records, but at least one. The order is random, but the largest stands last: in the
    last block it takes up what the estimate of the others' bytes missed.

    Args:
        random: where to draw from.
        goal: what the file is to hold.
        tally: what it holds when the next block is asked for.
        median_length: of the ancestors, in residues.
    """
    for first in range(0, goal.families, _BLOCK_FAMILIES):
        count = min(_BLOCK_FAMILIES, goal.families - first)
        lengths = random_lengths(random, count, median_length)
        ranks = [2 + rank for rank in np.argsort(random.draw(count - 1, "<u8"), kind="stable")]
        weights = [2**32 // int(rank) for rank in [*ranks, 1]]
        costs = [1] * count if goal.in_records else expected_bytes(lengths).tolist()
        share = goal.left(tally) * count // (goal.families - first)
        spare = max(0, share - sum(costs))  # after one member for each
        unit = sum(weight * cost for weight, cost in zip(weights, costs, strict=True))
        sizes = [1 + weight * spare // unit for weight in weights]
        if first + count == goal.families:
            sizes[-1] = sys.maxsize
        names = [PROTEIN_NAMES[name] for name in random.draw(count, "<u2") % len(PROTEIN_NAMES)]
        yield Block(
            first_family=goal.first_family + first,
            ancestors=make_ancestors(random, lengths),
            sizes=sizes,
            names=names,
        )
