import re

import numpy as np
import pytest

from preprocessing.homologs import LINE
from preprocessing.philox import RandomStream
from preprocessing.uniref_fasta import ACCESSIONS, expected_bytes, format_records, make_accessions


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_no_accession_recurs(seed):
    near, far = np.arange(1, 100_000), ACCESSIONS - np.arange(1, 100_000)
    # If the step from one to the next had a factor in common with `ACCESSIONS`, 2, 3, 5 or 13,
    # these would be equal.
    fractions = np.array([0, *(ACCESSIONS // factor for factor in (2, 3, 5, 13))])
    numbers = np.concatenate([near, far, fractions])
    accessions = make_accessions(numbers, seed)
    assert len(set(accessions)) == len(numbers)
    # UniProt's pattern of accessions with ten characters.
    pattern = re.compile(r"[A-NR-Z]\d(?:[A-Z][A-Z0-9]{2}\d){2}")
    assert all(map(pattern.fullmatch, accessions[::100]))


@pytest.mark.parametrize("length", [1, 59, 60, 61, 120])
def test_sequence_stands_in_lines_of_60(length):
    residues = np.frombuffer(b"ACDEFGHIKLMN" * 15, np.uint8)
    starts, lengths = np.array([LINE, 0]), np.array([length, 60])
    first, second = format_records(
        RandomStream(0, 0), ["A0A001", "A0A002"], ["One", "Two"], residues, starts, lengths
    )
    header, *lines = first.splitlines()
    assert re.fullmatch(
        r">UniRef50_A0A001 One n=\d+ Tax=\S+ \S+ TaxID=\d+ RepID=A0A001_[A-Z]{5}", header
    )
    assert [*map(len, lines)] == [60] * (length // 60) + [length % 60] * (length % 60 > 0)
    assert "".join(lines) == residues[LINE : LINE + length].tobytes().decode()
    assert first.endswith("\n")
    assert second.splitlines()[1:] == ["ACDEFGHIKLMN" * 5]


def test_expected_bytes_are_those_of_real_records_on_average():
    count, length = 4000, 250
    names = ["Uncharacterized protein", "Aminotransferase class I/II"] * (count // 2)
    residues = np.full(300, ord("A"), np.uint8)
    records = format_records(
        RandomStream(0, 0),
        make_accessions(np.arange(count), 0),
        names,
        residues,
        np.zeros(count, np.intp),
        np.full(count, length),
    )
    assert sum(map(len, records)) / count == pytest.approx(expected_bytes(length), rel=0.02)
