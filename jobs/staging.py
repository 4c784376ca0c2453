"""Copies the shards that a node reads to its own disk."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preprocessing.errors import InputError

_MANIFEST, _RUN = "manifest.json", "run.json"
_SPARE_BYTES = 2**30
"""Left free on the node's disk."""


@dataclass(frozen=True)
class Staged:
    """What is on the node's disk now."""

    shards: int
    """Copied now or before."""
    bytes: int
    others: int
    """Shards that other nodes read, or that found no room: links to where they are."""


def stage(records: Path, target: Path, node: int, nodes: int) -> Staged:
    """Make `target` a record set whose shards are copies where this node reads them, else links.

    Streams are contiguous ranges of the training records and a node's ranks own neighbouring ones,
    so node `i` of `n` reads the i-th n-th of them. A copy has its name when it is whole, so that
    a restart on the same node repeats only what is missing.

    Args:
        records: record set on the shared file system; absolute.
        target: directory on this node's disk.
        node: number of this node, from 0.
        nodes: nodes of the job.

    Raises:
        InputError: no record set, or a disk that cannot be written.
    """
    manifest = _read_manifest(records)
    own = {name for name, _ in _own_shards(manifest, node, nodes)}
    try:
        _begin(records, target)
        staged = copied = others = 0
        for split in manifest["splits"].values():
            for shard in split["shards"]:
                name, size = shard["name"], int(shard["bytes"])
                if name in own and _copy(records / name, target / name, size):
                    staged, copied = staged + 1, copied + size
                else:
                    _link(records / name, target / name)
                    others += 1
    except OSError as error:
        raise InputError(f"cannot stage {records} in {target}: {error}") from error
    return Staged(staged, copied, others)


def _read_manifest(records: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((records / _MANIFEST).read_bytes())
        return manifest
    except (OSError, ValueError) as error:
        raise InputError(f"{records}: no record set that can be read: {error}") from error


def _own_shards(manifest: dict[str, Any], node: int, nodes: int) -> list[tuple[str, int]]:
    """Names and bytes of the training shards in which this node's records lie."""
    shards = manifest["splits"]["train"]["shards"]
    total = sum(int(shard["records"]) for shard in shards)
    first, end = node * total // nodes, (node + 1) * total // nodes
    own, start = [], 0
    for shard in shards:
        count = int(shard["records"])
        if start < end and start + count > first:
            own.append((str(shard["name"]), int(shard["bytes"])))
        start += count
    return own


def _begin(records: Path, target: Path) -> None:
    """Make the directory, empty if another record set lies there."""
    content = (records / _MANIFEST).read_bytes()
    manifest = target / _MANIFEST
    if target.exists() and (not manifest.exists() or manifest.read_bytes() != content):
        shutil.rmtree(target)
    target.mkdir(parents=True, exist_ok=True)
    manifest.write_bytes(content)
    if (records / _RUN).is_file():
        shutil.copyfile(records / _RUN, target / _RUN)


def _copy(source: Path, target: Path, size: int) -> bool:
    """Copy a shard unless it is there; return whether it is there now."""
    if target.is_file() and not target.is_symlink() and target.stat().st_size == size:
        return True
    if shutil.disk_usage(target.parent).free < size + _SPARE_BYTES:
        return False
    part = target.with_name(f"{target.name}.part")
    shutil.copyfile(source, part)
    os.replace(part, target)
    return True


def _link(source: Path, target: Path) -> None:
    if not target.is_symlink():
        target.unlink(missing_ok=True)
        target.symlink_to(source)
