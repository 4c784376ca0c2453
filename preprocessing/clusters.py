"""Hold-out by cluster: which ids a table of clusters holds out.

A cluster is held out by the salted hash of its name, which is its representative's id. An id that
the table does not list is a cluster of its own, named by itself, as a table that lists single
proteins says, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa

from preprocessing.columns import gather, parts
from preprocessing.files import publish
from preprocessing.keys import HOLDOUT_SEED, hash64
from preprocessing.raw import BadInput

_READ_BYTES = 4 * 2**20
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_SHOWN_CHARACTERS = 40
_NEWLINE, _TAB, _RETURN = 10, 9, 13
_HELD_OUT = np.uint64(1)
_SORT_COPIES = 3
"""Times the words of one pass are in memory: as found, joined, and as numbers of their rows."""


class Clusters:
    """Says of ids whether their cluster is held out."""

    def __init__(self, path: Path, below: int) -> None:
        """Map a table that `write_clusters` wrote with the same `below`."""
        self._words = np.memmap(path, np.uint64, "r")
        self._below = np.uint64(below)

    def look_up(self, ids: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        """Return bool [N] each: which ids, binary [N], are held out, and which the table lists."""
        offsets, names = parts(ids)
        words = hash64(offsets, names) | _HELD_OUT
        held_out = self._has(words)
        listed = held_out | self._has(words ^ _HELD_OUT)
        alone = np.flatnonzero(~listed)
        if len(alone):
            held_out[alone] = (hash64(offsets, names, HOLDOUT_SEED) < self._below)[alone]
        return held_out, listed

    def _has(self, words: np.ndarray) -> np.ndarray:
        place = np.searchsorted(self._words, words)
        return self._words[np.minimum(place, len(self._words) - 1)] == words


def write_clusters(path: Path, table: Path, below: int, memory: int) -> str:
    """Turn a table of clusters into what `Clusters` maps: 8 bytes a row.

    A row becomes the 64-bit hash of the member's id, its last bit replaced by whether the cluster
    is held out. The rows are sorted in as many passes as the memory asks for.

    Args:
        path: the file to be written; beside it, as much again is needed meanwhile.
        table: lines of a representative's and a member's id with a tab between them, as
            `mmseqs createtsv` writes them; plain, gzip or zstd.
        below: clusters are held out whose salted hash is below this.
        memory: bytes to be used, about.

    Returns:
        The first member's id.

    Raises:
        BadInput: if the table is none.
    """
    found, temporary, first = path.with_suffix(".rows"), path.with_suffix(".tmp"), ""
    try:
        with found.open("wb") as file:
            for representatives, members in _read_table(table):
                first = first or members[0].as_py().decode("utf-8", "backslashreplace")
                held_out = hash64(*parts(representatives), HOLDOUT_SEED) < np.uint64(below)
                words = hash64(*parts(members))
                (words & ~_HELD_OUT | held_out).tofile(file)
        with temporary.open("wb") as file:
            _sort(np.memmap(found, np.uint64, "r"), file, memory)
        publish(temporary, path)
    finally:
        found.unlink(missing_ok=True)
    return first


def _sort(words: np.ndarray, file: IO[bytes], memory: int) -> None:
    """Write words in order; hashes are spread evenly, so each pass sorts one range of them."""
    step = max(1, memory // (_SORT_COPIES * words.itemsize))
    passes = -(-len(words) // step)
    borders = [2**64 * number // passes for number in range(passes + 1)]
    for first, stop in pairwise(borders):
        in_range = []
        for start in range(0, len(words), step):
            block = np.array(words[start : start + step])
            in_range.append(block[(block >= np.uint64(first)) & (block <= np.uint64(stop - 1))])
        joined = np.concatenate(in_range)
        del in_range
        joined.sort()
        joined.tofile(file)


def _read_table(path: Path) -> Iterator[tuple[pa.Array, pa.Array]]:
    """Yield the representatives and members, binary [N] each, of some lines at a time."""
    with path.open("rb") as file:
        head = file.read(4)
    kinds = [kind for magic, kind in _COMPRESSIONS.items() if head.startswith(magic)]
    lines, rest = 0, b""
    try:
        with pa.input_stream(str(path), compression=kinds[0] if kinds else None) as stream:
            while block := stream.read(_READ_BYTES):
                text, newline, rest = (rest + block).rpartition(b"\n")
                if newline:
                    yield _columns(path, text + newline, lines)
                    lines += text.count(b"\n") + 1
    except OSError as error:
        raise BadInput(f"{path}: is damaged ({error}): copy or make it again") from error
    if rest:
        yield _columns(path, rest + b"\n", lines)
    elif not lines:
        raise BadInput(f"{path}: is empty: leave out --holdout-by, or write the table first")


def _columns(path: Path, lines: bytes, lines_before: int) -> tuple[pa.Array, pa.Array]:
    text = np.frombuffer(lines, np.uint8)
    stops = np.flatnonzero(text == _NEWLINE)
    starts = np.append(0, stops[:-1] + 1)
    tabs = np.append(np.flatnonzero(text == _TAB), len(text))
    first = np.searchsorted(tabs, starts)
    tab = tabs[first]
    second = tabs[np.minimum(first + 1, len(tabs) - 1)]
    stops = np.minimum(stops - (text[stops - 1] == _RETURN), second)
    wrong = np.flatnonzero((tab == starts) | (tab + 1 >= stops))
    if len(wrong):
        line = lines[starts[wrong[0]] :].split(b"\n", 1)[0]
        shown = line[:_SHOWN_CHARACTERS].decode("utf-8", "backslashreplace")
        raise BadInput(
            f"{path}, line {lines_before + int(wrong[0]) + 1:,}: {shown!r} is not a "
            "representative's id, a tab and a member's id, as 'mmseqs createtsv' writes them"
        )
    return gather(text, starts, tab), gather(text, tab + 1, stops)
