"""What a job is going to do, before it does it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from preprocessing.errors import InputError
from preprocessing.inputs import find_inputs
from preprocessing.keys import Placement
from preprocessing.options import MAX_SHARDS, PreprocessOptions, record_options
from preprocessing.records import FORMAT, VERSION
from preprocessing.sizes import show_size
from preprocessing.sources import Source, Unit, beginnings, cut, examine
from preprocessing.space import Estimate, Room

SHARD_TEXT_BYTES = 96_000_000
"""FASTA text per shard when the number of shards is not given: BFD (572 GB) then has 5,959, about
the 6,000 files of the ProtTrans paper, section 2.1."""

MIN_SHARDS = 8
_COMPRESSION = 2  # protein FASTA is about twice as long as its gzip or zstd file
_RECORD_TEXT_BYTES = 500  # of UniRef, about
_NAMED = 10  # input files that a description names


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A job that can be begun."""

    sources: list[Source]
    placement: Placement
    document: dict[str, Any]
    """All that decides what comes out, as JSON: two jobs with one document may be one job."""


def make_plan(inputs: Sequence[Path], options: PreprocessOptions, unit_bytes: int) -> Plan:
    """Look at the inputs and plan a job.

    Raises:
        InputError: for anything that is evidently wrong with the inputs, or a file that an option
            names.
    """
    sources = sorted(map(examine, find_inputs(inputs)), key=lambda source: source.path)
    for first, second in pairwise(sources):
        if first.path == second.path:
            raise InputError(f"{first.path}: named twice among the inputs: name it once")
    shards = options.shards or default_shards(sources, options)
    placement = Placement(shards, options.holdout)
    document = {
        "format": FORMAT,
        "version": VERSION,
        "unit_bytes": unit_bytes,
        "options": record_options(options, placement),
        "spill": None if options.spill is None else str(options.spill.resolve()),
        "inputs": [
            {"path": source.path, "bytes": source.bytes, "mtime_ns": source.mtime_ns}
            for source in sources
        ],
    }
    return Plan(sources=sources, placement=placement, document=document)


def units_of(sources: Sequence[Source], options: PreprocessOptions, unit_bytes: int) -> list[Unit]:
    """Return the units of work that the ranks share."""
    return cut(sources, unit_bytes) if options.limit is None else beginnings(sources)


def default_shards(sources: Sequence[Source], options: PreprocessOptions) -> int:
    """Return the number of train shards for inputs when it is not given."""
    shards = math.ceil(text_bytes(sources, options) / SHARD_TEXT_BYTES)
    return min(max(MIN_SHARDS, shards), MAX_SHARDS)


def text_bytes(sources: Sequence[Source], options: PreprocessOptions) -> int:
    """Return about how much FASTA text is to be read, where overlapping windows count in full.

    It is a function of the files' sizes, unlike `space.estimate`.
    """
    text = sum(source.bytes * (1 if source.kind == "plain" else _COMPRESSION) for source in sources)
    if options.limit is not None:
        text = min(text, options.limit * len(sources) * _RECORD_TEXT_BYTES)
    if options.long == "split" and options.max_length is not None:
        text = text * options.max_length // (options.max_length - options.overlap)
    return text


def describe_plan(plan: Plan, units: int, needs: Estimate, rooms: Sequence[Room]) -> str:
    """Say what a job would do, in lines for people."""
    size = sum(source.bytes for source in plan.sources)
    lines = [f"input files: {len(plan.sources):,} with {show_size(size)}"]
    for source in plan.sources[:_NAMED]:
        lines.append(f"  {source.kind:5} {show_size(source.bytes):>10}  {source.path}")
    if len(plan.sources) > _NAMED:
        lines.append(f"  and {len(plan.sources) - _NAMED:,} more")
    placement = plan.placement
    lines += [
        f"FASTA text: about {show_size(needs.text_bytes)}; units of work for ranks: {units:,}",
        f"records: about {needs.records:,} with {needs.residues:,} residues, before exclusion and "
        "de-duplication",
        f"shards: {placement.shards:,} for training, {placement.holdout_shards:,} held out",
        f"space: about {show_size(needs.spill_bytes)} for spills and "
        f"{show_size(needs.output_bytes)} for shards",
    ]
    for room in rooms:
        lines.append(
            f"  on the disk of {room.directory}: {show_size(room.needed)} still to be written, "
            f"{show_size(room.free)} free"
        )
    return "\n".join(lines)
