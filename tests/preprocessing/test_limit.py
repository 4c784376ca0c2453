"""`--limit`: the first records of each input, however it is packed and whoever reads it."""

import gzip
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import zstandard
from Bio.SeqIO.FastaIO import SimpleFastaParser
from hypothesis import given, settings
from hypothesis import strategies as st
from record_sets import DRIVER, content

from preprocessing.generate import generate
from preprocessing.options import PreprocessOptions
from preprocessing.records import RecordSet
from preprocessing.verify import verify

Run = Callable[..., Any]


def first_records(path: Path, count: int) -> list[tuple[str, str]]:
    with path.open() as file:
        return [(title.split()[0], text) for title, text in islice(SimpleFastaParser(file), count)]


def found(directory: Path) -> list[tuple[str, str]]:
    records = RecordSet(directory)
    every = map(records.record, range(len(records)))
    return sorted((record.id, record.sequence) for record in every)


def test_same_bytes_for_any_rank_count(tmp_path: Path, mpirun: Run, real_fasta: Path) -> None:
    copies = {
        "a.fasta": real_fasta.read_bytes(),
        "b.fasta.gz": gzip.compress(real_fasta.read_bytes()[: 10**6].rpartition(b">")[0]),
        "c.fasta.zst": zstandard.compress(b">last\nMKVL"),
    }
    for name, text in copies.items():
        (tmp_path / name).write_bytes(text)
    paths = [tmp_path / name for name in copies]
    options = {"shards": 3, "limit": 1234, "dedup": False, "memory": 2**20}
    job = ([str(path) for path in paths], str(tmp_path / "three"), options, 2**18)
    result = mpirun(3, "-c", DRIVER, "3", json.dumps([job]))
    assert result.stdout.count("done") == 3, result.stderr
    made = generate(
        paths[::-1], tmp_path / "one", PreprocessOptions(**{**options, "memory": 2**24}),
        unit_bytes=2**18,
    )  # fmt: skip
    assert content(tmp_path / "three") == content(tmp_path / "one")
    expected = [*first_records(real_fasta, 1234) * 2, ("last", "MKVL")]
    assert found(tmp_path / "one") == sorted(expected)
    assert [entry["records"] for entry in made["inputs"]] == [1, 1234, 1234]
    assert made["inputs"][1]["hash"] == made["inputs"][2]["hash"]  # of the same text
    verify(tmp_path / "one")


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=30),
    limit=st.integers(1, 40),
    chunk=st.integers(1, 2000),
)
def test_first_records_for_any_chunks(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], limit: int, chunk: int
) -> None:
    directory = tmp_path_factory.mktemp("limit")
    path = directory / "in.fasta"
    path.write_text("\n\n" + "".join(f">id{n}\n{'M' * k}\n" for n, k in enumerate(lengths)))
    made = []
    for name, unit_bytes in (("small", chunk), ("large", 10**6)):
        options = PreprocessOptions(limit=limit, dedup=False, shards=2)
        generate([path], directory / name, options, unit_bytes=unit_bytes)
        assert found(directory / name) == sorted(first_records(path, limit))
        made.append(content(directory / name))
    assert made[0] == made[1]


def test_little_of_a_large_file_is_read(tmp_path: Path) -> None:
    """The file would be refused, if its end were reached."""
    (tmp_path / "in.fasta").write_bytes(b">a\nMK\n>b\nMV\n" * 10**6 + b">c\nM-K\n")
    generate([tmp_path / "in.fasta"], tmp_path / "set", PreprocessOptions(limit=10))
    assert found(tmp_path / "set") == [("a", "MK"), ("b", "MV")]
