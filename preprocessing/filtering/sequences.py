"""The two sides of a search: records under ordinals, 0 to N - 1 in the order of the input.

Programs get ordinals for ids (MMseqs2 rewrites ids, BLAST reads meaning into some). A side is an
Arrow file, so that every process maps it and looks up what an ordinal stands for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from preprocessing.columns import key_array, key_column, open_arrow, parts, take
from preprocessing.errors import InputError
from preprocessing.fasta import OnInvalid
from preprocessing.files import publish
from preprocessing.keys import KEY_BYTES, hash_residues
from preprocessing.parsing import parsed_chunks
from preprocessing.records import MANIFEST, SPLITS, WORK, RecordSet, read_manifest
from preprocessing.sources import UNIT_BYTES, UnitReader, cut, examine

_SCHEMA = pa.schema(
    [
        pa.field("key", pa.binary(KEY_BYTES), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("length", pa.int32(), nullable=False),
        pa.field("residues", pa.binary(), nullable=False),
    ]
)
_ROWS_PER_READ = 4096


@dataclass(frozen=True)
class Totals:
    """How much a side holds."""

    records: int
    residues: int
    longest: int


def is_record_set(path: Path) -> bool:
    """Whether a path names a record set (else it is taken for FASTA)."""
    return (path / MANIFEST).is_file() or (path / WORK).is_dir()


class SideWriter:
    """Writes a side, and at the same time the FASTA from which a program makes its database."""

    def __init__(self, path: Path, *, fasta: Path | None, with_residues: bool) -> None:
        """Open the files.

        Args:
            path: the Arrow file.
            fasta: FASTA of all sequences under their ordinals, or None.
            with_residues: keep the residues in the Arrow file.
        """
        self._path, self._part = path, path.with_suffix(".part")
        self._with_residues = with_residues
        self._sink = self._part.open("wb")
        self._writer = pa.ipc.new_file(self._sink, _SCHEMA)
        self._fasta = fasta.open("wb") if fasta else None
        self._records = self._residues = self._longest = 0

    def add(self, ids: pa.Array, sequences: pa.Array) -> None:
        """Append records: ids binary [N] in UTF-8, residues binary [N]."""
        offsets, residues = parts(sequences)
        lengths = np.diff(offsets).astype(np.int32)
        if self._fasta:
            self._fasta.write(as_fasta(offsets, residues, self._records))
        stored = sequences.cast(pa.binary()) if self._with_residues else [b""] * len(lengths)
        columns = [
            key_column(np.ascontiguousarray(hash_residues(offsets, residues))),
            ids.cast(pa.string()),
            pa.array(lengths),
            pa.array(stored, pa.binary()),
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
        self._records += len(lengths)
        self._residues += int(lengths.sum())
        self._longest = max(self._longest, int(lengths.max(initial=0)))

    def close(self) -> Totals:
        """Finish the files."""
        self._writer.close()
        self._sink.close()
        publish(self._part, self._path)
        if self._fasta:
            self._fasta.close()
        return Totals(self._records, self._residues, self._longest)


def write_side(
    inputs: Sequence[Path],
    path: Path,
    *,
    on_invalid: OnInvalid,
    fasta: Path | None,
    with_residues: bool,
) -> Totals:
    """Read FASTA files and record sets, one after another.

    Raises:
        InputError: if one cannot be read, or there is no record in any.
    """
    writer = SideWriter(path, fasta=fasta, with_residues=with_residues)
    for source in inputs:
        for ids, sequences in _read(source, on_invalid):
            writer.add(ids, sequences)
    totals = writer.close()
    if totals.records == 0:
        raise InputError(f"{', '.join(map(str, inputs))}: no sequences: give some to search with")
    return totals


def _read(path: Path, on_invalid: OnInvalid) -> Iterator[tuple[pa.Array, pa.Array]]:
    if is_record_set(path):
        yield from _read_records(path)
        return
    source = examine(path)
    for unit in cut([source]):
        reader = UnitReader(source, unit, block_bytes=UNIT_BYTES)
        for _, parsed in parsed_chunks(reader, source.path, on_invalid):
            valid = np.flatnonzero(~parsed.invalid)
            yield take(parsed.ids, valid), take(parsed.sequences, valid)


def _read_records(path: Path) -> Iterator[tuple[pa.Array, pa.Array]]:
    manifest, _ = read_manifest(path)
    for split in (split for split in SPLITS if manifest["splits"][split]["shards"]):
        records = RecordSet(path, split)
        for start in range(0, len(records), _ROWS_PER_READ):
            read = records.read(start, min(start + _ROWS_PER_READ, len(records)))
            offsets = (read.offsets - read.offsets[0]).astype(np.int32)
            residues = read.residues[int(read.offsets[0]) : int(read.offsets[-1])]
            buffers = [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(residues))]
            sequences = pa.Array.from_buffers(pa.binary(), len(read), buffers, null_count=0)
            yield read.id_column.cast(pa.binary()), sequences


class Side:
    """A side that was written, mapped into memory."""

    def __init__(self, path: Path) -> None:
        reader = open_arrow(path)
        self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._starts = np.cumsum([0, *map(len, self._batches)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def keys(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the keys, uint8 [N, 16], batch by batch, with the ordinal of the first."""
        for start, batch in zip(self._starts.tolist(), self._batches, strict=False):
            yield start, key_array(batch.column("key"))

    def read(self, start: int, stop: int) -> Iterator[pa.RecordBatch]:
        """Yield the records start to stop - 1."""
        for first, batch in zip(self._starts.tolist(), self._batches, strict=False):
            low, high = max(start - first, 0), min(stop - first, len(batch))
            if low < high:
                yield batch.slice(low, high - low)

    def take(self, ordinals: np.ndarray) -> pa.Table:
        """Return the records of ordinals, int64 [M], in that order."""
        if len(ordinals) == 0:
            return _SCHEMA.empty_table()
        order = np.argsort(ordinals, kind="stable")
        bounds = np.searchsorted(ordinals[order], self._starts)
        picked = [
            batch.take(pa.array(ordinals[order[low:high]] - start))
            for batch, start, low, high in zip(
                self._batches, self._starts, bounds, bounds[1:], strict=False
            )
            if low < high
        ]
        back = np.empty(len(order), np.int64)
        back[order] = np.arange(len(order))
        return pa.Table.from_batches(picked).combine_chunks().take(pa.array(back))

    def chunk(self, number: int, chunks: int) -> tuple[int, int]:
        """Return the ordinals (start, stop) of one of `chunks` parts of about equal residues."""
        residues = [int(batch.column("length").to_numpy().sum()) for batch in self._batches]
        before = np.cumsum([0, *residues])
        return self._ordinal_at(before, number, chunks), self._ordinal_at(
            before, number + 1, chunks
        )

    def _ordinal_at(self, before: np.ndarray, number: int, chunks: int) -> int:
        """Return the first ordinal with at least number / chunks of all residues before it."""
        goal = -(-int(before[-1]) * number // chunks)
        batch = max(int(np.searchsorted(before, goal)) - 1, 0)
        lengths = self._batches[batch].column("length").to_numpy()
        inside = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        return int(self._starts[batch]) + int(np.searchsorted(inside, goal - before[batch]))


def as_fasta(offsets: np.ndarray, residues: np.ndarray, first: int) -> bytes:
    """Return FASTA of the records `residues[offsets[i]:offsets[i + 1]]` under ordinals.

    Args:
        offsets: int [N + 1].
        residues: uint8, ASCII.
        first: ordinal of the first.
    """
    text = residues[int(offsets[0]) : int(offsets[-1])].tobytes()
    bounds = (offsets - offsets[0]).tolist()
    pieces = zip(range(first, first + len(bounds) - 1), bounds, bounds[1:], strict=False)
    return b"".join([b">%d\n%b\n" % (number, text[low:high]) for number, low, high in pieces])


def write_queries(side: Side, start: int, stop: int, path: Path) -> None:
    """Write FASTA of the records start to stop - 1 under their ordinals."""
    with path.open("wb") as file:
        for batch in side.read(start, stop):
            file.write(as_fasta(*parts(batch.column("residues")), start))
            start += len(batch)


def write_some_queries(side: Side, ordinals: np.ndarray, path: Path) -> None:
    """Write FASTA of the records of some ordinals, int64 [M], under these."""
    residues = side.take(ordinals).column("residues").to_pylist()
    with path.open("wb") as file:
        for number, sequence in zip(ordinals.tolist(), residues, strict=True):
            file.write(b">%d\n%b\n" % (number, sequence))
