"""Finished stages kept by content, and writes that are whole or absent.

A stage's result is found again by a key over everything that shaped it, never because a file is
there. What is half-written lives in a scratch folder whose lock its process holds; when the process
dies the lock is free, and the next writer clears the folder away.

Layout: ``<root>/<key>/index.json`` names every file of ``<root>/<key>/files/`` with its digest.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import platformdirs

from cswap_deploy.errors import ArtifactError
from cswap_deploy.records.files import (
    compare_files,
    disk_errors,
    flush,
    list_files,
    scratch_folder,
    sync,
)
from cswap_deploy.records.value import (
    FileRef,
    Value,
    canonical_json,
    read_value,
    sha256_text,
)

STORE_VARIABLE = "CSWAP_STORE"


class StoreIndex(Value):
    """What a finished entry holds."""

    schema_version: Literal[1] = 1
    key: str
    files: tuple[FileRef, ...]


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
        self.damaged: list[str] = []
        """One sentence for each entry that was found damaged and set aside; for the manifest."""

    def find(self, key: str) -> Path | None:
        """The folder with the finished files of ``key``, every digest verified.

        A damaged entry is never returned: it is removed, a sentence is added to ``damaged``, and
        the answer is None, so that the stage runs again.

        Raises:
            UsageError: The store cannot be read, or a damaged entry cannot be removed.
        """
        entry = self.root / key
        with disk_errors(self.root, option="--store"):
            if not entry.is_dir():
                return None
            wrong = _fault(entry, key)
            if wrong is None:
                return entry / "files"
            self.damaged.append(f"store entry {key[:12]} was damaged and is made again: {wrong}")
            self._discard(entry)
            return None

    @contextmanager
    def create(self, key: str, *, replace: bool = False) -> Iterator[Path]:
        """Lend an empty folder to fill; it becomes the entry of ``key`` when the block ends well.

        When the block raises (Ctrl-C too) nothing is left. When another process finished the same
        key first, its entry stays and this one is dropped, unless it is to ``replace`` what is
        there; what is there stays until then. Ask ``find`` for the finished folder.

        Raises:
            UsageError: The store cannot be written.
            MissingDependencyError: The disk is full.
        """
        with scratch_folder(self.root, prefix=".partial-", option="--store") as scratch:
            entry = scratch / "entry"
            files = entry / "files"
            files.mkdir(parents=True)
            yield files
            index = StoreIndex(key=key, files=list_files(files))
            (entry / "index.json").write_text(index.canonical_json())
            flush(entry)
            self._publish(entry, key, replace=replace)

    def remove(self, key: str) -> None:
        """Drop an entry, where there is one."""
        if (self.root / key).is_dir():
            self._discard(self.root / key)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Lend an empty folder that is gone afterwards."""
        with scratch_folder(self.root, prefix=".partial-", option="--store") as folder:
            inner = folder / "work"
            inner.mkdir()
            yield inner

    def _publish(self, entry: Path, key: str, *, replace: bool) -> None:
        final = self.root / key
        try:
            os.rename(entry, final)
        except OSError as err:
            if err.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if not replace and _fault(final, key) is None:
                return
            self._discard(final)
            os.rename(entry, final)
        sync(self.root)

    def _discard(self, entry: Path) -> None:
        """Take an entry out of sight in one step, then delete it."""
        with (
            scratch_folder(self.root, prefix=".partial-", option="--store") as scratch,
            suppress(FileNotFoundError),
        ):
            os.rename(entry, scratch / "damaged")


def _fault(entry: Path, key: str) -> str | None:
    """What is wrong with a finished entry, or None."""
    try:
        index = read_value(entry / "index.json", StoreIndex)
    except ArtifactError as err:
        return str(err).splitlines()[0]
    if index.key != key:
        return f"its index is of {index.key[:12]}"
    wrong, extra = compare_files(entry / "files", index.files)
    wrong += [f"{path} was not there when it was made" for path in extra]
    return "; ".join(wrong) or None
