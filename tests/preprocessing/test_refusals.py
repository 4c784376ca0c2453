"""Every malformed input is refused with one sentence: file, line, record, what to do."""

import bz2
import gzip
import lzma
import re
from pathlib import Path

import pytest
import zstandard

from preprocessing.errors import InputError
from preprocessing.generate import generate
from preprocessing.options import PreprocessOptions

GOOD = ">a first\nMKV\n"
ZIPPED = gzip.compress(GOOD.encode() * 3000)

TEXTS = {
    "empty file": (b"", "the file is empty"),
    "blank lines only": (b"\n\r\n\n", "holds blank lines only"),
    "empty gzip": (gzip.compress(b""), "the file is empty"),
    "text first": (b"\nhello\n>a\nMK\n", "line 2: 'hello' stands before the first '>'"),
    "fastq": (b"@read\nACGT\n+\nIIII\n", "line 1: looks like FASTQ.*seqkit fq2fa"),
    "fastq later": (b">a\nACGT\n+\nIIII\n", "line 3, record 'a': character '\\+'.*FASTQ"),
    "comment first": (b"; made by\n>a\nMK\n", "line 1: comment lines.*grep -v"),
    "comment later": (b">a\nMK\n;x\nMK\n", "line 3, record 'a': character ';'.*grep -v"),
    "binary": (b">a\x00\x01\x02", "binary file"),
    "binary later": (b">a\n" + b"MK\n" * 40_000 + b"M\0K\n", "line 40,002, record 'a': .*binary"),
    "utf-16": (GOOD.encode("utf-16-le"), "UTF-16"),
    "byte-order mark": (b"\xef\xbb\xbf" + GOOD.encode(), "byte-order mark"),
    "no id": (b">a\nMK\n>\nMKV\n", "line 3: the header has no id"),
    "blank before id": (b">a\nMK\n> b\nMKV\n", "line 3: the header has no id"),
    "id not utf-8": (b">a\nMK\n>\xe9x\nMKV\n", r"line 3, record '\\xe9x':.*not UTF-8 .*iconv"),
    "empty record": (b">a\nMK\n>b\n\n>c\nMK\n", "line 3, record 'b':.*no residues"),
    "empty record last": (b">a\nMK\n>b", "line 3, record 'b':.*no residues"),
    "only a stop": (b">a\n*\n", "line 1, record 'a':.*no residues"),
    "inner stop": (b">a\nMK*V\n", r"line 2, record 'a': character '\*'.*only at the end"),
    "gap": (b">a\nMK\n>b\nMK\nM-V\n", "line 5, record 'b': character '-'.*seqkit seq -g"),
    "dot": (b">a\nM.V\n", r"line 2, record 'a': character '\.'.*gaps"),
    "digit": (b">a\n1 MKV\n", "line 2, record 'a': character '1'.*position numbers"),
    "blank in line": (b">a\nMK VA\n", "line 2, record 'a': character ' '.*blanks"),
    "blank before header": (b">a\nMK\n >b\nMK\n", "line 3, record 'a': character ' '"),
    "header in a line": (b">a\nMK>b\nMK\n", "line 2, record 'a': character '>'.*beginning"),
    "not ascii": (b">a\nM\xc3\xa9K\n", "line 2, record 'a': byte 0xC3.*plain text"),
    "other character": (b">a\r\nMK\r\nM?\r\n", r"line 3, record 'a': character '\?'.*A to Z"),
    "return in a line": (b">a\nMK\rMK\n", r"line 2, record 'a': character '\\r'.*line ends"),
    "macintosh": (b">a\rMK\r>b\rMK\r", "Macintosh line ends"),
    "bzip2": (bz2.compress(GOOD.encode()), "bzip2: decompress"),
    "xz": (lzma.compress(GOOD.encode()), "xz: decompress"),
    "zip": (b"PK\x03\x04xxxx", "zip: unpack"),
    "gzip twice": (gzip.compress(ZIPPED), "compressed twice"),
    "gzip in zstd": (zstandard.compress(ZIPPED), "compressed twice"),
    "gzip cut in its header": (ZIPPED[:6], "ends too early.*gzip -t"),
    "gzip cut": (ZIPPED[:-20], "ends too early.*gzip -t"),
    "gzip cut in its trailer": (ZIPPED[:-3], "ends too early.*gzip -t"),
    "gzip cut in a later member": (ZIPPED + ZIPPED[:40], "ends too early.*gzip -t"),
    "gzip with a wrong checksum": (
        ZIPPED[:-8] + bytes(4) + ZIPPED[-4:],
        "gzip file is damaged .*CRC.*gzip -t",
    ),
    "gzip with a wrong length": (ZIPPED[:-4] + bytes(4), "gzip file is damaged"),
    "gzip and then text": (ZIPPED + b">b\nMK\n", "other bytes follow the end of the gzip data"),
    "bad letter in gzip": (
        gzip.compress(b">a\nMK\n>b\nMK\nM-V\n"),
        "line 5, record 'b': character '-'",
    ),
}


@pytest.mark.parametrize("unit_bytes", [4, 2**26])
@pytest.mark.parametrize("kind", TEXTS)
def test_malformed_input(tmp_path: Path, kind: str, unit_bytes: int) -> None:
    content, message = TEXTS[kind]
    if len(content) > 1000 and unit_bytes == 4:
        unit_bytes = len(content) // 4
    path = tmp_path / "in.fasta"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        generate([path], tmp_path / "set", PreprocessOptions(), unit_bytes=unit_bytes)
    said = str(caught.value)
    assert said.startswith(str(path)), said
    assert re.search(message, said), said
    assert "\n" not in said
    assert not (tmp_path / "set" / ".work").exists()


def test_inputs_that_are_no_files(tmp_path: Path) -> None:
    options = PreprocessOptions()
    with pytest.raises(InputError, match="no input files"):
        generate([], tmp_path / "set", options)
    with pytest.raises(InputError, match=r"missing\.fasta: .*No such file"):
        generate([tmp_path / "missing.fasta"], tmp_path / "set", options)
    with pytest.raises(InputError, match="not a regular file"):
        generate([Path("/dev/null")], tmp_path / "set", options)
    path = tmp_path / "in.fasta"
    path.write_text(GOOD)
    with pytest.raises(InputError, match="named twice"):
        generate([path, tmp_path / "." / "in.fasta"], tmp_path / "set", options)


def test_file_that_changes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from preprocessing import planning as module

    path = tmp_path / "in.fasta"
    path.write_text(GOOD)
    cut = module.cut

    def write_more(*arguments: object) -> object:
        path.write_text(GOOD + ">b\nMK\n")
        return cut(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "cut", write_more)
    with pytest.raises(InputError, match=r"in\.fasta: changed while it was being read"):
        generate([path], tmp_path / "set", PreprocessOptions())
