"""Input files: what they are, how they are cut into units, and their text in chunks of records."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from preprocessing.errors import InputError

UNIT_BYTES = 64 * 2**20
"""Bytes of a plain file that one rank takes at a time, and of a hashed block of any file."""

CHUNK_BYTES = 2 * 2**20
"""Bytes parsed at a time: the temporaries then stay in the L2 cache (4 MB and more halved the
speed)."""

_HEAD_BYTES = 64 * 2**10
_GZIP_BUFFER = 128 * 2**10  # Python 3.10's gzip asks for 8 KiB at a time
_GZIP_MAGIC = b"\x1f\x8b"
_UNREADABLE = {
    b"\x28\xb5\x2f\xfd": "zstd: decompress it first (zstd -d)",
    b"BZh": "bzip2: decompress it first (bunzip2)",
    b"\xfd7zXZ": "xz: decompress it first (unxz)",
    b"PK\x03\x04": "zip: unpack it first (unzip)",
}
_TO_THE_END = 2**63
_MAX_TEXT = 2**31 - 2  # Arrow's 32-bit offsets address the bytes of a chunk

_Stream = io.RawIOBase | io.BufferedIOBase


class BadInput(InputError):
    """An input file is refused: no job can succeed before the file or an option changes."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """An input file."""

    path: str
    bytes: int
    mtime_ns: int
    compressed: bool


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Work for one rank: the records whose `>` lies in a byte range of a file's text."""

    source: int
    start: int
    stop: int


@dataclass(frozen=True)
class Chunk:
    """Whole records of a unit; `text` is overwritten when the next chunk is asked for."""

    text: np.ndarray
    """uint8; starts with `>` and ends with a newline."""
    offset: int
    """Place of its first byte in the file's (decompressed) text."""


def examine(path: Path) -> Source:
    """Look at a file's size and first bytes.

    Raises:
        InputError: if it cannot be read or is evidently no FASTA.
    """
    with _readable(path):
        status = path.stat()
        if not path.is_file():
            raise InputError(f"{path}: not a regular file; give FASTA files, plain or gzip")
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
            compressed = head.startswith(_GZIP_MAGIC)
            if compressed:
                file.seek(0)
                with gzip.GzipFile(fileobj=file) as text:
                    head = text.read(_HEAD_BYTES)
    _refuse_other_formats(path, head)
    return Source(
        path=str(path.resolve()),
        bytes=status.st_size,
        mtime_ns=status.st_mtime_ns,
        compressed=compressed,
    )


def cut(sources: Sequence[Source], unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """Cut files into units: plain ones by byte ranges, a gzip file is one unit."""
    units = []
    for number, source in enumerate(sources):
        if source.compressed:
            units.append(Unit(source=number, start=0, stop=_TO_THE_END))
            continue
        for start in range(0, source.bytes, unit_bytes):
            stop = min(start + unit_bytes, source.bytes)
            units.append(Unit(source=number, start=start, stop=stop))
    return units


class UnitReader:
    """Reads one unit: first `chunks()` to its end, then `block_hashes`."""

    def __init__(
        self, source: Source, unit: Unit, *, block_bytes: int, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        self._source = source
        self._path = Path(source.path)
        self._unit = unit
        self._chunk_bytes = chunk_bytes
        self._hasher = BlockHasher(block_bytes)

    @property
    def block_hashes(self) -> list[str]:
        """xxh3-128 (hex) of each block of the file's raw bytes that the unit covers, in order."""
        return self._hasher.finish()

    def chunks(self) -> Iterator[Chunk]:
        """Yield the unit's records.

        Raises:
            InputError: if the file changed since it was examined, or is damaged gzip.
        """
        begin = max(self._unit.start - 1, 0)  # to see whether a newline stands before the range
        with self._open_text(begin, self._hasher) as stream:
            yield from self._cut(_Window(stream, begin, self._chunk_bytes))

    def line_number(self, chunk: Chunk, position: int) -> int:
        """Return the file's line number, from 1, of a byte of a chunk (reads the file again)."""
        line = 1
        with self._open_text(0, BlockHasher(UNIT_BYTES)) as stream:
            left = chunk.offset
            while left > 0 and (block := stream.read(min(left, CHUNK_BYTES))):
                line += block.count(b"\n")
                left -= len(block)
        return line + int(np.count_nonzero(chunk.text[:position] == ord("\n")))

    def _cut(self, window: _Window) -> Iterator[Chunk]:
        start, stop = self._unit.start, self._unit.stop
        before_header = b"" if start == 0 else b"\n"
        window.extend()
        while (found := window.text.find(before_header + b">", 0, window.filled)) < 0:
            if window.at_end or window.end >= stop:
                return
            window.discard(window.filled - 1)
            window.extend()
        window.discard(found + len(before_header))
        searched = 0  # before it there is no second header in the window
        while window.base < stop:
            if window.end > stop:  # the record after the last one may be in sight
                from_stop = max(stop - 1 - window.base, searched)
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
    def _open_text(self, begin: int, hasher: BlockHasher) -> Iterator[_Stream]:
        """Open the file's text at byte `begin`; the raw bytes of the unit go to the hasher."""
        source, unit = self._source, self._unit
        with _readable(self._path), self._path.open("rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if (status.st_size, status.st_mtime_ns) != (source.bytes, source.mtime_ns):
                raise BadInput(
                    f"{self._path}: changed while it was being read; run again when it is complete"
                )
            file.seek(begin)
            raw = _Hashed(file, begin, unit.start, unit.stop, hasher)
            if source.compressed:
                buffered = io.BufferedReader(raw, _GZIP_BUFFER)
                with gzip.GzipFile(fileobj=buffered, mode="rb") as text:
                    yield text
            else:
                yield raw


class _Window:
    """A piece of a text, moved forward along it."""

    def __init__(self, stream: _Stream, base: int, step: int) -> None:
        self._stream = stream
        self._step = step
        self.base = base
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


class BlockHasher:
    """xxh3-128 of each block of fixed length of a stream of bytes (the last may be shorter)."""

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._done: list[str] = []
        self._block = xxhash.xxh3_128()
        self._length = 0

    def update(self, data: bytes | memoryview) -> None:
        """Take the next bytes."""
        while len(data):
            part = data[: self._block_bytes - self._length]
            self._block.update(part)
            self._length += len(part)
            data = data[len(part) :]
            if self._length == self._block_bytes:
                self._close()

    def finish(self) -> list[str]:
        """Return the digests (hex) of all blocks."""
        if self._length:
            self._close()
        return self._done

    def _close(self) -> None:
        self._done.append(self._block.hexdigest())
        self._block.reset()
        self._length = 0


class _Hashed(io.RawIOBase):
    """A raw file whose bytes in a range are hashed as they are read."""

    def __init__(
        self, file: io.FileIO, position: int, start: int, stop: int, hasher: BlockHasher
    ) -> None:
        self._file = file
        self._position = position
        self._start = start
        self._stop = stop
        self._hasher = hasher

    def readable(self) -> bool:
        return True

    def readinto(self, room: Any) -> int:
        got = self._file.readinto(room)
        low = max(self._start - self._position, 0)
        high = min(self._stop - self._position, got)
        if low < high:
            self._hasher.update(memoryview(room)[low:high])
        self._position += got
        return got


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what reading a file, gzip or not, may raise into a sentence for the user."""
    again = f"copy or download it again and check it with 'gzip -t {path}'"
    try:
        yield
    except EOFError as error:
        raise BadInput(f"{path}: the gzip file ends too early: {again}") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        if "Not a gzipped file" in str(error):  # the first bytes were gzip's
            raise BadInput(
                f"{path}: other bytes follow the end of the gzip data: {again}"
            ) from error
        raise BadInput(f"{path}: the gzip file is damaged ({error}): {again}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


def _refuse_other_formats(path: Path, head: bytes) -> None:
    for magic, name in _UNREADABLE.items():
        if head.startswith(magic):
            raise BadInput(f"{path}: is compressed with {name}")
    if head.startswith(_GZIP_MAGIC):
        raise BadInput(f"{path}: is compressed twice: run gunzip on it once")
    start = head.lstrip(b"\r\n")
    if not head:
        raise BadInput(f"{path}: the file is empty: leave it out, or write it first")
    if not start:
        raise BadInput(f"{path}: holds blank lines only: leave it out, or write it first")
    line = head[: len(head) - len(start)].count(b"\n") + 1
    if b"\0" in head:
        raise BadInput(f"{path}: is a binary file (or UTF-16 text), not FASTA text")
    if start.startswith(b"\xef\xbb\xbf"):
        raise BadInput(f"{path}: begins with a byte-order mark: save it as plain ASCII")
    if start.startswith(b"@"):
        raise BadInput(
            f"{path}, line {line}: looks like FASTQ (reads with qualities), not protein FASTA: "
            "convert it first (seqkit fq2fa) and translate it"
        )
    if start.startswith(b";"):
        raise BadInput(
            f"{path}, line {line}: comment lines are not read: remove them (grep -v '^;')"
        )
    if not start.startswith(b">"):
        found = start.split(b"\n", 1)[0][:40].decode("ascii", "backslashreplace")
        raise BadInput(
            f"{path}, line {line}: {found!r} stands before the first '>': "
            "FASTA begins with a header"
        )
    if b"\r" in start and b"\n" not in start:
        raise BadInput(f"{path}: has old Macintosh line ends: convert it first (tr '\\r' '\\n')")
