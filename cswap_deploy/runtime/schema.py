"""Plain data held against a JSON Schema: the part of the standard that pydantic writes.

The device has neither pydantic nor a library for schemas; what is checked there is what is
published.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

MANIFEST_SCHEMA = Path(__file__).with_name("manifest.schema.json")
"""The schema of ``manifest.json``, made by :func:`cswap_deploy.records.manifest.schema`."""
_KINDS: dict[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "integer": (int,),
    "number": (int, float), "boolean": (bool,), "null": (type(None),),
}  # fmt: skip
_BOUNDS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "minimum": (lambda value, bound: value >= bound, "is below"),
    "maximum": (lambda value, bound: value <= bound, "is above"),
    "exclusiveMinimum": (lambda value, bound: value > bound, "is not above"),
    "exclusiveMaximum": (lambda value, bound: value < bound, "is not below"),
    "minItems": (lambda value, bound: len(value) >= bound, "has fewer items than"),
    "maxItems": (lambda value, bound: len(value) <= bound, "has more items than"),
    "minLength": (lambda value, bound: len(value) >= bound, "is shorter than"),
    "maxLength": (lambda value, bound: len(value) <= bound, "is longer than"),
}
SAID = {"title", "description", "default", "format", "$schema", "$id", "$defs"}
"""Keywords that check nothing."""
CHECKED = {
    "$ref", "type", "const", "enum", "anyOf", "pattern", "properties", "required",
    "additionalProperties", "propertyNames", "items", "prefixItems", *_BOUNDS,
}  # fmt: skip


def manifest_schema() -> dict[str, Any]:
    """The published schema of ``manifest.json``."""
    found: dict[str, Any] = json.loads(MANIFEST_SCHEMA.read_bytes())
    return found


def check(value: Any, schema: Mapping[str, Any]) -> None:
    """Hold plain data against a schema.

    Raises:
        ValueError: It does not fit; says where, and why.
    """
    _check(value, schema, schema.get("$defs", {}), "")


def _check(value: Any, schema: Mapping[str, Any], defs: Mapping[str, Any], at: str) -> None:
    if "$ref" in schema:
        _check(value, defs[schema["$ref"].rpartition("/")[2]], defs, at)
    if "anyOf" in schema:
        _check_any(value, schema["anyOf"], defs, at)
    if "type" in schema and not _is(value, schema["type"]):
        raise _wrong(at, f"{_shown(value)} where {schema['type']} belongs")
    if "const" in schema and value != schema["const"]:
        raise _wrong(at, f"{_shown(value)} where {schema['const']!r} belongs")
    if "enum" in schema and value not in schema["enum"]:
        raise _wrong(at, f"{_shown(value)} is none of {', '.join(map(repr, schema['enum']))}")
    if "pattern" in schema and re.search(schema["pattern"], value) is None:
        raise _wrong(at, f"{_shown(value)} is not of the form {schema['pattern']}")
    for word, (fits, words) in _BOUNDS.items():
        if word in schema and not fits(value, schema[word]):
            raise _wrong(at, f"{_shown(value)} {words} {schema[word]}")
    if isinstance(value, dict):
        _check_object(value, schema, defs, at)
    elif isinstance(value, list):
        first = schema.get("prefixItems", ())
        for index, item in enumerate(value):
            inner = first[index] if index < len(first) else schema.get("items", {})
            _check(item, inner, defs, f"{at}.{index}")


def _check_any(value: Any, schemas: list[dict[str, Any]], defs: Mapping[str, Any], at: str) -> None:
    """One of several; what is wrong with the one of the value's kind is told."""
    told: list[ValueError] = []
    for each in schemas:
        try:
            _check(value, each, defs, at)
        except ValueError as err:
            told.append(err)
        else:
            return
    # An error from deeper inside is of the schema that was meant.
    raise max(told, key=lambda err: str(err).partition(":")[0].count("."))


def _check_object(
    value: dict[str, Any], schema: Mapping[str, Any], defs: Mapping[str, Any], at: str
) -> None:
    known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    if absent := [name for name in schema.get("required", ()) if name not in value]:
        raise _wrong(at, f"there is no {', '.join(absent)}")
    for name, item in value.items():
        if "propertyNames" in schema:
            _check(name, schema["propertyNames"], defs, f"{at}.{name}")
        if name in known:
            _check(item, known[name], defs, f"{at}.{name}")
        elif others is False:
            raise _wrong(at, f"{name!r} is not known")
        elif others is not True:
            _check(item, others, defs, f"{at}.{name}")


def _is(value: Any, kind: str) -> bool:
    """A truth value is no number, though Python thinks so."""
    return isinstance(value, _KINDS[kind]) and (kind == "boolean" or not isinstance(value, bool))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _wrong(at: str, words: str) -> ValueError:
    return ValueError(f"{at.lstrip('.') or 'the document'}: {words}")
