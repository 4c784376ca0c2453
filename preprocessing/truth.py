"""What is known of synthetic records: their families, identities and GO terms, as tables."""

from __future__ import annotations

from collections.abc import Sequence

from preprocessing.philox import RandomStream

SHARED_GO_TERMS = 64
"""GO terms that any family may have; the other terms belong to few families or to one."""

GO_VOCABULARY = 8_943
"""GO terms of the main families, as many as ProteinBERT's; hidden families have more, their own."""

MAX_HIDDEN_FAMILIES = 100_000
"""Hidden families for which there are GO terms, so that these stay below GO:1000000."""

TRUTH_HEADER = b"id\tfamily\tidentity\thidden\n"

# One random stream for every family, far from those of the sequences.
_FIRST_STREAM = 2**32


def truth_rows(
    ids: Sequence[str], families: Sequence[int], identities: Sequence[int], *, hidden: bool
) -> bytes:
    """Return a line of the truth table for each record; identities are in 1/10,000."""
    rows = zip(ids, families, identities, strict=True)
    lines = [f"{i}\t{family}\t{p / 10_000:.4f}\t{hidden:d}\n" for i, family, p in rows]
    return "".join(lines).encode("ascii")


def go_rows(
    ids: Sequence[str], families: Sequence[int], *, seed: int, first_family: int, hidden: bool
) -> bytes:
    """Return a line of the GO table for each record; a family always has the same terms.

    Args:
        ids: of the records.
        families: of the records.
        seed: of the corpus.
        first_family: the first one of the set, main or hidden, to which the families belong.
        hidden: whether that is the hidden set.
    """
    terms = {
        family: _go_terms(seed, family, family - first_family, hidden) for family in set(families)
    }
    rows = zip(ids, families, strict=True)
    return "".join([f"{i}\t{terms[family]}\n" for i, family in rows]).encode("ascii")


def _go_terms(seed: int, family: int, index: int, hidden: bool) -> str:
    """Return 1 to 3 GO terms that any family may have, and 0 to 3 of this one's own."""
    draws = RandomStream(seed, _FIRST_STREAM + family).draw(5, "<u2").tolist()
    numbers = {draw % SHARED_GO_TERMS for draw in draws[: 1 + draws[3] % 3]}
    # Three numbers are set aside for each family; the main ones go round in the vocabulary.
    rest = GO_VOCABULARY - SHARED_GO_TERMS
    first = 3 * index
    for own in range(first, first + draws[4] % 4):
        numbers.add(GO_VOCABULARY + own if hidden else SHARED_GO_TERMS + own % rest)
    return ";".join(f"GO:{1 + number:07d}" for number in sorted(numbers))
