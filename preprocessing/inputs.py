"""Which files are the inputs: files, patterns and directories become a list of files."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from preprocessing.errors import InputError

_log = logging.getLogger(__name__)

FASTA_SUFFIXES = (".fasta", ".fa", ".faa", ".fas")
COMPRESSED_SUFFIXES = (".gz", ".zst")
"""What may follow one of them."""

_NAMED = 5  # files left out of a directory that are named
_SUFFIXES = f"{', '.join(FASTA_SUFFIXES)}, also with {' or '.join(COMPRESSED_SUFFIXES)}"


def find_inputs(inputs: Sequence[Path]) -> list[Path]:
    """Return the files that the inputs stand for.

    A directory stands for the files in it and below that are named as FASTA (hidden ones and
    linked directories are passed over), a pattern with `*`, `?`, `[…]` or `**` for the files that
    it matches, and everything else for itself.

    Raises:
        InputError: if an input stands for no file.
    """
    if not inputs:
        raise InputError("no input files: name one or more FASTA files, patterns or directories")
    return [path for given in inputs for path in _files_of(Path(given))]


def _files_of(given: Path) -> Iterable[Path]:
    if given.is_dir():
        return _files_below(given)
    if not os.path.lexists(given) and glob.has_magic(str(given)):
        return _matching_files(given)
    return [given]


def _matching_files(pattern: Path) -> list[Path]:
    matches = [Path(name) for name in sorted(glob.glob(str(pattern), recursive=True))]
    files = [path for path in matches if not path.is_dir()]
    if not files:
        found = "directories only: name them" if matches else "nothing: correct it"
        raise InputError(f"{pattern}: the pattern matches {found}, or name the files")
    return files


def _files_below(directory: Path) -> list[Path]:
    files: list[Path] = []
    others: list[Path] = []

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from error

    for folder, folders, names in os.walk(directory, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                (files if _is_named_as_fasta(name) else others).append(Path(folder, name))
    if not files:
        raise InputError(
            f"{directory}: the directory holds no file named as FASTA ({_SUFFIXES}): "
            "name the files themselves"
        )
    if others:
        shown = ", ".join(str(path.relative_to(directory)) for path in others[:_NAMED])
        more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
        _log.info("%s: not named as FASTA, left out: %s%s", directory, shown, more)
    return files


def _is_named_as_fasta(name: str) -> bool:
    name = name.lower()
    for suffix in COMPRESSED_SUFFIXES:
        name = name.removesuffix(suffix)
    return name.endswith(FASTA_SUFFIXES)
