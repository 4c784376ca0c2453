"""Seek index of a gzip file: points at which ranks can begin to inflate it side by side.

A gzip file of one member can be read from its beginning only, unless one knows where a deflate
block begins and the 32 KiB of text before it. rapidgzip finds such points, with as many threads as
there are. What ranks then read is checked against the CRC-32 and length that each member ends with
(`GzipText`): rapidgzip lets some files pass that are cut short or have wrong lengths.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import xxhash

from preprocessing.columns import open_arrow
from preprocessing.errors import InputError
from preprocessing.files import publish
from preprocessing.gzip_text import Section

SPACING_BYTES = 8 * 2**20
"""Bytes of the gzip file from one point to the next, at least. A point costs 32 KiB."""

_VERSION = 1
_SCHEMA = pa.schema(
    [
        ("bit", pa.uint64()),  # of the gzip file: where a deflate block begins
        ("text", pa.uint64()),  # where its text begins
        ("window", pa.large_binary()),  # the text before it
        ("check", pa.uint64()),  # xxh3-64 of the three
    ]
)

# The format of indexed_gzip, which rapidgzip writes.
_MAGIC = b"GZIDX"
_HEADER = struct.Struct("<5sBB QQ III")  # magic, version, flags, sizes, spacing, window, points
_POINT = struct.Struct("<QQBB")  # byte behind the first bits, text, those bits, whether a window


class IndexFailed(InputError):
    """No index can be made, for the reason given; the file itself may be sound or not."""


class SeekIndex:
    """An index, mapped into memory."""

    def __init__(self, path: Path, size: int, mtime_ns: int) -> None:
        """Open the index of a file of this size and time.

        Raises:
            IndexFailed: if it cannot be read, or belongs to another state of the file.
        """
        try:
            reader = open_arrow(path)
            about = json.loads(reader.schema.metadata[b"index"])
            self._points = reader.get_batch(0)
        except (OSError, pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
            raise IndexFailed(f"{path} cannot be read ({error})") from error
        if about != _about(size, mtime_ns):
            raise IndexFailed(f"{path} belongs to another state of the file")
        self._path = path
        self._bits = self._points["bit"].to_numpy()

    def check(self) -> None:
        """Check all points.

        Raises:
            IndexFailed: if one has changed since it was written.
        """
        for number in range(len(self._bits)):
            self._point(number)

    def section(self, start: int, stop: int) -> Section | None:
        """Return the part of the text that begins in a range of the gzip file's bytes, if any.

        Raises:
            IndexFailed: if the points at its ends have changed since they were written.
        """
        bounds = np.searchsorted(self._bits, np.array([start, stop]) * 8)
        first, last = int(bounds[0]), int(bounds[1])
        if start == 0:
            began, text, window = 0, 0, b""
        elif first == last:
            return None
        else:
            began, text, window = self._point(first)
        if last == len(self._bits):
            return Section(began=began, ended=-1, window=window, text_bytes=None)
        ended, next_text, _ = self._point(last)
        return Section(began=began, ended=ended, window=window, text_bytes=next_text - text)

    def _point(self, number: int) -> tuple[int, int, bytes]:
        bit, text, window, check = (column[number].as_py() for column in self._points.columns)
        if check != _check_sum(bit, text, window):
            raise IndexFailed(
                f"{self._path} is damaged: delete the output directory that it is in, and run again"
            )
        return bit, text, window


def build_index(path: Path, size: int, mtime_ns: int, index: Path, threads: int) -> None:
    """Make the index of a gzip file of this size and time.

    Args:
        path: the gzip file.
        size: its bytes.
        mtime_ns: when it was last changed.
        index: where the index goes.
        threads: that inflate side by side.

    Raises:
        IndexFailed: if rapidgzip is missing, or cannot read the file.
    """
    exported = index.with_name(f"{index.name}.points")
    temporary = index.with_name(f"{index.name}.tmp")
    try:
        _export(path, exported, threads)
        with exported.open("rb") as points:
            batch = _thin_out(points)
        schema = _SCHEMA.with_metadata({"index": json.dumps(_about(size, mtime_ns))})
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(batch.replace_schema_metadata(schema.metadata))
        publish(temporary, index)
    finally:
        exported.unlink(missing_ok=True)
        temporary.unlink(missing_ok=True)


def _check_sum(bit: int, text: int, window: bytes) -> int:
    return xxhash.xxh3_64_intdigest(struct.pack("<QQ", bit, text) + window)


def _about(size: int, mtime_ns: int) -> dict[str, int]:
    return {"version": _VERSION, "bytes": size, "mtime_ns": mtime_ns}


def _export(path: Path, exported: Path, threads: int) -> None:
    try:
        import rapidgzip
    except ImportError as error:
        raise IndexFailed(f"rapidgzip cannot be used: {error}") from error
    try:
        file = rapidgzip.open(str(path), parallelization=threads)
        try:
            file.export_index(str(exported))
        finally:
            file.close()  # Python aborts at its end with a file left open
    except (OSError, RuntimeError, ValueError) as error:
        raise IndexFailed(f"rapidgzip cannot read it: {error}") from error


def _thin_out(points: BinaryIO) -> pa.RecordBatch:
    """Return exported points that lie far enough apart."""
    header = _HEADER.unpack(points.read(_HEADER.size))
    magic, text_bytes, window_bytes, count = header[0], header[4], header[6], header[7]
    if magic != _MAGIC:
        raise IndexFailed("rapidgzip writes an index in an unknown format")
    found = [_POINT.unpack(points.read(_POINT.size)) for _ in range(count)]
    bits: list[int] = []
    texts: list[int] = []
    windows: list[bytes] = []
    checks: list[int] = []
    windows_at, last = points.tell(), 0
    for byte, text, first_bits, has_window in found:
        bit = 8 * byte - first_bits
        if last < text < text_bytes and bit - (bits[-1] if bits else 0) >= 8 * SPACING_BYTES:
            points.seek(windows_at)
            bits.append(bit)
            texts.append(text)
            windows.append(points.read(window_bytes) if has_window else b"")
            checks.append(_check_sum(bit, text, windows[-1]))
            last = text
        windows_at += window_bytes * has_window
    columns = zip((bits, texts, windows, checks), _SCHEMA.types, strict=True)
    return pa.record_batch([pa.array(*column) for column in columns], schema=_SCHEMA)
