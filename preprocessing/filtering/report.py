"""What comes out of a search: exclusions, hits, a summary, and a picture of the identities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from preprocessing.files import publish, write_whole
from preprocessing.filtering.hits import Hits
from preprocessing.filtering.options import FilterOptions
from preprocessing.filtering.sequences import Side
from preprocessing.filtering.work import SUMMARY
from preprocessing.keys import KEY_BYTES
from preprocessing.records import RUN, canonical_json

EXCLUSIONS, HITS, PICTURE, KEPT = "exclusions.parquet", "hits.parquet", "identity.png", "kept.fasta"

EXCLUSIONS_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("key", pa.binary(KEY_BYTES)),
        ("hit", pa.string()),
        ("identity", pa.float32()),
        ("coverage", pa.float32()),
        ("evalue", pa.float64()),
    ]
)
"""A row for each excluded record and its most similar hit, in the order of the input. Without
e-value: the record is excluded only because the hit is equal; the program aligned it to none."""

HITS_SCHEMA = pa.schema(
    [
        ("query", pa.string()),
        ("target", pa.string()),
        ("identity", pa.float32()),
        ("coverage", pa.float32()),
        ("evalue", pa.float64()),
    ]
)
"""A row for each pair that is too similar."""

_BIN = 0.02
_ROWS_AT_A_TIME = 2**20


def best_of_queries(hits: Hits) -> Hits:
    """Return the most similar hit of each query."""
    ordered = hits.take(hits.similarity_order(hits.query))
    _, first = np.unique(ordered.query, return_index=True)
    return ordered.take(first)


def turned(hits: Hits) -> Hits:
    """Return the hits with queries and targets exchanged."""
    return Hits(hits.target, hits.query, hits.identity, hits.coverage, hits.evalue)


def write_exclusions(
    output: Path, best: Hits, excluded: Side, others: Side, about: dict[str, str]
) -> None:
    """Write the table that `preprocess --exclude` reads.

    Args:
        output: directory.
        best: a row for each excluded record, which is the query.
        excluded: its side.
        others: the side of the targets.
        about: what is written into the file's metadata.
    """
    records = excluded.take(best.query)
    columns = [
        records.column("id"),
        records.column("key"),
        others.take(best.target).column("id"),
        *_numbers(best),
    ]
    table = pa.table(columns, schema=EXCLUSIONS_SCHEMA.with_metadata(about))
    temporary = output / f"{EXCLUSIONS}.part"
    parquet.write_table(table, temporary)
    publish(temporary, output / EXCLUSIONS)


def write_hits(output: Path, hits: Hits, queries: Side, targets: Side) -> None:
    """Write all pairs."""
    temporary = output / f"{HITS}.part"
    with parquet.ParquetWriter(temporary, HITS_SCHEMA) as writer:
        for start in range(0, len(hits), _ROWS_AT_A_TIME):
            rows = hits.take(np.arange(start, min(start + _ROWS_AT_A_TIME, len(hits))))
            ids = [
                side.take(ordinals).column("id")
                for side, ordinals in ((queries, rows.query), (targets, rows.target))
            ]
            writer.write_table(pa.table([*ids, *_numbers(rows)], schema=HITS_SCHEMA))
    publish(temporary, output / HITS)


def write_kept(output: Path, excluded: np.ndarray, side: Side) -> None:
    """Write FASTA of the records of a side whose ordinals are not among those excluded."""
    temporary = output / f"{KEPT}.part"
    stays = np.ones(len(side), bool)
    stays[excluded] = False
    start = 0
    with temporary.open("wb") as file:
        for batch in side.read(0, len(side)):
            rows = batch.filter(pa.array(stays[start : start + len(batch)]))
            names, sequences = (rows.column(name).to_pylist() for name in ("id", "residues"))
            for name, sequence in zip(names, sequences, strict=True):
                file.write(b">%b\n%b\n" % (name.encode(), sequence))
            start += len(batch)
    publish(temporary, output / KEPT)


def identity_histogram(best: Hits) -> dict[str, Any]:
    """Return how many excluded records have an identity in each bin of 0.02, up to and with 1."""
    count = round(1 / _BIN)
    bins = np.minimum((best.identity / _BIN + 1e-9).astype(int), count - 1)
    return {"bin": _BIN, "counts": np.bincount(bins, minlength=count).tolist()}


def draw_histogram(output: Path, histogram: dict[str, Any], title: str, threshold: str) -> None:
    """Draw the identities of the excluded records."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    counts, width = histogram["counts"], histogram["bin"]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.bar(np.arange(len(counts)) * width, counts, width, align="edge", edgecolor="white")
    axes.set_xlim(0, 1)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(f"identity with the most similar hit ({threshold})")
    axes.set_ylabel("excluded records")
    axes.set_title(title, fontsize="medium")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    temporary = output / f"{PICTURE}.part"
    FigureCanvasAgg(figure).print_png(temporary, metadata={"Software": None})
    publish(temporary, output / PICTURE)


def write_summary(output: Path, summary: dict[str, Any], run: dict[str, Any]) -> None:
    """Write what makes the search a finished one."""
    write_whole(output / RUN, canonical_json(run))
    write_whole(output / SUMMARY, canonical_json(summary))


def describe_threshold(options: FilterOptions) -> dict[str, str]:
    """Return what is written into the exclusions about how they were found."""
    return {"tool": options.tool, "threshold": options.threshold()}


def _numbers(hits: Hits) -> list[pa.Array]:
    return [
        pa.array(hits.identity.astype(np.float32)),
        pa.array(hits.coverage.astype(np.float32)),
        pa.array(hits.evalue, from_pandas=True),
    ]
