"""Files, patterns and directories become the list of input files, or are refused."""

import logging
from pathlib import Path

import pytest

from preprocessing.errors import InputError
from preprocessing.inputs import find_inputs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (
        "a.fasta", "b.FA.gz", "README.md", "c.fasta.bz2", ".hidden.fasta", "d[1].fasta",
        "deep/e.faa.zst", "deep/er/f.fas", "deep/notes.txt", ".git/g.fasta", "bare/x.txt",
    ):  # fmt: skip
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(">a\nMK\n")
    return tmp_path / "in"


def names(folder: Path, *inputs: str) -> list[str]:
    return [str(path.relative_to(folder)) for path in find_inputs([folder / one for one in inputs])]


def test_directory_stands_for_the_fasta_files_below(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    expected = ["a.fasta", "b.FA.gz", "d[1].fasta", "deep/e.faa.zst", "deep/er/f.fas"]
    assert names(folder, ".") == expected
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.endswith("left out: README.md, c.fasta.bz2, bare/x.txt, deep/notes.txt")


def test_pattern_stands_for_the_files_that_it_matches(folder: Path) -> None:
    assert names(folder, "*.fasta") == ["a.fasta", "d[1].fasta"]
    assert names(folder, "[Rb]*") == ["README.md", "b.FA.gz"]  # whatever they are called
    assert names(folder, "**/*.f*s") == ["deep/er/f.fas"]
    assert names(folder, "**/?.fa*") == [
        "a.fasta", "c.fasta.bz2", "deep/e.faa.zst", "deep/er/f.fas",
    ]  # fmt: skip


def test_file_stands_for_itself_whatever_its_name(folder: Path) -> None:
    given = ["deep/notes.txt", "d[1].fasta", "missing.fasta", "deep"]
    assert names(folder, *given) == [*given[:3], "deep/e.faa.zst", "deep/er/f.fas"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("*.fna", r"\*\.fna: the pattern matches nothing: correct it"),
        ("dee?", r"dee\?: the pattern matches directories only: name them"),
        ("bare", r"bare: the directory holds no file named as FASTA \(\.fasta, .*\.zst\)"),
    ],
)
def test_input_that_stands_for_no_file_is_refused(folder: Path, given: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_inputs([folder / "a.fasta", folder / given])


def test_no_input_is_refused() -> None:
    with pytest.raises(InputError, match="no input files: name one or more"):
        find_inputs([])
