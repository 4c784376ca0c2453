"""Text of zstd files; a unit takes the frames that begin in its bytes (RFC 8878, section 3.1)."""

from __future__ import annotations

import re
from collections.abc import Iterator

import zstandard

from preprocessing.compressed import (
    BORDER,
    INPUT_BYTES,
    Damaged,
    EndsEarly,
    Feed,
    OtherBytesFollow,
    Stretch,
)
from preprocessing.raw import RawFile

MAGIC = b"\x28\xb5\x2f\xfd"
_MAGIC_AT = re.compile(re.escape(MAGIC))
_SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")
_MAGIC_BYTES = 4
_MAX_BLOCK = 128 * 2**10
_RLE, _RESERVED = 1, 3  # block types
_MAX_HEADER = 18

_BLOCKS_AT_ONCE = 4
"""Blocks handed to the decompressor together: half a megabyte of text, however small they are."""

_BLOCKS_SURE = 16
"""Blocks that must follow one another where a frame seems to begin. In other data the chain breaks
at each block with a probability of 0.95."""

_MAX_WINDOW = 2**27
"""Bytes that a frame may look back, as `zstd -d` allows by default."""


def is_zstd(head: bytes) -> bool:
    """Say whether a file that begins so is zstd."""
    return head.startswith(MAGIC) or bool(_SKIPPABLE.match(head))


class ZstdText:
    """The text of a unit; `stretch` tells what was read, None if no frame begins in the unit."""

    def __init__(self, raw: RawFile, start: int, stop: int) -> None:
        self._raw = raw
        self._stop = stop
        began = 0 if start == 0 else _find_frame(raw, start, stop)
        self.stretch = None if began is None else Stretch(began=began)
        if began is not None:
            raw.seek(began)

    def pieces(self) -> Iterator[bytes]:
        """Yield the text, with `BORDER` where the unit's ends.

        Raises:
            Damaged: if the file is.
        """
        assert self.stretch is not None
        feed = Feed(self._raw)
        decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
        while True:
            offset = feed.offset
            magic = bytes(feed.up_to(_MAGIC_BYTES))
            if not magic:
                break
            if _SKIPPABLE.match(magic):
                _skip(feed, int.from_bytes(feed.take(4), "little"))
                continue
            if magic != MAGIC:
                raise EndsEarly() if MAGIC.startswith(magic) else OtherBytesFollow()
            if offset >= self._stop and self.stretch.ended < 0:
                self.stretch.ended = offset
                yield BORDER
            yield from _frame(feed, decompressor)
        if self.stretch.ended < 0:
            self.stretch.ended = feed.offset


def _skip(feed: Feed, count: int) -> None:
    while count:
        count -= len(feed.take(min(count, INPUT_BYTES)))


def _frame(feed: Feed, decompressor: zstandard.ZstdDecompressor) -> Iterator[bytes]:
    """Yield the text of the frame whose magic was just read."""
    frame = decompressor.decompressobj()
    descriptor = feed.take(1)
    header = MAGIC + bytes(descriptor) + bytes(feed.take(_header_bytes(descriptor[0]) - 1))
    parts = [header]
    blocks, last = 0, False
    while not last:
        block_header = bytes(feed.take(3))
        last, size = _block(block_header)
        parts += [block_header, bytes(feed.take(size))]
        blocks += 1
        if last:
            parts.append(bytes(feed.take(_checksum_bytes(descriptor[0]))))
        if last or blocks == _BLOCKS_AT_ONCE:
            try:
                text = frame.decompress(b"".join(parts))
            except zstandard.ZstdError as error:
                raise Damaged(_reason(error)) from error
            if text:
                yield text
            parts, blocks = [], 0
    if not frame.eof:
        raise EndsEarly


def _reason(error: zstandard.ZstdError) -> str:
    reason = str(error).removeprefix("zstd decompressor error: ")
    if "too much memory" in reason:
        return f"{reason}: it was compressed with --long or --ultra; compress it without"
    return reason


def _header_bytes(descriptor: int) -> int:
    """Return the length of a frame header, without its magic, that begins with this byte."""
    single_segment = descriptor >> 5 & 1
    content_size = (single_segment, 2, 4, 8)[descriptor >> 6]
    return 1 + (1 - single_segment) + (0, 1, 2, 4)[descriptor & 3] + content_size


def _checksum_bytes(descriptor: int) -> int:
    return 4 if descriptor & 4 else 0


def _block(header: bytes) -> tuple[bool, int]:
    """Return whether a block is a frame's last, and its bytes behind the header."""
    value = int.from_bytes(header, "little")
    kind, size = value >> 1 & 3, value >> 3
    if kind == _RESERVED or size > _MAX_BLOCK:
        raise Damaged("a block header makes no sense")
    return bool(value & 1), 1 if kind == _RLE else size


def _find_frame(raw: RawFile, start: int, stop: int) -> int | None:
    """Return where the first frame begins in a range; reads the range up to there."""
    raw.seek(start)
    tail = b""
    while raw.tell() < stop:
        data = tail + (raw.read(min(INPUT_BYTES, stop - raw.tell())) or b"")
        first = raw.tell() - len(data)
        # a magic that begins in the range may end behind it
        data += raw.peek(raw.tell(), _MAGIC_BYTES - 1) if raw.tell() == stop else b""
        for match in _MAGIC_AT.finditer(data):
            if _is_frame(raw, first + match.start()):
                return first + match.start()
        tail = data[1 - _MAGIC_BYTES :]
    return None


def _is_frame(raw: RawFile, offset: int) -> bool:
    """Say whether blocks follow one another as in a frame that begins here."""
    header = raw.peek(offset + _MAGIC_BYTES, _MAX_HEADER)
    if not header or header[0] & 8:  # a reserved bit
        return False
    offset += _MAGIC_BYTES + _header_bytes(header[0])
    for _ in range(_BLOCKS_SURE):
        block_header = raw.peek(offset, 3)
        if len(block_header) < 3:  # a file cut short: who reads the frame will say so
            return True
        try:
            last, size = _block(block_header)
        except Damaged:
            return False
        offset += 3 + size
        if last:
            following = raw.peek(offset + _checksum_bytes(header[0]), _MAGIC_BYTES)
            return not following or is_zstd(following)
    return True
