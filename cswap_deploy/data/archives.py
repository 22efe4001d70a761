"""Arrays of an ``.npz`` file that somebody else wrote: nothing is believed before it is checked."""

from __future__ import annotations

import lzma
import math
import struct
import sys
import tokenize
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from cswap_deploy.data.memory import free_memory
from cswap_deploy.errors import UsageError, first_line

_DAMAGED = (
    OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error,
    RuntimeError, TypeError, AttributeError, LookupError, ArithmeticError, SyntaxError,
    tokenize.TokenError, MemoryError,
)  # fmt: skip
"""What ``zipfile`` and NumPy raise on damaged, encrypted and strange archives."""


def read_arrays(
    path: Path,
    needed: Sequence[str] = (),
    wanted: Sequence[str] | None = None,
    *,
    fix: str | None = None,
) -> Mapping[str, NDArray[Any]]:
    """Arrays of an ``.npz`` file by name; nothing is unpickled.

    Args:
        path: The file.
        needed: Arrays that must be there.
        wanted: Those that may be; all unless given.
        fix: For a file that is no such archive.

    Raises:
        UsageError: It is none, damaged or encrypted, lacks an array, or an array says that it is
            larger than its file, or is larger than the memory that is free.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {each.filename.removesuffix(".npy"): each for each in archive.infolist()}
            if absent := [key for key in needed if key not in entries]:
                raise UsageError(
                    f"{path} has no array {' and no array '.join(map(repr, absent))}; it has "
                    f"{', '.join(entries) or 'nothing'}",
                    fix=fix,
                )
            kept = set(entries) if wanted is None else {*needed, *wanted}
            found = {name: entry for name, entry in entries.items() if name in kept}
            size = sum(_size(archive, entry) for entry in found.values())
            if size > (free := free_memory()):
                raise UsageError(
                    f"{path}: the arrays {', '.join(found)} take {size / 2**30:,.1f} GiB, "
                    f"{free / 2**30:.1f} GiB of memory are free",
                    fix="save fewer images, or pass them as picture files",
                )
            return {name: _array(archive, entry) for name, entry in found.items()}
    except _DAMAGED as err:
        raise UsageError(f"cannot read {path}: {first_line(err)}", fix=fix) from err


def _size(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> int:
    """Bytes of an array by its header, which must be those of its file."""
    with archive.open(entry) as file:
        version = npy.read_magic(file)
        header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = header(file)
        there = entry.file_size - file.tell()
    size = math.prod(shape) * dtype.itemsize
    if min(shape, default=1) < 0 or (size > there and not dtype.hasobject):
        raise ValueError(
            f"{entry.filename} says that it has shape {shape} and {size:,} bytes; it has {there:,}"
        )
    return size


def _array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> NDArray[Any]:
    with archive.open(entry) as file:
        found: NDArray[Any] = npy.read_array(file, allow_pickle=False)
    if found.dtype.kind == "U":  # NumPy takes any 32 bits for a letter, Python does not
        letters = np.frombuffer(found.tobytes(), np.dtype("u4").newbyteorder(found.dtype.byteorder))
        if letters.max(initial=0) > sys.maxunicode:
            raise ValueError(f"{entry.filename} is no text")
    return found
