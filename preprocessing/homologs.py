"""Random protein families: ancestors, and members with gaps and substitutions.

Ancestors have natural lengths and amino-acid frequencies; members differ from theirs by short gaps
and by substitutions as frequent as in alignments of homologs. Arithmetic is such that results do
not depend on the machine: see `preprocessing.philox`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

from preprocessing.philox import RandomStream
from preprocessing.vocabulary import AMINO_ACIDS

BACKGROUND_PERCENT = {
    "A": 8.25, "C": 1.38, "D": 5.46, "E": 6.72, "F": 3.86, "G": 7.07, "H": 2.27, "I": 5.91,
    "K": 5.80, "L": 9.65, "M": 2.41, "N": 4.06, "P": 4.74, "Q": 3.93, "R": 5.53, "S": 6.64,
    "T": 5.35, "V": 6.86, "W": 1.10, "Y": 2.92,
}  # fmt: skip
"""Amino-acid composition of UniProtKB/Swiss-Prot by its release statistics (about 2021)."""

RARE_LETTER_WEIGHTS = {"X": 90, "U": 4, "B": 2, "Z": 2, "O": 1, "J": 1}
"""What the rare letters are, in percent of them; in TrEMBL too nearly all are X."""

LOWERCASE_LENGTHS = (10, 60)
"""Shortest and longest stretch in lower case, such as repeat maskers leave."""

LENGTH_SIGMA = 0.75
"""Spread of the log-normal lengths; it gives TrEMBL's ratio of mean to median, 1.3."""

MEAN_TO_MEDIAN = 1.325
"""Mean over median of the lengths: exp(LENGTH_SIGMA^2 / 2)."""

MIN_LENGTH = 11
"""Shortest ancestor: UniRef90 and UniRef50 leave out sequences of fewer than 11 residues."""

MAX_LENGTH = 35_000
"""Longest sequence; human titin has 34,350 residues."""

LINE = 60
"""Residues in a line of `Members`, and in one of UniRef's FASTA."""


@dataclass(frozen=True)
class Ancestors:
    """One sequence of each family, one after another."""

    residues: np.ndarray
    """uint8 [sum of lengths], ASCII."""
    starts: np.ndarray
    """intp [families], in `residues`."""
    lengths: np.ndarray
    """intp [families]."""


@dataclass(frozen=True)
class Members:
    """Sequences in the making: every one begins a new line of `LINE` residues."""

    residues: np.ndarray
    """uint8 [lines * LINE], ASCII; the last line of each member is filled up with anything."""
    starts: np.ndarray
    """intp [members], in `residues`."""
    lengths: np.ndarray
    """intp [members]."""
    identities: np.ndarray
    """intp [members]: identical columns in 10,000 columns of the alignment with the ancestor."""


def random_lengths(random: RandomStream, count: int, median: int) -> np.ndarray:
    """Return intp [count], log-normal but for tails that end at 6 sigma."""
    # Twelve uniform numbers add up to nearly a normal one (Irwin-Hall), and (1 + x / 2^20)^(2^20)
    # is exp(x) to 5 digits; library functions differ in the last bit between machines.
    sums = random.draw(12 * count, "<u2").reshape(-1, 12).sum(axis=1, dtype=np.int64)
    factors = 1 + LENGTH_SIGMA * ((sums - 6 * 65_535) / 65_536) / 2**20
    for _ in range(20):
        factors *= factors
    return (median * factors + 0.5).astype(np.intp).clip(MIN_LENGTH, MAX_LENGTH)


def make_ancestors(random: RandomStream, lengths: np.ndarray) -> Ancestors:
    """Return random sequences of these lengths, with natural frequencies."""
    residues = _background()[random.draw(int(lengths.sum()), "<u2")]
    return Ancestors(residues, np.cumsum(lengths) - lengths, lengths)


def make_members(
    random: RandomStream,
    ancestors: Ancestors,
    families: np.ndarray,
    *,
    min_identity: float,
    max_identity: float,
) -> Members:
    """Copy an ancestor for every entry of `families`, with gaps and substitutions.

    Args:
        random: where to draw from.
        ancestors: what to copy.
        families: intp [members]: indices of ancestors, in rising order.
        min_identity: least identity of a member to its ancestor; it is drawn uniformly from min
            to max, as a fraction of alignment columns, gaps included, and met but for sampling.
        max_identity: greatest identity.
    """
    count = len(families)
    begins, ancestor_lengths = ancestors.starts[families], ancestors.lengths[families]
    targets = min_identity + (max_identity - min_identity) * random.fractions(count)

    # Where gaps are: per gap the member that has it, the cut before it, what goes in or out.
    expected_gaps = ancestor_lengths * (1 - targets) * _GAPS_PER_DIFFERENCE
    gaps = (expected_gaps + random.fractions(count)).astype(np.intp)
    owners = np.repeat(np.arange(count), gaps)
    cuts = 1 + random.below(ancestor_lengths[owners] - 1)
    cuts = np.sort(owners << 16 | cuts) & 0xFFFF  # in order; MAX_LENGTH is below 2^16
    draws = random.draw(len(owners), "<u1")
    inserted = np.where(draws & 16, _GAP_LENGTHS[draws & 15], 0)
    deleted = _GAP_LENGTHS[draws & 15] - inserted

    # A member is a row of pieces of `source`, the ancestors and then random residues: the
    # ancestor's up to a gap, what is inserted there (perhaps nothing), the ancestor's from there.
    low, high = begins[0], begins[-1] + ancestor_lengths[-1]
    slack = LINE + int(_GAP_LENGTHS.max())
    random_residues = _background()[random.draw(int(inserted.sum()) + slack, "<u2")]
    source = np.concatenate([ancestors.residues[low:high], random_residues])
    begins = begins - low
    first_pieces = np.arange(count) + 2 * (np.cumsum(gaps) - gaps)
    last_pieces = first_pieces + 2 * gaps
    gap_pieces = owners + 1 + 2 * np.arange(len(owners))
    starts = np.empty(count + 2 * len(owners), np.intp)
    stops = np.empty_like(starts)
    starts[first_pieces] = begins
    stops[last_pieces] = begins + ancestor_lengths
    stops[gap_pieces - 1] = begins[owners] + cuts
    starts[gap_pieces + 1] = begins[owners] + cuts + deleted
    stops[gap_pieces] = high - low + np.cumsum(inserted)
    starts[gap_pieces] = stops[gap_pieces] - inserted
    sizes = np.maximum(stops - starts, 0)  # a deletion may reach over the next cut
    lengths = np.add.reduceat(sizes, first_pieces)
    lines = -(-lengths // LINE)
    sizes[last_pieces] += lines * LINE - lengths
    residues = source.take(_ranges(starts, sizes))

    # Identity counts alignment columns: substitute more rarely where gaps have cost some of it.
    insertions = np.bincount(owners, inserted, count).astype(np.intp)
    columns, kept = ancestor_lengths + insertions, lengths - insertions
    rates = np.clip(1 - targets * columns / kept, 0, 255 / 256)
    thresholds = np.repeat((rates * 256 + 0.5).astype(np.uint8), lines)
    changed = random.draw(len(residues), "<u1").reshape(-1, LINE) < thresholds[:, None]
    changed = changed.reshape(-1)
    piece_places = np.cumsum(sizes) - sizes
    changed[_ranges(piece_places[gap_pieces], inserted)] = False  # random residues already
    changes = np.flatnonzero(changed)
    cells = (residues[changes] & 31).astype(np.intp) << 12 | random.draw(len(changes), "<u2") >> 4
    residues[changes] = _substitutes().take(cells)

    places = piece_places[first_pieces]
    substitutions = np.searchsorted(changes, places + lengths) - np.searchsorted(changes, places)
    identities = ((kept - substitutions) * 10_000 + columns // 2) // columns
    return Members(residues, places, lengths, identities)


def strew_rare_letters(
    random: RandomStream, members: Members, *, rare_rate: float, lowercase_rate: float
) -> None:
    """Change members in place: put B, J, O, U, X, Z and lower-case stretches into them.

    Args:
        random: where to draw from.
        members: what to change.
        rare_rate: share of residues that become rare letters (`RARE_LETTER_WEIGHTS`).
        lowercase_rate: share of members with one stretch in lower case (`LOWERCASE_LENGTHS`).
    """
    residues = members.residues
    count = int(len(residues) * rare_rate + random.fractions(1)[0])
    places = random.below(np.full(count, len(residues)))
    residues[places] = _rare_letters()[random.draw(count, "<u2")]

    chosen = random.fractions(len(members.lengths)) < lowercase_rate
    lengths, starts = members.lengths[chosen], members.starts[chosen]
    offsets = random.below(lengths)
    shortest, longest = LOWERCASE_LENGTHS
    stretches = shortest + random.below(np.full(len(lengths), longest + 1 - shortest))
    residues[_ranges(starts + offsets, np.minimum(stretches, lengths - offsets))] |= 0x20


# Gaps: one for each twenty expected differences; their lengths, for four random bits, fall off
# about geometrically.
_GAPS_PER_DIFFERENCE = 0.05
_GAP_LENGTHS = np.array([1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 4, 5, 8])

# BLOSUM62 (Henikoff and Henikoff 1992) below the diagonal: rows and columns as in AMINO_ACIDS.
_BLOSUM62 = """
A
C  0
D -2 -3
E -1 -4  2
F -2 -2 -3 -3
G  0 -3 -1 -2 -3
H -2 -3 -1  0 -1 -2
I -1 -1 -3 -3  0 -4 -3
K -1 -3 -1  1 -3 -2 -1 -3
L -1 -1 -4 -3  0 -4 -3  2 -2
M -1 -1 -3 -2  0 -3 -2  1 -1  2
N -2 -3  1  0 -3  0  1 -3  0 -3 -2
P -1 -3 -1 -1 -4 -2 -2 -3 -1 -3 -2 -2
Q -1 -3  0  2 -3 -2  0 -3  1 -2  0  0 -1
R -1 -3 -2  0 -3 -2  0 -3  2 -2 -1  0 -2  1
S  1 -1  0  0 -2  0 -1 -2  0 -2 -1  1 -1  0 -1
T  0 -1 -1 -1 -2 -2 -2 -1 -1 -1 -1  0 -1 -1 -1  1
V  0 -1 -3 -2 -1 -3 -3  3 -2  1  1 -3 -2 -2 -3 -2  0
W -3 -2 -4 -3  1 -2 -2 -3 -3 -2 -1 -4 -4 -2 -3 -3 -2 -3
Y -2 -2 -3 -2  3 -3  2 -1 -2 -1 -1 -2 -3 -1 -2 -2 -2 -1  2
"""


@cache
def _substitutes() -> np.ndarray:
    """Return uint8 [32 * 4096]: what may stand for a residue, at (residue & 31) * 4096.

    A pair of residues is weighted with its frequency in alignments of homologs, which BLOSUM62
    gives as half-bits over chance. Scaling rows and columns alike (as Sinkhorn and Knopp) until a
    row adds up to its residue's frequency keeps that frequency under any number of substitutions.
    """
    frequencies = [BACKGROUND_PERCENT[residue] for residue in AMINO_ACIDS]
    pairs = [[0.0] * len(AMINO_ACIDS) for _ in AMINO_ACIDS]
    for a, row in enumerate(_BLOSUM62.strip().splitlines()):
        for b, score in enumerate(map(int, row.split()[1:])):
            ratio = math.ldexp(math.sqrt(2) if score % 2 else 1.0, score // 2)
            pairs[a][b] = pairs[b][a] = frequencies[a] * frequencies[b] * ratio
    scales = [1.0] * len(AMINO_ACIDS)
    for _ in range(50):
        sums = [math.fsum(map(operator.mul, weights, scales)) for weights in pairs]
        scales = [
            math.sqrt(scale * frequency / total)
            for scale, frequency, total in zip(scales, frequencies, sums, strict=True)
        ]
    table = np.zeros((32, 4096), np.uint8)
    for residue, weights in zip(AMINO_ACIDS, pairs, strict=True):
        scaled = map(operator.mul, weights, scales)
        table[ord(residue) & 31] = _lookup(dict(zip(AMINO_ACIDS, scaled, strict=True)), 12)
    return table.reshape(-1)


@cache
def _background() -> np.ndarray:
    return _lookup(BACKGROUND_PERCENT, 16)


@cache
def _rare_letters() -> np.ndarray:
    return _lookup(RARE_LETTER_WEIGHTS, 16)


def _lookup(weights: Mapping[str, float], bits: int) -> np.ndarray:
    """Return uint8 [2^bits] that holds every letter in proportion to its weight."""
    values = list(weights.values())
    total = math.fsum(values)
    edges = [
        math.floor(math.fsum(values[:i]) / total * 2**bits + 0.5) for i in range(len(values) + 1)
    ]
    return np.repeat(np.frombuffer("".join(weights).encode("ascii"), np.uint8), np.diff(edges))


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the numbers from start to start + length - 1 of every pair, one after another."""
    stops = np.cumsum(lengths)
    numbers = np.repeat(starts - stops + lengths, lengths)
    numbers += np.arange(len(numbers))
    return numbers
