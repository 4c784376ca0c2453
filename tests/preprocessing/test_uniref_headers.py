"""Cluster size, taxon and representative of UniRef headers, as a regular expression finds them."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from record_sets import DRIVER, content

from preprocessing.generate import generate
from preprocessing.options import PreprocessOptions
from preprocessing.records import RecordSet
from preprocessing.synthetic import SynthesisOptions, synthesize
from preprocessing.uniref_headers import pack_metadata, unpack_metadata
from preprocessing.verify import verify

Metadata = tuple[int | None, int | None, str | None]


def expected(header: str) -> Metadata:
    """What the last `n=`, `TaxID=` and `RepID=` of a UniRef header say."""
    if not header.startswith("UniRef"):
        return None, None, None
    size, taxon = (
        ([int(text) for text in re.findall(rf" {name}=(\d*)", header) if text] or [0])[-1]
        for name in ("n", "TaxID")
    )
    representative = ([*re.findall(r" RepID=(\S*)", header)] or [""])[-1]
    if not size and not representative:
        return None, None, None
    size, taxon = (number if number < 2**32 else 0 for number in (size, taxon))
    return size or None, taxon or None, representative or None


def found(headers: list[str]) -> list[Metadata]:
    names = [re.match(r"[^ \t]*", header).group() for header in headers]  # type: ignore[union-attr]
    rest = [header[len(name) :].encode() for header, name in zip(headers, names, strict=True)]
    ids = pa.array([name.encode() for name in names], pa.binary())
    columns = unpack_metadata(pack_metadata(ids, pa.array(rest, pa.binary())))
    return list(zip(*(column.to_pylist() for column in columns), strict=True))


HEADERS = {
    "UniRef50_P1 Kinase n=3 Tax=Homo sapiens TaxID=9606 RepID=P1_HUMAN": (3, 9606, "P1_HUMAN"),
    "UniRef100_A n=1 Tax=x TaxID=4294967295 RepID=UPI0001": (1, 2**32 - 1, "UPI0001"),
    "UniRef50_B b=9 an=8 n=12 Tax=n=x TaxID=7 RepID=B\r": (12, 7, "B"),
    "UniRef50_C Name n=4 Tax=unknown": (4, None, None),
    "UniRef50_D Name n=4294967296 Tax=a TaxID=x RepID=D": (None, None, "D"),
    "UniRef50_E": (None, None, None),
    "sp|P1|X_Y Name OS=Homo sapiens OX=9606 GN=a PE=1 SV=2 n=3 RepID=Z": (None, None, None),
    "UniRef90_F n=2 Tax=é TaxID=1 RepID=F_é": (2, 1, "F_é"),
    "UniRef90_G\tn=2 RepID=": (None, None, None),
}


def test_headers() -> None:
    assert dict(zip(HEADERS, found(list(HEADERS)), strict=True)) == HEADERS
    assert found([]) == []


words = st.sampled_from(
    ["Name", "n=5", "n=", "n=70 ", "Tax=Mus", "TaxID=10090", "TaxID=9", "RepID=A_B", "RepID=", "="]
)


@given(
    st.lists(
        st.tuples(st.sampled_from(["UniRef50_A", "UniRef90_B", "sp|C", "n=2"]), st.lists(words)),
        max_size=6,
    )
)
def test_any_headers(headers: list[tuple[str, list[str]]]) -> None:
    texts = [" ".join([name, *rest]) for name, rest in headers]
    wanted = [expected(text) for text in texts]
    # a field that is repeated and empty the last time is of no interest
    odd = [bool(re.search(r" (n|TaxID|RepID)=( |$)", text)) for text in texts]
    pairs = zip(found(texts), wanted, odd, strict=True)
    assert all(is_odd or mine == theirs for mine, theirs, is_odd in pairs)


def all_metadata(directory: Path) -> dict[str, Metadata]:
    result: dict[str, Metadata] = {}
    for split in ("train", "holdout"):
        records = RecordSet(directory, split)
        read = records.read(0, len(records))
        columns = [read.metadata[name] for name in ("cluster_size", "tax_id", "rep_id")]
        rows = zip(*(column.to_pylist() for column in columns), strict=True)
        result |= dict(zip(read.ids(), rows, strict=True))
    return result


def test_records_keep_what_their_headers_say(tmp_path: Path, mpirun: Callable[..., Any]) -> None:
    fasta = tmp_path / "in.fasta"
    synthesize(fasta, SynthesisOptions(records=3000, median_length=80))
    with fasta.open("a") as file:
        file.write(">sp|X n=3 TaxID=4\nMKVLAA\n")
    options = {"shards": 3, "holdout": 0.1, "keep_metadata": True, "max_length": 100,
               "long": "split", "memory": 2**20}  # fmt: skip
    job = ([str(fasta)], str(tmp_path / "three"), options, 2**16)
    result = mpirun(3, "-c", DRIVER, "3", json.dumps([job]))
    assert result.stdout.count("done") == 3, result.stderr
    generate([fasta], tmp_path / "set", PreprocessOptions(**options), unit_bytes=2**16)
    assert content(tmp_path / "three") == content(tmp_path / "set")
    verify(tmp_path / "set")
    headers = {line[1:].split()[0]: line[1:-1] for line in fasta.open() if line.startswith(">")}
    kept = all_metadata(tmp_path / "set")
    assert len(kept) > 2900
    assert any("/" in name for name in kept)  # windows have what their protein has
    for name, metadata in kept.items():
        assert metadata == expected(headers[name.split("/")[0]])


def test_one_id_in_two_headers_has_one_result(tmp_path: Path) -> None:
    records = [f">UniRef50_A n={n} Tax=a TaxID=7 RepID=A\nMKV\n" for n in (300, 20, 5)]
    made = []
    for name, order in (("ab", records), ("ba", records[::-1])):
        (tmp_path / f"{name}.fasta").write_text("".join(order))
        options = PreprocessOptions(keep_metadata=True, holdout=0.5, shards=1)
        generate([tmp_path / f"{name}.fasta"], tmp_path / name, options)
        made.append(all_metadata(tmp_path / name))
    assert made[0] == made[1] == {"UniRef50_A": (5, 7, "A")}


def test_metadata_of_a_join_and_of_a_slice(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("preprocessing.shards.ROWS_PER_BATCH", 50)
    monkeypatch.setattr("preprocessing.manifest.ROWS_PER_BATCH", 50)
    synthesize(tmp_path / "in.fasta", SynthesisOptions(records=300, median_length=80))
    options = PreprocessOptions(keep_metadata=True, shards=2, compression="zstd")
    generate([tmp_path / "in.fasta"], tmp_path / "set", options)
    records = RecordSet(tmp_path / "set")
    whole = records.read(0, len(records)).metadata
    part = records.read(33, 120).metadata
    for name, column in whole.items():
        assert part[name].to_pylist() == column.to_pylist()[33:120]
    generate([tmp_path / "in.fasta"], tmp_path / "without", PreprocessOptions())
    assert RecordSet(tmp_path / "without").read(0, 9).metadata == {}


@pytest.mark.parametrize("rows", [0, 1, 8, 9])
def test_same_bytes_for_the_same_rows(rows: int) -> None:
    packed = pa.array([b"\0\0\0\1\0\0\0\2X", b""] * rows, pa.binary())
    columns = unpack_metadata(packed)
    sliced = unpack_metadata(pa.concat_arrays([packed[:1], packed])[1:] if rows else packed)
    assert columns == sliced
    assert np.array_equal(columns[0].to_pylist(), [1, None] * rows)
