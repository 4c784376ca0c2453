"""A text gives the same records however it is packed, and wherever units and chunks begin."""

import gzip
import io
import json
import re
import struct
import zlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import xxhash
import zstandard
from Bio.SeqIO.FastaIO import SimpleFastaParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from record_sets import DRIVER, content

from preprocessing import gzip_text, zstd_text
from preprocessing.errors import InputError
from preprocessing.fasta import parse
from preprocessing.generate import generate
from preprocessing.options import PreprocessOptions
from preprocessing.sources import Source, UnitReader, check_fit, cut, examine

BGZF_END = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")


def bgzf_block(text: bytes) -> bytes:
    deflate = zlib.compressobj(6, zlib.DEFLATED, -15)
    body = deflate.compress(text) + deflate.flush()
    start = bytes.fromhex("1f8b08040000000000ff060042430200")
    size = struct.pack("<H", len(start) + 2 + len(body) + 8 - 1)
    return start + size + body + struct.pack("<II", zlib.crc32(text), len(text))


def pieces(text: bytes, cuts: list[int]) -> list[bytes]:
    bounds = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[a:b] for a, b in pairwise(bounds)]


def zstd_frames(parts: list[bytes]) -> bytes:
    """Frames with and without length and checksum, and one to be skipped between them."""
    compress = [
        zstandard.ZstdCompressor(write_checksum=number % 2 == 0, write_content_size=number % 3 > 0)
        for number in range(6)
    ]
    skipped = b"\x53\x2a\x4d\x18" + struct.pack("<I", 5) + b"seeks"
    return skipped.join(compress[n % 6].compress(part) for n, part in enumerate(parts))


PACKINGS: dict[str, Callable[[list[bytes]], bytes]] = {
    "plain": b"".join,
    "gzip": lambda parts: gzip.compress(b"".join(parts)),
    "gzip members": lambda parts: b"".join(map(gzip.compress, parts)) + b"\0" * 7,
    "bgzf": lambda parts: b"".join(map(bgzf_block, parts)) + BGZF_END,
    "zstd": lambda parts: zstandard.compress(b"".join(parts)),
    "zstd frames": zstd_frames,
}


def read_units(
    source: Source, unit_bytes: int, chunk_bytes: int
) -> tuple[list[tuple[str, str]], str, list[int]]:
    """Return all records, the hashes of all blocks, and how many records each unit has."""
    found: list[tuple[str, str]] = []
    hashes, stretches, records = "", [], []
    for unit in cut([source], unit_bytes):
        reader = UnitReader(source, unit, block_bytes=unit_bytes, chunk_bytes=chunk_bytes)
        before = len(found)
        for chunk in reader.chunks():
            parsed = parse(chunk.text)
            ids, sequences = parsed.ids.to_pylist(), parsed.sequences.to_pylist()
            found += [(a.decode(), b.decode()) for a, b in zip(ids, sequences, strict=True)]
        hashes += "".join(reader.block_hashes)
        stretches.append(reader.stretch)
        records.append(len(found) - before)
    check_fit(source, stretches)
    return found, hashes, records


records = st.lists(
    st.tuples(st.text("abcXYZ01|_>;", min_size=1, max_size=9), st.text("ACDEFG", min_size=1)),
    min_size=1,
    max_size=25,
)


@pytest.mark.parametrize("packing", PACKINGS)
@settings(max_examples=40, deadline=None)
@given(
    records=records,
    width=st.integers(1, 70),
    line_end=st.sampled_from(["\n", "\r\n", "\n\n"]),
    last_line_end=st.booleans(),
    cuts=st.lists(st.integers(0, 10**4), max_size=6),
    unit_bytes=st.integers(1, 400),
    chunk_bytes=st.integers(1, 300),
)
@example(
    records=[("a", "MK"), ("b", "MV")], width=9, line_end="\n", last_line_end=True,
    cuts=[5, 6, 7], unit_bytes=20, chunk_bytes=1,
)  # fmt: skip
def test_same_records_as_biopython(
    tmp_path_factory: pytest.TempPathFactory,
    packing: str,
    records: list[tuple[str, str]],
    width: int,
    line_end: str,
    last_line_end: bool,
    cuts: list[int],
    unit_bytes: int,
    chunk_bytes: int,
) -> None:
    lines = []
    for title, sequence in records:
        lines += [f">{title} of it", *(re.findall(f".{{1,{width}}}", sequence))]
    text = (line_end.join(lines) + line_end * last_line_end).encode()
    path = tmp_path_factory.mktemp("any") / "in.fasta"
    packed = PACKINGS[packing](pieces(text, cuts))
    path.write_bytes(packed)
    expected = list(SimpleFastaParser(io.StringIO(text.decode().replace("\r\n", "\n"))))
    found, hashes, _ = read_units(examine(path), unit_bytes, chunk_bytes)
    assert found == [(title.split()[0], sequence) for title, sequence in expected]
    if unit_bytes > 20:  # shorter ones take long
        blocks = [packed[n : n + unit_bytes] for n in range(0, len(packed), unit_bytes)]
        assert hashes == "".join(xxhash.xxh3_128_hexdigest(block) for block in blocks)


@pytest.fixture(scope="module")
def text(real_fasta: Path) -> bytes:
    return real_fasta.read_bytes()


@pytest.fixture(scope="module")
def expected(text: bytes) -> list[tuple[str, str]]:
    parsed = SimpleFastaParser(io.StringIO(text.decode()))
    return [(title.split()[0], sequence) for title, sequence in parsed]


class TestRealProteins:
    """Twenty thousand of them, packed in all ways."""

    unit_bytes = 200_000

    @pytest.mark.parametrize(
        ("packing", "size", "together"),
        [("gzip members", 10**6, 1), ("bgzf", 60_000, 10), ("zstd", 10**6, 1),
         ("zstd frames", 10**6, 10)],
    )  # fmt: skip
    def test_units_share_what_can_be_shared(
        self, tmp_path: Path, text: bytes, expected: object, packing: str, size: int, together: int
    ) -> None:
        cuts = list(range(0, len(text), size))
        path = tmp_path / "in"
        path.write_bytes(PACKINGS[packing](pieces(text, cuts)))
        found, _, records = read_units(examine(path), self.unit_bytes, 2**20)
        assert found == expected
        assert sum(number > 0 for number in records) >= together


@pytest.mark.slow
def test_same_bytes_for_any_packing_and_rank_count(
    tmp_path: Path, text: bytes, mpirun: Callable[..., Any]
) -> None:
    cuts = list(range(0, len(text), 60_000))
    jobs = []
    for name, pack in PACKINGS.items():
        path = tmp_path / f"{name}.in"
        path.write_bytes(pack(pieces(text, cuts)))
        jobs.append(([str(path)], str(tmp_path / f"{name}-SIZE"), {"shards": 3}, 200_000))
    for size in (1, 2, 3):
        mine = json.dumps(jobs).replace("SIZE", str(size))
        result = mpirun(size, "-c", DRIVER, str(size), mine)
        assert result.stdout.count("done") == size * len(jobs), result.stderr
    expected = content(tmp_path / "plain-1")
    for name in PACKINGS:
        alone = content(tmp_path / f"{name}-1")
        differing = {file for file in expected if alone[file] != expected[file]}
        assert differing == ({"manifest.json"} if name != "plain" else set())
        for size in (2, 3):
            assert content(tmp_path / f"{name}-{size}") == alone


LINES = b"".join(b">%d x\nMKVA\n\nMKV\n" % number for number in range(4000))
PARTS = [LINES[n : n + 9000] for n in range(0, len(LINES), 9000)]


class TestDamage:
    """Damaged compressed files are refused, whichever rank meets the damage."""

    def refuse(self, path: Path, data: bytes, unit_bytes: int) -> str:
        path.write_bytes(data)
        with pytest.raises(InputError) as caught:
            generate([path], path.parent / "set", PreprocessOptions(), unit_bytes=unit_bytes)
        said = str(caught.value)
        assert said.startswith(f"{path}")
        assert "\n" not in said
        assert not (path.parent / "set" / ".work").exists()
        return said.removeprefix(f"{path}").removeprefix(": ")

    @pytest.mark.parametrize("unit_bytes", [700, 2**26])
    @pytest.mark.parametrize("cut", [1, 9, 27, 28, 29, 500, 3000])
    def test_bgzf_cut_short(self, tmp_path: Path, cut: int, unit_bytes: int) -> None:
        said = self.refuse(tmp_path / "in", PACKINGS["bgzf"](PARTS)[:-cut], unit_bytes)
        assert re.match("the gzip file ends too early.*gzip -t", said)

    @pytest.mark.parametrize("unit_bytes", [700, 2**26])
    @pytest.mark.parametrize("cut", [1, 4, 5, 500, 1000])
    def test_zstd_cut_short(self, tmp_path: Path, cut: int, unit_bytes: int) -> None:
        said = self.refuse(tmp_path / "in", PACKINGS["zstd frames"](PARTS)[:-cut], unit_bytes)
        assert re.match("the zstd file ends too early.*zstd -t", said)

    @pytest.mark.parametrize("unit_bytes", [700, 2**26])
    @pytest.mark.parametrize("packing", ["bgzf", "gzip", "gzip members", "zstd", "zstd frames"])
    def test_a_flipped_bit_in_the_middle(
        self, tmp_path: Path, packing: str, unit_bytes: int
    ) -> None:
        checked = zstandard.ZstdCompressor(write_checksum=True).compress
        zstd = {"zstd": checked(LINES), "zstd frames": b"".join(map(checked, PARTS))}
        data = bytearray(zstd.get(packing) or PACKINGS[packing](PARTS))
        data[len(data) // 2] ^= 16
        said = self.refuse(tmp_path / "in", bytes(data), unit_bytes)
        # a member's checksum stands behind its text, so nonsense in that may be found first
        sayings = r"the (gzip|zstd) file (is damaged \(.*\)|ends too early)|, line .*not a residue"
        assert re.match(sayings, said)

    @pytest.mark.parametrize("unit_bytes", [700, 2**26])
    @pytest.mark.parametrize("packing", ["bgzf", "gzip members", "zstd", "zstd frames"])
    def test_other_bytes_behind(self, tmp_path: Path, packing: str, unit_bytes: int) -> None:
        said = self.refuse(tmp_path / "in", PACKINGS[packing](PARTS) + b">b\nMK\n", unit_bytes)
        assert re.match("other bytes follow the end of the (gzip|zstd) data", said)

    def test_bgzf_that_goes_on_as_other_gzip(self, tmp_path: Path) -> None:
        data = PACKINGS["bgzf"](PARTS[:9]) + gzip.compress(b"".join(PARTS[9:]))
        assert "goes on as other gzip: compress it again" in self.refuse(tmp_path / "in", data, 700)

    @pytest.mark.parametrize(
        ("packing", "finder"), [("bgzf", "_is_block"), ("zstd frames", "_is_frame")]
    )
    def test_overlooked_parts_are_not_lost(
        self, tmp_path: Path, packing: str, finder: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module = {"bgzf": gzip_text, "zstd frames": zstd_text}[packing]
        monkeypatch.setattr(module, finder, lambda *_: False)
        said = self.refuse(tmp_path / "in", PACKINGS[packing](PARTS), 700)
        assert "is damaged (its parts do not join)" in said

    def test_zstd_that_looks_back_too_far(self, tmp_path: Path) -> None:
        parameters = zstandard.ZstdCompressionParameters(window_log=28)
        frame = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        said = self.refuse(tmp_path / "in", frame.compress(LINES) + frame.flush(), 700)
        assert "compressed with --long or --ultra; compress it without" in said

    @pytest.mark.parametrize("which", [0, 1])
    def test_gzip_member_with_a_wrong_end(self, tmp_path: Path, which: int) -> None:
        member = bytearray(gzip.compress(LINES))
        member[-1 - 4 * which] ^= 1
        data = gzip.compress(LINES) + bytes(member)
        said = self.refuse(tmp_path / "in", data, 2**26)
        assert ("its CRC is", "its text is")[1 - which] in said

    @pytest.mark.parametrize("packing", PACKINGS)
    @pytest.mark.parametrize("unit_bytes", [700, 2**26])
    @pytest.mark.parametrize("record", [0, 1000, 3999])
    def test_line_numbers_are_those_of_the_text(
        self, tmp_path: Path, packing: str, unit_bytes: int, record: int
    ) -> None:
        text = LINES.replace(b">%d x\nMKVA" % record, b">%d x\nMK-A" % record)
        parts = [text[n : n + 9000] for n in range(0, len(text), 9000)]
        said = self.refuse(tmp_path / "in", PACKINGS[packing](parts), unit_bytes)
        line = 4 * record + 2
        assert said.startswith(f", line {line:,}, record '{record}': character '-'"), said
