"""What everything that is saved is made of: frozen values, canonical JSON, digests.

Unknown fields are refused, so a file of another schema version is noticed and not half understood.
"""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cswap_deploy.errors import ArtifactError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


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
    sha256: str
    size_bytes: int


V = TypeVar("V", bound=Value)


def read_value(path: Path, kind: type[V]) -> V:
    """Read a saved value.

    Raises:
        ArtifactError: The file is absent, damaged or of another schema version.
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError as err:
        raise ArtifactError(f"{path} does not exist") from err
    except ValidationError as err:
        first = err.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        raise ArtifactError(
            f"{path} is not a {kind.__name__}{_version(kind)}: {where}: {first['msg']}",
            fix="build the bundle again with this version of cswap-deploy",
        ) from err


def _version(kind: type[Value]) -> str:
    field = kind.model_fields.get("schema_version")
    return "" if field is None else f" of schema version {field.default}"
