"""Files that are either whole or not there, also after a crash or a power cut."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from preprocessing.errors import InputError

_READ_BYTES = 4 * 2**20
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SYNC_THREADS = 8


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(data)
        publish(temporary, path)
    except OSError as error:  # a full disk says nothing of the file
        error.filename = error.filename or str(path)
        raise


def publish(temporary: Path, path: Path) -> None:
    """Give a finished file its name, once its bytes are on the disk."""
    publish_all([(temporary, path)])


def publish_all(files: Sequence[tuple[Path, Path]]) -> None:
    """Give finished files of one directory their names: `(temporary, path)` of each."""
    temporaries = [temporary for temporary, _ in files]
    if len(files) > 1:  # file systems sync many files in hardly more time than one
        with ThreadPoolExecutor(_SYNC_THREADS) as threads:
            list(threads.map(sync, temporaries))
    else:
        sync(temporaries[0])
    for temporary, path in files:
        temporary.replace(path)
    sync(files[0][1].parent)


def sync(path: Path) -> None:
    """Put a file's bytes, or the names that were given in a directory, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_checked(path: Path, value: Any) -> None:
    """Write JSON in a way that `read_checked` notices any change of it."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    write_whole(path, f"{xxhash.xxh3_128_hexdigest(text.encode())}\n{text}\n".encode())


def read_checked(path: Path) -> Any:
    """Read what `write_checked` wrote.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is not what was written.
    """
    digest, _, text = path.read_bytes().partition(b"\n")
    if xxhash.xxh3_128_hexdigest(text[:-1]).encode() != digest or not text.endswith(b"\n"):
        raise ValueError("its bytes do not have the hash that was written with them")
    return json.loads(text)


@contextmanager
def explaining_no_room(directory: Path) -> Iterator[None]:
    """Turn an error for lack of room, while a job writes in `directory`, into a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise InputError(
            f"{error.filename or directory}: {os.strerror(error.errno)} "
            f"({socket.gethostname()}): make room and run the same command again, it goes on "
            "where it stopped"
        ) from error


def hash_file(path: Path) -> tuple[int, str]:
    """Return a file's size and the xxh3-128 (hex) of its bytes."""
    hasher, size = xxhash.xxh3_128(), 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_READ_BYTES):
            hasher.update(block)
            size += len(block)
    return size, hasher.hexdigest()


def write_all(descriptor: int, buffers: Sequence[bytes | memoryview]) -> None:
    """Write buffers, at most 1,024, one after the other."""
    data = [memoryview(buffer).cast("B") for buffer in buffers if len(buffer)]
    left = sum(map(len, data)) - os.writev(descriptor, data)
    if left:  # a full disk, a signal, or more than 2 GiB
        rest = memoryview(b"".join(data))[-left:]
        while len(rest):
            rest = rest[os.write(descriptor, rest) :]


class Background:
    """Does one thing after another beside its caller: what waits for a disk, mostly."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._tasks: list[Future[None]] = []

    def submit(self, task: Callable[[], None]) -> None:
        """Have a task done; raise what an earlier one raised."""
        self._tasks = [earlier for earlier in self._tasks if not _is_done(earlier)]
        self._tasks.append(self._thread.submit(task))

    def wait(self) -> None:
        """Return when all tasks are done; raise what one of them raised."""
        for task in self._tasks:
            task.result()
        self._tasks = []

    def close(self) -> None:
        """Let the task at work end and give up the others."""
        self._thread.shutdown(cancel_futures=True)


def _is_done(task: Future[None]) -> bool:
    if task.done():
        task.result()
        return True
    return False


class HashingFile:
    """A file that counts and hashes what is written to it; a sink for Arrow."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb")
        self._hash = xxhash.xxh3_128()
        self.bytes = 0

    def write(self, data: bytes | memoryview) -> int:
        """Write all of `data`."""
        view = memoryview(data)
        self._hash.update(view)
        self._file.write(view)
        self.bytes += view.nbytes
        return view.nbytes

    def hexdigest(self) -> str:
        """Return the xxh3-128 of everything written."""
        return self._hash.hexdigest()

    @property
    def closed(self) -> bool:
        """Whether it is closed."""
        return self._file.closed

    def flush(self) -> None:
        """Hand everything to the operating system."""
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
