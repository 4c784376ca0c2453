"""Seeded UniRef-like FASTA of any size: families, duplicates, hidden test families, GO terms.

A corpus without a download: for tests, benchmarks and demonstrations. It is made of *families*.
Each has a random ancestor with natural amino-acid frequencies; its members are copies with
BLOSUM62-like substitutions and short gaps, so a model has something to learn and BLASTP or MMseqs2
something to find. Families follow one another in the file, as UniRef's clusters do.

Same options, same bytes, whatever the machine and the NumPy version (see `preprocessing.philox`);
gzipped bytes depend on the zlib besides. The hidden families, the truth table and the GO terms do
not change the main FASTA.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, compress
from pathlib import Path

import numpy as np

from preprocessing.errors import InputError, as_typed
from preprocessing.families import Block, Goal, Tally, plan_families
from preprocessing.homologs import (
    MAX_LENGTH,
    MEAN_TO_MEDIAN,
    MIN_LENGTH,
    make_members,
    strew_rare_letters,
)
from preprocessing.outputs import OutputFile, replaced_files
from preprocessing.philox import RandomStream
from preprocessing.truth import MAX_HIDDEN_FAMILIES, TRUTH_HEADER, go_rows, truth_rows
from preprocessing.uniref_fasta import ACCESSIONS, expected_bytes, format_records, make_accessions

MEMBERS_PER_FAMILY = 50
"""Mean family size where the number of families is not given, and of the hidden families."""

MAX_RECORDS = ACCESSIONS // 2
"""Most records; it leaves ids for the hidden set and for a wrong estimate."""

# Random streams: 0 and 1 of the main set, then two of the hidden one.
_HIDDEN_STREAMS = 2


@dataclass(frozen=True, kw_only=True)
class SynthesisOptions:
    """What to synthesize; the same options give the same text.

    Raises:
        InputError: if an option is out of range, or if not exactly one of `records` and
            `size_bytes` is given.
    """

    records: int | None = None
    """Records of the main FASTA, exactly; or give `size_bytes`."""
    size_bytes: int | None = None
    """Bytes of the main FASTA before compression: it ends with the record that reaches them."""
    seed: int = 0
    """Any number from 0 to 2^64 - 1."""
    families: int | None = None
    """Families of the main FASTA; by default one for each `MEMBERS_PER_FAMILY` records."""
    median_length: int = 250
    """Median length of an ancestor in residues; the lengths are log-normal."""
    min_identity: float = 0.5
    """Least identity of a member to its family's ancestor; it is drawn uniformly from min to max,
    as a fraction of alignment columns, gaps included, and met but for sampling."""
    max_identity: float = 0.95
    """Greatest identity of a member to its family's ancestor."""
    duplicate_rate: float = 0.005
    """Share of records that repeat, under another id, a sequence of their family that stands
    before them in the file."""
    rare_rate: float = 4e-4
    """Share of residues that are B, J, O, U, X or Z; TrEMBL has about this many X."""
    lowercase_rate: float = 1e-3
    """Share of records with one stretch in lower case."""
    annotated_rate: float = 0.45
    """Share of records that the GO table lists; in UniRef90 46 of 106 million (ProteinBERT)."""
    hidden_families: int = 0
    """Further families, of `MEMBERS_PER_FAMILY` members on average, for the hidden FASTA."""

    def __post_init__(self) -> None:
        if (self.records is None) == (self.size_bytes is None):
            raise InputError("give either --size or --records, not both")
        for name, least, most in (
            ("records", 1, None),
            ("size_bytes", 1, None),
            ("seed", 0, 2**64 - 1),
            ("families", 1, None),
            ("median_length", MIN_LENGTH, MAX_LENGTH),
            ("min_identity", 0, 1),
            ("max_identity", 0, 1),
            ("duplicate_rate", 0, 1),
            ("rare_rate", 0, 1),
            ("lowercase_rate", 0, 1),
            ("annotated_rate", 0, 1),
            ("hidden_families", 0, MAX_HIDDEN_FAMILIES),
        ):
            value = getattr(self, name)
            # Written so that NaN fails.
            if value is not None and not (value >= least and (most is None or value <= most)):
                upper = "" if most is None else f" and at most {most}"
                raise InputError(f"{_typed(name)} {value} must be at least {least}{upper}")
        if self.min_identity > self.max_identity:
            raise InputError(
                f"--min-identity {self.min_identity} is above --max-identity "
                f"{self.max_identity}: "
                "lower the one or raise the other"
            )
        expected = self._expected_records()
        if expected > MAX_RECORDS:
            raise InputError(
                f"about {expected} records are more than there are ids for: "
                f"ask for at most {MAX_RECORDS}"
            )
        if self.families is not None and self.families > expected:
            raise InputError(
                f"--families {self.families} do not fit into about {expected} records: "
                "ask for fewer families or more records"
            )

    def family_count(self) -> int:
        """Return the number of families of the main FASTA."""
        return self.families or max(1, self._expected_records() // MEMBERS_PER_FAMILY)

    def _expected_records(self) -> int:
        if self.records is not None:
            return self.records
        mean_length = int(self.median_length * MEAN_TO_MEDIAN)
        return max(1, (self.size_bytes or 0) // expected_bytes(mean_length))


@dataclass(frozen=True, kw_only=True)
class SynthesisSummary:
    """What was written; `bytes` is the main FASTA before compression, `hidden_*` the other one."""

    records: int
    residues: int
    bytes: int
    families: int
    duplicates: int
    annotated: int
    hidden_records: int
    hidden_families: int


def synthesize(
    output: Path,
    options: SynthesisOptions,
    *,
    hidden_output: Path | None = None,
    truth: Path | None = None,
    go_terms: Path | None = None,
    overwrite: bool = False,
) -> SynthesisSummary:
    """Write a UniRef50-like FASTA, and what goes with it.

    Every file is written beside its place under a `.part` name and renamed when all are whole;
    one whose name ends in `.gz` is gzip-compressed. Memory is bounded whatever the size.

    Args:
        output: the main FASTA.
        options: what to write.
        hidden_output: FASTA of families that the main one does not have.
        truth: table of all records of both, tab-separated under a header line: `id`, `family` (a
            number, from 0; the hidden ones follow), `identity` (identical columns over alignment
            columns with the ancestor, before rare letters), `hidden` (0 or 1).
        go_terms: table of the annotated records of both, tab-separated without a header line: id
            and `;`-separated GO terms, 1 to 6 and the same for all of a family.
        overwrite: replace files that exist.

    Returns:
        What was written.

    Raises:
        InputError: if `hidden_output` and `options.hidden_families` do not go together, a file
            exists, two outputs are one file, a file cannot be written, or the families do not fit.
    """
    if (hidden_output is None) != (options.hidden_families == 0):
        given, missing = "--hidden-families", "--hidden-output"
        if hidden_output is not None:
            given, missing = missing, given
        raise InputError(f"{given} is given without {missing}: give both or neither")
    main = Goal(
        amount=options.records or options.size_bytes or 0,
        in_records=options.records is not None,
        families=options.family_count(),
    )
    paths = [path for path in (output, hidden_output, truth, go_terms) if path is not None]
    with replaced_files(paths, overwrite=overwrite) as files:
        truth_table = files[truth] if truth else None
        go_table = files[go_terms] if go_terms else None
        if truth_table:
            truth_table.write(TRUTH_HEADER)
        done = _write_set(main, options, files[output], truth_table, go_table)
        if options.families and done.families < options.families:
            raise InputError(
                f"--size {options.size_bytes} was full after {done.families} of "
                f"--families {options.families}: ask for fewer families or more bytes"
            )
        hidden_done = Tally()
        if hidden_output:
            hidden = Goal(
                amount=options.hidden_families * MEMBERS_PER_FAMILY,
                in_records=True,
                families=options.hidden_families,
                first_family=main.families,
                first_record=done.records,
                hidden=True,
            )
            hidden_done = _write_set(hidden, options, files[hidden_output], truth_table, go_table)
    return SynthesisSummary(
        records=done.records,
        residues=done.residues,
        bytes=done.bytes,
        families=done.families,
        duplicates=done.duplicates,
        annotated=done.annotated + hidden_done.annotated,
        hidden_records=hidden_done.records,
        hidden_families=hidden_done.families,
    )


def _typed(name: str) -> str:
    if name.endswith("_rate"):
        return name  # no option of the command line
    return "--size" if name == "size_bytes" else as_typed(name)


def _write_set(
    goal: Goal,
    options: SynthesisOptions,
    fasta: OutputFile,
    truth: OutputFile | None,
    go_terms: OutputFile | None,
) -> Tally:
    first_stream = _HIDDEN_STREAMS if goal.hidden else 0
    random, annotation = (RandomStream(options.seed, first_stream + i) for i in range(2))
    tally = Tally()
    for chunk in _chunks(random, options, goal, tally):
        text = "".join(chunk.texts).encode("ascii")
        fasta.write(text)
        tally.records += len(chunk.ids)
        tally.residues += sum(chunk.lengths)
        tally.bytes += len(text)
        tally.families = chunk.families[-1] - goal.first_family + 1
        tally.duplicates += sum(chunk.duplicates)
        if truth:
            rows = truth_rows(chunk.ids, chunk.families, chunk.identities, hidden=goal.hidden)
            truth.write(rows)
        if go_terms:
            chosen = (annotation.fractions(len(chunk.ids)) < options.annotated_rate).tolist()
            rows = go_rows(
                list(compress(chunk.ids, chosen)),
                list(compress(chunk.families, chosen)),
                seed=options.seed,
                first_family=goal.first_family,
                hidden=goal.hidden,
            )
            go_terms.write(rows)
            tally.annotated += sum(chosen)
    return tally


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """Records in order; lists of equal length."""

    ids: list[str]
    texts: list[str]  # header line and sequence lines
    lengths: list[int]
    families: list[int]
    identities: list[int]  # to the ancestor, in 1/10,000
    duplicates: list[bool]


def _chunks(
    random: RandomStream, options: SynthesisOptions, goal: Goal, tally: Tally
) -> Iterator[_Chunk]:
    """Yield records until the tally, kept by whoever takes them, has reached the goal."""
    for block in plan_families(random, goal, tally, options.median_length):
        for families in block.batches():
            yield _chunk(random, options, goal, tally, block, families)
            if goal.left(tally) <= 0:
                return


def _chunk(
    random: RandomStream,
    options: SynthesisOptions,
    goal: Goal,
    tally: Tally,
    block: Block,
    families: np.ndarray,
) -> _Chunk:
    """Make a record of each of the block's `families`, or as many as the goal leaves room for."""
    members = make_members(
        random,
        block.ancestors,
        families,
        min_identity=options.min_identity,
        max_identity=options.max_identity,
    )
    strew_rare_letters(
        random, members, rare_rate=options.rare_rate, lowercase_rate=options.lowercase_rate
    )
    # A duplicate shows the sequence of the first member of its family in the chunk.
    numbers = np.arange(len(families))
    firsts = np.searchsorted(families, families)
    duplicates = (random.fractions(len(families)) < options.duplicate_rate) & (firsts < numbers)
    shown = np.where(duplicates, firsts, numbers)

    lengths = np.minimum(members.lengths, MAX_LENGTH)[shown]
    accessions = make_accessions(goal.first_record + tally.records + numbers, options.seed)
    names = [block.names[family] for family in families]
    texts = format_records(
        random, accessions, names, members.residues, members.starts[shown], lengths
    )
    costs = [1] * len(texts) if goal.in_records else map(len, texts)
    kept = bisect_left(list(accumulate(costs, initial=0)), goal.left(tally))
    return _Chunk(
        ids=[f"UniRef50_{accession}" for accession in accessions[:kept]],
        texts=texts[:kept],
        lengths=lengths[:kept].tolist(),
        families=(block.first_family + families)[:kept].tolist(),
        identities=members.identities[shown][:kept].tolist(),
        duplicates=duplicates[:kept].tolist(),
    )
