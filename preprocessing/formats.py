"""What a file is, judged by its first bytes: FASTA text, compressed or not, or something else."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from preprocessing import gzip_text, zstd_text
from preprocessing.raw import BadInput

Kind = Literal["plain", "gzip", "bgzf", "zstd"]
"""How a file's text is packed; "bgzf" is gzip in blocks that say how long they are."""

_UNREADABLE = {
    b"BZh": "bzip2: decompress it first (bunzip2)",
    b"\xfd7zXZ": "xz: decompress it first (unxz)",
    b"PK\x03\x04": "zip: unpack it first (unzip)",
}


def kind_of(head: bytes) -> Kind:
    """Return what a file that begins so is."""
    if zstd_text.is_zstd(head):
        return "zstd"
    if head.startswith(gzip_text.MAGIC):
        return "bgzf" if gzip_text.is_bgzf(head) else "gzip"
    return "plain"


def refuse_other_formats(path: Path, head: bytes) -> None:
    """Refuse a file whose text begins so, if it is evidently no FASTA.

    Raises:
        BadInput: with what it seems to be, and what to do.
    """
    for magic, name in _UNREADABLE.items():
        if head.startswith(magic):
            raise BadInput(f"{path}: is compressed with {name}")
    if kind_of(head) != "plain":
        raise BadInput(f"{path}: is compressed twice: decompress it once")
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
