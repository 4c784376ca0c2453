"""Which gzip files are read with a seek index: what decides it, and where indexes are kept.

The decision is made once for a job and kept in its work directory, with the indexes: a restart must
cut the files into the same units. Indexes are also kept beside the output, for later jobs.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import xxhash

from preprocessing.errors import InputError
from preprocessing.files import publish, read_checked, write_checked
from preprocessing.gzip_index import IndexFailed, SeekIndex, build_index
from preprocessing.parallel import Ranks, on_first_rank
from preprocessing.sources import Source

_log = logging.getLogger(__name__)

_DECISION = "indexed.json"

_MIN_BYTES = 256 * 2**20  # smaller files are read in seconds

# MB of text a second that one core manages, measured on a machine of two cores.
_INFLATE = 600  # isal
_SEARCH_ALONE = 500  # one thread of rapidgzip, which reads on from the beginning
_SEARCH = 130  # each of several threads, which must find out where a block begins
_MAP = 300  # parsing, hashing and spilling


def choose_indexes(
    ranks: Ranks, sources: Sequence[Source], work: Path, beside: Path, wanted: bool | None
) -> list[Source]:
    """Return the sources, with an index for those gzip files that are to be read with one.

    Args:
        ranks: the job; all its ranks must call this.
        sources: the input files.
        work: the job's work directory.
        beside: directory in which indexes are kept for later jobs.
        wanted: whether to use indexes; None: those that are there, and others if making them saves
            time.
    """
    candidates = {number: each for number, each in enumerate(sources) if each.kind == "gzip"}
    if not candidates:
        return list(sources)
    cores = _cores_of_first_host(ranks)

    def choose() -> list[int]:
        try:
            decision = work / _DECISION
            if not decision.exists():
                chosen = _choose(candidates, work, beside, wanted, ranks.size, cores)
                write_checked(decision, chosen)
            return _read_decision(decision)
        finally:
            ranks.rest()

    if ranks.rank > 0:
        ranks.rest()  # rank 0 may need all cores
    chosen = on_first_rank(ranks, choose)
    return [
        replace(source, index=str(_index_in(work, number))) if number in chosen else source
        for number, source in enumerate(sources)
    ]


def _read_decision(path: Path) -> list[int]:
    try:
        return read_checked(path)
    except ValueError as error:
        output = path.parent.parent
        raise InputError(
            f"{path}: damaged, so nothing is known of the work in {output}: delete this directory "
            "and run the command again"
        ) from error


def index_pays(sizes: Sequence[int], ranks: int, cores: int) -> bool:
    """Say whether it saves time to make indexes of gzip files that are read once.

    Without, one rank inflates each file, beside its parsing. With indexes, all cores of a node
    inflate it once, and all ranks once more.

    Args:
        sizes: bytes of the gzip files.
        ranks: that read them.
        cores: that make the indexes.
    """
    if ranks == 1 or max(sizes) < _MIN_BYTES:
        return False
    without = max(max(sizes), sum(sizes) / ranks) / min(_INFLATE, _MAP)
    search = max(_SEARCH_ALONE, _SEARCH * cores)
    return sum(sizes) * (1 / search + (1 / _INFLATE + 1 / _MAP) / ranks) < without


def _choose(
    candidates: dict[int, Source],
    work: Path,
    beside: Path,
    wanted: bool | None,
    ranks: int,
    cores: set[int],
) -> list[int]:
    """Find or make indexes, on rank 0; return the numbers of the sources that have one."""
    chosen = [
        number
        for number, source in candidates.items()
        if wanted is not False and _fetch(source, beside, work, number)
    ]
    missing = {number: each for number, each in candidates.items() if number not in chosen}
    if wanted is None and missing:
        wanted = index_pays([source.bytes for source in missing.values()], ranks, len(cores))
    for number, source in missing.items():
        if wanted and _make(source, beside, work, number, cores):
            chosen.append(number)
        elif ranks > 1:
            _log.info("%s: one rank alone reads it, without a seek index", source.path)
    return chosen


def _make(source: Source, beside: Path, work: Path, number: int, cores: set[int]) -> bool:
    index = _index_in(work, number)
    threads = len(cores) if _SEARCH * len(cores) > _SEARCH_ALONE else 1
    _log.info("%s: making a seek index with %d threads", source.path, threads)
    try:
        with _on_cores(cores):
            build_index(Path(source.path), source.bytes, source.mtime_ns, index, threads)
    except IndexFailed as error:
        _log.warning("%s: no seek index can be made: %s", source.path, error)
        return False
    kept = _index_beside(beside, source)
    try:
        _link(index, kept)
        _log.info("%s: its seek index is kept for later jobs: %s", source.path, kept)
    except OSError as error:
        _log.warning("%s: its seek index cannot be kept: %s", source.path, error)
    return True


def _fetch(source: Source, beside: Path, work: Path, number: int) -> bool:
    """Take the index that an earlier job has kept into the work directory."""
    kept = _index_beside(beside, source)
    if not kept.exists():
        return False
    try:
        SeekIndex(kept, source.bytes, source.mtime_ns).check()
        _link(kept, _index_in(work, number))
    except (IndexFailed, OSError) as error:
        _log.warning("%s: its seek index is of no use: %s", source.path, error)
        return False
    _log.info("%s: is read with its seek index %s", source.path, kept)
    return True


def _index_in(work: Path, number: int) -> Path:
    return work / f"index-{number:05d}.arrow"


def _index_beside(directory: Path, source: Source) -> Path:
    """Name an index after its file; the digits tell files of one name apart."""
    digits = xxhash.xxh32_hexdigest(source.path.encode())
    return directory / f"{Path(source.path).name}.{digits}.seek-index"


def _link(path: Path, other: Path) -> None:
    """Give a file another name, or copy it where that is impossible."""
    temporary = other.with_name(f"{other.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:
        shutil.copyfile(path, temporary)
    publish(temporary, other)


def _cores_of_first_host(ranks: Ranks) -> set[int]:
    """Return the cores on which ranks of rank 0's host may run."""
    everywhere = ranks.allgather((socket.gethostname(), os.sched_getaffinity(0)))
    return set().union(*(cores for host, cores in everywhere if host == everywhere[0][0]))


@contextmanager
def _on_cores(cores: set[int]) -> Iterator[None]:
    """Let this thread, and those that it starts, run on other cores for a while."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
