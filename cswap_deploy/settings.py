"""How a setting is declared: a field of a section, with the flag that shows it."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, get_args

from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    ValidationError,
    WrapValidator,
    field_validator,
    model_validator,
)

from cswap_deploy.errors import UsageError, first_line

MOST_TEXT_BYTES = 1 << 20
"""Of a file that people write; what is longer is something else."""
_LONGEST_NAME = 255
"""Bytes of a file's name, on Linux."""
_DEEPEST = 8
"""Tables and lists within each other in a TOML file; settings and budgets need three."""
_BITS = 63
"""Of an integer, in TOML and in the libraries that are given one."""


@dataclass(frozen=True, slots=True)
class Flag:
    """How the command shows a setting, and whether the setting shapes the stage's result."""

    help: str
    metavar: str = ""
    """What the help shows for the value; from the type unless given."""
    short: str = ""
    off: str = ""
    """The flag that says no, where ``--no-NAME`` would read badly."""
    common: bool = False
    """Among the few that most people use: first in ``--help``."""
    expert: bool = False
    """In TOML files and Python only; the command has no flag for it."""
    in_key: bool = True
    """Whether another value may give another result, so that it belongs to the store's key."""
    local: bool = False
    """Names code or a file of this machine: never taken from a folder, which may be anyone's."""


def _size(value: Any, read: Any) -> Any:
    try:
        return read(value)
    except ValidationError as err:
        raise ValueError("is no amount of memory; write 512MiB, 2GiB or bytes") from err


Memory = Annotated[ByteSize, WrapValidator(_size)]
"""Bytes, or a text with a unit."""


class BatchRange(BaseModel):
    """Smallest, tuned-for and largest batch (samples); as text ``1:8:64``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min: int = 1
    opt: int = 1
    max: Annotated[int, Field(le=1 << 20)] = 16

    @model_validator(mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        parts = value.split(":")
        if len(parts) != 3 or not all(part.isdigit() for part in parts):
            raise ValueError("MIN:OPT:MAX is wanted, for example 1:8:64")
        return dict(zip(("min", "opt", "max"), map(int, parts), strict=True))

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if not 1 <= self.min <= self.opt <= self.max:
            raise ValueError(f"batches must ascend from 1: {self}")
        return self

    def __str__(self) -> str:
        return f"{self.min}:{self.opt}:{self.max}"


class Section(BaseModel):
    """The settings of one stage."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    title: ClassVar[str]
    """Heading of its flags in ``--help``."""

    def key(self) -> dict[str, Any]:
        """The settings that shape the stage's result, as plain data for its key in the store."""
        free = {name for name in type(self).model_fields if not flag_of(type(self), name).in_key}
        return self.model_dump(mode="json", exclude=free)

    @field_validator("*", mode="before")
    @classmethod
    def _list(cls, value: Any, info: Any) -> Any:
        """Flags give several numbers as one text, ``3,224,224``."""
        kind = cls.model_fields[info.field_name].annotation
        if not isinstance(value, str) or not _is_numbers(kind):
            return value
        parts = [part.strip() for part in value.split(",")]
        if not all(re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", p, re.I) for p in parts):
            example = "3,224,224" if "int" in str(kind) else "0.485,0.456,0.406"
            raise ValueError(f"numbers with commas between them are wanted, for example {example}")
        return parts

    @field_validator("*", mode="after")
    @classmethod
    def _usable(cls, value: Any) -> Any:
        """No setting is more than a library's integer holds, or a path that no system takes."""
        for each in value if isinstance(value, tuple) else (value,):
            if problem := _unusable(each):
                raise ValueError(problem)
            if isinstance(each, Path):
                check_path(each)
        return value


def read_text(file: Path, encoding: str = "utf-8") -> str:
    """A text that a person wrote.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no text, too long, or its path is none.
    """
    with file.open("rb") as opened:
        content = opened.read(MOST_TEXT_BYTES + 1)
    if len(content) > MOST_TEXT_BYTES:
        raise ValueError(f"it is longer than {MOST_TEXT_BYTES:,} bytes")
    return content.decode(encoding)


def read_toml(file: Path, what: str = "configuration") -> dict[str, Any]:
    """A TOML file as plain data.

    Raises:
        UsageError: It cannot be read, or holds what is no setting; ``what`` it is, for the message.
    """
    try:
        found = tomllib.loads(read_text(file))
        for value in _values(found):
            if problem := _unusable(value):
                raise ValueError(f"a value {problem}")
    except (OSError, ValueError, RecursionError) as err:
        nested = isinstance(err, RecursionError)
        words = f"it is nested over {_DEEPEST} deep" if nested else first_line(err)
        raise UsageError(f"cannot read the {what} {shown(file)}: {words}") from err
    return found


def check_path(path: str | Path) -> None:
    """Refuse, with a ``ValueError``, what no file can be called."""
    parts = [part for part in str(path).split("/") if len(os.fsencode(part)) > _LONGEST_NAME]
    if parts:
        raise ValueError(
            f"{shown(parts[0])} is a name of {len(os.fsencode(parts[0]))} bytes; file systems take "
            f"{_LONGEST_NAME}"
        )


def shown(value: object, form: Callable[[object], str] = str, *, most: int = 100) -> str:
    """A value for a message, cut short where it is long."""
    try:
        text = form(value)
    except ValueError:  # of thousands of digits
        text = "a number of thousands of digits"
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def _values(data: Any) -> Iterator[Any]:
    """Everything in nested tables and lists, names too."""
    level = [data]
    for _ in range(_DEEPEST):
        below: list[Any] = []
        for each in level:
            inside = [*each, *each.values()] if isinstance(each, dict) else each
            yield from (value for value in inside if not isinstance(value, dict | list))
            below += [value for value in inside if isinstance(value, dict | list)]
        level = below
    if level:
        raise RecursionError


def _unusable(value: Any) -> str:
    """Why a value is no setting; empty where it may be one."""
    if isinstance(value, int) and value.bit_length() > _BITS:
        return f"is an integer of {value.bit_length()} bits; {_BITS} are the most"
    if isinstance(value, str | Path) and "\0" in str(value):
        return "holds a NUL, which is no text"
    return ""


def flag_of(section: type[Section], field: str) -> Flag:
    """How the command shows a setting."""
    (found,) = (m for m in section.model_fields[field].metadata if isinstance(m, Flag))
    return found


def _is_numbers(annotation: Any) -> bool:
    """Whether a setting is several numbers, or none."""
    kinds = [annotation, *get_args(annotation)]
    return any(
        set(get_args(kind)) - {Ellipsis} <= {int, float} and get_args(kind) for kind in kinds
    )
