"""Finished stages kept by content, and writes that are whole or absent.

A stage's result is found again by a key over everything that shaped it, never because a file is
there. What is half-written lives in a scratch folder whose lock its process holds; when the process
dies the lock is free, and the next writer clears the folder away.

Layout: ``<root>/<key>/index.json`` names a folder beside it and every file in it with its digest.
Files never change: what replaces them is another folder, and a reader holds the one it found.
"""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import platformdirs
from pydantic import Field

from cswap_deploy.errors import ArtifactError
from cswap_deploy.records.files import (
    clear_stale,
    compare_files,
    disk_errors,
    flush,
    list_files,
    scratch_folder,
    sync,
)
from cswap_deploy.records.holding import Holder, is_held, locked
from cswap_deploy.records.value import (
    FileRef,
    Value,
    canonical_json,
    read_value,
    sha256_text,
)

STORE_VARIABLE = "CSWAP_STORE"
_INDEX = "index.json"
_SCRATCH = ".partial-"
_KEY = re.compile(r"[0-9a-z]{64}")


class StoreIndex(Value):
    """What a finished entry holds."""

    schema_version: Literal[1] = 1
    key: str
    stage: str = ""
    """What made it; empty where that was not said."""
    folder: Annotated[str, Field(pattern=r"^files(-[0-9a-f]+)?$")] = "files"
    """Where the files are; another folder once they were replaced."""
    files: tuple[FileRef, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry, as it is on the disk."""

    key: str
    stage: str
    """Empty where it is not known."""
    size_bytes: int
    made: float
    """Seconds since 1970, as ``used``."""
    used: float
    """When it was last found by a build."""


def stage_key(
    stage: str,
    *,
    version: int,
    inputs: Mapping[str, Any],
    settings: Mapping[str, Any],
    tools: Mapping[str, str],
) -> str:
    """Name a stage's result by everything that shapes it.

    Args:
        stage: The stage's name.
        version: Raised when the stage's code changes what it writes.
        inputs: Digests of what it reads.
        settings: The settings it obeys; plain data.
        tools: Name -> version of the libraries that affect the output.

    Returns:
        sha256 (hex) of the canonical JSON of the five.
    """
    return sha256_text(
        canonical_json(
            {
                "stage": stage,
                "version": version,
                "inputs": dict(inputs),
                "settings": dict(settings),
                "tools": dict(tools),
            }
        )
    )


class Store:
    """Finished stages on disk. Several processes may share one.

    Args:
        root: Where the entries are; else the folder that ``CSWAP_STORE`` names, else the user's
            cache directory.
    """

    def __init__(self, root: Path | None = None) -> None:
        named = os.environ.get(STORE_VARIABLE)
        default = Path(named) if named else platformdirs.user_cache_path("cswap-deploy")
        self.root = Path(root) if root is not None else default
        self._held = Holder()
        self.damaged: list[str] = []
        """One sentence for each entry that was found damaged and set aside; for the manifest."""

    def find(self, key: str) -> Path | None:
        """The folder with the finished files of ``key``, every digest verified.

        They stay as they are for as long as this object lives, even where another process replaces
        or removes the entry. A damaged entry is never returned: it is removed, a sentence is added
        to ``damaged``, and the answer is None, so that the stage runs again.

        Raises:
            UsageError: The store cannot be read, or a damaged entry cannot be removed.
        """
        entry = self.root / key
        with disk_errors(self.root, option="--store"):
            folder, wrong = self._open(entry)
            if wrong is not None:
                what = f"store entry {key[:12]} was damaged and is made again"
                self.damaged.append(f"{what}: {wrong}")
                self._discard(entry)
            elif folder is not None:
                with suppress(OSError):  # a store that may only be read has no last use
                    os.utime(entry)
            return folder

    @contextmanager
    def create(self, key: str, *, stage: str = "", replace: bool = False) -> Iterator[Path]:
        """Lend an empty folder to fill; it becomes the entry of ``key`` when the block ends well.

        When the block raises (Ctrl-C too) nothing is left. When another process finished the same
        key first, its entry stays and this one is dropped, unless it is to ``replace`` what is
        there; what is there stays until then, and for whoever reads it. Ask ``find`` for the
        finished folder.

        Args:
            key: See :func:`stage_key`.
            stage: Its name, for people.
            replace: Whether what is there is not wanted.

        Raises:
            UsageError: The store cannot be written.
            MissingDependencyError: The disk is full.
        """
        with scratch_folder(self.root, prefix=_SCRATCH, option="--store") as scratch:
            made = scratch / "entry"
            files = made / "files"
            files.mkdir(parents=True)
            yield files
            index = StoreIndex(key=key, stage=stage, files=list_files(files))
            (made / _INDEX).write_text(index.canonical_json())
            flush(made)
            self._publish(made, index, replace=replace)

    def remove(self, key: str) -> bool:
        """Drop an entry, where there is one that no other process reads; whether it is gone."""
        self._held.drop(self.root / key)
        return self._discard(self.root / key)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Lend an empty folder that is gone afterwards."""
        with scratch_folder(self.root, prefix=_SCRATCH, option="--store") as folder:
            inner = folder / "work"
            inner.mkdir()
            yield inner

    def entries(self) -> tuple[Entry, ...]:
        """Every entry, the one that was used last first; nothing is verified.

        Raises:
            UsageError: The store cannot be read.
        """
        found = []
        with disk_errors(self.root, option="--store"):
            for folder in self._folders():
                with suppress(FileNotFoundError):  # removed meanwhile
                    found.append(_describe(folder))
        return tuple(sorted(found, key=lambda entry: -entry.used))

    def prune(self, *, unused_seconds: float) -> tuple[Entry, ...]:
        """Drop the entries that no build found for so long; those that one reads now stay."""
        before = time.time() - unused_seconds
        old = [entry for entry in self.entries() if entry.used <= before]
        return tuple(entry for entry in old if self.remove(entry.key))

    def verify(self) -> dict[str, str]:
        """Hold every entry against its digests.

        Returns:
            Key -> what is wrong, for the damaged ones; they stay.
        """
        found = {}
        with disk_errors(self.root, option="--store"):
            for folder in self._folders():
                wrong = self._open(folder)[1]
                self._held.drop(folder)
                if wrong is not None:
                    found[folder.name] = wrong
        return found

    def clean(self) -> None:
        """Remove what dead processes left half-made, and replaced files that no one reads."""
        if self.root.is_dir():
            with disk_errors(self.root, option="--store"):
                clear_stale(self.root, prefix=_SCRATCH)
                for folder in self._folders():
                    self._clear(folder)

    def _folders(self) -> list[Path]:
        if not self.root.is_dir():
            return []
        return sorted(f for f in self.root.iterdir() if _KEY.fullmatch(f.name) and f.is_dir())

    def _open(self, entry: Path) -> tuple[Path | None, str | None]:
        """Hold an entry's files; their folder where they are sound, else what is wrong.

        Neither where there is no entry.
        """
        tried = ""
        while entry.is_dir():
            try:
                index = read_value(entry / _INDEX, StoreIndex)
            except ArtifactError as err:
                wrong = str(err).splitlines()[0]
            else:
                folder = entry / index.folder
                if not self._held.take(folder) and index.folder != tried:
                    tried = index.folder  # replaced meanwhile: the index names others now
                    continue
                wrong = _fault(folder, index, entry.name)
                if not wrong:
                    return folder, None
            if entry.is_dir():
                return None, wrong
        return None, None

    def _publish(self, made: Path, index: StoreIndex, *, replace: bool) -> None:
        final = self.root / index.key
        with locked(self.root):
            if not final.is_dir():
                os.rename(made, final)
            elif replace or self._open(final)[1] is not None:
                # Beside what is there: one step, the index, makes it count.
                folder = f"files-{secrets.token_hex(4)}"
                index = index.model_copy(update={"folder": folder})
                (made / _INDEX).write_text(index.canonical_json())
                sync(made / _INDEX)
                os.rename(made / "files", final / folder)
                os.replace(made / _INDEX, final / _INDEX)
                sync(final)
            sync(self.root)
        self._clear(final)

    def _clear(self, entry: Path) -> None:
        """Remove an entry's replaced files, where no one reads them."""
        if len(list(entry.glob("files*"))) < 2:
            return
        with (
            scratch_folder(self.root, prefix=_SCRATCH, option="--store") as scratch,
            locked(self.root),
            suppress(ArtifactError),  # a damaged index: nothing says which are the replaced ones
        ):
            named = read_value(entry / _INDEX, StoreIndex).folder
            for folder in entry.glob("files*"):
                if folder.name != named and not is_held(folder):
                    os.rename(folder, scratch / folder.name)

    def _discard(self, entry: Path) -> bool:
        """Take an entry out of sight in one step, then delete it, unless someone reads it."""
        if not entry.is_dir():
            return True
        self._held.drop(entry)
        with (
            scratch_folder(self.root, prefix=_SCRATCH, option="--store") as scratch,
            locked(self.root),
        ):
            if any(is_held(folder) for folder in entry.glob("files*")):
                return False
            with suppress(FileNotFoundError):
                os.rename(entry, scratch / "removed")
        return True


def _describe(folder: Path) -> Entry:
    try:
        stage = read_value(folder / _INDEX, StoreIndex).stage
    except ArtifactError:
        stage = ""  # `verify` says what is wrong
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    used = folder.stat().st_mtime
    index = folder / _INDEX
    made = index.stat().st_mtime if index.is_file() else used
    return Entry(folder.name, stage, sum(sizes), made, max(used, made))


def _fault(files: Path, index: StoreIndex, key: str) -> str:
    """What is wrong with a finished entry's files; empty where nothing is."""
    if index.key != key:
        return f"its index is of {index.key[:12]}"
    wrong, extra = compare_files(files, index.files)
    wrong += [f"{path} was not there when it was made" for path in extra]
    return "; ".join(wrong)
