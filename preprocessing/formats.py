"""What a file is, judged by its first bytes: FASTA text, compressed or not, or something else."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Literal

from preprocessing import gzip_text, zstd_text
from preprocessing.raw import BadInput

_log = logging.getLogger(__name__)

Kind = Literal["plain", "gzip", "bgzf", "zstd"]
"""How a file's text is packed; "bgzf" is gzip in blocks that say how long they are."""

_UNREADABLE = {
    b"BZh": "bzip2: decompress it first (bunzip2)",
    b"\xfd7zXZ": "xz: decompress it first (unxz)",
    b"PK\x03\x04": "zip: unpack it first (unzip)",
}

_OTHER_FORMATS = {
    rb"<": "HTML or XML (the error page of a download?), not FASTA: look into it",
    rb"LOCUS ": "GenBank, not FASTA: convert it first (seqret -osformat fasta)",
    rb"ID   ": "EMBL or UniProt text, not FASTA: convert it first (seqret -osformat fasta)",
    rb"# STOCKHOLM": "Stockholm, not FASTA: convert it first (esl-reformat fasta)",
    rb"CLUSTAL": "Clustal, not FASTA: convert it first (seqret -osformat fasta)",
    rb"#NEXUS": "NEXUS, not FASTA: convert it first (seqret -osformat fasta)",
    rb"(HEADER|ATOM)  ": "PDB, not FASTA: convert it first",
    rb" *\d+ +\d+\s": "PHYLIP, not FASTA: convert it first (seqret -osformat fasta)",
    # Its second line is a title that could be taken for residues.
    rb">(P1|F1|DL|DC|RL|RC|N1|N3|XX);": "PIR, not FASTA: convert it first (seqret -osformat fasta)",
}
"""How the text of another format begins (a pattern)."""

_NUCLEOTIDES = b"ACGTUNacgtun"
_FEWEST_NUCLEOTIDES = 60  # 60 residues of a protein are all among them with p = 1e-35


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
    for beginning, name in _OTHER_FORMATS.items():
        if re.match(beginning, start):
            raise BadInput(f"{path}, line {line}: looks like {name}")
    if not start.startswith(b">"):
        found = start.split(b"\n", 1)[0][:40].decode("ascii", "backslashreplace")
        raise BadInput(
            f"{path}, line {line}: {found!r} stands before the first '>': "
            "FASTA begins with a header"
        )
    if b"\r" in start and b"\n" not in start:
        raise BadInput(f"{path}: has old Macintosh line ends: convert it first (tr '\\r' '\\n')")
    _warn_of_nucleotides(path, start)


def _warn_of_nucleotides(path: Path, head: bytes) -> None:
    sequences = b"".join(line for line in head.splitlines() if not line.startswith(b">"))
    if len(sequences) >= _FEWEST_NUCLEOTIDES and not sequences.strip(_NUCLEOTIDES):
        _log.warning(
            "%s: holds only A, C, G, T, U and N, as far as it was looked at: if these are "
            "nucleotides, translate them first (seqkit translate)",
            path,
        )
