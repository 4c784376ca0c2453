"""What tests of searches share: families of proteins, searches, and the files they leave."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from Bio.SeqIO.FastaIO import SimpleFastaParser

from preprocessing.filtering.options import resolve_options
from preprocessing.filtering.stage import Execution, filter_sequences
from preprocessing.homologs import make_ancestors, make_members
from preprocessing.philox import RandomStream
from tests.conftest import skip_unless

PROGRAMS = {"blastp": ("blastp", "makeblastdb"), "mmseqs2": ("mmseqs",)}


def need(tool: str) -> None:
    for program in PROGRAMS[tool]:
        skip_unless(shutil.which(program) is not None, program)


def write_fasta(path: Path, sequences: Mapping[str, str]) -> Path:
    path.write_text("".join(f">{name} some words\n{text}\n" for name, text in sequences.items()))
    return path


def read_fasta(path: Path) -> dict[str, str]:
    with path.open() as file:
        return {title.split()[0]: text for title, text in SimpleFastaParser(file)}


def random_proteins(lengths: Sequence[int], seed: int) -> list[str]:
    made = make_ancestors(RandomStream(seed, 0), np.array(lengths))
    text = made.residues.tobytes().decode()
    return [text[i : i + n] for i, n in zip(made.starts, made.lengths, strict=True)]


def homologs(ancestor: str, count: int, identity: float, seed: int) -> list[str]:
    """Copies of a protein with gaps and substitutions."""
    residues = np.frombuffer(ancestor.encode(), np.uint8)
    one = make_ancestors(RandomStream(seed, 1), np.array([len(ancestor)]))
    ancestors = type(one)(residues, one.starts, one.lengths)
    made = make_members(
        RandomStream(seed, 2),
        ancestors,
        np.zeros(count, np.intp),
        min_identity=identity,
        max_identity=identity,
    )
    text = made.residues.tobytes().decode()
    return [text[i : i + n] for i, n in zip(made.starts, made.lengths, strict=True)]


def search(
    queries: Path,
    targets: Path | None,
    output: Path,
    *,
    preset: str | None = None,
    execution: Execution | None = None,
    **options: Any,
) -> dict[str, Any] | None:
    """Run `filter_sequences` on one file each."""
    sides = [queries], None if targets is None else [targets]
    return filter_sequences(*sides, output, resolve_options(preset, **options), execution)


def excluded(output: Path) -> dict[str, dict[str, Any]]:
    rows = pq.read_table(output / "exclusions.parquet").to_pylist()
    return {row["id"]: row for row in rows}


def commands(output: Path) -> list[str]:
    return [" ".join(words) for words in json.loads((output / "run.json").read_text())["commands"]]


def content(output: Path) -> dict[str, bytes]:
    """Everything in a finished search but run.json."""
    files = {path.name: path.read_bytes() for path in output.iterdir()}
    del files["run.json"]
    return files
