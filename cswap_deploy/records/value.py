"""What everything that is saved is made of: frozen values, canonical JSON, digests.

Unknown fields are refused, so a file of another schema version is noticed and not half understood.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cswap_deploy.errors import ArtifactError
from cswap_deploy.runtime.documents import UNSEALED, parse, parse_sealed, read_regular, sealed

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0, le=2**62)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""sha256, in hex."""


class Value(BaseModel):
    """Base of everything that is saved: immutable, and strict about its fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def canonical_json(self) -> str:
        """Sorted keys, no blanks: the same value gives the same bytes."""
        return canonical_json(self.model_dump(mode="json"))


def canonical_json(value: Any) -> str:
    """Serialise plain data to one spelling, for hashing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def now() -> str:
    """The time, as records have it: ISO 8601, UTC, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def sha256_text(text: str) -> str:
    """Hex digest of UTF-8 text."""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class FileRef(Value):
    """A file of the bundle. ``path`` is relative to the bundle."""

    path: str
    sha256: Digest
    size_bytes: Count


class Sealed(Value):
    """What says itself whether it is as it was written; see ``runtime.documents``."""

    sealed_since: ClassVar[int]
    """First schema version that has a seal."""
    seal: Digest = UNSEALED
    """sha256 of the file with zeros in this place."""

    @property
    def is_sealed(self) -> bool:
        """Whether it was read from a file that has a seal, or written to one."""
        return self.seal != UNSEALED


V = TypeVar("V", bound=Value)
S = TypeVar("S", bound=Sealed)


def read_value(path: Path, kind: type[V]) -> V:
    """Read a saved value.

    Raises:
        ArtifactError: The file is absent, damaged or of another schema version.
    """
    try:
        content = read_regular(path)
        if issubclass(kind, Sealed):
            told: Any = parse_sealed(content, since=kind.sealed_since)[0]
        else:
            told = parse(content)
    except FileNotFoundError as err:
        raise ArtifactError(f"{path} does not exist") from err
    except OSError as err:
        raise ArtifactError(f"cannot read {path}: {err.strerror or err}") from err
    except ValueError as err:
        raise ArtifactError(
            f"{path} is not a {kind.__name__}{_version(kind)}: {err}", fix="copy it again"
        ) from err
    return validated(told, kind, path)


def validated(told: Mapping[str, Any], kind: type[V], path: Path) -> V:
    """Plain data that was read from a file as the value that it is to be.

    Raises:
        ArtifactError: It is not that.
    """
    try:
        return kind.model_validate(told)
    except ValidationError as err:
        first = err.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        raise ArtifactError(
            f"{path} is not a {kind.__name__}{_version(kind)}: {where}: {first['msg']}",
            fix="build the bundle again with this version of cswap-deploy",
        ) from err


def write_sealed(path: Path, value: S) -> S:
    """Write a value with its seal, and return it with that.

    A value that was read or written before is sealed anew.
    """
    content = sealed(value.model_copy(update={"seal": UNSEALED}).model_dump_json(indent=1))
    path.write_bytes(content)
    return value.model_copy(update={"seal": json.loads(content)["seal"]})


def _version(kind: type[Value]) -> str:
    field = kind.model_fields.get("schema_version")
    return "" if field is None else f" of schema version {field.default}"
