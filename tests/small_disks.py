"""File systems that are too small or read-only, for real."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


def mounted(folder: Path, *options: str) -> Iterator[Path]:
    """A small file system of its own, or a skip that says why."""
    folder.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs root, to mount a small file system")
    line = ["mount", "-t", "tmpfs", "-o", ",".join(options), "none", str(folder)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        gc.collect()  # a store that a traceback keeps alive holds what it found
        subprocess.run(["umount", str(folder)], check=True)
