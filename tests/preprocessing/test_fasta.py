"""Any FASTA text gives the records that Biopython finds, however it is cut up."""

import gzip
import io
from typing import NamedTuple

import numpy as np
import pytest
import xxhash
from Bio.SeqIO.FastaIO import SimpleFastaParser
from hypothesis import example, given, settings
from hypothesis import strategies as st

from preprocessing.columns import parts
from preprocessing.fasta import FastaProblem, OnInvalid, Parsed, parse
from preprocessing.sources import UnitReader, cut, examine


def parse_text(text: str | bytes, on_invalid: OnInvalid = "error") -> Parsed:
    data = text.encode() if isinstance(text, str) else text
    return parse(np.frombuffer(data, np.uint8), on_invalid)


def records_of(parsed: Parsed) -> list[tuple[str, str]]:
    ids = [value.decode() for value in parsed.ids.to_pylist()]
    return list(zip(ids, (value.decode() for value in parsed.sequences.to_pylist()), strict=True))


class Layout(NamedTuple):
    """How records are written down."""

    width: int
    line_end: str
    blank_lines: bool
    trailing_blanks: str
    last_newline: bool
    stops: int


layouts = st.builds(
    Layout,
    width=st.integers(1, 70),
    line_end=st.sampled_from(["\n", "\r\n"]),
    blank_lines=st.booleans(),
    trailing_blanks=st.sampled_from(["", " ", " \t "]),
    last_newline=st.booleans(),
    stops=st.integers(0, 3),
)
residues = st.text("ACDEFGHIKLMNPQRSTVWYXBZUOJacdefxz", min_size=1, max_size=150)
ids = st.text("abcXYZ019|_.>:;*-é", min_size=1, max_size=12)
descriptions = st.sampled_from(["", " ", " a protein > than *", "\tn=3", " \x01tr|second"])
some_records = st.lists(st.tuples(ids, descriptions, residues), min_size=1, max_size=12)


def write(records: list[tuple[str, str, str]], layout: Layout) -> str:
    lines = [""] if layout.blank_lines else []
    for name, description, sequence in records:
        lines.append(f">{name}{description}")
        text = sequence + "*" * layout.stops
        for start in range(0, len(text), layout.width):
            lines.append(text[start : start + layout.width] + layout.trailing_blanks)
            if layout.blank_lines and start % 3 == 0:
                lines.append("")
    return layout.line_end.join(lines) + (layout.line_end if layout.last_newline else "")


def biopython(text: str) -> list[tuple[str, str]]:
    """Records as Biopython reads them, in our spelling: first word, capitals, no stops."""
    found = SimpleFastaParser(io.StringIO(text, newline=None))
    return [
        (title.split(" ")[0].split("\t")[0], sequence.replace("\t", "").rstrip("*").upper())
        for title, sequence in found
    ]


@settings(max_examples=150, deadline=None)
@given(
    records=some_records,
    layout=layouts,
    unit_bytes=st.integers(1, 300),
    chunk_bytes=st.integers(1, 200),
    zipped=st.booleans(),
)
@example(
    records=[("a", "", "MK" * 400), ("b", "", "W")],
    layout=Layout(60, "\n", False, "", True, 0),
    unit_bytes=7,
    chunk_bytes=3,
    zipped=False,
)
@example(
    records=[("a", "", "MK"), ("b", "", "W"), ("c", "", "A")],
    layout=Layout(60, "\n", False, "", True, 0),
    unit_bytes=1,
    chunk_bytes=1,
    zipped=False,
)
def test_same_records_as_biopython_however_the_file_is_cut(
    tmp_path_factory: pytest.TempPathFactory,
    records: list[tuple[str, str, str]],
    layout: Layout,
    unit_bytes: int,
    chunk_bytes: int,
    zipped: bool,
) -> None:
    text = write(records, layout)
    raw = gzip.compress(text.encode()) if zipped else text.encode()
    path = tmp_path_factory.getbasetemp() / "any.fasta"
    path.write_bytes(raw)
    source = examine(path)

    found, hashes = [], []
    for unit in cut([source], unit_bytes):
        reader = UnitReader(source, unit, block_bytes=unit_bytes, chunk_bytes=chunk_bytes)
        for chunk in reader.chunks():
            found += records_of(parse(chunk.text))
        hashes += reader.block_hashes

    assert found == biopython(text)
    blocks = [raw[start : start + unit_bytes] for start in range(0, len(raw), unit_bytes)]
    assert hashes == [xxhash.xxh3_128_hexdigest(block) for block in blocks]


def test_changes_are_counted() -> None:
    parsed = parse_text(">a\nmkV*\n**\n>b\nMX\n")
    assert records_of(parsed) == [("a", "MKV"), ("b", "MX")]
    assert parsed.changed == {"lowercase_residues": 2, "stops_stripped": 3, "masked_residues": 0}


def test_clean_chunk_is_not_copied_again() -> None:
    text = np.frombuffer(b">a\nMK\n", np.uint8)
    assert parts(parse(text).sequences)[1].tobytes() == b"MK"
    assert parse(text).changed == dict.fromkeys(
        ("lowercase_residues", "stops_stripped", "masked_residues"), 0
    )


def test_mask_writes_x_for_what_is_no_residue() -> None:
    parsed = parse_text(">a\nM-K*V*\n>b\nMé\n", "mask")
    assert records_of(parsed) == [("a", "MXKXV"), ("b", "MXX")]
    assert parsed.changed["masked_residues"] == 4


def test_drop_marks_the_record_and_no_other() -> None:
    parsed = parse_text(">a\nM-K\n>b\nMK\n>c\n>d\nM*M\n>e\nW*\n", "drop")
    assert parsed.invalid.tolist() == [True, False, True, True, False]
    assert [name for name, _ in records_of(parsed)] == list("abcde")


@pytest.mark.parametrize("on_invalid", ["error", "mask"])
def test_empty_record_is_refused_unless_dropped(on_invalid: OnInvalid) -> None:
    with pytest.raises(FastaProblem, match="no residues") as caught:
        parse_text(">a\nMK\n>b\n*\n>c\nM\n", on_invalid)
    assert caught.value.position == 6
    assert caught.value.record_id == "b"


def test_the_first_of_several_problems_is_named() -> None:
    with pytest.raises(FastaProblem) as caught:
        parse_text(">a\nMK\nMM\nM?K\n>b\n>\nMMM\n>c\nM5\n")
    assert (caught.value.position, caught.value.record_id) == (10, "a")
    assert "'?'" in str(caught.value)


def test_position_counts_what_was_removed_before_it() -> None:
    text = ">a\r\nMK  \r\n\r\nmm\t\r\nM.K*\r\n"
    with pytest.raises(FastaProblem) as caught:
        parse_text(text)
    assert text[caught.value.position] == "."
