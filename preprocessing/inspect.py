"""`prothpc inspect`: what is in a record set, and single records of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from preprocessing.errors import InputError
from preprocessing.keys import KEY_BYTES
from preprocessing.parallel import Ranks, Tasks, share_out
from preprocessing.progress import Progress
from preprocessing.records import RUN, SPLITS, Record, RecordSet, read_manifest

SAMPLE = 1_000_000
"""Records that histograms are made of by default. Records lie in the order of their hashes, so
that any of them are a random sample; the share of a residue is then known to ± 0.01 %."""

_PIECE = 4096
"""Records read together."""

_LONGEST_COUNTED = 65_535
"""Longer proteins are counted as having so many residues; the longest known has 45,354."""

_LETTERS = slice(ord("A"), ord("Z") + 1)


@dataclass(frozen=True, kw_only=True)
class Contents:
    """Length and composition of records, all of them or a sample."""

    records: int
    """Records looked at."""
    of: int
    """Records there are."""
    lengths: np.ndarray
    """int64 [65,536]: records of each length in residues; the last counts longer ones, too."""
    longest: int
    """Residues of the longest record looked at."""
    letters: np.ndarray
    """int64 [26]: residues of each letter, A to Z."""

    def quantile(self, share: float) -> int:
        """Return the length that `share` of the records do not exceed."""
        return int(np.searchsorted(np.cumsum(self.lengths), share * self.records))

    def as_dict(self) -> dict[str, Any]:
        """Return what `--json` shows: lengths and letters that occur, with their counts."""
        present = np.flatnonzero(self.lengths).tolist()
        letters = [chr(_LETTERS.start + number) for number in np.flatnonzero(self.letters)]
        return {
            "records": self.records,
            "of_records": self.of,
            "longest": self.longest,
            "length_records": {str(length): int(self.lengths[length]) for length in present},
            "residues": dict(zip(letters, self.letters[self.letters > 0].tolist(), strict=True)),
        }


class Found(NamedTuple):
    """A record and where it lies."""

    split: str
    number: int
    """Place in the split, from 0."""
    record: Record
    file: str
    """Shard that it lies in."""

    def as_dict(self) -> dict[str, Any]:
        """Return what `--json` shows."""
        place = {"split": self.split, "number": self.number, "file": self.file}
        key, name, sequence = self.record
        return place | {"id": name, "key": key.hex(), "sequence": sequence}


def open_splits(directory: Path, split: str | None = None) -> list[RecordSet]:
    """Open a split, or all that have shards.

    Raises:
        InputError: if the directory is no finished record set, or has no such split.
    """
    if split is not None:
        return [RecordSet(directory, split)]
    manifest, _ = read_manifest(directory)
    present = manifest.get("splits", {})
    return [RecordSet(directory, name) for name in SPLITS if present.get(name, {}).get("shards")]


def read_run(directory: Path) -> dict[str, Any]:
    """Return how a record set was made; empty if its run.json is missing or damaged."""
    try:
        run = json.loads((directory / RUN).read_bytes())
    except (OSError, ValueError):
        return {}
    return run if isinstance(run, dict) else {}


def measure(splits: list[RecordSet], ranks: Ranks, sample: int = SAMPLE) -> Contents:
    """Count lengths and residues.

    Args:
        splits: whose records are looked at, together.
        ranks: the job; all its ranks must call this, and all get the result.
        sample: about how many records, in pieces of 4,096 spread evenly; 0: all of them.
    """
    total = sum(map(len, splits))
    pieces = _pieces(splits, sample)

    def work(tasks: Tasks) -> tuple[int, int, np.ndarray, np.ndarray]:
        number, longest = 0, 0
        lengths, letters = np.zeros(_LONGEST_COUNTED + 1, np.int64), np.zeros(256, np.int64)
        progress = Progress(tasks, "inspect")
        for task in tasks:
            records, start, stop = pieces[task]
            part = records.read(start, stop)
            of_each = np.diff(part.offsets)
            lengths += np.bincount(np.minimum(of_each, _LONGEST_COUNTED), minlength=len(lengths))
            longest = max(longest, int(of_each.max()))
            residues = part.residues[part.offsets[0] : part.offsets[-1]]
            letters += _count_bytes(residues)
            number += len(part)
            progress.add(len(part), len(residues))
        return number, longest, lengths, letters

    parts = share_out(ranks, len(pieces), work)
    return Contents(
        records=sum(part[0] for part in parts),
        of=total,
        longest=max(part[1] for part in parts),
        lengths=sum((part[2] for part in parts), np.zeros(1, np.int64)),
        letters=sum((part[3] for part in parts), np.zeros(1, np.int64))[_LETTERS],
    )


def find_number(records: RecordSet, number: int) -> Found:
    """Return a record by its place in the split.

    Raises:
        InputError: if the split has fewer records.
    """
    if not 0 <= number < len(records):
        raise InputError(
            f"--number {number}: {records.directory} has the {records.split} records 0 to "
            f"{len(records) - 1:,}"
        )
    return _found(records, number)


def find_key(splits: list[RecordSet], text: str) -> list[Found]:
    """Return the records with a key: none, one, or all copies of a set with duplicates.

    Raises:
        InputError: if `text` is no key in hexadecimal.
    """
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise InputError(
            f"--key {text}: a key is written with {2 * KEY_BYTES} hexadecimal digits, the xxh3-128 "
            "of the residues"
        )
    found = []
    for records in splits:
        number = records.find(key)
        while number is not None and number < len(records):
            one = _found(records, number)
            if one.record.key != key:
                break
            found.append(one)
            number += 1
    return found


def find_id(splits: list[RecordSet], name: str, ranks: Ranks) -> list[Found]:
    """Return all records with an id; every id is read, since they are in no order.

    Args:
        splits: where it is looked for.
        name: the id, exactly.
        ranks: the job; all its ranks must call this, and all get the result.
    """
    shards = [(split, shard) for split in splits for shard in range(split.num_shards)]

    def work(tasks: Tasks) -> list[Found]:
        found = []
        progress = Progress(tasks, "looking through the ids")
        for task in tasks:
            records, shard = shards[task]
            found += [_found(records, number) for number in records.find_id(name, shard)]
            progress.add(len(records.numbers_in(shard)), 0)
        return found

    return sorted(
        (one for part in share_out(ranks, len(shards), work) for one in part),
        key=lambda one: (SPLITS.index(one.split), one.number),
    )


def _found(records: RecordSet, number: int) -> Found:
    return Found(records.split, number, records.record(number), records.file_of(number))


def _pieces(splits: list[RecordSet], sample: int) -> list[tuple[RecordSet, int, int]]:
    """Cut all records into pieces, or take pieces at even distances that make up a sample."""
    total = sum(map(len, splits))
    complete = not 0 < sample < total
    count = -(-(total if complete else sample) // _PIECE)
    borders = [number * total // count for number in range(count + 1)] if count else []
    pieces, first = [], 0
    for records in splits:
        for start, end in pairwise(borders):
            start, stop = start - first, (end if complete else min(start + _PIECE, end)) - first
            start, stop = max(start, 0), min(stop, len(records))
            if start < stop:
                pieces.append((records, start, stop))
        first += len(records)
    return pieces


def _count_bytes(values: np.ndarray) -> np.ndarray:
    """Return int64 [256]: how often each byte occurs; in pairs it is five times as fast."""
    even = len(values) // 2 * 2
    pairs = np.bincount(values[:even].view(np.uint16), minlength=2**16).reshape(256, 256)
    return pairs.sum(0) + pairs.sum(1) + np.bincount(values[even:], minlength=256)
