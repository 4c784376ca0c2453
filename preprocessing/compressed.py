"""Text of compressed files, in pieces: what gzip and zstd have in common.

A compressed file is cut into units by its raw bytes, as a plain one is. The text of a unit is that
of the parts of the file (zstd frames, BGZF blocks, stretches between two points of a gzip index)
that begin in its bytes. Where the parts begin, each rank finds out on its own; `Stretch` says what
it found, so that the stretches of all units can be seen to fit together.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preprocessing.raw import BadInput, RawFile

PIECE_BYTES = 2**19
"""Text decompressed at a time, about."""

INPUT_BYTES = 2**18
"""Bytes of a compressed file read at a time; isal is slower with more."""

BORDER = b""
"""Among the pieces of a text, it stands where the unit's text ends; they go on behind it, because
the last record may."""

_PIECES_AHEAD = 4
_NOT_SEEN = 2**62  # beyond the end of every text


@dataclass(kw_only=True)
class Stretch:
    """What part of a compressed file one unit has read."""

    began: int
    """Raw byte at which its text begins: a border of parts, or that of an index point."""
    ended: int = -1
    """Raw byte at which its text ends: where the next unit must begin, or the end of the file."""
    members: list[list[int]] = field(default_factory=list)
    """Parts of gzip members that begin or end in another unit, at most two: CRC-32 and length of
    the text that was read, then both as the member's end says, or -1 for a part without it."""


class Damaged(Exception):
    """What is wrong with compressed data; who opened the file adds its name and what to do."""


class EndsEarly(Damaged):
    """The data stop in the middle."""


class OtherBytesFollow(Damaged):
    """The compressed data end well, but not the file."""


class Feed:
    """Bytes of a raw file in portions of any size."""

    def __init__(self, raw: RawFile) -> None:
        self._raw = raw
        self._data = b""
        self._next = 0

    @property
    def offset(self) -> int:
        """Byte of the file that comes next."""
        return self._raw.tell() - len(self._data) + self._next

    def some(self) -> memoryview:
        """Return the next bytes, as many as are at hand; empty at the end of the file."""
        if self._next == len(self._data):
            self._data, self._next = self._raw.read(INPUT_BYTES) or b"", 0
        return self.up_to(len(self._data) - self._next)

    def up_to(self, count: int) -> memoryview:
        """Return the next bytes, fewer only at the end of the file."""
        if self._next + count > len(self._data):
            parts = [self._data[self._next :]]
            missing = count - len(parts[0])
            while missing > 0 and (more := self._raw.read(max(INPUT_BYTES, missing))):
                parts.append(more)
                missing -= len(more)
            self._data, self._next = b"".join(parts), 0
        portion = memoryview(self._data)[self._next : self._next + count]
        self._next += len(portion)
        return portion

    def take(self, count: int) -> memoryview:
        """Return exactly as many bytes.

        Raises:
            EndsEarly: if the file has fewer.
        """
        data = self.up_to(count)
        if len(data) < count:
            raise EndsEarly
        return data

    def take_back(self, count: int) -> None:
        """Take back the last bytes of what was returned last: they come again."""
        self._next -= count


class Ahead:
    """The pieces of an iterator, which runs in a thread, a few pieces ahead of its reader."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._queue: queue.Queue[bytes | BaseException | None] = queue.Queue(_PIECES_AHEAD)
        self._closed = False
        self._thread = threading.Thread(target=self._run, args=(pieces,), daemon=True)
        self._thread.start()

    def next(self) -> bytes | None:
        """Return the next piece, None at the end; raise what the iterator raised."""
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """End the thread, also in the middle."""
        self._closed = True
        while self._thread.is_alive():
            while not self._queue.empty():
                self._queue.get()
            self._thread.join(0.01)

    def _run(self, pieces: Iterator[bytes]) -> None:
        last = None
        try:
            for piece in pieces:
                if self._closed:
                    return
                self._queue.put(piece)
        except BaseException as error:
            last = error
        self._queue.put(last)


class PieceReader:
    """Text of a unit from its pieces, for a reader that fills buffers of its own."""

    def __init__(self, pieces: Ahead) -> None:
        self._pieces = pieces
        self._piece = memoryview(b"")
        self._position = 0
        self._at_end = False
        self.stop = _NOT_SEEN
        """Place in the text before which the unit's last `>` stands, once it was passed: the first
        byte behind the border is the unit's if it begins a record, since a newline in front of it
        can be seen in this unit only."""

    def readinto(self, room: Any) -> int:
        """Read; return the number of bytes, 0 at the end."""
        while not self._piece and not self._at_end:
            piece = self._pieces.next()
            if piece is None:
                self._at_end = True
            elif piece == BORDER:
                self.stop = self._position + 1
            else:
                self._piece = memoryview(piece)
        count = min(len(room), len(self._piece))
        room[:count] = self._piece[:count]
        self._piece = self._piece[count:]
        self._position += count
        return count


def check_stretches(stretches: Sequence[Stretch], size: int) -> None:
    """Check that stretches of a file of `size` bytes, in order, leave nothing out.

    Raises:
        Damaged: if one does not begin where the one before it ends.
    """
    ends = [0, *(stretch.ended for stretch in stretches)]
    begins = [*(stretch.began for stretch in stretches), size]
    if ends != begins:
        raise Damaged("its parts do not join")


def refuse_damaged(path: Path, tool: str, error: Exception) -> BadInput:
    """Return the sentence for damaged data that the tool (gzip, zstd) made."""
    again = f"copy or download it again and check it with '{tool} -t {path}'"
    if isinstance(error, EndsEarly):
        return BadInput(f"{path}: the {tool} file ends too early: {again}")
    if isinstance(error, OtherBytesFollow):
        return BadInput(f"{path}: other bytes follow the end of the {tool} data: {again}")
    return BadInput(f"{path}: the {tool} file is damaged ({error}): {again}")
