"""Text of gzip files (RFC 1952): members in one go or from a point of an index on, BGZF blocks."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from isal import igzip_lib, isal_zlib

from preprocessing.compressed import (
    BORDER,
    INPUT_BYTES,
    PIECE_BYTES,
    Damaged,
    EndsEarly,
    Feed,
    OtherBytesFollow,
    Stretch,
)
from preprocessing.raw import RawFile

MAGIC = b"\x1f\x8b"
_DEFLATE = 8
_FHCRC, _FEXTRA, _FNAME, _FCOMMENT = 2, 4, 8, 16  # flags of a header
_HEADER = struct.Struct("<2sBB6x")  # magic, method, flags; time and system are of no interest
_TRAILER = struct.Struct("<II")  # CRC-32 and length of the text, modulo 2**32
_MAX_NAME = 2**16

_BGZF_HEADER = struct.Struct("<4s6xH2sHH")  # start, bytes of extra field, "BC", 2, block size - 1
_BGZF_START = (b"\x1f\x8b\x08\x04", 6, b"BC", 2)
_BGZF_END = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")
_BGZF_BLOCKS_SURE = 8
"""Blocks that must follow one another where one seems to begin."""

_InflateError: type[Exception] = igzip_lib.IsalError  # type: ignore[assignment]  # wrong stub

_ANY_LENGTH = -1
_NOT_READ = -1


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a gzip file between two points of an index."""

    began: int
    """Bit of the file at which its first deflate block begins."""
    ended: int
    """That of the next section."""
    window: bytes
    """32 KiB of text before it; empty at the beginning of a member."""
    text_bytes: int | None
    """None: all text to the end of the file."""


class GzipText:
    """The text of a file, or of a section of it; `stretch` tells what was read."""

    def __init__(self, raw: RawFile, section: Section | None = None) -> None:
        self._feed = Feed(raw)
        self._section = section
        self._left = _ANY_LENGTH
        self._from_start = section is None or section.began == 0
        if section is None or section.began == 0:
            raw.seek(0)
            _read_header(self._feed)
            self._inflate = _inflater(b"")
        else:
            byte, bit = divmod(section.began, 8)
            raw.seek(byte)
            self._inflate = _inflater(section.window)
            if bit:
                self._inflate.decompress(_enter_byte(self._feed.take(1)[0], bit))
        if section is not None and section.text_bytes is not None:
            self._left = section.text_bytes
        self._crc = self._length = 0
        self._passed = False  # the section's end
        self.stretch = Stretch(began=0 if section is None else section.began)

    def pieces(self) -> Iterator[bytes]:
        """Yield the text, with `BORDER` where the section's ends.

        Raises:
            Damaged: if the file is.
        """
        while True:
            for text in self._rest_of_member():
                if self._left == 0 and not self._passed:
                    self._pass()
                    yield BORDER
                inside = self._count(text)
                if inside:
                    yield text[:inside]
                if inside < len(text):
                    if not self._passed:
                        self._pass()
                        yield BORDER
                    yield text[inside:]
            self._end_member()
            if not _next_member(self._feed):
                break
            self._inflate = _inflater(b"")
            self._from_start = True
            self._crc = self._length = 0
        if self._left > 0:
            raise EndsEarly
        if not self._passed:
            self.stretch.ended = self._feed.offset

    def _rest_of_member(self) -> Iterator[bytes]:
        while not self._inflate.eof:
            data = self._feed.some() if self._inflate.needs_input else b""
            if self._inflate.needs_input and not data:
                raise EndsEarly
            try:
                text = self._inflate.decompress(data, PIECE_BYTES)
            except _InflateError as error:
                raise Damaged(str(error)) from error
            if text:
                yield text
        self._feed.take_back(len(self._inflate.unused_data))

    def _count(self, text: bytes) -> int:
        """Take text into the checksum; return how many of its bytes belong to the section."""
        if self._passed:
            return 0
        if self._left != _ANY_LENGTH:
            text = text[: self._left]
            self._left -= len(text)
        self._crc = isal_zlib.crc32(text, self._crc)
        self._length += len(text)
        return len(text)

    def _pass(self) -> None:
        """Note that the section's text is over, and the next byte of text belongs to another."""
        assert self._section is not None
        self._passed = True
        self.stretch.ended = self._section.ended
        self.stretch.members.append([self._crc, self._length, _NOT_READ, _NOT_READ])

    def _end_member(self) -> None:
        """Compare a member that has ended with what it says of itself."""
        stored = _TRAILER.unpack(self._feed.take(_TRAILER.size))
        if self._passed:
            return
        if self._from_start:
            _check(self._crc, self._length, *stored)
        elif self._length:  # otherwise whoever read its last text has read this, too
            self.stretch.members.append([self._crc, self._length, *stored])


class BgzfText:
    """The text of a unit of blocked gzip (BGZF, section 4.1 of the SAM specification)."""

    def __init__(self, raw: RawFile, start: int, stop: int) -> None:
        self._raw = raw
        self._stop = stop
        began = 0 if start == 0 else _find_block(raw, start, stop)
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
        texts: list[bytes] = []
        length = 0
        block = b""
        while True:
            offset = feed.offset
            if offset >= self._stop and self.stretch.ended < 0:
                self.stretch.ended = offset
                if texts:
                    yield b"".join(texts)
                    texts, length = [], 0
                yield BORDER
            header = bytes(feed.up_to(_BGZF_HEADER.size))
            if not header:
                break
            size = _block_bytes(header)
            if size is None:
                raise _no_block(header)
            block = header + bytes(feed.take(size - len(header)))
            texts.append(_block_text(block))
            length += len(texts[-1])
            if length >= PIECE_BYTES:
                yield b"".join(texts)
                texts, length = [], 0
        if block != _BGZF_END:
            raise EndsEarly("the end mark of BGZF is missing")
        if length:
            yield b"".join(texts)
        if self.stretch.ended < 0:
            self.stretch.ended = feed.offset


def is_bgzf(head: bytes) -> bool:
    """Say whether a gzip file that begins so is blocked."""
    return _block_bytes(head) is not None


def check_members(stretches: list[Stretch]) -> None:
    """Compare the members that several units have read with what they say of themselves.

    Raises:
        Damaged: if one differs.
    """
    crc = length = 0
    for part_crc, part_length, *stored in (part for each in stretches for part in each.members):
        crc = isal_zlib.crc32_combine(crc, part_crc, part_length)
        length += part_length
        if stored[0] != _NOT_READ:
            _check(crc, length, *stored)
            crc = length = 0


def _check(crc: int, length: int, stored_crc: int, stored_length: int) -> None:
    if crc != stored_crc:
        raise Damaged(f"its CRC is 0x{crc:08x}, not 0x{stored_crc:08x} as it should be")
    if length % 2**32 != stored_length:
        raise Damaged(f"its text is {length:,} bytes long, not as long as it should be")


def _inflater(window: bytes) -> igzip_lib.IgzipDecompressor:
    return igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_DEFLATE, zdict=window)


def _next_member(feed: Feed) -> bool:
    """Go on to the next member, over zeros as gzip does; False at the end of the file."""
    while byte := feed.up_to(1):
        if byte[0]:
            feed.take_back(1)
            _read_header(feed)
            return True
    return False


def _read_header(feed: Feed) -> None:
    start = bytes(feed.up_to(_HEADER.size))
    if not start.startswith(MAGIC[: len(start)]):
        raise OtherBytesFollow
    if len(start) < _HEADER.size:
        raise EndsEarly
    _, method, flags = _HEADER.unpack(start)
    if method != _DEFLATE:
        raise Damaged(f"compression method {method} is unknown")
    if flags & _FEXTRA:
        feed.take(int.from_bytes(feed.take(2), "little"))
    for flag in (_FNAME, _FCOMMENT):
        if flags & flag:
            _skip_text(feed)
    if flags & _FHCRC:
        feed.take(2)


def _skip_text(feed: Feed) -> None:
    text = bytes(feed.up_to(_MAX_NAME))
    end = text.find(b"\0")
    if end < 0:
        raise EndsEarly() if len(text) < _MAX_NAME else Damaged("a name in it has no end")
    feed.take_back(len(text) - end - 1)


def _enter_byte(byte: int, bit: int) -> bytes:
    """Return deflate blocks without text whose last byte ends with the bits of `byte` from `bit`.

    A decompressor begins at a byte, a deflate block anywhere. Blocks that say nothing bring it to
    the place: one of 91 bits where it is odd, then some of 10 bits.
    """
    blocks = (_EMPTY_91 if bit % 2 else []) + _EMPTY_10 * ((bit - 91 * (bit % 2)) // 2 % 4)
    value = length = 0
    for number, bits in blocks:
        value |= number << length
        length += bits
    assert length % 8 == bit
    return (value | byte >> bit << length).to_bytes(length // 8 + 1, "little")


# Values and their bits, in order (RFC 1951, section 3.2).
_EMPTY_10 = [(0, 1), (1, 2), (0, 7)]  # not the last block; fixed codes; its end
_EMPTY_91 = [
    (0, 1), (2, 2),  # not the last block; codes of its own:
    (0, 5), (0, 5), (14, 4),  # 257 for letters, 1 for distances, 18 for lengths of codes,
    *((int(symbol in (1, 18)), 3) for symbol in  # where "1" is 0 and "11 to 138 zeros" is 1:
      (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1)),
    (0, 1), (1, 1), (138 - 11, 7), (1, 1), (117 - 11, 7), (0, 1),  # 1, 255 zeros, 1,
    (0, 1),  # 1
    (1, 1),  # its end, the second of two letters
]  # fmt: skip


def _block_bytes(header: bytes) -> int | None:
    """Return the length of the BGZF block with this header; None if it is none."""
    if len(header) < _BGZF_HEADER.size:
        return None
    *start, size = _BGZF_HEADER.unpack_from(header)
    smallest = _BGZF_HEADER.size + _TRAILER.size
    return size + 1 if tuple(start) == _BGZF_START and size + 1 > smallest else None


def _block_text(block: bytes) -> bytes:
    try:
        text = igzip_lib.decompress(
            block[_BGZF_HEADER.size : -_TRAILER.size], flag=igzip_lib.DECOMP_DEFLATE
        )
    except (_InflateError, EOFError) as error:
        raise Damaged(str(error)) from error
    _check(isal_zlib.crc32(text), len(text), *_TRAILER.unpack(block[-_TRAILER.size :]))
    return text


def _no_block(header: bytes) -> Damaged:
    if not header.startswith(MAGIC[: len(header)]):
        return OtherBytesFollow()
    if len(header) < _BGZF_HEADER.size:
        return EndsEarly()
    return Damaged("it begins as BGZF and goes on as other gzip: compress it again as a whole")


def _find_block(raw: RawFile, start: int, stop: int) -> int | None:
    """Return where the first BGZF block begins in a range; reads the range up to there."""
    magic = _BGZF_START[0]
    raw.seek(start)
    tail = b""
    while raw.tell() < stop:
        data = tail + (raw.read(min(INPUT_BYTES, stop - raw.tell())) or b"")
        first = raw.tell() - len(data)
        data += raw.peek(raw.tell(), len(magic) - 1) if raw.tell() == stop else b""
        found = data.find(magic)
        while found >= 0:
            if _is_block(raw, first + found):
                return first + found
            found = data.find(magic, found + 1)
        tail = data[1 - len(magic) :]
    return None


def _is_block(raw: RawFile, offset: int) -> bool:
    """Say whether BGZF blocks follow one another from here on."""
    for _ in range(_BGZF_BLOCKS_SURE):
        header = raw.peek(offset, _BGZF_HEADER.size)
        if len(header) < _BGZF_HEADER.size:  # at the end; if cut short, its reader will say so
            return True
        size = _block_bytes(header)
        if size is None:
            return False
        offset += size
    return True
