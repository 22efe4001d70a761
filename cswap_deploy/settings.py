"""How a setting is declared: a field of a section, with the flag that shows it."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, get_args

from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    ValidationError,
    WrapValidator,
    field_validator,
    model_validator,
)

from cswap_deploy.errors import UsageError


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
    max: int = 16

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

    model_config = ConfigDict(extra="forbid", frozen=True)
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


def read_toml(file: Path) -> dict[str, Any]:
    """A TOML file as plain data.

    Raises:
        UsageError: It cannot be read.
    """
    try:
        return tomllib.loads(file.read_text())
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
        raise UsageError(f"cannot read the configuration {file}: {err}") from err


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
