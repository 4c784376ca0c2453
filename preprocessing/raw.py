"""Input files as the bytes that lie on the disk: read, hashed, and checked for being the same."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from preprocessing.errors import InputError

TO_THE_END = 2**63
"""Stands for the end of a file that is read in one go."""

_READ_BYTES = 2**20


class BadInput(InputError):
    """An input file is refused: no job can succeed before the file or an option changes."""


class RawFile(io.RawIOBase):
    """An open file; the bytes of a range of it are hashed when they are first read.

    Reading goes on from where it stopped; it may go back, but not beyond what was read.
    """

    def __init__(self, file: io.FileIO, start: int, stop: int, hasher: BlockHasher | None) -> None:
        self._file = file
        self._position = file.tell()
        self._hashed = start
        self._stop = stop
        self._hasher = hasher

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def seekable(self) -> bool:
        """Say that one can go back in it."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to another byte."""
        self._position = self._file.seek(offset, whence)
        return self._position

    def tell(self) -> int:
        """Return the byte at which the next read begins."""
        return self._position

    def readinto(self, room: Any) -> int:
        """Read; return the number of bytes, 0 at the end of the file."""
        got = self._file.readinto(room)
        low = self._hashed - self._position
        high = min(self._stop - self._position, got)
        if self._hasher is not None and 0 <= low < high:
            self._hasher.update(memoryview(room)[low:high])
            self._hashed += high - low
        self._position += got
        return got

    def peek(self, offset: int, count: int) -> bytes:
        """Return up to `count` bytes from anywhere, without going there."""
        return os.pread(self._file.fileno(), count, offset)

    def hash_rest(self) -> None:
        """Read and hash what is left of the range."""
        if self._hasher is not None:
            self.seek(self._hashed)
            room = bytearray(_READ_BYTES)
            while self._position < self._stop and self.readinto(room):
                pass


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


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what the operating system has against reading a file into a sentence for the user."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


def check_unchanged(path: Path, file: io.FileIO, size: int, mtime_ns: int) -> None:
    """Refuse an open file that is no longer what was examined."""
    status = os.fstat(file.fileno())
    if (status.st_size, status.st_mtime_ns) != (size, mtime_ns):
        raise BadInput(f"{path}: changed while it was being read; run again when it is complete")
