"""Which share of planted relatives BLASTP and MMseqs2 find.

    python -m hpc.bench.filter_recall BACKGROUND.fasta WORK

Random proteins are the queries. The targets are relatives of theirs of known identity, made as
`synthesize` makes families, among the proteins of a FASTA; the search itself is `prothpc filter`.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from preprocessing.filtering.options import resolve_options
from preprocessing.filtering.stage import Execution, filter_sequences
from preprocessing.homologs import make_ancestors, make_members, random_lengths
from preprocessing.philox import RandomStream

PROTEINS = 300
MEDIAN_LENGTH = 250
IDENTITIES = (0.9, 0.6, 0.4, 0.3)

SEARCHES: dict[str, dict[str, Any]] = {
    "BLASTP": {"tool": "blastp"},
    "MMseqs2, -s 7.5": {"tool": "mmseqs2", "sensitivity": 7.5},
    "MMseqs2, -s 5.7": {"tool": "mmseqs2", "sensitivity": 5.7},
}


def main() -> None:
    """Plant, search, and print a table of recalls with their standard errors."""
    background, work = map(Path, sys.argv[1:])
    work.mkdir(parents=True, exist_ok=True)
    queries, relatives = work / "queries.fasta", work / "relatives.fasta"
    _plant(queries, relatives)
    print(f"| | {' | '.join(f'{identity:.0%}' for identity in IDENTITIES)} |")
    print(f"|---|{'---|' * len(IDENTITIES)}")
    for name, search in SEARCHES.items():
        output = work / name.replace(", -s ", "-")
        options = resolve_options(None, min_identity=0.0, max_evalue=1e-3, **search)
        filter_sequences([queries], [relatives, background], output, options, Execution(threads=2))
        found = _found(output)
        shares = [found.get(identity, 0) / PROTEINS for identity in IDENTITIES]
        cells = [
            f"{share:.3f} ± {math.sqrt(share * (1 - share) / PROTEINS):.3f}" for share in shares
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def _plant(queries: Path, relatives: Path) -> None:
    for path in (queries, relatives):
        path.unlink(missing_ok=True)
    random = RandomStream(0, 0)
    ancestors = make_ancestors(random, random_lengths(random, PROTEINS, MEDIAN_LENGTH))
    _write(queries, "ancestor", ancestors.residues, ancestors.starts, ancestors.lengths)
    for identity in IDENTITIES:
        made = make_members(
            random, ancestors, np.arange(PROTEINS), min_identity=identity, max_identity=identity
        )
        _write(relatives, f"relative-{identity}", made.residues, made.starts, made.lengths)


def _write(
    path: Path, name: str, residues: np.ndarray, starts: np.ndarray, lengths: np.ndarray
) -> None:
    text = residues.tobytes().decode("ascii")
    places = zip(starts.tolist(), lengths.tolist(), strict=True)
    records = [f">{name}-{i}\n{text[at : at + n]}\n" for i, (at, n) in enumerate(places)]
    with path.open("a") as file:
        file.writelines(records)


def _found(output: Path) -> dict[float, int]:
    """Return how many proteins found their relative of each identity."""
    found: dict[float, int] = {}
    for row in pq.read_table(output / "hits.parquet", columns=["query", "target"]).to_pylist():
        number = row["query"].rpartition("-")[2]
        for identity in IDENTITIES:
            if row["target"] == f"relative-{identity}-{number}":
                found[identity] = found.get(identity, 0) + 1
    return found


if __name__ == "__main__":
    main()
