"""BLASTP and MMseqs2: the commands that make a database and search it.

What depends on more than the query is pinned, so that a query finds the same whatever chunk it is
in: database size, k-mer length and number of parts. MMseqs2's steps are run one by one rather than
by `mmseqs search`, which neither tells whose list of candidates was full (in its prefilter, long
before the table of hits) nor counts identical residues unless told.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from preprocessing.filtering.hits import Table, read_table
from preprocessing.filtering.options import FilterOptions
from preprocessing.filtering.programs import ProgramError, Runner, Word, ask, find_program
from preprocessing.filtering.sequences import Totals

QUERIES, TARGETS = "queries.fasta", "targets.fasta"
"""Names of the FASTA files under ordinals."""
DATABASE = "database"
"""Name of the targets' database."""
_FOUND = "hits.tsv"


@dataclass(frozen=True)
class Found:
    """What a search found."""

    table: Table
    full: np.ndarray
    """Ordinals, int64, of the queries that filled their lists: they may have more hits."""


class Blastp:
    """NCBI BLAST+ (2.12 and newer)."""

    name = "blastp"
    first_limit = 500
    """Hits of a query asked for at first: blastp's own default."""
    _INSTALL = "install BLAST+ (Debian: ncbi-blast+, conda: bioconda::blast)"

    def __init__(self, options: FilterOptions, program: Path | None, threads: int) -> None:
        self._blastp = find_program("blastp", program, self._INSTALL)
        self._makeblastdb = find_program("makeblastdb", program, self._INSTALL)
        self._max_evalue = options.max_evalue
        self._threads = threads

    def version(self) -> str:
        """Return the version, such as "2.12.0+"."""
        return ask([self._blastp, "-version"]).split("\n", 1)[0].removeprefix("blastp: ")

    def make_database(self, runner: Runner, totals: Totals) -> None:
        """Make the database from `TARGETS`, in the runner's directory."""
        # Version 4, since version 5 keeps an LMDB file, which needs locks that parallel file
        # systems may lack.
        runner.run(
            self._makeblastdb, "-in", TARGETS, "-dbtype", "prot", "-blastdb_version", 4,
            "-title", DATABASE, "-out", DATABASE,
        )  # fmt: skip
        _check_blast_database(runner.directory, totals)

    def search(self, runner: Runner, database: str, totals: Totals, limit: int) -> Found:
        """Search `QUERIES` in the runner's directory.

        Args:
            runner: runs the program.
            database: path of the database, seen from the runner's directory.
            totals: of the targets.
            limit: hits that a query may have.
        """
        threads: list[Word] = ["-num_threads", self._threads]
        if self._threads > 1:
            threads += ["-mt_mode", 1]  # threads share the queries, not the database
        runner.run(
            self._blastp, "-query", QUERIES, "-db", database, "-dbsize", totals.residues,
            "-evalue", self._max_evalue, "-max_target_seqs", limit,
            *threads, "-outfmt",
            "7 qseqid sseqid nident length qstart qend sstart send qlen slen evalue",
            "-out", _FOUND,
        )  # fmt: skip
        path = runner.directory / _FOUND
        _check_blast_table(path)
        table = read_table(path)
        return Found(table, _with_many_targets(table, limit))


class Mmseqs:
    """MMseqs2 (14 and newer)."""

    name = "mmseqs2"
    first_limit = 10_000
    """Candidates of a query asked for at first. The prefilter takes as long whatever it is; with
    its own default, 300, most queries of a sensitive search would be run twice."""
    _INSTALL = "install MMseqs2 (Debian: mmseqs2, conda: bioconda::mmseqs2)"
    _SENSITIVITY = 5.7  # its default
    _MAX_SEQ_LEN = 65_535  # its default; a longer sequence is not searched
    _LARGE = 3_350_000_000  # residues from which on it chooses k = 7 instead of 6 by itself

    def __init__(self, options: FilterOptions, program: Path | None, threads: int) -> None:
        self._mmseqs = find_program("mmseqs", program, self._INSTALL)
        self._options = options
        self._threads = threads

    def version(self) -> str:
        """Return the version, such as "14-7e284"."""
        return ask([self._mmseqs, "version"]).strip()

    def make_database(self, runner: Runner, totals: Totals) -> None:
        """Make the database from `TARGETS`, in the runner's directory."""
        self._create_database(runner, TARGETS, DATABASE)
        made = _count_lines(runner.directory / f"{DATABASE}.index")
        if made != totals.records:
            raise ProgramError(
                f"mmseqs createdb made a database of {made:,} instead of {totals.records:,} "
                "sequences: is the disk full?"
            )

    def search(self, runner: Runner, database: str, totals: Totals, limit: int) -> Found:
        """Search `QUERIES` in the runner's directory, see `Blastp.search`."""
        options = self._options
        common: list[Word] = ["--threads", self._threads, "-v", 2]
        lengths: list[Word] = ["--max-seq-len", max(self._MAX_SEQ_LEN, totals.longest + 1)]
        self._create_database(runner, QUERIES, "queries")
        runner.run(
            self._mmseqs, "prefilter", "queries", database, "candidates",
            "-s", options.sensitivity or self._SENSITIVITY,
            "-k", 7 if totals.residues >= self._LARGE else 6,
            "--split", options.split or 1, "--split-mode", 0,
            "--max-seqs", limit, *lengths, *common,
        )  # fmt: skip
        # Mode 3 aligns, where the default, 2, estimates the identity from the score; without the
        # backtrace (-a) there is no count of identical residues, and gaps are not counted.
        runner.run(
            self._mmseqs, "align", "queries", database, "candidates", "alignments",
            "-e", options.max_evalue, "--alignment-mode", 3, "-a", 1, *lengths, *common,
        )  # fmt: skip
        runner.run(
            self._mmseqs, "convertalis", "queries", database, "alignments", _FOUND,
            "--format-output",
            "query,target,nident,alnlen,qstart,qend,tstart,tend,qlen,tlen,evalue", *common,
        )  # fmt: skip
        table = read_table(runner.directory / _FOUND)
        return Found(table, self._with_many_candidates(runner, database, limit))

    def _create_database(self, runner: Runner, fasta: str, name: str) -> None:
        # The type is said, since short or odd proteins are taken for nucleotides.
        runner.run(self._mmseqs, "createdb", fasta, name, "--dbtype", 1, "--shuffle", 0, "-v", 2)

    def _with_many_candidates(self, runner: Runner, database: str, limit: int) -> np.ndarray:
        runner.run(
            self._mmseqs, "result2stats", "queries", database, "candidates", "counts",
            "--stat", "linecount", "--threads", 1, "-v", 2,
        )  # fmt: skip
        runner.run(
            self._mmseqs, "createtsv", "queries", "counts", "counts.tsv", "--threads", 1, "-v", 2
        )
        counts = np.loadtxt(runner.directory / "counts.tsv", np.int64, ndmin=2)
        return counts[counts[:, 1] >= limit, 0]


Searcher = Blastp | Mmseqs
_SEARCHERS: dict[str, type[Searcher]] = {"blastp": Blastp, "mmseqs2": Mmseqs}


def choose_searcher(options: FilterOptions, program: Path | None, threads: int) -> Searcher:
    """Return the tool that the options name.

    Args:
        options: what is searched for.
        program: path of its program, or None: on PATH.
        threads: that it may use.

    Raises:
        InputError: if a program is missing.
    """
    return _SEARCHERS[options.tool](options, program, threads)


def _check_blast_database(directory: Path, totals: Totals) -> None:
    """See that a database is whole: makeblastdb ends well also where the disk is full."""
    heads = list(directory.glob(f"{DATABASE}*.pin"))
    size = sum(path.stat().st_size for path in directory.glob(f"{DATABASE}*.psq"))
    # Each volume is a zero byte, then sequences that each end with one.
    whole = totals.residues + totals.records + len(heads)
    if size != whole or not all(path.stat().st_size for path in heads):
        raise ProgramError(
            f"makeblastdb left an incomplete database ({size:,} of {whole:,} bytes of sequence): "
            "is the disk full?"
        )


def _check_blast_table(path: Path) -> None:
    """See that the table has its last line."""
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - 100, 0))
        if not re.search(rb"# BLAST processed \d+ queries\n$", file.read()):
            raise ProgramError(f"blastp left an incomplete table, {path}: is the disk full?")


def _with_many_targets(table: Table, limit: int) -> np.ndarray:
    """Return the queries that have hits with at least `limit` targets."""
    pairs = np.unique(np.stack([table.query, table.target]), axis=1)
    queries, counts = np.unique(pairs[0], return_counts=True)
    return queries[counts >= limit]


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b""))
