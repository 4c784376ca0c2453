"""The record format, and reading it.

A record set is a directory of `manifest.json`, `run.json` and Arrow IPC files. All records of a
split form one sequence in order of their keys, cut into shards by key range. A shard holds batches
of `ROWS_PER_BATCH` rows (the last may be shorter) and is read by mapping it into memory.
"""

from __future__ import annotations

import bisect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash

from preprocessing.columns import key_array, open_arrow, parts
from preprocessing.errors import InputError
from preprocessing.keys import KEY_BYTES

FORMAT = "prothpc-records"
VERSION = 1
ROWS_PER_BATCH = 4096

MANIFEST = "manifest.json"
RUN = "run.json"
WORK = ".work"
"""Directory of an unfinished job, inside the record set's own."""

SPLITS = ("train", "holdout")

SCHEMA = pa.schema(
    [
        pa.field("key", pa.binary(KEY_BYTES), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("tokens", pa.list_(pa.field("item", pa.uint8(), nullable=False)), nullable=False),
    ],
    {"format": FORMAT, "version": str(VERSION)},
)
"""Columns of a shard; `tokens` are residues as ASCII capitals."""


def canonical_json(value: Any) -> bytes:
    """Return the one way in which a value is written: sorted keys, indent 1, a last newline."""
    return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()


def read_manifest(directory: Path) -> tuple[dict[str, Any], bytes]:
    """Return a record set's manifest, and its bytes.

    Raises:
        InputError: if the directory holds no finished record set of a known version.
    """
    path = directory / MANIFEST
    if not path.is_file():
        if (directory / WORK).is_dir():
            raise InputError(
                f"{directory}: the record set is unfinished: run the same 'prothpc preprocess' "
                "again, it goes on where it stopped"
            )
        raise InputError(
            f"{directory}: not a record set (no {MANIFEST}): make one with 'prothpc preprocess'"
        )
    content = path.read_bytes()
    try:
        manifest = json.loads(content)
        known, version = manifest["format"] == FORMAT, manifest["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged ({error!r}): make the record set again") from error
    if not known or version != VERSION:
        raise InputError(
            f"{path}: format {manifest['format']!r} version {version!r}; this prothpc reads "
            f"{FORMAT!r} version {VERSION}"
        )
    return manifest, content


@dataclass(frozen=True, eq=False)
class Records:
    """N consecutive records; the arrays are views of the mapped shard if they lie in one batch."""

    keys: np.ndarray
    """uint8 [N, 16]."""
    offsets: np.ndarray
    """int32 or int64 [N + 1], need not start at 0."""
    residues: np.ndarray
    """uint8, ASCII capitals; record i is `residues[offsets[i]:offsets[i + 1]]`."""
    id_column: pa.Array
    """string [N]."""

    def __len__(self) -> int:
        return len(self.keys)

    def ids(self) -> list[str]:
        """Return the ids as Python strings."""
        return self.id_column.to_pylist()


class Record(NamedTuple):
    """One record in Python types."""

    key: bytes
    id: str
    sequence: str


class RecordSet:
    """One split of a record set on disk.

    Opening reads the manifest only; shards are mapped when a record of theirs is asked for. One
    thread may read at a time.
    """

    def __init__(self, directory: Path, split: str = "train") -> None:
        """Open a split.

        Args:
            directory: the record set.
            split: "train" or "holdout".

        Raises:
            InputError: if it is no finished record set of a known version, or has no such split.
        """
        self.directory = Path(directory)
        self.split = split
        self.manifest, content = read_manifest(self.directory)
        self.fingerprint: str = xxhash.xxh3_128_hexdigest(content)
        """xxh3-128 of the manifest's bytes: equal for equal record sets."""
        try:
            shards = self.manifest["splits"][split]["shards"] if split in SPLITS else []
            self._shards = [shard["name"] for shard in shards]
            self._sizes = [int(shard["bytes"]) for shard in shards]
            self._filled = [number for number, shard in enumerate(shards) if shard["records"]]
            self._first_keys = [bytes.fromhex(shards[i]["first_key"]) for i in self._filled]
            counts = [int(shard["records"]) for shard in shards]
            self.num_residues = sum(int(shard["residues"]) for shard in shards)
            self._rows_per_batch = int(self.manifest["rows_per_batch"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{self.directory / MANIFEST}: damaged ({error!r}): make the record set again"
            ) from error
        if not shards:
            raise InputError(
                f"{self.directory}: has no split {split!r}: choose train, or make the record set "
                "with --holdout"
            )
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self.num_records = int(self._starts[-1])
        self._open: dict[int, _Shard] = {}

    def __len__(self) -> int:
        return self.num_records

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def read(self, start: int, stop: int) -> Records:
        """Return records start to stop - 1, numbered through the split in order of keys.

        Raises:
            IndexError: if they are not within 0 to `num_records`.
            InputError: if a shard is missing or damaged.
        """
        if not 0 <= start <= stop <= self.num_records:
            raise IndexError(f"records {start} to {stop} of {self.num_records}")
        pieces = []
        while start < stop:
            number = self._shard_at(start)
            row = start - int(self._starts[number])
            batch, first = divmod(row, self._rows_per_batch)
            in_shard = int(self._starts[number + 1]) - int(self._starts[number])
            rows_left = min((batch + 1) * self._rows_per_batch, in_shard) - row
            count = min(stop - start, rows_left)
            pieces.append(_slice(self._shard(number).batch(batch), first, first + count))
            start += count
        return pieces[0] if len(pieces) == 1 else _join(pieces)

    def record(self, number: int) -> Record:
        """Return one record by its number."""
        records = self.read(number, number + 1)
        start, stop = records.offsets
        sequence = records.residues[start:stop].tobytes().decode("ascii")
        return Record(records.keys[0].tobytes(), records.ids()[0], sequence)

    def find(self, key: bytes) -> int | None:
        """Return the number of the (first) record with this key, or None."""
        if len(key) != KEY_BYTES:
            raise ValueError(f"a key has {KEY_BYTES} bytes, not {len(key)}")
        place = bisect.bisect_right(self._first_keys, key) - 1
        if place < 0:
            return None
        number = self._filled[place]
        first, last = int(self._starts[number]), int(self._starts[number + 1])
        rows = range(first, last)
        found = first + bisect.bisect_left(rows, key, key=self._key_of)
        return found if found < last and self._key_of(found) == key else None

    def check_files(self) -> None:
        """See that all shards are there and as long as they should be.

        Raises:
            InputError: naming the first that is not.
        """
        for number in range(len(self._shards)):
            self._check_file(number)

    def _shard_at(self, number: int) -> int:
        return int(np.searchsorted(self._starts, number, side="right")) - 1

    def _key_of(self, number: int) -> bytes:
        return self.read(number, number + 1).keys[0].tobytes()

    def _shard(self, number: int) -> _Shard:
        if number not in self._open:
            self._check_file(number)
            path = self.directory / self._shards[number]
            try:
                self._open[number] = _Shard(open_arrow(path))
            except (OSError, pa.ArrowInvalid) as error:
                raise InputError(
                    f"{path}: cannot be read ({error}): see what else is damaged with "
                    f"'prothpc verify {self.directory}'"
                ) from error
        return self._open[number]

    def _check_file(self, number: int) -> None:
        path = self.directory / self._shards[number]
        see = f"see what else is damaged with 'prothpc verify {self.directory}'"
        try:
            size = path.stat().st_size
        except OSError as error:
            raise InputError(f"{path}: the shard is missing ({error.strerror}): {see}") from error
        if size != self._sizes[number]:
            raise InputError(
                f"{path}: the shard has {size:,} bytes instead of {self._sizes[number]:,}: {see}"
            )


class _Shard:
    """An open shard, and its batch used last."""

    def __init__(self, reader: pa.ipc.RecordBatchFileReader) -> None:
        self._reader = reader
        self._last: tuple[int, Records] | None = None

    def batch(self, number: int) -> Records:
        if self._last is None or self._last[0] != number:
            self._last = number, as_records(self._reader.get_batch(number))
        return self._last[1]


def as_records(batch: pa.RecordBatch) -> Records:
    """View a batch of a shard as arrays."""
    keys, ids, tokens = batch.columns
    offsets, residues = parts(tokens)
    return Records(key_array(keys), offsets, residues, ids)


def _slice(records: Records, start: int, stop: int) -> Records:
    return Records(
        records.keys[start:stop],
        records.offsets[start : stop + 1],
        records.residues,
        records.id_column.slice(start, stop - start),
    )


def _join(pieces: list[Records]) -> Records:
    lengths = [np.diff(piece.offsets) for piece in pieces]
    offsets = np.concatenate([np.zeros(1, np.int64), *lengths]).cumsum()
    used = [piece.residues[piece.offsets[0] : piece.offsets[-1]] for piece in pieces]
    return Records(
        np.concatenate([np.empty((0, KEY_BYTES), np.uint8), *(piece.keys for piece in pieces)]),
        offsets,
        np.concatenate([np.empty(0, np.uint8), *used]),
        pa.concat_arrays([pa.array([], pa.string()), *(piece.id_column for piece in pieces)]),
    )
