"""Folders that processes read, and when one of them may go.

A reader holds a shared lock on the folder itself, so nothing is written for it: it ends with the
process, however that ends. Where a file system knows no such locks, nobody holds anything.
"""

from __future__ import annotations

import fcntl
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class Holder:
    """What one reader holds, until it lets go or is forgotten."""

    def __init__(self) -> None:
        self._handles: dict[Path, int] = {}
        weakref.finalize(self, _close, self._handles)

    def take(self, folder: Path) -> bool:
        """Hold a folder; false where it is not there (any more)."""
        if folder in self._handles and _is(folder, self._handles[folder]):
            return True
        self.drop(folder)
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except (FileNotFoundError, NotADirectoryError):
            return False
        self._handles[folder] = handle
        _lock(handle, fcntl.LOCK_SH)
        if _is(folder, handle):
            return True
        self.drop(folder)  # it was taken away while this one waited
        return False

    def drop(self, folder: Path) -> None:
        """Let go of a folder and of those in it."""
        for each in [f for f in self._handles if f.is_relative_to(folder)]:
            os.close(self._handles.pop(each))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One at a time, among all who ask for the same folder; waits."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def is_held(folder: Path) -> bool:
    """Whether someone, this process too, reads a folder."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        _lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def _lock(handle: int, how: int) -> None:
    try:
        fcntl.flock(handle, how)
    except BlockingIOError:
        raise
    except OSError:  # some network file systems have none for folders
        pass


def _is(folder: Path, handle: int) -> bool:
    """Whether a path is still the folder that was opened."""
    with suppress(FileNotFoundError, NotADirectoryError):
        return os.path.samestat(folder.stat(), os.fstat(handle))
    return False


def _close(handles: dict[Path, int]) -> None:
    while handles:
        os.close(handles.popitem()[1])
