"""Files that anyone may have written: opened only where they are files, read no further than said.

A sealed document is a JSON object whose ``seal`` is the sha256 of its own bytes, with zeros where
the seal's 64 digits stand.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from cswap_deploy.errors import ArtifactError, lacking

UNSEALED = "5ea1" * 16
"""Where the seal of a document goes, before it is known."""
MOST_BYTES = 256 << 20
"""Of a JSON document."""
_BLANK = b"0" * 64
_MOST_DEPTH = 64
_MOST_DIGITS = 19
"""Of an integer: no count here needs more, and Python takes minutes for a million."""
_AGAIN = "copy the bundle again, or build it again"


@contextmanager
def regular_file(path: Path, *, within: Path | None = None) -> Iterator[BufferedReader]:
    """Open a file for reading; a pipe, a device or a folder is refused and never waited for.

    Args:
        path: Of the file.
        within: The folder that it may not leave, by a link neither.

    Raises:
        OSError: It is not there.
        ArtifactError: It is no regular file, or leads out of the folder.
        MissingDependencyError: It may not be read, or this machine lacks what that takes.
    """
    try:
        with _opened(path, within) as file:
            yield file
    except OSError as err:
        if (told := lacking(err)) is not None:  # the file itself may be sound
            raise told from err
        raise


def _opened(path: Path, within: Path | None) -> BufferedReader:
    try:
        real = os.path.realpath(path)
        if within is not None and not Path(real).is_relative_to(os.path.realpath(within)):
            raise ArtifactError(f"{path} leads out of {within}", fix=_AGAIN)
        if not stat.S_ISREG(os.stat(real).st_mode):
            raise _no_file(path)
        wanted = ("O_NONBLOCK", "O_NOFOLLOW", "O_CLOEXEC", "O_BINARY")
        flags = sum(getattr(os, name, 0) for name in wanted)
        handle = os.open(real, os.O_RDONLY | flags)
    except ValueError as err:  # a NUL in a name
        raise ArtifactError(f"{str(path)!r} is no name of a file") from err
    if not stat.S_ISREG(os.fstat(handle).st_mode):  # changed since
        os.close(handle)
        raise _no_file(path)
    return os.fdopen(handle, "rb")


def read_regular(path: Path, *, within: Path | None = None, most: int = MOST_BYTES) -> bytes:
    """The content of a file of at most so many bytes.

    Raises:
        OSError, ArtifactError, MissingDependencyError: As :func:`regular_file`; or it is larger.
    """
    with regular_file(path, within=within) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ArtifactError(f"{path} has more than {most:,} bytes", fix=_AGAIN)
    return content


def parse(content: bytes) -> Any:
    """JSON in UTF-8, as RFC 8259 has it, each key once, numbers finite, nested no deeper than 64.

    Raises:
        ValueError: It is something else; says what.
    """
    try:
        value = json.loads(
            content.decode(), object_pairs_hook=_once, parse_constant=_refused, parse_int=_integer,
            parse_float=_finite,
        )  # fmt: skip
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [value]
    for _ in range(_MOST_DEPTH):
        inner: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                inner += (*each, *each.values())
            elif isinstance(each, list):
                inner += each
            elif isinstance(each, str) and "\0" in each:
                raise ValueError(f"a text has a NUL: {each[:60]!r}")
            elif isinstance(each, str):
                each.encode()  # half a character is none
        if not inner:
            return value
        level = inner
    raise ValueError("it is nested too deeply")


def parse_sealed(content: bytes, *, since: int) -> tuple[dict[str, Any], bool]:
    """A document that has a seal from a schema version on; and whether this one has.

    Raises:
        ValueError: It is no such document, or not as it was when it was sealed.
    """
    told = parse(content)
    if not isinstance(told, dict):
        raise ValueError("an object is wanted")
    version, seal = told.get("schema_version"), told.get("seal")
    if not isinstance(version, int) or isinstance(version, bool):
        raise ValueError(f"schema_version is {version!r:.60}")
    if "seal" in told and (not isinstance(seal, str) or seal != _seal_of(content, seal)):
        raise ValueError("it was changed: its seal is not that of its content")
    if ("seal" in told) != (version >= since):
        has = "a seal" if "seal" in told else "no seal"
        raise ValueError(f"it was changed: it has {has} in schema version {version}")
    return told, "seal" in told


def sealed(text: str) -> bytes:
    """A document as it is written: its seal stands where ``text`` has :data:`UNSEALED`."""
    if text.count(UNSEALED) != 1:
        raise ValueError("a document has one seal")
    return text.replace(UNSEALED, _digest(text.encode(), UNSEALED)).encode()


def _seal_of(content: bytes, seal: str) -> str | None:
    """What the seal of a document is; ``None`` where it does not have it once."""
    once = re.fullmatch("[0-9a-f]{64}", seal) and content.count(seal.encode()) == 1
    return _digest(content, seal) if once else None


def _digest(content: bytes, seal: str) -> str:
    return hashlib.sha256(content.replace(seal.encode(), _BLANK)).hexdigest()


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} stands twice in an object")
    return found


def _refused(constant: str) -> Any:
    raise ValueError(f"{constant} is no number of JSON")


def _integer(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"an integer of {len(text)} characters")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large a number")
    return value


def _no_file(path: Path) -> ArtifactError:
    return ArtifactError(f"{path} is no regular file", fix=_AGAIN)
