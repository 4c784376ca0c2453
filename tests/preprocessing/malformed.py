"""Odd and malformed inputs, and what prothpc does with each.

`python malformed.py --write docs/preprocess-inputs.md` runs them all and writes the table.
"""

import argparse
import gzip
import io
import logging
import os
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zstandard
from Bio import bgzf
from test_refusals import TEXTS

from preprocessing.errors import InputError
from preprocessing.generate import generate
from preprocessing.options import PreprocessOptions
from preprocessing.records import RecordSet

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "preprocess-inputs.md"
GOOD = b">a first\nMKV\n"
ZIPPED = gzip.compress(GOOD * 3)
THREE = {f"id{number}": "MKV" + "ACDEFGHIKL" * 20 + "ADE"[number] for number in range(3)}
_TEXT = "".join(f">{name}\n{sequence}\n" for name, sequence in THREE.items()).encode()
ZSTD = zstandard.ZstdCompressor(write_checksum=True).compress(_TEXT)
NOBODY = 65534
_LONGEST_EXAMPLE = 46


def bgzf_of(text: bytes) -> bytes:
    """Compress in blocks that say how long they are."""
    buffer = io.BytesIO()
    with bgzf.BgzfWriter(fileobj=buffer) as file:
        file.write(text)
        file.flush()
        packed = buffer.getvalue()
    return packed + bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")


BGZF = bgzf_of(_TEXT)

Place = Callable[[Path], tuple[list[Path], Path]]
"""Makes the input files in a directory; returns what is given as inputs and output."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """An input, and how a job on it ends."""

    what: str
    given: bytes | Place
    refused: str | None = None
    """Pattern of the sentence; None: a record set is made."""
    records: dict[str, str] = field(default_factory=dict)
    """Ids and sequences of the record set."""
    warning: str | None = None
    """Pattern of a warning."""
    options: dict[str, Any] = field(default_factory=dict)
    unprivileged: bool = False
    """Root may read and write everything: for this case it becomes somebody else."""


def named(name: str, content: bytes = GOOD) -> Place:
    """One file of a certain name."""

    def make(folder: Path) -> tuple[list[Path], Path]:
        (folder / name).write_bytes(content)
        return [folder / name], folder / "set"

    return make


def no_file(make: Callable[[Path], object], name: str = "in.fasta") -> Place:
    """Something that is no file."""

    def place(folder: Path) -> tuple[list[Path], Path]:
        make(folder / name)
        return [folder / name], folder / "set"

    return place


def secret(folder: Path) -> tuple[list[Path], Path]:
    (folder / "in.fasta").write_bytes(GOOD)
    (folder / "in.fasta").chmod(0)
    return [folder / "in.fasta"], folder / "set"


def read_only_output(folder: Path) -> tuple[list[Path], Path]:
    (folder / "in.fasta").write_bytes(GOOD)
    (folder / "set").mkdir(mode=0o555)
    return [folder / "in.fasta"], folder / "set"


def output_is_input(folder: Path) -> tuple[list[Path], Path]:
    (folder / "in.fasta").write_bytes(GOOD)
    return [folder / "in.fasta"], folder / "in.fasta"


def output_in_a_file(folder: Path) -> tuple[list[Path], Path]:
    (folder / "in.fasta").write_bytes(GOOD)
    return [folder / "in.fasta"], folder / "in.fasta" / "set"


def input_in_output(folder: Path) -> tuple[list[Path], Path]:
    (folder / "set").mkdir()
    (folder / "set" / "in.fasta").write_bytes(GOOD)
    return [folder / "set" / "in.fasta"], folder / "set"


def through_a_link(folder: Path) -> tuple[list[Path], Path]:
    (folder / "in.fasta").write_bytes(GOOD)
    (folder / "link.fasta").symlink_to("in.fasta")
    return [folder / "in.fasta", folder / "link.fasta"], folder / "set"


REFUSED_FILES = [
    Case(what="file that is not there", given=no_file(lambda path: None), refused="No such file"),
    Case(
        what="dangling link",
        given=no_file(lambda path: path.symlink_to("nowhere")),
        refused="No such file",
    ),
    Case(
        what="link to itself", given=no_file(lambda p: p.symlink_to(p)), refused="Too many levels"
    ),
    Case(
        what="directory without FASTA files",
        given=no_file(lambda path: path.mkdir(), "inputs"),
        refused="no file named as FASTA",
    ),
    Case(
        what="pattern that matches nothing",
        given=lambda folder: ([folder / "*.fasta"], folder / "set"),
        refused="matches nothing",
    ),
    Case(
        what="named pipe", given=no_file(lambda path: os.mkfifo(path)), refused="not a regular file"
    ),
    Case(
        what="device",
        given=lambda folder: ([Path("/dev/zero")], folder / "set"),
        refused="not a regular file",
    ),
    Case(
        what="path through a file",
        given=lambda folder: ([output_is_input(folder)[1] / "x.fasta"], folder / "set"),
        refused="Not a directory",
    ),
    Case(what="no permission", given=secret, refused="Permission denied", unprivileged=True),
    Case(what="one file twice, through a link", given=through_a_link, refused="named twice"),
    Case(what="output = input", given=output_is_input, refused="not a directory"),
    Case(what="output below a file", given=output_in_a_file, refused="Not a directory"),
    Case(what="input in the output directory", given=input_in_output, refused="not empty"),
    Case(
        what="read-only output",
        given=read_only_output,
        refused="Permission denied",
        unprivileged=True,
    ),
]

OTHER_FORMATS = [
    Case(
        what="HTML error page saved as .fasta",
        given=b"<!DOCTYPE html>\n<html>404</html>\n",
        refused="line 1: looks like HTML",
    ),
    Case(what="GenBank", given=b"LOCUS       AAB2 3 aa\n", refused="looks like GenBank"),
    Case(what="UniProt text", given=b"ID   001R_FRG3G\n", refused="looks like EMBL or UniProt"),
    Case(what="PIR", given=b">P1;CRAB\nCRYSTALLIN\nMKV*\n", refused="looks like PIR"),
    Case(what="PHYLIP", given=b" 2 4\na  MKVA\nb  MKVC\n", refused="looks like PHYLIP"),
    Case(what="Stockholm", given=b"# STOCKHOLM 1.0\na MKV\n//\n", refused="looks like Stockholm"),
    Case(what="Clustal", given=b"CLUSTAL W\n\na MKV\n", refused="looks like Clustal"),
    Case(what="NEXUS", given=b"#NEXUS\nbegin data;\n", refused="looks like NEXUS"),
    Case(what="PDB", given=b"HEADER    HYDROLASE\n", refused="looks like PDB"),
    Case(what="A3M or aligned FASTA", given=b">a\nMKV\n>b\nM-v\n", refused="line 4, .*gaps"),
    Case(what="table", given=b"id\tsequence\na\tMKV\n", refused="stands before the first '>'"),
    Case(
        what="header without `>`", given=b"a\nMKV\n>b\nMKV\n", refused="stands before the first '>'"
    ),
]

DAMAGED = [
    Case(what="zstd cut", given=ZSTD[:-9], refused="zstd file ends too early"),
    Case(what="zstd and then text", given=ZSTD + GOOD, refused="zstd"),
    Case(
        what="zstd with a flipped bit",
        given=ZSTD[:40] + bytes([ZSTD[40] ^ 1]) + ZSTD[41:],
        refused="zstd file is damaged",
    ),
    Case(
        what="BGZF cut between two blocks (its end mark is missing)",
        given=BGZF[:-28],
        refused="ends too early",
    ),
    Case(what="BGZF cut", given=BGZF[:-40], refused="ends too early"),
    Case(
        what="BGZF with a flipped bit",
        given=BGZF[:60] + bytes([BGZF[60] ^ 1]) + BGZF[61:],
        refused="gzip file is damaged",
    ),
]

ACCEPTED = [
    Case(what="zstd of several frames", given=ZSTD + ZSTD, records=THREE),
    Case(what="CRLF line ends", given=b">a\r\nMK\r\nV\r\n", records={"a": "MKV"}),
    Case(what="LF and CRLF mixed", given=b">a\r\nMK\nV\r\n", records={"a": "MKV"}),
    Case(what="blank lines anywhere", given=b"\n>a\n\nMK\n\nV\n\n", records={"a": "MKV"}),
    Case(what="no last newline", given=b">a\nMKV", records={"a": "MKV"}),
    Case(what="blanks and tabs at line ends", given=b">a \nMK \nV\t\n", records={"a": "MKV"}),
    Case(what="lower case", given=b">a\nmkV\n", records={"a": "MKV"}),
    Case(what="stops at the end", given=b">a\nMKV**\n", records={"a": "MKV"}),
    Case(what="B, J, O, U, X, Z", given=b">a\nBJOUXZ\n", records={"a": "BJOUXZ"}),
    Case(what="id ends at a tab", given=b">a\tb c\nMKV\n", records={"a": "MKV"}),
    Case(what="`>` and `;` in a header", given=b">a;1 >b\nMKV\n", records={"a;1": "MKV"}),
    Case(
        what="control characters in a header",
        given=b">a b\x01\x1b\x7f\nMKV\n",
        records={"a": "MKV"},
    ),
    Case(what="id in UTF-8", given=">é1 x\nMKV\n".encode(), records={"é1": "MKV"}),
    Case(
        what="id of 64 KB",
        given=b">" + b"i" * 2**16 + b"\nMKV\n",
        records={"i" * 2**16: "MKV"},
    ),
    Case(
        what="one id, two sequences: both are kept",
        given=b">a\nMKV\n>a\nMKW\n",
        records={"a": "MKV", "a ": "MKW"},
    ),
    Case(
        what="two ids, one sequence: the smaller id is kept",
        given=b">b\nMKV\n>a\nMKV\n",
        records={"a": "MKV"},
    ),
    Case(what="gzip named .fasta", given=named("in.fasta", ZIPPED), records={"a": "MKV"}),
    Case(what="plain text named .fasta.gz", given=named("in.fasta.gz"), records={"a": "MKV"}),
    Case(
        what="nucleotides",
        given=b">a\n" + b"ACGTN" * 12 + b"\n",
        records={"a": "ACGTN" * 12},
        warning="seqkit translate",
    ),
    Case(
        what="nothing left after `--min-length 9`",
        given=GOOD,
        options={"min_length": 9},
        warning="no record is kept",
    ),
    Case(
        what="inner stop, `--on-invalid mask`",
        given=b">a\nM*V\n",
        options={"on_invalid": "mask"},
        records={"a": "MXV"},
    ),
    Case(
        what="inner stop, `--on-invalid drop`",
        given=b">a\nM*V\n>b\nMK\n",
        options={"on_invalid": "drop"},
        records={"b": "MK"},
    ),
    Case(
        what="empty record, `--on-invalid drop`",
        given=b">a\n>b\nMK\n",
        options={"on_invalid": "drop"},
        records={"b": "MK"},
    ),
]

CASES = [
    *REFUSED_FILES,
    *OTHER_FORMATS,
    *DAMAGED,
    *(Case(what=what, given=content, refused=said) for what, (content, said) in TEXTS.items()),
    *ACCEPTED,
]


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a job ended."""

    refused: str | None
    warnings: list[str]
    records: dict[str, str]


def run(case: Case, folder: Path) -> Ending:
    """Run a case; names of its directory are cut out of what is said."""
    if isinstance(case.given, bytes):
        inputs, output = named("in.fasta", case.given)(folder)
    else:
        inputs, output = case.given(folder)
    refused, records = None, {}
    with warnings_of("preprocessing") as warnings:
        try:
            with somebody_else(folder) if case.unprivileged else nobody_else():
                manifest = generate(inputs, output, PreprocessOptions(**case.options))
            if manifest["totals"]["kept"]["records"]:
                records = contents(output)
        except InputError as error:
            refused = str(error)
    shown = [without(folder, warning) for warning in warnings]
    return Ending(refused=refused and without(folder, refused), warnings=shown, records=records)


def without(folder: Path, said: str) -> str:
    """Cut out what differs from run to run."""
    for place in (folder.resolve(), folder):
        said = said.replace(f"{place}/", "")
    return said.replace(f" (rank 0, {socket.gethostname()})", "")


def contents(directory: Path) -> dict[str, str]:
    """Ids and sequences; a blank follows an id that was there before."""
    records, found = RecordSet(directory), {}
    for record in sorted(
        (records.record(number) for number in range(len(records))), key=lambda r: r.sequence
    ):
        found[record.id if record.id not in found else record.id + " "] = record.sequence
    return found


@contextmanager
def warnings_of(name: str) -> Iterator[list[str]]:
    """Collect the warnings of a package."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(name).addHandler(handler)
    try:
        yield found
    finally:
        logging.getLogger(name).removeHandler(handler)


@contextmanager
def somebody_else(folder: Path) -> Iterator[None]:
    """Have no more rights than anybody on the machine."""
    if os.geteuid():
        yield
        return
    for parent in (folder, *folder.parents):
        if not parent.stat().st_mode & stat.S_IXOTH:
            raise PermissionError(f"{parent} is closed to others")
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@contextmanager
def nobody_else() -> Iterator[None]:
    yield


@contextmanager
def open_folder() -> Iterator[Path]:
    """Make a directory that everybody may look into and write to."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        Path(name).chmod(0o777)
        yield Path(name)


HEAD = """\
# What may be in an input file

Every row was run by `python tests/preprocessing/malformed.py --write docs/preprocess-inputs.md`,
and a test compares. *Refused* means: this sentence on standard error, exit code 1, and nothing left
behind that a corrected command would trip over. Sentences are those for a file `in.fasta`.

| in the file | for example | what prothpc does |
|---|---|---|
"""


def table() -> str:
    """Run all cases; return the document."""
    rows = []
    for case in CASES:
        with open_folder() as folder:
            ending = run(case, folder)
        rows.append(f"| {case.what} | {example(case)} | {summary(ending)} |\n")
    return HEAD + "".join(rows)


def example(case: Case) -> str:
    """Show a short content."""
    if not isinstance(case.given, bytes):
        return ""
    shown = repr(case.given)[2:-1]
    is_short = 0 < len(shown) <= _LONGEST_EXAMPLE
    return code(shown) if is_short and case.given.isascii() else ""


def summary(ending: Ending) -> str:
    """Say how a job ended."""
    said = "".join(f"; warns: {code(warning)}" for warning in ending.warnings)
    if ending.refused is not None:
        return f"refused: {code(ending.refused)}{said}"
    shown = ", ".join(f"{name.strip()} {text}" for name, text in ending.records.items())
    if len(shown) > _LONGEST_EXAMPLE:
        shown = f"{len(ending.records)} whole"
    return f"accepted: {code(shown) if shown else 'an empty record set'}{said}"


def code(text: str) -> str:
    """Set as code in a cell of a table."""
    return "`" + text.replace("|", "\\|") + "`"


def main() -> None:
    parser = argparse.ArgumentParser(description="Run all odd inputs and write the table of them.")
    parser.add_argument("--write", type=Path, default=DOCUMENT)
    parser.parse_args().write.write_text(table())


if __name__ == "__main__":
    main()
