"""`prothpc preprocess`: a record set from FASTA files, made by any number of ranks.

Map: ranks take units of the inputs, parse and hash the records, and spill them as runs sorted
into shards. Reduce: ranks take shards, and merge each from its part of every run. Both keep what
is done, so that a restart, on any number of ranks, repeats only what is missing. See `records` for
what comes out: it depends on the inputs and options alone.
"""

from __future__ import annotations

import logging
import math
import socket
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash

from preprocessing.compressed import Stretch
from preprocessing.errors import InputError
from preprocessing.indexing import choose_indexes
from preprocessing.keys import Placement
from preprocessing.lookups import check_clusters, open_selection, write_lookups
from preprocessing.manifest import describe_run, make_manifest
from preprocessing.options import PreprocessOptions
from preprocessing.parallel import Ranks, Serial, Tasks, on_first_rank, share_out
from preprocessing.parsing import parsed_chunks
from preprocessing.planning import Plan, describe_plan, make_plan, text_bytes, units_of
from preprocessing.progress import Progress
from preprocessing.raw import BadInput
from preprocessing.records import RecordSet, read_manifest
from preprocessing.runs import run_columns
from preprocessing.selection import Selection
from preprocessing.shards import Shard, piece_bytes
from preprocessing.sources import (
    CHUNK_BYTES,
    UNIT_BYTES,
    Source,
    Unit,
    UnitReader,
    check_fit,
)
from preprocessing.space import Room, check_room, estimate, find_rooms
from preprocessing.spill import Run, Spiller, UnitResult, parts_of, total_counts
from preprocessing.workspace import Workspace

_log = logging.getLogger(__name__)

_EXPECTED_SHARE = 0.75  # of the memory for a part of a shard: some have more than the average
_CHUNKS_IN_MEMORY = 16  # a chunk is at most this part of the memory budget


def generate(
    inputs: Sequence[Path],
    output: Path,
    options: PreprocessOptions,
    ranks: Ranks | None = None,
    *,
    unit_bytes: int = UNIT_BYTES,
    gzip_index: bool | None = None,
) -> dict[str, Any]:
    """Make a record set, or finish one that was begun.

    Args:
        inputs: FASTA files, plain, gzip or zstd, in any order; also patterns and directories, see
            `inputs.find_inputs`.
        output: the record set's directory; made if it is not there.
        options: what is done with the records.
        ranks: the job, from `parallel.connect`; all its ranks must call this. None: this process.
        unit_bytes: bytes of a file taken by a rank at a time; also the block of the input hashes,
            so that another value gives another manifest.
        gzip_index: whether ranks share gzip files by means of seek indexes, which are kept beside
            the output; None: where there is one already, or making one saves time.

    Returns:
        The manifest, on every rank.

    Raises:
        InputError: on every rank, for anything wrong with the inputs or the output directory.
    """
    ranks = ranks or Serial()
    _check_spill(options.spill, ranks)
    plan = on_first_rank(ranks, lambda: make_plan(inputs, options, unit_bytes))
    sources = plan.sources
    workspace = Workspace(Path(output), plan.document)
    try:
        on_first_rank(ranks, lambda: _check_room(workspace, plan, options))
        if on_first_rank(ranks, workspace.enter):
            return on_first_rank(ranks, lambda: _finished(workspace.output))
        beside = workspace.output.absolute().parent
        if options.limit is None:
            sources = choose_indexes(ranks, sources, workspace.work, beside, gzip_index)
        job = _Job(ranks, workspace, sources, plan.placement, options, unit_bytes)
        try:
            runs = job.map()
            if options.limit is None:
                job.check_inputs(runs)
            check_clusters(options, total_counts(runs))
        except BadInput:
            on_first_rank(ranks, workspace.discard)
            raise
        shards = job.reduce(runs)
        return job.finish(plan.document, runs, shards)
    finally:
        workspace.leave()


def dry_run(
    inputs: Sequence[Path],
    output: Path,
    options: PreprocessOptions,
    *,
    unit_bytes: int = UNIT_BYTES,
) -> tuple[str, list[Room]]:
    """Find out what `generate` would do.

    Returns:
        What it would read and write, in words, and the disks that it would write to.

    Raises:
        InputError: for anything wrong with the inputs.
    """
    _check_spill(options.spill, Serial())
    plan = make_plan(inputs, options, unit_bytes)
    workspace = Workspace(Path(output), plan.document)
    needs = estimate(plan.sources, options)
    rooms = find_rooms(workspace.output, workspace.spills, needs)
    units = units_of(plan.sources, options, unit_bytes)
    return describe_plan(plan, len(units), needs, rooms), rooms


def _check_spill(directory: Path | None, ranks: Ranks) -> None:
    if directory is None:
        return
    hosts = sorted(set(ranks.allgather(socket.gethostname())))
    if len(hosts) > 1:
        raise InputError(
            f"--spill {directory}: ranks run on {len(hosts)} nodes ({', '.join(hosts)}), and "
            "each needs the spills of all: leave out --spill, so that they go to the output's "
            "file system, or start all ranks on one node"
        )
    if not directory.is_dir():
        raise InputError(f"--spill {directory}: no such directory: make it first")


def _check_room(workspace: Workspace, plan: Plan, options: PreprocessOptions) -> None:
    if not workspace.is_finished():
        needs = estimate(plan.sources, options)
        check_room(find_rooms(workspace.output, workspace.spills, needs))


def _finished(output: Path) -> dict[str, Any]:
    manifest, _ = read_manifest(output)
    for split, content in manifest["splits"].items():
        if content["shards"]:
            RecordSet(output, split).check_files()
    _log.info("%s: already complete", output)
    return manifest


_SAMPLED_INPUTS = 16
"""Inputs whose first ids are looked for in a table of clusters before anything else is done."""


class _Job:
    """The two phases of a job on one rank."""

    def __init__(
        self,
        ranks: Ranks,
        workspace: Workspace,
        sources: list[Source],
        placement: Placement,
        options: PreprocessOptions,
        unit_bytes: int,
    ) -> None:
        self._ranks = ranks
        self._workspace = workspace
        self._sources = sources
        self._placement = placement
        self._options = options
        self._unit_bytes = unit_bytes
        self._units = units_of(sources, options, unit_bytes)
        self._started = time.time()

    def map(self) -> list[Run]:
        """Let every unit be parsed and spilled; return all runs, on every rank."""
        runs = on_first_rank(self._ranks, self._workspace.usable_runs)
        done = {result.unit for run in runs for result in run.finished}
        missing = [number for number in range(len(self._units)) if number not in done]
        if not missing:
            return runs
        if done and self._ranks.rank == 0:
            _log.info("going on: %d of %d units are done", len(done), len(self._units))
        on_first_rank(self._ranks, self._write_lookups)

        def work(tasks: Tasks) -> list[Run]:
            spiller = Spiller(
                self._workspace.spills,
                self._placement,
                self._options.memory,
                schema=run_columns(metadata=self._options.keep_metadata),
                parts=parts_of(runs) if runs else self._shard_parts(),
            )
            selection = open_selection(self._workspace.work, self._options, self._placement)
            text = text_bytes(self._sources, self._options) * len(missing) // len(self._units)
            progress = Progress(tasks, "map", text)
            # Nothing is published any more when other ranks hear of an error.
            with closing(spiller), self._workspace.writing():
                for task in tasks:
                    self._map_unit(missing[task], selection, spiller, progress)
                return spiller.flush()

        for written in share_out(self._ranks, len(missing), work):
            runs += written
        return sorted(runs, key=lambda run: run.name)

    def check_inputs(self, runs: Sequence[Run]) -> None:
        """Refuse a compressed file of which the ranks did not find all, or a damaged one."""
        results = {result.unit: result for run in runs for result in run.finished}
        of_source: list[list[Stretch | None]] = [[] for _ in self._sources]
        for number, unit in enumerate(self._units):
            found = results[number].stretch
            of_source[unit.source].append(None if found is None else Stretch(**found))
        for source, stretches in zip(self._sources, of_source, strict=True):
            check_fit(source, stretches)

    def reduce(self, runs: Sequence[Run]) -> list[Shard]:
        """Let every shard be built; return them in order, on every rank."""
        names = [self._placement.file_name(number) for number in range(len(self._placement))]

        def work(tasks: Tasks) -> dict[int, Shard]:
            opened = self._workspace.open_runs(
                runs, self._options.memory, run_columns(metadata=self._options.keep_metadata)
            )
            self._workspace.read_notes()
            progress = Progress(tasks, "reduce")
            built = {}
            with self._workspace.building():
                for number in tasks:
                    shard = self._workspace.finished_shard(names[number])
                    if shard is None:
                        shard = self._workspace.build_shard(
                            names[number],
                            opened.buckets(number),
                            dedup=self._options.dedup,
                            marks=self._options.leaves_marks,
                            metadata=self._options.keep_metadata,
                            compression=self._options.compression,
                        )
                    built[number] = shard
                    progress.add(shard.records, shard.residues)
            return built

        shards: dict[int, Shard] = {}
        for built in share_out(self._ranks, len(names), work):
            shards |= built
        return [shards[number] for number in range(len(names))]

    def finish(
        self, plan: dict[str, Any], runs: Sequence[Run], shards: Sequence[Shard]
    ) -> dict[str, Any]:
        """Write the manifest; return it, on every rank."""
        hosts = sorted(set(self._ranks.allgather(socket.gethostname())))
        results = {result.unit: result for run in runs for result in run.finished}
        made = make_manifest(
            sources=self._sources,
            units=[(unit.source, results[number]) for number, unit in enumerate(self._units)],
            shards=shards,
            placement=self._placement,
            options=plan["options"],
            block_bytes=self._unit_bytes if self._options.limit is None else None,
        )
        seconds = time.time() - self._started
        run = describe_run(
            plan, started=self._started, seconds=seconds, hosts=hosts, ranks=self._ranks.size
        )
        manifest = on_first_rank(self._ranks, lambda: self._workspace.finish(made, run))
        if self._ranks.rank == 0:
            records = manifest["totals"]["read"]["records"]
            size = sum(source.bytes for source in self._sources)
            if not manifest["totals"]["kept"]["records"]:
                _log.warning(
                    "%s: no record is kept, see not_kept in its manifest", self._workspace.output
                )
            _log.info(
                "%s records (%.0f MB of input) in %.1f s: %s records/s, %.0f MB/s",
                f"{records:,}", size / 1e6, seconds, f"{records / seconds:,.0f}",
                size / 1e6 / seconds,
            )  # fmt: skip
        return manifest

    def _shard_parts(self) -> int:
        """Return into how many ranges of keys a shard is cut so that one fits the memory budget."""
        of_shard = text_bytes(self._sources, self._options) / self._placement.shards
        return max(1, math.ceil(of_shard / (_EXPECTED_SHARE * piece_bytes(self._options.memory))))

    def _write_lookups(self) -> None:
        first_units = {unit.source: unit for unit in reversed(self._units)}
        chunks = (self._first_ids(first_units[number]) for number in range(len(self._sources)))
        write_lookups(
            self._workspace.work, self._options, self._placement, islice(chunks, _SAMPLED_INPUTS)
        )

    def _first_ids(self, unit: Unit) -> pa.Array:
        source = self._sources[unit.source]
        reader = UnitReader(source, unit, block_bytes=self._unit_bytes)
        for _, parsed in parsed_chunks(reader, source.path, self._options.on_invalid):
            return parsed.ids
        return pa.array([], pa.binary())

    def _map_unit(
        self, number: int, selection: Selection, spiller: Spiller, progress: Progress
    ) -> None:
        unit, options = self._units[number], self._options
        source = self._sources[unit.source]
        reader = UnitReader(
            source,
            unit,
            block_bytes=self._unit_bytes,
            chunk_bytes=min(CHUNK_BYTES, self._unit_bytes, options.memory // _CHUNKS_IN_MEMORY),
        )
        result = UnitResult(unit=number)
        hasher = xxhash.xxh3_128()
        for chunk, parsed in parsed_chunks(
            reader,
            source.path,
            options.on_invalid,
            options.limit,
            keep_metadata=options.keep_metadata,
        ):
            if options.limit is not None:
                hasher.update(chunk.text.data)
            for rows in selection.select(parsed, result.counts):
                spiller.add(number, rows.columns(), rows.shards)
            progress.add(len(parsed.ids), len(chunk.text))
        result.block_hashes = reader.block_hashes if options.limit is None else [hasher.hexdigest()]
        result.stretch = None if reader.stretch is None else asdict(reader.stretch)
        spiller.end_unit(result)
