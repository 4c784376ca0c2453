"""Output files that users name: gzipped where the name says so, and there once they are whole."""

from __future__ import annotations

import gzip
import os.path
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from preprocessing.errors import InputError
from preprocessing.files import publish


@contextmanager
def replaced_files(paths: Sequence[Path], *, overwrite: bool) -> Iterator[dict[Path, OutputFile]]:
    """Give a file to write for every path; they take their places when all are whole.

    Until then each stands beside its place under a `.part` name, which an error removes.

    Args:
        paths: where the files go; one whose name ends in `.gz` is gzip-compressed.
        overwrite: replace files that exist.

    Raises:
        InputError: if two paths are one file, a path exists (and is not to be overwritten) or is
            no regular file, or a file cannot be written.
    """
    # os.path answers where pathlib raises, as for a name that is too long: opening the file then
    # says what is wrong.
    for i, path in enumerate(paths):
        if os.path.realpath(path) in map(os.path.realpath, paths[:i]):
            raise InputError(f"{path} is named for two outputs: give each its own file")
        if os.path.exists(path):
            if not os.path.isfile(path):
                raise InputError(f"{path} is not a regular file: name another output")
            if not overwrite:
                raise InputError(f"{path} exists: name another output, or add --overwrite")
    files: dict[Path, OutputFile] = {}
    try:
        for path in paths:
            files[path] = OutputFile(path)
        yield files
        for file in files.values():
            file.finish()
        for file in files.values():
            file.publish()
    except BaseException:
        for file in files.values():
            file.discard()
        raise


class OutputFile:
    """A file under its `.part` name; `replaced_files` opens and ends it.

    Raises:
        InputError: from every method, if the system refuses.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._part = path, path.with_name(f"{path.name}.part")
        with self._explained():
            self._raw = self._part.open("wb")
        self._file: IO[bytes] | gzip.GzipFile = self._raw
        if path.suffix == ".gz":
            # Without name and time: the same data give the same bytes.
            self._file = gzip.GzipFile("", "wb", compresslevel=1, fileobj=self._raw, mtime=0)

    def write(self, data: bytes) -> None:
        """Append `data`."""
        with self._explained():
            self._file.write(data)

    def finish(self) -> None:
        """Write what is still buffered."""
        with self._explained():
            self._file.close()
            self._raw.close()

    def publish(self) -> None:
        """Give the finished file its name."""
        with self._explained():
            publish(self._part, self._path)

    def discard(self) -> None:
        """Remove the `.part` file."""
        for file in (self._file, self._raw):
            with suppress(OSError, ValueError):  # what is still buffered may have no room either
                file.close()
        self._part.unlink(missing_ok=True)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(f"cannot write {self._path}: {error.strerror or error}") from error
