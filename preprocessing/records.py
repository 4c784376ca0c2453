"""The record format, and reading it.

A record set is a directory of `manifest.json`, `run.json` and Arrow IPC files. All records of a
split form one sequence in order of their keys, cut into shards by key range. A shard holds batches
of `ROWS_PER_BATCH` rows (the last may be shorter) and is read by mapping it into memory.
"""

from __future__ import annotations

import bisect
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from preprocessing.addresses import gather_at, read_at
from preprocessing.columns import key_array, map_file, parts
from preprocessing.errors import InputError
from preprocessing.keys import KEY_BYTES
from preprocessing.uniref_headers import METADATA_FIELDS

FORMAT = "prothpc-records"
VERSION = 1
ROWS_PER_BATCH = 4096

MANIFEST = "manifest.json"
RUN = "run.json"
WORK = ".work"
"""Directory of an unfinished job, inside the record set's own."""

SPLITS = ("train", "holdout")

CACHED_BYTES = 512 * 2**20
"""Decompressed batches that a reader keeps; those of uncompressed shards stay in the file."""
_CACHED_BATCHES = 4096
_OFFSET_BYTES = 4  # offsets of list<uint8> are int32

SCHEMA = pa.schema(
    [
        pa.field("key", pa.binary(KEY_BYTES), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("tokens", pa.list_(pa.field("item", pa.uint8(), nullable=False)), nullable=False),
    ],
    {"format": FORMAT, "version": str(VERSION)},
)
"""Columns of a shard; `tokens` are residues as ASCII capitals."""


def shard_schema(*, metadata: bool) -> pa.Schema:
    """Return the columns of a shard, with or without those of UniRef headers."""
    fields = [*SCHEMA, *METADATA_FIELDS] if metadata else list(SCHEMA)
    return pa.schema(fields, SCHEMA.metadata)


def canonical_json(value: Any) -> bytes:
    """Return the one way in which a value is written: sorted keys, indent 1, a last newline."""
    return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()


def seal(document: dict[str, Any]) -> dict[str, Any]:
    """Return a document with the checksum of all that is in it, so that any change of it shows."""
    content = {name: value for name, value in document.items() if name != "checksum"}
    return content | {"checksum": xxhash.xxh3_128_hexdigest(canonical_json(content))}


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
    metadata: dict[str, pa.Array] = field(default_factory=dict)
    """Of UniRef headers, if they were kept: `cluster_size` and `tax_id`, uint32 [N], and `rep_id`,
    string [N]; null where a header does not say."""

    def __len__(self) -> int:
        return len(self.keys)

    def ids(self) -> list[str]:
        """Return the ids as Python strings."""
        return self.id_column.to_pylist()


@dataclass(frozen=True, eq=False)
class Picked:
    """N records in any order, still in the mapped shards."""

    lengths: np.ndarray
    """int64 [N]: residues."""
    _residue_addresses: np.ndarray
    _key_addresses: np.ndarray
    _owners: object
    """Keeps alive what the addresses point to."""

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def keys(self) -> np.ndarray:
        """uint8 [N, 16]; read each time."""
        if not len(self):
            return np.empty((0, KEY_BYTES), np.uint8)
        halves = [read_at(self._key_addresses + skip, np.uint64) for skip in (0, KEY_BYTES // 2)]
        return np.stack(halves, axis=1).view(np.uint8)

    def residues(self, first: np.ndarray | int = 0, count: np.ndarray | None = None) -> np.ndarray:
        """Copy the records' residues next to each other.

        Args:
            first: int64 [N], first residue wanted of each record.
            count: int64 [N], residues wanted from there; None: all to the end.

        Returns:
            uint8 [sum of counts], ASCII capitals.
        """
        if not len(self):
            return np.empty(0, np.uint8)
        count = self.lengths - first if count is None else count
        if np.any((count < 0) | (first < 0) | (first + count > self.lengths)):
            raise IndexError("residues beyond the ends of a record")
        starts = self._residue_addresses + first
        return gather_at(starts, starts + count)


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
            has_metadata = self.manifest["options"].get("keep_metadata", False)
            self._metadata = METADATA_FIELDS if has_metadata else ()
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
        batches = -(-np.array(counts, np.int64) // self._rows_per_batch)
        self._first_batches = np.concatenate([[0], np.cumsum(batches)])
        self._close()

    def __len__(self) -> int:
        return self.num_records

    def __getstate__(self) -> dict[str, Any]:
        closed = dict.fromkeys(("_open", "_recent", "_places"))
        return {**self.__dict__, **closed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._close()

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
            shard = self._shard_at(start)
            batch, first = divmod(start - int(self._starts[shard]), self._rows_per_batch)
            records = self._batch(int(self._first_batches[shard]) + batch)
            count = min(stop - start, len(records) - first)
            pieces.append(_slice(records, first, first + count))
            start += count
        self._forget()
        return pieces[0] if len(pieces) == 1 else _join(pieces, self._metadata)

    def pick(self, numbers: np.ndarray) -> Picked:
        """Return records in any order; all at once is many times faster than one by one.

        Args:
            numbers: integers [N], of records in the split.

        Raises:
            IndexError: if they are not within 0 to `num_records` - 1.
            InputError: if a shard is missing or damaged.
        """
        numbers = np.asarray(numbers, np.int64)
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < self.num_records:
            raise IndexError(f"records {numbers.min()} to {numbers.max()} of {self.num_records}")
        shards = np.searchsorted(self._starts, numbers, side="right") - 1
        batches, rows = np.divmod(numbers - self._starts[shards], self._rows_per_batch)
        batches += self._first_batches[shards]
        places: np.ndarray = self._places.take(batches, axis=0)
        decompressed = []
        # Addresses in the file hold for ever, those of decompressed batches while they are kept.
        if self._decompresses or not places[:, 0].all():
            decompressed = [self._batch(number) for number in np.unique(batches).tolist()]
            places = self._places.take(batches, axis=0)
        self._forget()
        owners = (self._open, decompressed)
        if not len(numbers):
            return Picked(numbers, numbers, numbers, owners)
        keys, offsets, residues, size = places.T
        offsets = offsets + rows * _OFFSET_BYTES
        starts, stops = read_at(offsets, np.int32), read_at(offsets + _OFFSET_BYTES, np.int32)
        wrong = (starts < 0) | (stops < starts) | (stops > size)
        if wrong.any():
            raise self._damaged(int(shards[wrong][0]), "some records lie outside of it")
        lengths = stops.astype(np.int64) - starts
        return Picked(lengths, residues + starts, keys + rows * KEY_BYTES, owners)

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

    @property
    def num_shards(self) -> int:
        """Shards of the split, empty ones included."""
        return len(self._shards)

    def numbers_in(self, shard: int) -> range:
        """Return the numbers of a shard's records."""
        return range(*self._starts[shard : shard + 2].tolist())

    def file_of(self, number: int) -> str:
        """Return the file in which a record lies."""
        return self._shards[self._shard_at(number)]

    def find_id(self, name: str, shard: int) -> list[int]:
        """Return the numbers of the records with an id in one shard.

        Ids are in no order, so all are compared; nothing else is read.

        Raises:
            InputError: if the shard is missing or damaged.
        """
        numbers = self.numbers_in(shard)
        if not numbers:
            return []
        try:
            ids = self._shard(shard).ids()
        except (OSError, pa.ArrowException) as error:
            raise self._damaged(shard, f"cannot be read ({error})") from error
        return [numbers[row] for row in pc.indices_nonzero(pc.equal(ids, name)).to_pylist()]

    def check_files(self) -> None:
        """See that all shards are there and as long as they should be.

        Raises:
            InputError: naming the first that is not.
        """
        for number in range(len(self._shards)):
            self._check_file(number)

    def _close(self) -> None:
        """Begin with nothing read."""
        self._open: dict[int, _Shard] = {}
        self._recent: OrderedDict[int, _Batch] = OrderedDict()
        self._recent_bytes = 0
        self._decompresses = False
        # Of each batch: addresses of keys, offsets and residues, and residues; 0 if not known.
        self._places: np.ndarray = np.zeros((int(self._first_batches[-1]), 4), np.int64)

    def _shard_at(self, number: int) -> int:
        return int(np.searchsorted(self._starts, number, side="right")) - 1

    def _key_of(self, number: int) -> bytes:
        return self.read(number, number + 1).keys[0].tobytes()

    def _batch(self, number: int) -> Records:
        """Return a batch, numbered through the split; `_forget` comes later."""
        if number in self._recent:
            self._recent.move_to_end(number)
            return self._recent[number].records
        shard = int(np.searchsorted(self._first_batches, number, side="right")) - 1
        in_shard = number - int(self._first_batches[shard])
        rows = int(self._starts[shard + 1] - self._starts[shard]) - in_shard * self._rows_per_batch
        try:
            batch = self._shard(shard).batch(in_shard)
        except (OSError, pa.ArrowException, IndexError) as error:
            raise self._damaged(shard, f"cannot be read ({error})") from error
        records = batch.records
        if len(records) != min(rows, self._rows_per_batch):
            raise self._damaged(shard, f"batch {in_shard:,} has {len(records):,} records")
        arrays = (records.keys, records.offsets, records.residues)
        self._places[number] = *(array.ctypes.data for array in arrays), len(records.residues)
        self._recent[number] = batch
        self._recent_bytes += batch.bytes
        self._decompresses |= batch.bytes > 0
        return records

    def _forget(self) -> None:
        """Let go of the batches that were not used for the longest time."""
        while len(self._recent) > 1 and (
            self._recent_bytes > CACHED_BYTES or len(self._recent) > _CACHED_BATCHES
        ):
            _, batch = self._recent.popitem(last=False)
            self._recent_bytes -= batch.bytes

    def _shard(self, number: int) -> _Shard:
        if number not in self._open:
            self._check_file(number)
            self._open[number] = _Shard(self.directory / self._shards[number])
        return self._open[number]

    def _damaged(self, shard: int, what: str) -> InputError:
        return InputError(
            f"{self.directory / self._shards[shard]}: {what}: see what else is damaged with "
            f"'prothpc verify {self.directory}'"
        )

    def _check_file(self, number: int) -> None:
        try:
            size = (self.directory / self._shards[number]).stat().st_size
        except OSError as error:
            raise self._damaged(number, f"the shard is missing ({error.strerror})") from error
        if size != self._sizes[number]:
            expected = f"{size:,} bytes instead of {self._sizes[number]:,}"
            raise self._damaged(number, f"the shard has {expected}")


class _Batch(NamedTuple):
    records: Records
    bytes: int
    """Memory that it takes; 0 if it is a view of the file."""


class _Shard:
    """An open shard."""

    def __init__(self, path: Path) -> None:
        self._content = map_file(path)
        self._reader = pa.ipc.open_file(pa.BufferReader(self._content))

    def ids(self) -> pa.ChunkedArray:
        """Read the ids alone."""
        column = [SCHEMA.get_field_index("id")]
        options = pa.ipc.IpcReadOptions(included_fields=column)
        return pa.ipc.open_file(pa.BufferReader(self._content), options=options).read_all()[0]

    def batch(self, number: int) -> _Batch:
        content = self._reader.get_batch(number)
        records = as_records(content)
        # Compression is up to each buffer: those that it would not shorten stay in the file.
        first, end = self._content.address, self._content.address + self._content.size
        arrays = (records.keys, records.offsets, records.residues)
        in_file = all(first <= array.ctypes.data < end for array in arrays)
        return _Batch(records, 0 if in_file else content.nbytes)


def as_records(batch: pa.RecordBatch) -> Records:
    """View a batch of a shard as arrays."""
    keys, ids, tokens, *others = batch.columns
    offsets, residues = parts(tokens)
    names = batch.schema.names[len(SCHEMA) :]
    return Records(key_array(keys), offsets, residues, ids, dict(zip(names, others, strict=True)))


def _slice(records: Records, start: int, stop: int) -> Records:
    return Records(
        records.keys[start:stop],
        records.offsets[start : stop + 1],
        records.residues,
        records.id_column.slice(start, stop - start),
        {name: column.slice(start, stop - start) for name, column in records.metadata.items()},
    )


def _join(pieces: list[Records], metadata: Sequence[pa.Field]) -> Records:
    lengths = [np.diff(piece.offsets) for piece in pieces]
    offsets = np.concatenate([np.zeros(1, np.int64), *lengths]).cumsum()
    used = [piece.residues[piece.offsets[0] : piece.offsets[-1]] for piece in pieces]
    return Records(
        np.concatenate([np.empty((0, KEY_BYTES), np.uint8), *(piece.keys for piece in pieces)]),
        offsets,
        np.concatenate([np.empty(0, np.uint8), *used]),
        pa.concat_arrays([pa.array([], pa.string()), *(piece.id_column for piece in pieces)]),
        {
            kind.name: pa.concat_arrays(
                [pa.array([], kind.type), *(piece.metadata[kind.name] for piece in pieces)]
            )
            for kind in metadata
        },
    )
