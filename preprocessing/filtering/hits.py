"""Hits: from a program's table to the pairs of sequences that are too similar."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import csv

from preprocessing.columns import key_array
from preprocessing.filtering.options import FilterOptions
from preprocessing.filtering.sequences import Side
from preprocessing.keys import KEY_BYTES
from preprocessing.keysets import KeySet


@dataclass(frozen=True)
class Table:
    """Alignments as both programs list them, int64 [A] each but for `evalue`, float64 [A]."""

    query: np.ndarray
    target: np.ndarray
    identical: np.ndarray
    """Identical residues."""
    columns: np.ndarray
    """Columns of the alignment, gaps included."""
    query_start: np.ndarray
    query_end: np.ndarray
    target_start: np.ndarray
    target_end: np.ndarray
    query_length: np.ndarray
    target_length: np.ndarray
    evalue: np.ndarray


@dataclass(frozen=True)
class Hits:
    """Pairs of sequences, one row each, in order of query and target ordinal."""

    query: np.ndarray
    """int64 [H], ordinals."""
    target: np.ndarray
    """int64 [H], ordinals."""
    identity: np.ndarray
    """float64 [H]."""
    coverage: np.ndarray
    """float64 [H]."""
    evalue: np.ndarray
    """float64 [H]; NaN for equal sequences between which the program found no alignment."""

    def __len__(self) -> int:
        return len(self.query)

    def take(self, rows: np.ndarray) -> Hits:
        """Return some rows."""
        return Hits(*(getattr(self, field.name)[rows] for field in fields(self)))

    def similarity_order(self, *leading: np.ndarray) -> np.ndarray:
        """Return the rows by `leading` columns, then the most similar first.

        Alignments come before pairs that are only known to be equal; then the greatest identity,
        then coverage, then the least e-value, then the smallest ordinals.
        """
        least_first = (self.target, self.query, self.evalue, -self.coverage, -self.identity)
        return np.lexsort((*least_first, np.isnan(self.evalue), *reversed(leading)))


def join(parts: Iterable[Hits]) -> Hits:
    """Return hits of several searches in order of query and target."""
    pieces = [_NONE, *parts]
    joined = Hits(
        *(np.concatenate([getattr(p, field.name) for p in pieces]) for field in fields(Hits))
    )
    return joined.take(np.lexsort((joined.target, joined.query)))


def read_table(path: Path) -> Table:
    """Read a table of the columns of `Table`, tab-separated; lines with `#` are comments."""
    with path.open("rb") as file:
        rows = b"".join(line for line in file if not line.startswith(b"#"))
    names = [field.name for field in fields(Table)]
    types = {name: pa.float64() if name == "evalue" else pa.int64() for name in names}
    if not rows:
        return Table(*(np.empty(0, types[name].to_pandas_dtype()) for name in names))
    table = csv.read_csv(
        BytesIO(rows),
        read_options=csv.ReadOptions(column_names=names, use_threads=False),
        parse_options=csv.ParseOptions(delimiter="\t"),
        convert_options=csv.ConvertOptions(column_types=types),
    )
    return Table(*(table.column(name).to_numpy() for name in names))


def too_similar(table: Table, options: FilterOptions, *, within: bool) -> Hits:
    """Return the pairs with an alignment that meets all thresholds; of several the best.

    Args:
        table: what the program found.
        options: the thresholds.
        within: leave out hits of a sequence with itself.
    """
    shorter = np.minimum(table.query_length, table.target_length)
    whole = {"alignment": table.columns, "query": table.query_length, "shorter": shorter}
    identity = table.identical / whole[options.identity_of]
    coverage = _shorter_span(table) / shorter
    meets = (coverage >= options.min_coverage) & (table.evalue <= options.max_evalue)
    if options.min_identity is not None:
        meets &= identity >= options.min_identity
    else:
        meets &= identity > options.identity_above
    if within:
        meets &= table.query != table.target
    hits = Hits(table.query, table.target, identity, coverage, table.evalue).take(meets)
    hits = hits.take(hits.similarity_order(hits.query, hits.target))
    first = np.ones(len(hits), bool)
    first[1:] = (hits.query[1:] != hits.query[:-1]) | (hits.target[1:] != hits.target[:-1])
    return hits.take(first)


def _shorter_span(table: Table) -> np.ndarray:
    """Return the aligned residues of the shorter sequence; of equally long ones the more."""
    query = table.query_end - table.query_start + 1
    target = table.target_end - table.target_start + 1
    longer_query = np.where(table.query_length > table.target_length, target, query)
    same = table.query_length == table.target_length
    return np.where(same, np.maximum(query, target), longer_query)


def equal_pairs(queries: Side, start: int, stop: int, targets: Side, *, within: bool) -> Hits:
    """Return the pairs of a chunk's queries and targets with equal residues.

    Programs miss some: they mask repeats, and find nothing significant in short sequences.

    Args:
        queries: the side of which start to stop - 1 are the chunk.
        start: first ordinal of the chunk.
        stop: ordinal after its last.
        targets: the other side.
        within: leave out pairs of a sequence with itself.
    """
    batches = [key_array(batch.column("key")) for batch in queries.read(start, stop)]
    keys = np.concatenate([np.empty((0, KEY_BYTES), np.uint8), *batches])
    known = KeySet.of(keys)
    numbers: dict[bytes, list[int]] = {}
    for ordinal, key in enumerate(keys, start):
        numbers.setdefault(key.tobytes(), []).append(ordinal)
    pairs = [
        (query, first + int(row))
        for first, of_targets in targets.keys()  # noqa: SIM118 - no dictionary
        for row in np.flatnonzero(known.contains(of_targets))
        for query in numbers[of_targets[row].tobytes()]
        if not (within and query == first + row)
    ]
    query, target = np.array(pairs, np.int64).reshape(-1, 2).T
    whole = np.ones(len(pairs))
    return join([Hits(query, target, whole, whole, np.full(len(pairs), np.nan))])


def without(hits: Hits, others: Hits) -> Hits:
    """Return the pairs of `hits` that are not among the others."""
    if len(hits) == 0:
        return hits
    known = set(zip(others.query.tolist(), others.target.tolist(), strict=True))
    pairs = zip(hits.query.tolist(), hits.target.tolist(), strict=True)
    return hits.take(np.array([pair not in known for pair in pairs], bool))


_NONE = Hits(*(np.empty(0, dtype) for dtype in (np.int64, np.int64, float, float, float)))
