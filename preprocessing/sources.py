"""Input files: what they are, how they are cut into units, and their text in chunks of records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from preprocessing.compressed import (
    Ahead,
    Damaged,
    PieceReader,
    Stretch,
    check_stretches,
    refuse_damaged,
)
from preprocessing.formats import Kind, kind_of, refuse_other_formats
from preprocessing.gzip_index import SeekIndex
from preprocessing.gzip_text import BgzfText, GzipText, check_members
from preprocessing.raw import TO_THE_END, BadInput, BlockHasher, RawFile, check_unchanged, readable
from preprocessing.zstd_text import ZstdText

UNIT_BYTES = 64 * 2**20
"""Bytes of a file that one rank takes at a time, and of a hashed block of it."""

CHUNK_BYTES = 2 * 2**20
"""Bytes parsed at a time: the temporaries then stay in the L2 cache (4 MB and more halved the
speed)."""

_HEAD_BYTES = 64 * 2**10
_MAX_TEXT = 2**31 - 2  # Arrow's 32-bit offsets address the bytes of a chunk

_TOOLS = {"gzip": "gzip", "bgzf": "gzip", "zstd": "zstd"}


@dataclass(frozen=True, kw_only=True)
class Source:
    """An input file."""

    path: str
    bytes: int
    mtime_ns: int
    kind: Kind = "plain"
    index: str | None = None
    """Path of the seek index of a gzip file, if it is read with one."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Work for one rank: the records whose `>` lies in the text of a byte range of a file.

    That is the range itself in a plain file; in a compressed one what begins in it, see
    `compressed`.
    """

    source: int
    start: int
    stop: int


@dataclass(frozen=True)
class Chunk:
    """Whole records of a unit; `text` is overwritten when the next chunk is asked for."""

    text: np.ndarray
    """uint8; starts with `>` and ends with a newline."""
    offset: int
    """Place of its first byte in the text that its unit begins with."""


def examine(path: Path) -> Source:
    """Look at a file's size and first bytes.

    Raises:
        InputError: if it cannot be read or is evidently no FASTA.
    """
    with readable(path):
        status = path.stat()
        if not path.is_file():
            raise BadInput(f"{path}: not a regular file; give FASTA files, plain, gzip or zstd")
        with path.open("rb", buffering=0) as file:
            kind = kind_of(file.read(_HEAD_BYTES))
    source = Source(
        path=str(path.resolve()), bytes=status.st_size, mtime_ns=status.st_mtime_ns, kind=kind
    )
    reader = UnitReader(source, Unit(source=0, start=0, stop=TO_THE_END), block_bytes=UNIT_BYTES)
    refuse_other_formats(path, reader.head(_HEAD_BYTES))
    return source


def cut(sources: Sequence[Source], unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """Cut files into units by byte ranges; a gzip file without marks or index is one unit."""
    units = []
    for number, source in enumerate(sources):
        if source.kind == "gzip" and source.index is None:
            units.append(Unit(source=number, start=0, stop=TO_THE_END))
            continue
        for start in range(0, source.bytes, unit_bytes):
            stop = min(start + unit_bytes, source.bytes)
            units.append(Unit(source=number, start=start, stop=stop))
    return units


def beginnings(sources: Sequence[Source]) -> list[Unit]:
    """Return one unit for each file, from which its first records are to be read."""
    return [Unit(source=number, start=0, stop=TO_THE_END) for number in range(len(sources))]


def check_fit(source: Source, stretches: Sequence[Stretch | None]) -> None:
    """Check that the units of a compressed file have read all of it, and only once.

    Args:
        source: the file.
        stretches: what each of its units has read, in order.

    Raises:
        BadInput: if they have not, or if a gzip member that several of them read is damaged.
    """
    if source.kind == "plain":
        return
    found = [stretch for stretch in stretches if stretch is not None]
    with _damage_refused(source):
        check_stretches(found, source.bytes)
        check_members(found)


class UnitReader:
    """Reads one unit: first `chunks()` to its end, then `block_hashes` and `stretch`."""

    def __init__(
        self, source: Source, unit: Unit, *, block_bytes: int, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        self._source = source
        self._path = Path(source.path)
        self._unit = unit
        self._chunk_bytes = chunk_bytes
        self._hasher = BlockHasher(block_bytes)
        self.stretch: Stretch | None = None
        """What was read of a compressed file; None if it is plain, or nothing begins in the unit.
        """

    @property
    def block_hashes(self) -> list[str]:
        """xxh3-128 (hex) of each block of the file's raw bytes that the unit covers, in order."""
        return self._hasher.finish()

    def chunks(self) -> Iterator[Chunk]:
        """Yield the unit's records.

        Raises:
            InputError: if the file changed since it was examined, or is damaged.
        """
        with self._open(self._unit.start, self._unit.stop, self._hasher) as text:
            if text is not None:
                yield from self._cut(text)

    def head(self, count: int) -> bytes:
        """Return the first bytes of the text."""
        with self._open(0, self._unit.stop, None) as text:
            assert text is not None
            window = _Window(text, count)
            window.extend()
            return bytes(window.text[: window.filled])

    def line_number(self, chunk: Chunk, position: int) -> int:
        """Return the file's line number, from 1, of a byte of a chunk (reads the file again)."""
        line = 1 + int(np.count_nonzero(chunk.text[:position] == ord("\n")))
        if self._unit.start > 0:
            with self._open(0, self._unit.start, None) as before:
                assert before is not None
                line += _count_lines(before, None)
        with self._open(self._unit.start, self._unit.stop, None) as text:
            assert text is not None
            return line + _count_lines(text, chunk.offset)

    def _cut(self, text: _Text) -> Iterator[Chunk]:
        window = _Window(text, self._chunk_bytes)
        before_header = b"" if self._unit.start == 0 else b"\n"
        window.extend()
        while (found := window.text.find(before_header + b">", 0, window.filled)) < 0:
            if window.at_end or window.end >= text.stop:
                return
            window.discard(window.filled - 1)
            window.extend()
        window.discard(found + len(before_header))
        searched = 0  # before it there is no second header in the window
        while window.base < text.stop:
            if window.end > text.stop:  # the record after the last one may be in sight
                from_stop = max(text.stop - 1 - window.base, searched)
                end = window.text.find(b"\n>", from_stop, window.filled)
                if end >= 0:
                    yield window.chunk(end + 1)
                    return
            if window.at_end:
                window.end_line()
                yield window.chunk(window.filled)
                return
            end = window.text.rfind(b"\n>", searched, window.filled)
            if end >= 0:
                yield window.chunk(end + 1)
                window.discard(end + 1)
            searched = window.filled - 1
            if not window.extend():
                raise BadInput(
                    f"{self._path}: a record is longer than 2 GB; is this a protein FASTA?"
                )

    @contextmanager
    def _open(self, start: int, stop: int, hasher: BlockHasher | None) -> Iterator[_Text | None]:
        """Open the text of a range of the file; None if nothing begins in the range.

        The raw bytes of the range go to the hasher.
        """
        source = self._source
        with readable(self._path), _damage_refused(source), self._path.open("rb", 0) as file:
            check_unchanged(self._path, file, source.bytes, source.mtime_ns)
            raw = RawFile(file, start, stop, hasher)
            if source.kind == "plain":
                yield _PlainText(raw, start, stop)
            else:
                packed = self._unpack(raw, start, stop)
                if packed is None:
                    yield None
                else:
                    ahead = Ahead(packed.pieces())
                    try:
                        yield PieceReader(ahead)
                    finally:
                        ahead.close()
                if hasher is not None:
                    self.stretch = packed.stretch if packed is not None else None
            raw.hash_rest()

    def _unpack(self, raw: RawFile, start: int, stop: int) -> _Packed | None:
        source = self._source
        packed: _Packed
        if source.kind == "zstd":
            packed = ZstdText(raw, start, stop)
        elif source.kind == "bgzf":
            packed = BgzfText(raw, start, stop)
        elif source.index is None:
            packed = GzipText(raw)
        else:
            section = SeekIndex(Path(source.index), source.bytes, source.mtime_ns).section(
                start, stop
            )
            if section is None:
                return None
            packed = GzipText(raw, section)
        return None if packed.stretch is None else packed


_Packed = ZstdText | BgzfText | GzipText


class _PlainText:
    """The text of a unit of a plain file."""

    def __init__(self, raw: RawFile, start: int, stop: int) -> None:
        self._raw = raw
        begin = max(start - 1, 0)  # to see whether a newline stands before the range
        raw.seek(begin)
        self.stop = stop - begin

    def readinto(self, room: Any) -> int:
        return self._raw.readinto(room)


_Text = _PlainText | PieceReader


def _count_lines(text: _Text, stop: int | None) -> int:
    """Count the newlines before a place of a text; None: those that lie in its unit."""
    room = memoryview(bytearray(CHUNK_BYTES))
    lines = position = 0
    while got := text.readinto(room):
        # a unit owns the headers behind its newlines, so its last newline is before `text.stop`
        end = min(got, (text.stop - 1 if stop is None else stop) - position)
        lines += bytes(room[: max(end, 0)]).count(b"\n")
        if end < got:
            break
        position += got
    return lines


@contextmanager
def _damage_refused(source: Source) -> Iterator[None]:
    try:
        yield
    except Damaged as error:
        raise refuse_damaged(Path(source.path), _TOOLS[source.kind], error) from error


class _Window:
    """A piece of a text, moved forward along it."""

    def __init__(self, text: _Text, step: int) -> None:
        self._stream = text
        self._step = step
        self.base = 0
        """Place in the text of the first byte."""
        self.text = bytearray(2 * step + 1)
        self.filled = 0
        """Bytes of `text` that hold text."""
        self.at_end = False

    @property
    def end(self) -> int:
        return self.base + self.filled

    def extend(self) -> bool:
        """Read on; False if the window is as long as it may be."""
        want = max(self._step, self.filled)  # doubles, so that a huge record costs O(n)
        if self.filled + want > _MAX_TEXT:
            return False
        if self.filled + want + 1 > len(self.text):  # views of the old text may be about
            self.text = self.text[: self.filled] + bytearray(want + 1)
        room = memoryview(self.text)[self.filled : self.filled + want]
        got = 0
        while got < want and (count := self._stream.readinto(room[got:])):
            got += count
        self.filled += got
        self.at_end = got < want
        return True

    def discard(self, count: int) -> None:
        """Drop bytes at the front."""
        self.text[: self.filled - count] = self.text[count : self.filled]
        self.base += count
        self.filled -= count

    def end_line(self) -> None:
        """Give the last line of a file the newline that it may lack."""
        if self.text[self.filled - 1] != ord("\n"):
            self.text[self.filled] = ord("\n")
            self.filled += 1

    def chunk(self, stop: int) -> Chunk:
        return Chunk(np.frombuffer(self.text, np.uint8, stop), self.base)
