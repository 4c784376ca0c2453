"""Every odd or malformed input ends as `malformed.py` and the table in the documents say."""

import re
from pathlib import Path
from typing import Any

import pytest
from malformed import CASES, DOCUMENT, GOOD, Case, open_folder, run, table

from preprocessing.errors import InputError
from preprocessing.generate import generate
from preprocessing.options import PreprocessOptions


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def test_input_ends_as_documented(case: Case) -> None:
    with open_folder() as folder:
        ending = run(case, folder)
        assert (ending.refused is None) == (case.refused is None), ending
        if case.refused is not None:
            assert re.search(case.refused, ending.refused or ""), ending.refused
            assert "\n" not in (ending.refused or "")
        assert ending.records == case.records
        assert len(ending.warnings) == (case.warning is not None)
        assert all(re.search(case.warning or "", warning) for warning in ending.warnings)

        if case.refused is not None and not case.unprivileged and not (folder / "set").is_file():
            good = folder / "good.fasta"
            good.write_bytes(GOOD)
            if (folder / "set" / "in.fasta").exists():  # the case of an input in the output
                (folder / "set" / "in.fasta").unlink()
            made = generate([good], folder / "set", PreprocessOptions())
            assert made["totals"]["kept"]["records"] == 1


def test_table_in_the_documents_is_what_happens() -> None:
    assert DOCUMENT.read_text() == table(), (
        f"run 'python {Path('tests/preprocessing/malformed.py')} --write docs/{DOCUMENT.name}'"
    )


@pytest.mark.slow
def test_line_of_100_mb_is_a_record(tmp_path: Path) -> None:
    (tmp_path / "in.fasta").write_bytes(b">a\n" + b"MKVLA" * 20_000_000 + b"\n>b\nMKV\n")
    made = generate([tmp_path / "in.fasta"], tmp_path / "set", PreprocessOptions())
    assert made["totals"]["kept"] == {"records": 2, "residues": 100_000_003}


@pytest.mark.slow
def test_record_of_3_gb_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "in.fasta").open("wb") as file:
        file.write(b">a\n" + b"M" * 2**20)
        file.truncate(3 * 2**30)  # takes no room on the disk
    with pytest.raises(InputError, match=r"in\.fasta: a record is longer than 2 GB"):
        generate([tmp_path / "in.fasta"], tmp_path / "set", PreprocessOptions())
    assert not (tmp_path / "set" / ".work").exists()


def test_refusal_on_the_command_line_is_one_sentence(prothpc: Any, tmp_path: Path) -> None:
    (tmp_path / "in.fasta").write_bytes(b">a\nM-V\n")
    result = prothpc("preprocess", tmp_path / "in.fasta", "-o", tmp_path / "set")
    assert result.returncode == 1
    assert result.stderr.startswith(f"prothpc: {tmp_path / 'in.fasta'}, line 2, record 'a': ")
    assert result.stderr.count("\n") == 1
