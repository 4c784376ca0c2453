"""Check of a directory: can every node write there, how fast, and how much room is left."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hpc.checks.findings import (
    GIB,
    Check,
    Finding,
    Measured,
    Situation,
    group,
    in_bytes,
    nodes,
    places,
    where,
)
from preprocessing.errors import InputError

_BLOCK = 4 * 2**20

_LITTLE_SPACE = 10 * GIB
"""Two checkpoints of ProtBert: 420 million weights and two moments of each, 4 bytes a number."""

_SMALL_SYNCS = 5
"""Synchronous small writes, of which the median is reported: what many small files cost."""


def _measure(situation: Situation) -> dict[str, Any]:
    directory = situation.directory.resolve()
    if not directory.is_dir():
        raise InputError(f"{directory} is no directory")
    try:
        seconds = _write(directory, situation.size)
    except OSError as error:  # it names a temporary file, if anything
        raise InputError(f"{directory}: {error.strerror}") from error
    return {
        "path": str(directory),
        "file_system": _file_system(directory),
        "free": shutil.disk_usage(directory).free,
        "bytes": situation.size,
        **seconds,
    }


def _write(directory: Path, size: int) -> dict[str, float]:
    """Time writing and syncing; the file never has a name, or only for a moment."""
    block = os.urandom(min(_BLOCK, size))  # does not compress
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        syncs = []
        for _ in range(_SMALL_SYNCS):
            began = time.perf_counter()
            file.write(b"small")
            os.fsync(file.fileno())
            syncs.append(time.perf_counter() - began)
        free = shutil.disk_usage(directory).free
        if free < size:
            raise InputError(
                f"{directory} has {in_bytes(free)} free, too little to write {in_bytes(size)}"
            )
        began = time.perf_counter()
        left = size
        while left:
            left -= file.write(block[:left])
        written = time.perf_counter()
        os.fsync(file.fileno())
        ended = time.perf_counter()
    return {
        "write_seconds": written - began,
        "sync_seconds": ended - written,
        "small_sync_seconds": statistics.median(syncs),
    }


def _file_system(directory: Path) -> str:
    """Return the type of the file system, like `lustre`; nothing if the system does not say."""
    kinds = {}
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        _, place, kind, *_ = line.split(" ")
        kinds[Path(place)] = kind  # of several at one place the last one counts
    return next(
        (kinds[place] for place in (directory, *directory.parents) if place in kinds), "unknown"
    )


def _judge(measured: Sequence[Measured]) -> Iterator[Finding]:
    for kind, ranks in group(measured, lambda one: one.values["file_system"]).items():
        slowest = min(ranks, key=_speed)
        path, size = slowest.values["path"], slowest.values["bytes"]
        text = f"{path} ({kind}): {in_bytes(size)} written and synced"
        if nodes(measured) > 1:
            total = sum(map(_speed, ranks))
            text += (
                f" by each node, the slowest at {_speed(slowest):.2f} GB/s ({places([slowest])}), "
                f"all together at {total:.2f} GB/s{where(ranks, measured)}"
            )
        else:
            text += f" at {_speed(slowest):.2f} GB/s"
        sync = max(one.values["small_sync_seconds"] for one in ranks)
        free = min(one.values["free"] for one in ranks)
        scarce = free < _LITTLE_SPACE
        yield Finding(
            check="directory",
            level="note" if scarce else "ok",
            text=f"{text}; a small sync takes {1000 * sync:.3g} ms; {in_bytes(free)} free",
            advice="two checkpoints of ProtBert would fill it: name another with --dir"
            if scarce
            else "",
        )


def _speed(one: Measured) -> float:
    """In GB/s, until all is on the disk."""
    seconds = one.values["write_seconds"] + one.values["sync_seconds"]
    return one.values["bytes"] / seconds / 1e9


DIRECTORY = Check(
    name="directory",
    measure=_measure,
    judge=_judge,
    advice="name another with --dir",
    once_per_node=True,
)
