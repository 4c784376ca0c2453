"""The reduce phase: one shard from its segments of all runs, sorted, without duplicates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from preprocessing.columns import key_array, key_column, parts, take, to_binary
from preprocessing.errors import InputError
from preprocessing.files import HashingFile, publish
from preprocessing.keys import halves
from preprocessing.marks import obey_marks
from preprocessing.records import ROWS_PER_BATCH, SCHEMA

_PIECE_SHARE = 0.25
"""Share of the memory budget for the records that are sorted at once: they are copied out of the
mapped runs, twice more to compare duplicates, and once to be written."""

_MAX_BATCH_RESIDUES = 2**31 - 1  # offsets of list<uint8> are 32-bit


Compression = Literal["none", "lz4", "zstd"]

_CODECS = {
    "none": None,
    "lz4": "lz4",
    # Level 3 made shards that were larger and slower to write.
    "zstd": pa.Codec("zstd", compression_level=1),
}


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A finished shard file, as the manifest describes it, and what was left out of it."""

    name: str
    first_key: str | None
    records: int
    residues: int
    bytes: int
    xxh3_128: str
    left_out: dict[str, int]
    """Records and residues that are not in it, by reason: `duplicate.records` and so on."""


def build_shard(
    path: Path,
    temporary: Path,
    segments: Sequence[pa.RecordBatch],
    *,
    dedup: bool,
    marks: bool,
    compression: Compression,
    memory: int,
) -> Shard:
    """Write the shard `path`.

    Args:
        path: the shard file.
        temporary: where it is written until it is whole; on the same file system.
        segments: its records (columns `spill.RUN_COLUMNS`); each segment is sorted by key.
        dedup: whether of equal sequences only the one with the smallest id is kept.
        marks: whether there may be marks among the records.
        compression: of the record batches.
        memory: bytes to be used, about.

    Raises:
        InputError: if 4,096 records in a row have more than 2 GiB of residues.
    """
    writer = _ShardWriter(temporary, compression)
    left_out: Counter[str] = Counter()
    for piece in _pieces(segments, int(memory * _PIECE_SHARE)):
        keys, ids, residues = _concatenate(piece)
        if marks:
            rows, kept_out = obey_marks(keys, residues)
            keys, ids, residues = keys[rows], take(ids, rows), take(residues, rows)
            left_out.update(kept_out)
        order, duplicates = _sort(keys, ids, residues)
        if dedup:
            dropped = order[duplicates]
            offsets, _ = parts(residues)
            lengths = offsets[dropped + 1] - offsets[dropped]
            left_out["duplicate.records"] += len(dropped)
            left_out["duplicate.residues"] += int(lengths.sum())
            order = order[~duplicates]
        writer.append(keys, ids, residues, order)
    writer.close()
    publish(temporary, path)
    return Shard(
        name=path.name,
        first_key=writer.first_key,
        records=writer.records,
        residues=writer.residues,
        bytes=writer.file.bytes,
        xxh3_128=writer.file.hexdigest(),
        left_out=dict(left_out),
    )


def _pieces(segments: Sequence[pa.RecordBatch], limit: int) -> Iterator[list[pa.RecordBatch]]:
    """Cut a shard's segments at common keys, so that a piece has about `limit` bytes."""
    segments = [segment for segment in segments if len(segment)]
    if not segments:
        return
    size = sum(segment.get_total_buffer_size() for segment in segments)
    count = -(-size // limit)
    heads = [halves(key_array(segment.column(0)))[0] for segment in segments]
    first = int(min(head[0] for head in heads))
    last = int(max(head[-1] for head in heads))
    # Keys are spread evenly; equal keys have equal heads and stay together.
    borders = [first + (last - first) * number // count for number in range(1, count)]
    cuts = [
        [0, *np.searchsorted(head, np.array(borders, np.uint64)).tolist(), len(head)]
        for head in heads
    ]
    for number in range(count):
        piece = [
            segment.slice(cut[number], cut[number + 1] - cut[number])
            for segment, cut in zip(segments, cuts, strict=True)
            if cut[number] < cut[number + 1]
        ]
        if piece:
            yield piece


def _concatenate(piece: list[pa.RecordBatch]) -> tuple[np.ndarray, pa.Array, pa.Array]:
    keys = np.concatenate([key_array(segment.column(0)) for segment in piece])
    ids = pa.concat_arrays([segment.column(1) for segment in piece])
    residues = pa.concat_arrays([segment.column(2) for segment in piece])
    return keys, ids, residues


def _sort(keys: np.ndarray, ids: pa.Array, residues: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Sort by key, residues and id.

    Returns:
        The rows in order, int [N], and which of those are equal to the row before, bool [N].
    """
    high, low = halves(keys)
    order = np.argsort(high)
    same = high[order[1:]] == high[order[:-1]]
    duplicates = np.zeros(len(order), bool)
    if not same.any():
        return order, duplicates

    # Rows that share the key's high half are put in order among themselves.
    places = np.flatnonzero(np.append(same, False) | np.insert(same, 0, False))
    rows = order[places]
    table = pa.table({"high": high[rows], "low": low[rows], "id": take(ids, rows)})
    columns = [(name, "ascending") for name in table.column_names]
    rows = rows[pc.sort_indices(table, sort_keys=columns).to_numpy()]
    equal_keys, equal = _compare_with_previous(rows, high, low, residues)
    if not np.array_equal(equal_keys, equal):  # two sequences, one key: never seen, but correct
        rows = np.array(
            sorted(rows, key=lambda r: (high[r], low[r], residues[r].as_py(), ids[r].as_py()))
        )
        equal_keys, equal = _compare_with_previous(rows, high, low, residues)
    order[places] = rows
    duplicates[places[1:]] = equal
    return order, duplicates


def _compare_with_previous(
    rows: np.ndarray, high: np.ndarray, low: np.ndarray, residues: pa.Array
) -> tuple[np.ndarray, np.ndarray]:
    """For rows[1:], bool [rows - 1]: has it the key, has it the residues of the row before?"""
    equal_keys = (high[rows[1:]] == high[rows[:-1]]) & (low[rows[1:]] == low[rows[:-1]])
    equal = np.zeros(len(equal_keys), bool)
    pairs = np.flatnonzero(equal_keys)
    same_text = pc.equal(take(residues, rows[pairs]), take(residues, rows[pairs + 1]))
    equal[pairs] = same_text.to_numpy(zero_copy_only=False)
    return equal_keys, equal


class _ShardWriter:
    """Writes rows as batches of equal length, and counts them."""

    def __init__(self, path: Path, compression: Compression) -> None:
        self.file = HashingFile(path)
        options = pa.ipc.IpcWriteOptions(compression=_CODECS[compression], use_threads=False)
        self._writer = pa.ipc.new_file(self.file, SCHEMA, options=options)
        self._left: list[tuple[np.ndarray, pa.Array, pa.Array]] = []
        self._rows_left = 0
        self.first_key: str | None = None
        self.records = 0
        self.residues = 0

    def append(
        self, keys: np.ndarray, ids: pa.Array, residues: pa.Array, order: np.ndarray
    ) -> None:
        """Write the rows `order` of the columns; those that fill no batch wait for the next."""
        start = 0
        while start < len(order):
            rows = order[start : start + ROWS_PER_BATCH - self._rows_left]
            self._left.append((keys[rows], take(ids, rows), take(residues, rows)))
            self._rows_left += len(rows)
            start += len(rows)
            if self._rows_left == ROWS_PER_BATCH:
                self._write_batch()

    def close(self) -> None:
        """Write the last batch and the end of the file."""
        if self._rows_left:
            self._write_batch()
        self._writer.close()
        self.file.close()

    def _write_batch(self) -> None:
        keys = np.concatenate([part[0] for part in self._left])
        ids = pa.concat_arrays([part[1] for part in self._left])
        residues = pa.concat_arrays([part[2] for part in self._left])
        self._left, self._rows_left = [], 0
        if self.first_key is None:
            self.first_key = keys[0].tobytes().hex()
        offsets, values = parts(residues)
        if offsets[-1] > _MAX_BATCH_RESIDUES:
            raise InputError(
                f"{len(keys)} records have {offsets[-1]:,} residues, more than a batch can hold: "
                "are these proteins? Leave out what is not with --max-length"
            )
        self._writer.write_batch(_batch(keys, ids, offsets, values))
        self.records += len(keys)
        self.residues += int(offsets[-1])


def _batch(
    keys: np.ndarray, ids: pa.Array, offsets: np.ndarray, values: np.ndarray
) -> pa.RecordBatch:
    """Make a batch from exactly the buffers that are needed: its bytes depend on nothing else."""
    id_offsets, id_values = parts(ids)
    names = to_binary(id_offsets.astype(np.int32), id_values[: id_offsets[-1]])
    tokens = pa.Array.from_buffers(
        SCHEMA.field("tokens").type,
        len(keys),
        [None, pa.py_buffer(offsets.astype(np.int32))],
        null_count=0,
        children=[pa.array(values[: offsets[-1]])],
    )
    return pa.record_batch([key_column(keys), names.view(pa.string()), tokens], schema=SCHEMA)
