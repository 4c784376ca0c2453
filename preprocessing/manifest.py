"""What is written about a record set: the manifest, and how this one came to be."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import xxhash

from preprocessing.keys import HOLDOUT_SEED, Placement
from preprocessing.records import FORMAT, ROWS_PER_BATCH, SPLITS, VERSION, canonical_json
from preprocessing.shards import Shard
from preprocessing.sources import Source
from preprocessing.spill import UnitResult
from preprocessing.vocabulary import RESIDUES

REASONS = ("duplicate", "excluded", "in_holdout", "invalid", "split", "too_long", "too_short")
"""Why a record is not kept: `in_holdout` ones equal a held-out record, `split` ones became windows.

The counts add up: `read` + `windows` = `kept` + all of `not_kept`.
"""

CHANGES = ("lowercase_residues", "masked_residues", "stops_stripped")

_SOFTWARE = ("prothpc", "numpy", "pyarrow", "xxhash")


def make_manifest(
    *,
    sources: Sequence[Source],
    units: Sequence[tuple[int, UnitResult]],
    shards: Sequence[Shard],
    placement: Placement,
    options: dict[str, Any],
    block_bytes: int | None,
) -> dict[str, Any]:
    """Return the manifest: a function of the contents of the inputs and of the options alone.

    Args:
        sources: the input files.
        units: each unit's source and result, in order.
        shards: train shards, then those of the held-out split.
        placement: which shard belongs to which split.
        options: those that change the records.
        block_bytes: length of the blocks that input hashes are made of; None if only the first
            records of the inputs were read.
    """
    counts: Counter[str] = Counter()
    for _, result in units:
        counts.update(result.counts)
    for shard in shards:
        counts.update(shard.left_out)
    by_split = {
        split: [shard for number, shard in enumerate(shards) if placement.split_of(number) == split]
        for split in SPLITS
    }
    read, windows, kept = _amount(counts, "read"), _amount(counts, "windows"), _sum(shards)
    not_kept = {reason: _amount(counts, reason) for reason in REASONS}
    for what in read:
        left = kept[what] + sum(part[what] for part in not_kept.values())
        assert read[what] + windows[what] == left, counts
    totals = {
        "read": read,
        "longer_than_max_length": _amount(counts, "longer"),
        "windows": windows,
        "not_in_clusters": counts["unlisted.records"],
        "kept": kept,
        "not_kept": not_kept,
        "changed": {change: counts[change] for change in CHANGES},
        "splits": {split: _sum(of_split) for split, of_split in by_split.items()},
    }
    return {
        "format": FORMAT,
        "version": VERSION,
        "vocabulary": {"name": "residues", "encoding": "ascii", "letters": RESIDUES},
        "key": {"hash": "xxh3-128", "of": "residues", "encoding": "big-endian"},
        "holdout": {"hash": "xxh3-64", "of": "key", "seed": HOLDOUT_SEED},
        "input_hash": _describe_hash(block_bytes),
        "inputs": _describe_inputs(sources, units),
        "options": options,
        "rows_per_batch": ROWS_PER_BATCH,
        "totals": totals,
        "splits": {
            split: {"shards": [_describe_shard(shard) for shard in of_split]}
            for split, of_split in by_split.items()
        },
    }


def describe_run(
    plan: dict[str, Any], *, started: float, seconds: float, hosts: list[str], ranks: int
) -> dict[str, Any]:
    """Return what may differ between two runs that make the same record set."""
    software = {"python": platform.python_version()}
    for name in _SOFTWARE:
        try:
            software[name] = version(name)
        except PackageNotFoundError:  # prothpc run from its source tree
            software[name] = "not installed"
    return {
        "started": datetime.fromtimestamp(started, timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "hosts": hosts,
        "ranks": ranks,
        "software": software,
        "plan": plan,
        "plan_fingerprint": xxhash.xxh3_128_hexdigest(canonical_json(plan)),
    }


def _describe_hash(block_bytes: int | None) -> dict[str, Any]:
    if block_bytes is None:
        return {"hash": "xxh3-128", "of": "xxh3-128 of the text of the records that were read"}
    return {"hash": "xxh3-128", "of": "xxh3-128 of blocks", "block_bytes": block_bytes}


def _describe_inputs(
    sources: Sequence[Source], units: Sequence[tuple[int, UnitResult]]
) -> list[dict[str, Any]]:
    """Describe each input file by its content; sorted by it, so that names do not matter."""
    of_source: list[list[UnitResult]] = [[] for _ in sources]
    for number, result in units:
        of_source[number].append(result)
    inputs = []
    for source, results in zip(sources, of_source, strict=True):
        blocks = "".join(block for result in results for block in result.block_hashes)
        inputs.append(
            {
                "bytes": source.bytes,
                "hash": xxhash.xxh3_128_hexdigest(bytes.fromhex(blocks)),
                "records": sum(result.counts["read.records"] for result in results),
                "residues": sum(result.counts["read.residues"] for result in results),
            }
        )
    return sorted(inputs, key=lambda entry: (entry["bytes"], entry["hash"]))


def _describe_shard(shard: Shard) -> dict[str, Any]:
    return {
        "name": shard.name,
        "first_key": shard.first_key,
        "records": shard.records,
        "residues": shard.residues,
        "bytes": shard.bytes,
        "xxh3_128": shard.xxh3_128,
    }


def _amount(counts: Counter[str], name: str) -> dict[str, int]:
    return {"records": counts[f"{name}.records"], "residues": counts[f"{name}.residues"]}


def _sum(shards: Sequence[Shard]) -> dict[str, int]:
    return {
        "records": sum(shard.records for shard in shards),
        "residues": sum(shard.residues for shard in shards),
    }
