import re
import statistics
from collections import Counter

import numpy as np
import pytest
from Bio.Align import substitution_matrices

from preprocessing.homologs import (
    BACKGROUND_PERCENT,
    LINE,
    MAX_LENGTH,
    MIN_LENGTH,
    Ancestors,
    Members,
    make_ancestors,
    make_members,
    random_lengths,
    strew_rare_letters,
)
from preprocessing.philox import RandomStream


def family(*lengths: int, size: int, identity: tuple[float, float]) -> tuple[Ancestors, Members]:
    """Ancestors of these lengths, and `size` members of each."""
    random = RandomStream(0, 0)
    ancestors = make_ancestors(random, np.array(lengths))
    families = np.repeat(np.arange(len(lengths)), size)
    low, high = identity
    return ancestors, make_members(random, ancestors, families, min_identity=low, max_identity=high)


def texts(sequences: Ancestors | Members) -> list[str]:
    text = sequences.residues.tobytes().decode("ascii")
    places = zip(sequences.starts.tolist(), sequences.lengths.tolist(), strict=True)
    return [text[start : start + length] for start, length in places]


@pytest.mark.parametrize("median", [100, 250])
def test_lengths_are_log_normal_about_the_median(median):
    lengths = np.sort(random_lengths(RandomStream(1, 0), 10_000, median))
    # One sigma is 0.75, so 84 % are below 2.12 times the median, and 2.3 % above 4.5 times.
    for share, factor in ((0.159, 1 / 2.12), (0.5, 1), (0.841, 2.12), (0.977, 4.48)):
        assert lengths[round(share * 10_000)] == pytest.approx(factor * median, rel=0.06)


def test_lengths_have_limits():
    assert random_lengths(RandomStream(1, 0), 1000, MIN_LENGTH).min() == MIN_LENGTH
    assert random_lengths(RandomStream(1, 0), 1000, MAX_LENGTH).max() == MAX_LENGTH


@pytest.mark.parametrize("identity", [0.25, 1.0])
def test_residues_have_natural_frequencies_whatever_the_identity(identity):
    _, members = family(*[400] * 2000, size=1, identity=(identity, identity))
    counts = Counter("".join(texts(members)))
    total = sum(counts.values())
    assert set(counts) == set(BACKGROUND_PERCENT)
    for residue, percent in BACKGROUND_PERCENT.items():
        assert 100 * counts[residue] / total == pytest.approx(percent, abs=0.15)


def test_identity_one_copies_the_ancestor():
    ancestors, members = family(30, 60, 333, size=20, identity=(1, 1))
    assert texts(members) == [ancestor for ancestor in texts(ancestors) for _ in range(20)]
    assert set(members.identities.tolist()) == {10_000}


def test_identities_are_even_over_their_range():
    _, members = family(*[300] * 80, size=50, identity=(0.6, 0.9))
    identities = np.sort(members.identities) / 10_000
    assert identities.mean() == pytest.approx(0.75, abs=0.005)
    assert identities[1000] == pytest.approx(0.675, abs=0.015)
    assert identities[3000] == pytest.approx(0.825, abs=0.015)
    assert identities[20] > 0.5
    assert identities[-20] < 0.97


def test_identity_is_what_a_comparison_of_ungapped_members_finds():
    ancestors, members = family(100, size=300, identity=(0.95, 0.99))
    (ancestor,) = texts(ancestors)
    found = [
        100 * sum(a == b for a, b in zip(ancestor, text, strict=False)) for text in texts(members)
    ]
    # The gaps that a few members have move all that follows them.
    assert (members.identities == found).mean() > 0.8
    assert len(set(found)) > 5


def test_substitutions_are_conservative_as_blosum62_says():
    ancestors, members = family(*[300] * 20, size=150, identity=(0.7, 0.7))
    scores = substitution_matrices.load("BLOSUM62")
    ancestral = np.repeat(texts(ancestors), 150)
    found = [
        scores[a][b]
        # Near the N-terminus few members have had a gap.
        for first, second in zip(ancestral, texts(members), strict=True)
        for a, b in zip(first[:5], second[:5], strict=True)
        if a != b
    ]
    assert len(found) > 3000
    # Substitutes drawn by frequency alone would score -1.3 on average.
    assert statistics.mean(found) > -0.9


def test_members_have_insertions_and_deletions():
    _, members = family(500, size=400, identity=(0.5, 0.95))
    assert (members.lengths > 500).sum() > 80
    assert (members.lengths < 500).sum() > 80
    assert (abs(members.lengths - 500) < 75).all()


def test_members_begin_lines_of_their_own():
    _, members = family(11, 59, 60, 61, 700, size=30, identity=(0.3, 0.9))
    lines = -(-members.lengths // LINE)
    assert (members.starts == LINE * (np.cumsum(lines) - lines)).all()
    assert len(members.residues) == LINE * lines.sum()


def test_rare_letters_and_lower_case_come_at_their_rates():
    _, members = family(*[300] * 100, size=50, identity=(0.5, 0.95))
    strew_rare_letters(RandomStream(2, 0), members, rare_rate=2e-3, lowercase_rate=0.02)
    text = "".join(texts(members))
    counts = Counter(text.upper())
    rare = {letter: counts[letter] for letter in "BJOUXZ"}
    assert sum(rare.values()) / len(text) == pytest.approx(2e-3, rel=0.1)
    assert min(rare.values()) > 0
    assert rare["X"] > 0.8 * sum(rare.values())
    stretches = [re.findall("[a-z]+", sequence) for sequence in texts(members)]
    with_lower = [found for found in stretches if found]
    assert len(with_lower) / 5000 == pytest.approx(0.02, abs=0.006)
    assert all(len(found) == 1 and len(found[0]) <= 60 for found in with_lower)
    assert statistics.mean(len(found[0]) for found in with_lower) > 20
