"""Raw measurements as they are saved: compressed, to the last digit."""

from __future__ import annotations

import base64
import binascii
import math
import zlib
from array import array
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

_NANOSECONDS, _DOUBLES = "zlib-ns:", "zlib-f64:"
_MOST_NANOSECONDS = 1 << 62
_MOST_BYTES = 64 << 20
"""Of what is unpacked: eight million samples."""


def _packed(samples: tuple[float, ...]) -> str:
    """Whole nanoseconds as differences where they are that, else doubles; base64 of zlib."""
    whole = [round(ms * 1e6) for ms in samples]
    fits = all(abs(ns) < _MOST_NANOSECONDS for ns in whole)
    if fits and all(ns / 1e6 == ms for ns, ms in zip(whole, samples, strict=True)):
        steps = array("q", (b - a for a, b in zip([0, *whole], whole, strict=False)))
        return _NANOSECONDS + _text(steps)
    return _DOUBLES + _text(array("d", samples))


def _unpacked(value: Any) -> Any:
    """What :func:`_packed` wrote; a list of older versions as it is."""
    if not isinstance(value, str):
        return value
    kind, _, text = value.partition(":")
    try:
        unpacker = zlib.decompressobj()
        content = unpacker.decompress(base64.b64decode(text, validate=True), _MOST_BYTES)
        if unpacker.unconsumed_tail:
            raise ValueError("more samples than are read")
        if f"{kind}:" == _DOUBLES:
            found = array("d", content).tolist()
            if not all(map(math.isfinite, found)):
                raise ValueError("samples that are not finite")
            return tuple(found)
        if f"{kind}:" != _NANOSECONDS:
            raise ValueError(f"unknown form {kind!r}")
        now = 0
        found = []
        for step in array("q", content):
            now += step
            found.append(now / 1e6)
        return tuple(found)
    except (binascii.Error, zlib.error) as err:
        raise ValueError(f"samples are damaged: {err}") from err


def _text(numbers: array[Any]) -> str:
    return base64.b64encode(zlib.compress(numbers.tobytes(), 9)).decode()


Samples = Annotated[
    tuple[float, ...],
    BeforeValidator(_unpacked),
    PlainSerializer(_packed, return_type=str, when_used="json"),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "number"}}]}),
]
"""Milliseconds, in the order taken; in JSON compressed."""
