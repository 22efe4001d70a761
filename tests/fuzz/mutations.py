"""Files that are nearly right: bytes, JSON, zip archives and PNGs, changed in a few places.

A change of bytes alone seldom passes a checksum, so archives and PNGs are taken apart, changed and
put together again with sums that fit.
"""

from __future__ import annotations

import copy
import io
import json
import random
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from cswap_deploy.runtime.documents import UNSEALED, sealed

Mutation = Callable[[random.Random, bytes], bytes]
_NUMBERS = (0, 1, 2, 7, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62,
            2**63 - 1, 2**64 - 1)  # fmt: skip
_ODD: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2**31, 2**63, 10**30, 10**4000, -0.5, 1e-300, 1e308, float("nan"),
    float("inf"), "", "x", "-1", "nan", "a\0b", "../../x", "/etc/passwd", "\ud800", "x" * 300,
    [], {}, [[]], {"": {}}, [1, "a", None], "é", "e\u0301",
)  # fmt: skip


def bytes_changed(rng: random.Random, data: bytes, words: Sequence[bytes] = ()) -> bytes:
    """A few bytes flipped, set, cut, doubled, moved; numbers and words written into it."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(len(found) + 1)
        span = rng.choice((1, 2, 4, 8, 32, 256))
        what = rng.randrange(9 if words else 8)
        if what < 2 and at < len(found):
            value = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            found[at] = value if what else found[at] ^ 1 << rng.randrange(8)
        elif what == 2:
            del found[at : at + span]
        elif what == 3:
            found[at:at] = found[at : at + span]
        elif what == 4:
            del found[at:]
        elif what == 5:
            size, order = rng.choice((2, 4, 8)), rng.choice(("little", "big"))
            number = rng.choice(_NUMBERS) % (1 << 8 * size)
            found[at : at + size] = number.to_bytes(size, order)  # type: ignore[arg-type]
        elif what == 6:
            found[at:at] = found[at : at + span][:8] * rng.choice((2, 100, 4000))
        elif what == 7 or not words:
            found[at:at] = rng.randbytes(span)
        else:
            found[at : at + rng.choice((0, span))] = rng.choice(words)
    return bytes(found)


def json_changed(rng: random.Random, data: bytes) -> bytes:
    """A JSON document with values, names and members that it should not have."""
    try:
        document = json.loads(data)
    except ValueError:
        return bytes_changed(rng, data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        document = _change(rng, document)
    text = json.dumps(document)
    if rng.random() < 0.05:  # deeper than any parser that calls itself
        deep = rng.choice(("[", '{"a":'))
        text = text.replace(": ", ": " + deep * rng.choice((50, 900, 30_000)), 1)
    if rng.random() < 0.05:
        text = text.replace("{", '{"a": 0, "a": 1, ', 1)
    return text.encode("utf-8", "replace")


def sealed_json_changed(rng: random.Random, data: bytes) -> bytes:
    """The same; half of them sealed anew, as only someone who wants to harm does it."""
    changed = json_changed(rng, data)
    if rng.random() < 0.5:
        return changed
    unsealed = re.sub(rb'("seal":\s*)"[0-9a-f]{64}"', rb'\1"%s"' % UNSEALED.encode(), changed)
    with suppress(ValueError):  # its seal was changed too
        return sealed(unsealed.decode())
    return changed


def _change(rng: random.Random, document: Any) -> Any:
    """One member replaced, removed, added, or changed itself."""
    if not isinstance(document, dict | list) or not document or rng.random() < 0.1:
        return copy.deepcopy(rng.choice(_ODD))
    keys = list(document) if isinstance(document, dict) else list(range(len(document)))
    key, what = rng.choice(keys), rng.random()
    if what < 0.7:
        document[key] = _change(rng, document[key])
    elif what < 0.8:
        del document[key]
    elif isinstance(document, dict):
        document[rng.choice(("", "a", str(key) + "x"))] = copy.deepcopy(rng.choice(_ODD))
    else:
        document.append(copy.deepcopy(document[key]))
    return document


def zip_changed(
    rng: random.Random, data: bytes, words: Sequence[bytes] = (), inner: Mutation | None = None
) -> bytes:
    """An archive with a member that is changed, absent, empty, doubled or compressed."""
    if rng.random() < 0.4:
        return bytes_changed(rng, data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    at = rng.randrange(len(members))
    name, content = members[at]
    what = rng.random()
    if what < 0.8:
        changed = inner(rng, content) if inner is not None else None
        members[at] = name, bytes_changed(rng, content, words) if changed is None else changed
    elif what < 0.85:
        del members[at]
    elif what < 0.9:
        members[at] = name, b""
    elif what < 0.95:
        members.append((name, content[: len(content) // 2]))
    else:
        members[at] = rng.choice(("", "x", name + "x", "../" + name)), content
    file = io.BytesIO()
    kind = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(file, "w", kind) as archive:
        archive.comment = b""
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, kind)
    return file.getvalue()


def sized_header_changed(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file: eight bytes of length, JSON, values."""
    if rng.random() < 0.4 or len(data) < 8:
        return bytes_changed(rng, data)
    length = int.from_bytes(data[:8], "little")
    header = json_changed(rng, data[8 : 8 + length])
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def png_changed(rng: random.Random, data: bytes) -> bytes:
    """A PNG with changed chunks whose sums fit; other files by their bytes."""
    if not data.startswith(b"\x89PNG") or rng.random() < 0.3:
        return bytes_changed(rng, data)
    chunks, at = [], 8
    while at + 12 <= len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    which = rng.randrange(len(chunks))
    kind, body = chunks[which]
    if kind == b"IDAT" and rng.random() < 0.5:
        body = zlib.compress(bytes_changed(rng, zlib.decompressobj().decompress(body)))
    elif rng.random() < 0.1:
        chunks.insert(rng.randrange(len(chunks) + 1), (kind, body))
    elif rng.random() < 0.1:
        kind = rng.choice((b"acTL", b"fcTL", b"PLTE", b"tRNS", b"eXIf", b"iCCP", b"zTXt", b"IEND"))
    else:
        body = bytes_changed(rng, body)
    chunks[which] = kind, body
    parts = [
        struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks
    ]
    return data[:8] + b"".join(parts)
