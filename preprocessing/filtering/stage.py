"""`prothpc filter`: prepare both sides, search chunk by chunk, merge.

Only queries are cut into chunks, which MPI ranks or the tasks of a job array share out; every chunk
searches all targets, and what is pinned (see `tools`) makes the result a function of the inputs,
the options and the tool alone.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from preprocessing.errors import InputError
from preprocessing.filtering.hits import Hits, equal_pairs, join, too_similar, without
from preprocessing.filtering.options import FilterOptions, describe_options
from preprocessing.filtering.programs import Runner
from preprocessing.filtering.reduction import reduce_greedily
from preprocessing.filtering.report import (
    best_of_queries,
    describe_threshold,
    draw_histogram,
    identity_histogram,
    turned,
    write_exclusions,
    write_hits,
    write_kept,
    write_summary,
)
from preprocessing.filtering.sequences import (
    Side,
    Totals,
    is_record_set,
    write_queries,
    write_side,
    write_some_queries,
)
from preprocessing.filtering.tools import (
    DATABASE,
    QUERIES,
    TARGETS,
    Searcher,
    choose_searcher,
)
from preprocessing.filtering.work import (
    SUMMARY,
    ChunkResult,
    Commands,
    FilterWork,
    Prepared,
    merge_commands,
    side_path,
)
from preprocessing.manifest import describe_run
from preprocessing.parallel import Ranks, Serial, on_first_rank, share_out
from preprocessing.records import MANIFEST, read_manifest
from preprocessing.sources import examine

_log = logging.getLogger(__name__)

FORMAT, VERSION = "prothpc-filter", 1

CHUNK_RESIDUES = 5_000_000
"""Residues of the queries in a chunk when the number of chunks is not given: about 15,000 proteins,
half an hour of BLASTP against 20,000 others on a core."""

_GROWTH = 10
"""How many times more hits are asked for when a query had more."""


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a search is run; nothing of it changes what comes out."""

    chunks: int | None = None
    """Parts of the queries; None: one for each 5 million residues."""
    chunk: int | None = None
    """Search only this chunk, 0 to `chunks` - 1, and do not merge."""
    threads: int = 1
    """Threads of a program."""
    program: Path | None = None
    """Path of blastp or mmseqs; None: on PATH."""

    def __post_init__(self) -> None:
        if self.chunks is not None and self.chunks < 1:
            raise InputError(f"--chunks {self.chunks}: choose 1 or more")
        if self.threads < 1:
            raise InputError(f"--threads {self.threads}: choose 1 or more")
        if self.chunk is not None and self.chunks is None:
            raise InputError(f"--chunk {self.chunk} needs --chunks: say of how many it is one")
        if self.chunk is not None and not 0 <= self.chunk < (self.chunks or 0):
            raise InputError(
                f"--chunk {self.chunk}: chunks are numbered from 0 to {(self.chunks or 0) - 1}"
            )


def filter_sequences(
    queries: Sequence[Path],
    targets: Sequence[Path] | None,
    output: Path,
    options: FilterOptions,
    execution: Execution | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Any] | None:
    """Search, or finish a search that was begun.

    Args:
        queries: FASTA files and record sets.
        targets: the same; None: the queries against themselves.
        output: directory; made if it is not there.
        options: what counts as similar, and what becomes of it.
        execution: how it is run.
        ranks: the job, from `parallel.connect`; all its ranks must call this. None: this process.

    Returns:
        The summary, on every rank; None if only a chunk was asked for and others are missing.

    Raises:
        InputError: on every rank, for anything wrong with inputs, options, programs or the output.
    """
    execution, ranks = execution or Execution(), ranks or Serial()
    options.check_direction(within=targets is None)
    if execution.chunk is not None and ranks.size > 1:
        raise InputError(
            f"--chunk {execution.chunk} is for one process, not for {ranks.size} ranks: leave it "
            "out, ranks share the chunks"
        )
    started = time.time()
    search = _Search(list(queries), targets, Path(output), options, execution)
    if on_first_rank(ranks, search.begin):
        return on_first_rank(ranks, search.summary)
    search.work.chunks = ranks.bcast(search.work.chunks)

    wanted = range(search.work.chunks) if execution.chunk is None else [execution.chunk]
    missing = on_first_rank(ranks, lambda: [k for k in wanted if not search.work.is_done(k)])
    if ranks.rank == 0 and len(missing) < len(wanted):
        _log.info("%d of %d chunks are done already", len(wanted) - len(missing), len(wanted))

    def work(tasks: Iterator[int]) -> None:
        for task in tasks:
            search.chunk(missing[task])

    share_out(ranks, len(missing), work)
    if execution.chunk is not None:
        return None
    hosts = sorted(set(ranks.allgather(socket.gethostname())))
    finish = partial(search.finish, started=started, hosts=hosts, ranks=ranks.size)
    return on_first_rank(ranks, finish)


class _Search:
    """One search on one rank."""

    def __init__(
        self,
        queries: list[Path],
        targets: Sequence[Path] | None,
        output: Path,
        options: FilterOptions,
        execution: Execution,
    ) -> None:
        self._queries = queries
        self._targets = targets
        self._options = options
        self._execution = execution
        self._within = targets is None
        self.work = FilterWork(output)

    def begin(self) -> bool:
        """Enter the directory and prepare what chunks share; return whether all is finished."""
        searcher = self._searcher()
        plan = self._plan(searcher)
        if self.work.is_finished(plan):
            return True
        with self.work.alone():
            if self.work.is_finished(plan):  # the process that was waited for has just merged
                return True
            self.work.enter(plan, self._execution.chunks)
            prepared = self.work.prepared() or self._prepare(searcher)
            if not self.work.chunks:
                chunks = max(1, round(prepared.queries.residues / CHUNK_RESIDUES))
                self.work.set_chunks(plan, chunks)
        return False

    def chunk(self, number: int) -> None:
        """Search a chunk."""
        began = time.monotonic()
        prepared = self._prepared()
        queries, targets = prepared.side("queries"), prepared.side("targets")
        start, stop = queries.chunk(number, self.work.chunks)
        with self.work.working(number) as directory:
            if self.work.is_done(number):  # by a process that was at work on it just now
                return
            attempt = _Chunk(self._searcher(), self._options, prepared, directory)
            found = attempt.search(queries, start, stop, within=self._within)
            equal = equal_pairs(queries, start, stop, targets, within=self._within)
            hits = join([found, without(equal, found)])
            self.work.set_done(number, ChunkResult(hits, attempt.cut_short, attempt.commands))
        _log.info(
            "chunk %d of %d: %s queries, %s similar pairs, %.1f s",
            number, self.work.chunks, f"{stop - start:,}", f"{len(hits):,}",
            time.monotonic() - began,
        )  # fmt: skip

    def finish(self, started: float, hosts: list[str], ranks: int) -> dict[str, Any]:
        """Merge the chunks; return the summary."""
        output, options = self.work.output, self._options
        with self.work.alone():
            if (output / SUMMARY).exists():  # another process has just merged
                self.work.clear()
                return self.summary()
            prepared = self._prepared()
            sides = {name: prepared.side(name) for name in ("queries", "targets")}
            results = [self.work.result(number) for number in range(self.work.chunks)]
            hits = join([result.hits for result in results])
            write_hits(output, hits, sides["queries"], sides["targets"])

            if options.reduce:
                best = reduce_greedily(sides["queries"], hits, options.prefer)
            else:
                best = best_of_queries(hits if options.exclude == "queries" else turned(hits))
            other = "targets" if options.exclude == "queries" else "queries"
            excluded = sides[options.exclude]
            about = describe_threshold(options)
            write_exclusions(output, best, excluded, sides[other], about)
            if options.kept:
                write_kept(output, best.query, excluded)

            plan = self._plan(self._searcher())
            summary = self._summarize(plan, prepared, results, best, excluded)
            title = f"{options.tool}: {len(best):,} of {len(excluded):,} {options.exclude} excluded"
            draw_histogram(output, summary["identity_histogram"], title, options.threshold())
            run = describe_run(
                plan, started=started, seconds=time.time() - started, hosts=hosts, ranks=ranks
            )
            run["chunks"] = self.work.chunks
            run["commands"] = merge_commands(
                [prepared.commands, *(result.commands for result in results)]
            )
            write_summary(output, summary, run)
            self.work.clear()
        return self.summary()

    def summary(self) -> dict[str, Any]:
        """Return the summary of a finished search."""
        return json.loads((self.work.output / SUMMARY).read_bytes())

    def _searcher(self) -> Searcher:
        return choose_searcher(self._options, self._execution.program, self._execution.threads)

    def _prepared(self) -> Prepared:
        prepared = self.work.prepared()
        if prepared is None:  # another process has merged and cleared meanwhile
            raise InputError(f"{self.work.output}: the work is gone: run the same command again")
        return prepared

    def _plan(self, searcher: Searcher) -> dict[str, Any]:
        """Return all that decides what comes out, as JSON."""
        inputs = [{"role": "query", **_describe_input(path)} for path in self._queries]
        inputs += [{"role": "target", **_describe_input(path)} for path in self._targets or []]
        return {
            "format": FORMAT,
            "version": VERSION,
            "tool": {"name": searcher.name, "version": searcher.version()},
            "options": {"self": self._within, **describe_options(self._options)},
            "inputs": inputs,
        }

    def _prepare(self, searcher: Searcher) -> Prepared:
        options = self._options
        write = partial(write_side, on_invalid=options.on_invalid)
        commands: Commands = []
        with self.work.preparing() as directory:
            fasta = directory / TARGETS
            queries = write(
                self._queries,
                side_path(directory, "queries"),
                fasta=fasta if self._within else None,
                with_residues=True,
            )
            targets = queries
            if self._targets is not None:
                kept = options.kept and options.exclude == "targets"
                path = directory / "targets.arrow"
                targets = write(self._targets, path, fasta=fasta, with_residues=kept)
            searcher.make_database(Runner(directory, commands.append), targets)
            fasta.unlink()
            self.work.set_prepared(directory, queries, targets, commands)
        return self._prepared()

    def _summarize(
        self,
        plan: dict[str, Any],
        prepared: Prepared,
        results: Sequence[ChunkResult],
        best: Hits,
        excluded: Side,
    ) -> dict[str, Any]:
        keys = excluded.take(best.query).column("key")
        return {
            "format": FORMAT,
            "version": VERSION,
            "tool": plan["tool"],
            "options": plan["options"],
            "threshold": self._options.threshold(),
            "queries": {
                "records": prepared.queries.records,
                "residues": prepared.queries.residues,
            },
            "targets": {
                "records": prepared.targets.records,
                "residues": prepared.targets.residues,
            },
            "similar_pairs": sum(len(result.hits) for result in results),
            "queries_cut_short": sum(result.cut_short for result in results),
            "excluded": {
                "side": self._options.exclude,
                "records": len(best),
                "sequences": len(keys.unique()),
                "of": len(excluded),
                "only_equal": int(np.isnan(best.evalue).sum()),
            },
            "identity_histogram": identity_histogram(best),
        }


class _Chunk:
    """The search of one chunk, again and again for the queries that had more hits."""

    def __init__(
        self, searcher: Searcher, options: FilterOptions, prepared: Prepared, directory: Path
    ) -> None:
        self._searcher = searcher
        self._options = options
        self._directory = directory
        longest = max(prepared.targets.longest, prepared.queries.longest)
        targets = prepared.targets
        self._totals = Totals(targets.records, targets.residues, longest)
        self._most = min(options.max_hits or targets.records, targets.records)
        self.commands: Commands = []
        self.cut_short = 0

    def search(self, queries: Side, start: int, stop: int, *, within: bool) -> Hits:
        """Return the pairs that are too similar."""
        limit, pieces = min(self._searcher.first_limit, self._options.max_hits or 2**31), []
        ordinals: np.ndarray | None = None
        while start < stop and (ordinals is None or len(ordinals)):
            directory = self._directory / f"{limit}-hits"
            directory.mkdir()
            if ordinals is None:
                write_queries(queries, start, stop, directory / QUERIES)
            else:
                write_some_queries(queries, ordinals, directory / QUERIES)
            runner = Runner(directory, self.commands.append)
            database = os.path.join("..", "..", "prepared", DATABASE)
            found = self._searcher.search(runner, database, self._totals, limit)
            table = found.table
            if limit >= self._most:
                self.cut_short = len(found.full) if self._most < self._totals.records else 0
                ordinals = found.full[:0]
            else:
                ordinals = found.full
            hits = too_similar(table, self._options, within=within)
            pieces.append(hits.take(~np.isin(hits.query, ordinals)))
            limit = min(limit * _GROWTH, self._most)
        return join(pieces)


def _describe_input(path: Path) -> dict[str, Any]:
    """Return a path and what would change if its content did."""
    if is_record_set(path):
        read_manifest(path)
        path = path / MANIFEST
    else:
        examine(path)
    status = path.stat()
    return {
        "path": str(path.resolve()),
        "bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
    }
