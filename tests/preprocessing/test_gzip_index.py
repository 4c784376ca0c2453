"""With a seek index ranks share a gzip file, and find all that is wrong with it."""

import gzip
import io
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from Bio.SeqIO.FastaIO import SimpleFastaParser
from record_sets import content

from preprocessing import gzip_index, indexing
from preprocessing.errors import InputError
from preprocessing.fasta import parse
from preprocessing.generate import generate
from preprocessing.gzip_index import IndexFailed, SeekIndex, build_index
from preprocessing.indexing import index_pays
from preprocessing.options import PreprocessOptions
from preprocessing.sources import Source, UnitReader, check_fit, cut, examine

UNIT_BYTES = 300_000
OPTIONS = PreprocessOptions(shards=3, holdout=0.1)


@pytest.fixture(autouse=True)
def _dense_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gzip_index, "SPACING_BYTES", 50_000)


@pytest.fixture(scope="module")
def text(real_fasta: Path) -> bytes:
    return real_fasta.read_bytes()


def compress(text: bytes, members: int) -> bytes:
    """Members of equal length, and an empty one after each third."""
    size = -(-len(text) // members)
    packed = []
    for number, start in enumerate(range(0, len(text), size)):
        packed += [gzip.compress(text[start : start + size], 5)]
        packed += [gzip.compress(b"")] * (number % 3 == 2)
    return b"".join(packed)


def indexed(path: Path) -> Source:
    source = examine(path)
    index = path.with_suffix(".index")
    build_index(path, source.bytes, source.mtime_ns, index, threads=2)
    return replace(source, index=str(index))


@pytest.mark.parametrize("unit_bytes", [20_000, UNIT_BYTES, 10**9])
@pytest.mark.parametrize("members", [1, 2, 5, 300])
def test_units_read_all_records_once(
    tmp_path: Path, text: bytes, members: int, unit_bytes: int
) -> None:
    path = tmp_path / "in"
    path.write_bytes(compress(text, members))
    source = indexed(path)
    found, stretches, busy = [], [], 0
    for unit in cut([source], unit_bytes):
        reader = UnitReader(source, unit, block_bytes=unit_bytes)
        before = len(found)
        for chunk in reader.chunks():
            parsed = parse(chunk.text)
            found += zip(parsed.ids.to_pylist(), parsed.sequences.to_pylist(), strict=True)
        busy += len(found) > before
        stretches.append(reader.stretch)
    check_fit(source, stretches)
    records = SimpleFastaParser(io.StringIO(text.decode()))
    assert found == [(title.split()[0].encode(), sequence.encode()) for title, sequence in records]
    assert busy >= 3 or unit_bytes > len(text)


@pytest.mark.parametrize(
    ("members", "spoil", "message"),
    [
        (1, lambda data: data[:-1_000_000], "the gzip file ends too early"),
        (1, lambda data: data[:-4] + bytes(4), "damaged .its text is .* bytes long"),
        (3, lambda data: data[:-300_000], "the gzip file ends too early"),
        (4, lambda data: data[:-4] + bytes(4), "damaged .its text is .* bytes long"),
        (1, lambda data: data + b">b\nMK\n", "other bytes follow the end of the gzip data"),
    ],
)
def test_damage_is_found(
    tmp_path: Path,
    text: bytes,
    members: int,
    spoil: Callable[[bytes], bytes],
    message: str,
) -> None:
    """Some of this rapidgzip lets pass, and some it does not: then the file is read without."""
    path = tmp_path / "in"
    path.write_bytes(spoil(compress(text, members)))
    with pytest.raises(InputError, match=message):
        generate([path], tmp_path / "set", OPTIONS, unit_bytes=UNIT_BYTES, gzip_index=True)


@pytest.mark.parametrize("which", [-8, -1])
def test_member_that_several_units_read_is_checked(tmp_path: Path, text: bytes, which: int) -> None:
    """The trailer is spoilt behind the index's back: no unit sees more of it than its last."""
    path = tmp_path / "in"
    data = bytearray(compress(text, 1))
    path.write_bytes(data)
    source = indexed(path)
    data[which] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(source.mtime_ns, source.mtime_ns))
    stretches = []
    for unit in cut([source], UNIT_BYTES):
        reader = UnitReader(source, unit, block_bytes=UNIT_BYTES)
        for _ in reader.chunks():
            pass
        stretches.append(reader.stretch)
    assert sum(stretch is not None for stretch in stretches) >= 3
    with pytest.raises(InputError, match=r"in: the gzip file is damaged \(its (CRC|text) is"):
        check_fit(source, stretches)


def test_line_number_behind_a_point(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "in"
    wrong = text.rindex(b"\nM") + 2
    path.write_bytes(gzip.compress(text[:wrong] + b"-" + text[wrong:]))
    line = text.count(b"\n", 0, wrong) + 1
    with pytest.raises(InputError, match=f"in, line {line:,}, record .*character '-'"):
        generate([path], tmp_path / "set", OPTIONS, unit_bytes=UNIT_BYTES, gzip_index=True)


class TestKeeping:
    """An index is made once, kept beside the output, and used while it fits the file."""

    @pytest.fixture
    def path(self, tmp_path: Path, text: bytes) -> Path:
        (tmp_path / "in.gz").write_bytes(compress(text, 1))
        return tmp_path / "in.gz"

    @pytest.fixture
    def built(self, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
        """Return the files of which an index is made from now on."""
        paths: list[Path] = []

        def count(path: Path, *rest: Any, **more: Any) -> None:
            build_index(path, *rest, **more)
            paths.append(path)

        monkeypatch.setattr(indexing, "build_index", count)
        return paths

    def make(self, path: Path, name: str, **options: Any) -> dict[str, bytes]:
        output = path.parent / name
        generate([path], output, OPTIONS, unit_bytes=UNIT_BYTES, **options)
        return content(output)

    def test_made_once_and_used_by_later_jobs(self, path: Path, built: list[Path]) -> None:
        expected = self.make(path, "streamed")
        assert self.make(path, "first", gzip_index=True) == expected
        (kept,) = path.parent.glob("*.seek-index")
        assert kept.name.startswith("in.gz.")
        assert self.make(path, "second") == expected
        assert self.make(path, "third", gzip_index=True) == expected
        assert built == [path]

    def test_not_used_where_it_is_not_wanted(
        self, path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO)
        expected = self.make(path, "first", gzip_index=True)
        caplog.clear()
        assert self.make(path, "second", gzip_index=False) == expected
        assert "seek" not in caplog.text

    @pytest.mark.parametrize("spoil", ["empty", "other", "flipped", "new file"])
    def test_made_again_when_it_is_spoilt_or_the_file_is_new(
        self, path: Path, built: list[Path], spoil: str
    ) -> None:
        expected = self.make(path, "first", gzip_index=True)
        (kept,) = path.parent.glob("*.seek-index")
        data = kept.read_bytes()
        kept.unlink()
        middle = len(data) // 2  # in the text before a point
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        kept.write_bytes({"empty": b"", "other": b"other", "flipped": flipped}.get(spoil, data))
        if spoil == "new file":
            os.utime(path)
        assert self.make(path, "second", gzip_index=True) == expected
        assert built == [path, path]
        source = examine(path)
        SeekIndex(kept, source.bytes, source.mtime_ns).check()

    def test_damaged_while_it_is_used(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gzip_index, "_check_sum", lambda *_: 1)
        with monkeypatch.context() as patch:
            patch.setattr("preprocessing.generate._Job.map", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                self.make(path, "set", gzip_index=True)
        monkeypatch.undo()
        with pytest.raises(InputError, match=r"set/\.work/index-00000\.arrow is damaged: delete"):
            self.make(path, "set")

    @pytest.mark.parametrize("lost", [False, True])
    def test_restart_uses_the_index_that_was_begun_with(
        self, path: Path, built: list[Path], lost: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Stopped(BaseException):
            pass

        calls: list[int] = []
        chunks = UnitReader.chunks

        def stop(reader: UnitReader) -> Any:
            calls.append(1)
            if len(calls) == 4:
                raise Stopped
            return chunks(reader)

        expected = self.make(path, "streamed")
        with monkeypatch.context() as patch:
            patch.setattr(UnitReader, "chunks", stop)
            with pytest.raises(Stopped):
                self.make(path, "set", gzip_index=True)
        if lost:
            for kept in path.parent.glob("*.seek-index"):
                kept.unlink()
        assert self.make(path, "set", gzip_index=None if lost else False) == expected
        assert built == [path]

    def test_restart_does_not_change_its_mind(self, path: Path, monkeypatch: Any) -> None:
        """A unit that was the whole file cannot be followed by others."""
        expected = self.make(path, "streamed")
        with monkeypatch.context() as patch:
            patch.setattr("preprocessing.generate._Job.reduce", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                self.make(path, "set")
        assert self.make(path, "set", gzip_index=True) == expected

    def test_file_that_rapidgzip_cannot_read_is_read_without(
        self, path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise IndexFailed("out of order")

        monkeypatch.setattr(indexing, "build_index", fail)
        expected = self.make(path, "first")
        assert self.make(path, "second", gzip_index=True) == expected
        assert "in.gz: no seek index can be made: out of order" in caplog.text

    @pytest.mark.parametrize("size", [2, 3])
    def test_same_bytes_for_any_rank_count(
        self, path: Path, size: int, mpirun: Callable[..., Any]
    ) -> None:
        script = """
import json, sys
from pathlib import Path
from preprocessing import gzip_index
from preprocessing.generate import generate
from preprocessing.options import PreprocessOptions
from preprocessing.parallel import connect

gzip_index.SPACING_BYTES = 50_000
ranks = connect(int(sys.argv[1]))
for name in ("made", "there"):
    generate([Path(sys.argv[2])], Path(sys.argv[3]) / name,
             PreprocessOptions(shards=3, holdout=0.1), ranks, unit_bytes=300_000,
             gzip_index=True if name == "made" else None)
"""
        expected = self.make(path, "streamed")
        result = mpirun(size, "-c", script, size, path, path.parent)
        assert result.returncode == 0, result.stderr
        for name in ("made", "there"):
            assert content(path.parent / name) == expected


@pytest.mark.parametrize(
    ("sizes", "ranks", "cores", "pays"),
    [
        ([10**10], 1, 64, False),
        ([10**10], 2, 2, False),
        ([10**10], 3, 3, False),
        ([10**10], 8, 1, True),
        ([10**10], 8, 8, True),
        ([10**10] * 8, 8, 8, False),
        ([10**10] + [10**8] * 7, 8, 8, True),
        ([10**8], 8, 8, False),
    ],
)
def test_index_pays_with_many_cores_and_few_files(
    sizes: list[int], ranks: int, cores: int, pays: bool
) -> None:
    assert index_pays(sizes, ranks, cores) is pays
