"""Files that one process at a time holds: for as long as it lives, the system lets go after."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Held(Exception):
    """Another process holds the lock; the message says which."""


def take_lock(path: Path, *, wait: bool = False) -> int:
    """Lock a file, made if it is not there.

    Args:
        path: the file.
        wait: wait until it is free.

    Returns:
        A descriptor; close it to let go.

    Raises:
        Held: if another process holds it, unless `wait`.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as error:
        holder = os.read(descriptor, 200).decode(errors="replace")
        os.close(descriptor)
        raise Held(holder) from error
    except OSError:
        pass  # a file system without locks: nothing can be known
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    return descriptor


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock, see `take_lock`."""
    descriptor = take_lock(path, wait=wait)
    try:
        yield
    finally:
        os.close(descriptor)
