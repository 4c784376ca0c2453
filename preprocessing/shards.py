"""The reduce phase: one shard from its segments of all runs, sorted, without duplicates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from preprocessing.columns import cut_by_size, parts, take, to_binary
from preprocessing.errors import InputError
from preprocessing.files import HashingFile
from preprocessing.keys import halves
from preprocessing.marks import mark_rows, obey_marks
from preprocessing.records import ROWS_PER_BATCH, SCHEMA, shard_schema
from preprocessing.runs import Bucket, Table
from preprocessing.uniref_headers import unpack_metadata

_PIECE_SHARE = 0.3
"""Share of the memory budget for the records that are sorted at once."""

_PIECE_BYTES = 128 * 2**20
"""More of them at once is not faster."""

_COMPARE_BYTES = 2**20
"""As much is compared at a time to find equal sequences."""

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


def piece_bytes(memory: int) -> int:
    """Return how many bytes of records may be sorted at once, of a memory budget."""
    return min(int(memory * _PIECE_SHARE), _PIECE_BYTES)


def build_shard(
    path: Path,
    temporary: Path,
    buckets: Iterable[Bucket],
    *,
    dedup: bool,
    marks: bool,
    metadata: bool,
    compression: Compression,
) -> Shard:
    """Write the shard `path` under a temporary name.

    Args:
        path: the shard file.
        temporary: where it is written.
        buckets: its records, in the order of their keys.
        dedup: whether of equal sequences only the one with the smallest id is kept.
        marks: whether there may be marks among the records.
        metadata: whether the records have metadata.
        compression: of the record batches.

    Raises:
        InputError: if 4,096 records in a row have more than 2 GiB of residues, or a run is damaged.
    """
    writer = _ShardWriter(temporary, shard_schema(metadata=metadata), compression)
    left_out: Counter[str] = Counter()
    for bucket in buckets:
        table = _settle(bucket, dedup, marks, left_out)
        order, duplicates = _sort(table)
        if dedup:
            _count_duplicates(table, order[duplicates], left_out)
            order = order[~duplicates]
        writer.append(table, order)
    writer.close()
    return Shard(
        name=path.name,
        first_key=writer.first_key,
        records=writer.records,
        residues=writer.residues,
        bytes=writer.file.bytes,
        xxh3_128=writer.file.hexdigest(),
        left_out=dict(left_out),
    )


def _settle(bucket: Bucket, dedup: bool, marks: bool, left_out: Counter[str]) -> Table:
    """Return a bucket's records without those that marks keep out.

    Many equal sequences, or more records than were expected, may make a bucket larger than memory:
    then it is read in portions, of which only one record of each sequence stays.
    """
    of_bucket = Table.concat(
        [table.take(mark_rows(table.residues)) for table in bucket.portions()]
    ) if marks and bucket.is_large else None  # fmt: skip
    kept: list[Table] = []
    for table in bucket.portions():
        if of_bucket is not None:
            rows = np.arange(table.rows)
            table = table.take(np.delete(rows, mark_rows(table.residues)))
            table = Table.concat([table, of_bucket])
        if marks:
            rows, kept_out = obey_marks(table.keys, table.residues)
            table = table.take(rows)
            left_out.update(kept_out)
        if not bucket.is_large:
            return table
        kept.append(table.take(np.arange(table.rows)) if not marks else table)
        if dedup:
            together = Table.concat(kept)
            order, duplicates = _sort(together)
            _count_duplicates(together, order[duplicates], left_out)
            kept = [together.take(order[~duplicates])]
    return Table.concat(kept)


def _count_duplicates(table: Table, rows: np.ndarray, left_out: Counter[str]) -> None:
    offsets, _ = parts(table.residues)
    left_out["duplicate.records"] += len(rows)
    left_out["duplicate.residues"] += int((offsets[rows + 1] - offsets[rows]).sum())


def _sort(table: Table) -> tuple[np.ndarray, np.ndarray]:
    """Sort by key, residues, id and metadata.

    Returns:
        The rows in order, int [N], and which of those are equal to the row before, bool [N].
    """
    high, low = halves(table.keys)
    ids, residues = table.ids, table.residues
    order = np.argsort(high)
    in_order = high[order]
    same = in_order[1:] == in_order[:-1]
    duplicates = np.zeros(len(order), bool)
    if not same.any():
        return order, duplicates

    # Rows that share the key's high half are put in order among themselves.
    places = np.flatnonzero(np.append(same, False) | np.insert(same, 0, False))
    rows = order[places]
    keys = pa.table({"high": high[rows], "low": low[rows], "id": take(ids, rows)})
    texts = [residues, ids]
    if table.metadata is not None:  # that differ where an id stands in two headers
        keys = keys.append_column("metadata", take(table.metadata, rows))
        texts.append(table.metadata)
    columns = [(name, "ascending") for name in keys.column_names]
    rows = rows[pc.sort_indices(keys, sort_keys=columns).to_numpy()]
    equal_keys, equal = _compare_with_previous(rows, high, low, residues)
    if not np.array_equal(equal_keys, equal):  # two sequences, one key: never seen, but correct
        rows = np.array(
            sorted(rows, key=lambda r: (high[r], low[r], *(text[r].as_py() for text in texts)))
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
    offsets, _ = parts(residues)
    sizes = np.diff(offsets)[rows[pairs]].astype(np.int64)
    for first, last in cut_by_size(sizes, _COMPARE_BYTES):
        some = pairs[first:last]
        same_text = pc.equal(take(residues, rows[some]), take(residues, rows[some + 1]))
        equal[some] = same_text.to_numpy(zero_copy_only=False)
    return equal_keys, equal


class _ShardWriter:
    """Writes rows as batches of equal length, and counts them."""

    def __init__(self, path: Path, schema: pa.Schema, compression: Compression) -> None:
        self.file = HashingFile(path)
        options = pa.ipc.IpcWriteOptions(compression=_CODECS[compression], use_threads=False)
        self._writer = pa.ipc.new_file(self.file, schema, options=options)
        self._schema = schema
        self._left: list[Table] = []
        self._rows_left = 0
        self.first_key: str | None = None
        self.records = 0
        self.residues = 0

    def append(self, table: Table, order: np.ndarray) -> None:
        """Write the rows `order` of a table; those that fill no batch wait for the next."""
        start = 0
        while start < len(order):
            rows = order[start : start + ROWS_PER_BATCH - self._rows_left]
            self._left.append(table.take(rows))
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
        rows = self._rows_left
        residues = sum(_residues(table) for table in self._left)
        if residues > _MAX_BATCH_RESIDUES:
            raise InputError(
                f"{rows} records have {residues:,} residues, more than a batch can hold: "
                "are these proteins? Leave out what is not with --max-length"
            )
        table = self._left[0] if len(self._left) == 1 else Table.concat(self._left)
        self._left, self._rows_left = [], 0
        if self.first_key is None:
            self.first_key = table.keys[0].tobytes().hex()
        self._writer.write_batch(_batch(table, self._schema))
        self.records += rows
        self.residues += residues


def _residues(table: Table) -> int:
    offsets, _ = parts(table.residues)
    return int(offsets[-1]) - int(offsets[0])


def _batch(table: Table, schema: pa.Schema) -> pa.RecordBatch:
    """Make a batch from exactly the buffers that are needed: its bytes depend on nothing else."""
    id_offsets, id_values = parts(table.ids)
    names = to_binary(id_offsets, id_values[: id_offsets[-1]])
    offsets, values = parts(table.residues)
    tokens = pa.Array.from_buffers(
        SCHEMA.field("tokens").type,
        table.rows,
        [None, pa.py_buffer(offsets)],
        null_count=0,
        children=[pa.array(values[: offsets[-1]])],
    )
    columns = [table.columns[0], names.view(pa.string()), tokens]
    if table.metadata is not None:
        columns += unpack_metadata(table.metadata)
    return pa.record_batch(columns, schema=schema)
