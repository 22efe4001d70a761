"""Writes that are whole or absent, and files held against their digests.

What is half-written lives in a scratch folder whose lock its process holds; when the process
dies the lock is free, and the next writer clears the folder away.
"""

from __future__ import annotations

import atexit
import errno
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from cswap_deploy.errors import (
    ArtifactError,
    CswapError,
    MissingDependencyError,
    UsageError,
    first_line,
)
from cswap_deploy.records.value import FileRef, sha256_file
from cswap_deploy.runtime.documents import regular_file

_FULL = {errno.ENOSPC, errno.EDQUOT}

_UNWRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM, errno.EBUSY}

_NO_FOLDER = {errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG}

_LOCK = "lock"

_GONE = (FileNotFoundError, FileExistsError)
"""What making a lock says when another process clears its folder away at that moment: a lock makes
its folder where there is none, and "exists" is the answer when the folder goes right after."""

_OURS = ("manifest.json", "build.json", "sweep.json", "kit.json")
"""A folder with one of these was made by a build or a sweep and may be replaced by one."""

_YOUNG_SECONDS = 60.0
"""A scratch folder without a lock file may belong to a process that is about to make it."""

_IN_USE: set[Path] = set()
"""This process's scratch folders."""


def list_files(folder: Path) -> tuple[FileRef, ...]:
    """Every file below ``folder`` with digest and size (bytes), ordered by relative path."""
    return tuple(
        FileRef(
            path=path.relative_to(folder).as_posix(),
            sha256=sha256_file(path),
            size_bytes=path.stat().st_size,
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    )


def compare_files(folder: Path, expected: tuple[FileRef, ...]) -> tuple[list[str], list[str]]:
    """Hold the files below ``folder`` against a list of them.

    Returns:
        Sentences on files that are missing or differ, and the paths of files not in the list.
    """
    wrong = [f"{path} {words}" for path, words in differences(folder, expected).items()]
    known = {ref.path for ref in expected}
    present = (p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file())
    return wrong, [path for path in present if path not in known]


def differences(folder: Path, expected: tuple[FileRef, ...]) -> dict[str, str]:
    """Path -> what is wrong with a file that is missing, is none, or differs."""
    return {ref.path: words for ref in expected if (words := _difference(folder, ref))}


def _difference(folder: Path, ref: FileRef) -> str:
    """How a file differs from what is said of it; nothing where it does not."""
    try:
        with regular_file(folder / ref.path, within=folder) as file:
            if (size := os.fstat(file.fileno()).st_size) != ref.size_bytes:
                return f"has {size:,} bytes instead of {ref.size_bytes:,}"
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    except OSError as err:
        return f"cannot be read: {err.strerror or err}"
    except ArtifactError as err:
        return first_line(err).removeprefix(f"{folder / ref.path} ")
    same = digest == ref.sha256
    return "" if same else f"has sha256 {digest[:12]}… instead of {ref.sha256[:12]}…"


def require_files(folder: Path, expected: tuple[FileRef, ...], *, fix: str) -> tuple[str, ...]:
    """Hold a folder's files against a list of them.

    Returns:
        The paths of files that are not in the list.

    Raises:
        ArtifactError: A file is missing or differs; every one is named.
    """
    wrong, extra = compare_files(folder, expected)
    if wrong:
        raise ArtifactError(f"{folder} is damaged: " + "; ".join(wrong), fix=fix)
    return tuple(extra)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Lend an empty folder beside ``target`` and move it there when the block ends well.

    A bundle that is already there is replaced by two renames (after a kill between them, the next
    call puts the old one back); anything else that is there is kept and refused. When the block
    raises (Ctrl-C too) nothing of the new folder is left.

    Args:
        target: Where the folder goes; its parents are made.

    Raises:
        UsageError: ``target`` is a file, holds something other than a bundle, is a mount point, or
            cannot be written.
        MissingDependencyError: The disk is full.
    """
    target = target.resolve()
    _refuse_foreign(target)
    prefix = f".{target.name}.partial-"
    with scratch_folder(target.parent, prefix=prefix, option="-o", restore=target) as scratch:
        new = scratch / "new"
        new.mkdir()
        yield new
        flush(new)
        _refuse_foreign(target)
        _swap(new, target, old=scratch / "old")


def check_output(target: Path) -> None:
    """Fail now rather than after minutes of work if ``atomic_folder(target)`` would not work.

    Raises:
        UsageError: As ``atomic_folder``.
    """
    target = target.resolve()
    _refuse_foreign(target)
    made = [p for p in target.parents if not p.exists()]
    prefix = f".{target.name}.partial-"
    with scratch_folder(target.parent, prefix=prefix, option="-o", restore=target):
        pass
    _remove_empty(made)


def write_atomic(path: Path, data: bytes, *, option: str = "-o") -> None:
    """Write a file so that a reader sees all of it or what was there before.

    Args:
        path: Of the file.
        data: Its content.
        option: What names another folder.

    Raises:
        UsageError: The folder cannot be written.
        MissingDependencyError: The disk is full.
    """
    with scratch_folder(path.parent, prefix=f".{path.name}.partial-", option=option) as scratch:
        new = scratch / "new"
        new.write_bytes(data)
        sync(new)
        os.replace(new, path)
        sync(path.parent)


@contextmanager
def scratch_folder(
    parent: Path, *, prefix: str, option: str, restore: Path | None = None
) -> Iterator[Path]:
    """Lend a locked folder in ``parent``; it is gone afterwards, and so are parents made for it."""
    made = [p for p in (parent, *parent.parents) if not p.exists()]
    # Named before it is made, so that a signal between the two leaves nothing.
    scratch = parent / f"{prefix}{os.getpid()}-{secrets.token_hex(4)}"
    lock = FileLock(scratch / _LOCK, timeout=0)
    _IN_USE.add(scratch)
    done = False
    try:
        with disk_errors(parent, option=option):
            parent.mkdir(parents=True, exist_ok=True)
            clear_stale(parent, prefix=prefix, restore=restore)
            _make_locked(scratch, lock)
        with disk_errors(parent, option=option, within=scratch):
            yield scratch
        done = True
    finally:
        remove_tree(scratch)
        lock.release()
        _IN_USE.discard(scratch)
        if not done:
            _remove_empty(made)


def _make_locked(folder: Path, lock: FileLock) -> None:
    """Make a scratch folder and hold its lock."""
    while True:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock.acquire()
        except (Timeout, *_GONE):
            continue  # another process took it for stale between the two steps
        if (folder / _LOCK).exists():
            return
        lock.release()


def remove_tree(folder: Path) -> None:
    """Delete a folder, where there is one, write-protected folders in it too."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.is_dir():
        for path in (folder, *folder.rglob("*")):
            if path.is_dir() and not path.is_symlink():
                with suppress(OSError):
                    path.chmod(0o700)
        shutil.rmtree(folder, ignore_errors=True)


def _remove_own() -> None:
    """At the end of a process that was interrupted while it was clearing up."""
    for folder in _IN_USE:
        if f"-{os.getpid()}-" in folder.name:  # not those of the process that this one forked from
            remove_tree(folder)


atexit.register(_remove_own)


def clear_stale(parent: Path, *, prefix: str, restore: Path | None = None) -> None:
    """Remove scratch folders whose process is gone.

    Args:
        parent: Where they are.
        prefix: Of their names.
        restore: Where a bundle goes back that was moved aside when the process was killed.
    """
    for folder in parent.glob(f"{_escape(prefix)}*"):
        with suppress(*_GONE):
            if not (folder / _LOCK).exists():
                young = time.time() - folder.stat().st_mtime < _YOUNG_SECONDS
                if not young or _is_dead(folder.name.removeprefix(prefix).partition("-")[0]):
                    remove_tree(folder)
                continue
            lock = FileLock(folder / _LOCK, timeout=0)
            try:
                lock.acquire()
            except Timeout:
                continue
            try:
                if restore is not None and (folder / "old").is_dir() and not restore.exists():
                    os.rename(folder / "old", restore)  # killed between the two moves of a swap
                remove_tree(folder)
            finally:
                lock.release()


def _is_dead(process: str) -> bool:
    """Whether a scratch folder's name tells of a process that is no more."""
    if not process.isdigit():
        return False
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass
    return False


def _escape(text: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)


def _swap(new: Path, target: Path, *, old: Path) -> None:
    """Put ``new`` where ``target`` is; what was there goes to ``old``."""
    replaced = target.exists()
    if replaced:
        os.rename(target, old)
    try:
        os.rename(new, target)
    except BaseException as err:
        if isinstance(err, OSError) and err.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise UsageError(
                f"another process wrote {target} at the same moment; its folder is kept",
                fix="run the command again; finished stages are reused",
            ) from err
        if replaced:
            os.rename(old, target)
        raise
    sync(target.parent)


def _refuse_foreign(target: Path) -> None:
    if target.is_dir():
        if os.path.ismount(target):
            raise UsageError(
                f"{target} is a mount point; a bundle is moved into place as one folder",
                fix=f"-o {target / 'bundle'}",
            )
        if not os.access(target, os.R_OK | os.W_OK | os.X_OK):
            raise MissingDependencyError(
                f"{target} may not be replaced: it has mode {target.stat().st_mode & 0o777:o}",
                fix=f"chmod u+rwx {target}, or choose another folder with -o",
            )
        with disk_errors(target, option="-o"):
            foreign = any(target.iterdir()) and not any((target / name).is_file() for name in _OURS)
        if foreign:
            raise UsageError(
                f"{target} is not empty and is not a bundle (it has no manifest.json); "
                "it is left as it is",
                fix="choose another folder with -o",
            )
    elif target.exists():
        raise UsageError(f"{target} is a file; a bundle is a folder", fix="choose another -o")


@contextmanager
def disk_errors(path: Path, *, option: str, within: Path | None = None) -> Iterator[None]:
    """Turn a full or unwritable disk into an error that says what to do.

    Args:
        path: The folder that was asked for.
        option: The flag that names another one.
        within: Where set, only trouble with files below it counts as unwritable: the code that runs
            in it may read elsewhere.
    """
    try:
        yield
    except CswapError:
        raise
    except Exception as err:
        number = err.errno if isinstance(err, OSError) else None
        # safetensors and other libraries wrap the system's error in their own, as text
        if number in _FULL or "No space left on device" in str(err):
            raise _full(path, within, option, err) from err
        if isinstance(err, OSError) and _unusable(err, within):
            raise UsageError(
                f"cannot use {path}: {err.strerror}",
                fix=f"choose a folder that you may write, with {option}",
            ) from err
        raise


def _unusable(err: OSError, within: Path | None) -> bool:
    if within is None:
        return err.errno in _UNWRITABLE | _NO_FOLDER
    named = isinstance(err.filename, str) and Path(err.filename).is_relative_to(within)
    return named and err.errno in _UNWRITABLE


def _full(path: Path, within: Path | None, option: str, err: Exception) -> MissingDependencyError:
    while not path.exists():
        path = path.parent
    free = shutil.disk_usage(path).free
    written = 0
    if within is not None:
        written = sum(p.stat().st_size for p in within.rglob("*") if p.is_file())
    words = os.strerror(err.errno) if isinstance(err, OSError) and err.errno else str(err)
    return MissingDependencyError(
        f"the disk that holds {path} is full: more than {written:,} bytes are needed there and "
        f"{free:,} more are free ({words})",
        fix=f"free some space, or choose a folder on another disk with {option}",
    )


def flush(folder: Path) -> None:
    """Bring every file and folder below to the disk, so that a power cut cannot empty them."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def sync(path: Path) -> None:
    """Bring one file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()
