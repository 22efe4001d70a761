"""What a checkpoint's file is, by its content, and its tensors, without running what is in it."""

from __future__ import annotations

import argparse
import codecs
import io
import json
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from cswap_deploy.errors import UsageError
from cswap_deploy.settings import check_path

_SNIFFED = 1 << 14
"""Bytes from the start that say what a file is."""
_DAMAGED = (
    RuntimeError, OSError, EOFError, LookupError, ValueError, AttributeError, TypeError,
    ArithmeticError, AssertionError, ImportError, NameError, SyntaxError, MemoryError, struct.error,
    zlib.error,
)  # fmt: skip
"""What ``torch.load`` raises on files that are no checkpoints."""
_PICKLES = 5
"""In a row, before the values, in files of torch before 1.6."""
_LONGEST = 1 << 14
"""Letters in a row, in a pickle: to say what is wrong torch takes the square of their number, which
for 64,000 is a minute."""
_MAGIC: dict[bytes, tuple[str, str]] = {
    b"\x1f\x8b": ("a gzip archive", "gunzip it"),
    b"BZh": ("a bzip2 archive", "unpack it"),
    b"\xfd7zXZ\x00": ("an xz archive", "unpack it"),
    b"\x28\xb5\x2f\xfd": ("a zstd archive", "unpack it"),
    b"7z\xbc\xaf": ("a 7z archive", "unpack it"),
    b"Rar!": ("a rar archive", "unpack it"),
    b"\x89HDF": ("an HDF5 file, as Keras writes", "convert it to safetensors"),
    b"GGUF": ("a GGUF file", "convert it to safetensors"),
    b"\x93NUMPY": ("a NumPy array", "save model.state_dict()"),
    b"\x89PNG": ("a PNG picture", "pass the file of the weights"),
    b"\xff\xd8\xff": ("a JPEG picture", "pass the file of the weights"),
    b"%PDF": ("a PDF document", "pass the file of the weights"),
}
"""First bytes -> what such a file is, and what to do."""
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)  # fmt: skip
_DOWNLOAD = (
    "download the weights themselves: the link that says raw, resolve or download, signed in where "
    "that is needed"
)


def read_file(path: Path) -> Any:
    """What a safetensors file holds, or one that ``torch.save`` wrote.

    Pickles are read with ``weights_only=True``: one that names any code is refused and nothing of
    it runs.

    Raises:
        UsageError: The file is absent, damaged, wants to run code, or is something else; says what.
    """
    _check_there(path)
    with path.open("rb") as f:
        head = f.read(_SNIFFED)
    if found := _something_else(path, head):
        what, fix = found
        raise UsageError(f"the checkpoint {path} {what}", fix=fix)
    # A safetensors file is eight bytes of length, then a JSON object.
    safetensors = path.suffix == ".safetensors" or head[8:9] == b"{"
    return _read_safetensors(path) if safetensors else _read_pickle(path)


def _check_there(path: Path) -> None:
    try:
        check_path(path)
    except ValueError as err:
        raise UsageError(f"the checkpoint is no file: {err}") from err
    if path.is_dir():
        kinds = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
        inside = sorted(file for file in path.iterdir() if file.suffix in kinds)
        fix = f"pass {inside[0]}" if inside else None
        raise UsageError(f"the checkpoint {path} is not a file but a folder", fix=fix)
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise UsageError(f"the checkpoint {path} {what}")


def _something_else(path: Path, head: bytes) -> tuple[str, str] | None:
    """What a file is that holds no weights, and what to do; ``None`` where it may hold some."""
    if not head:
        return "is empty (0 bytes)", "download or save it again"
    for magic, (what, fix) in _MAGIC.items():
        if head.startswith(magic):
            inside = _told_by_text(_gunzipped(head)) if magic == b"\x1f\x8b" else None
            if inside is None:
                return f"is {what}", f"{fix} and pass what is in it" if "archive" in what else fix
            return f"{inside[0]} (compressed with gzip)", inside[1]
    if head.startswith(b"PK\x03\x04"):
        return _told_by_zip(path)
    return _told_by_text(head)


def _gunzipped(head: bytes) -> bytes:
    try:
        return zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(head, _SNIFFED)
    except zlib.error:
        return b"\x00"


def _told_by_zip(path: Path) -> tuple[str, str] | None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error):
        return "was cut short: its end is missing", "download or save it again"
    names = [entry.filename for entry in entries]
    if any(name.rpartition("/")[2] in ("data.pkl", "constants.pkl") for name in names):
        claimed = sum(entry.file_size for entry in entries if "/data" in entry.filename)
        if claimed <= (size := path.stat().st_size):  # torch compresses nothing
            return None
        return f"claims {claimed:,} bytes of tensors in {size:,}", "download or save it again"
    few = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    what = "a NumPy archive" if all(n.endswith(".npy") for n in names) else "a zip archive"
    return (
        f"is {what} and no checkpoint of torch: it holds {few or 'nothing'}",
        "unpack it and pass the file of the weights"
        if what == "a zip archive"
        else "save model.state_dict()",
    )


def _told_by_text(head: bytes) -> tuple[str, str] | None:
    """What a text file is, by its first lines; ``None`` for binary ones."""
    text = _text(head)
    if text is None:
        return None
    start = text.lstrip().removeprefix("\ufeff").lstrip()
    lower, line = start.lower(), " ".join(start.split())[:120]
    if not start:
        return "holds nothing but blanks", "download or save it again"
    if start.startswith("version https://git-lfs"):
        return "is a Git LFS pointer, not the weights", (
            "git lfs pull, in the repository that it is from, or download the file itself"
        )
    if "/annex/objects/" in lower[:300]:
        return "is a git-annex pointer, not the weights", "git annex get, in its repository"
    if lower.startswith("<") and ("<html" in lower or "<!doctype html" in lower):
        title = re.search(r"<title[^>]*>(.*?)</title>", start, re.I | re.S)
        named = f" ({' '.join(title[1].split())[:80]!r})" if title and title[1].strip() else ""
        return f"is an HTML page{named}, not the weights", _DOWNLOAD
    if start.startswith("<"):
        return f"is an XML document, not the weights: {line}", _DOWNLOAD
    if start[0] in "{[":
        return _told_by_json(start, line)
    if re.match(r"\(?[dl]p\d+|\(?c[\w.]+\n", start):  # a pickle of protocol 0 is text
        return None
    return f"is a text file, not the weights: {line!r}", _DOWNLOAD


def _told_by_json(start: str, line: str) -> tuple[str, str]:
    if '"weight_map"' in start:
        return "is the index of a checkpoint in several files", (
            "merge them: load the model with the library that wrote it, then save its state_dict"
        )
    try:
        told = json.loads(start)
    except (ValueError, RecursionError):
        told = None
    keys = ("error", "message", "detail", "errors")
    failed = isinstance(told, Mapping) and any(key in told for key in keys)
    what = "a server's error message" if failed else "a JSON file"
    return f"is {what}, not the weights: {line}", _DOWNLOAD


def _text(head: bytes) -> str | None:
    """The start of a file as text; ``None`` where it is binary."""
    for mark, encoding in _BYTE_ORDER_MARKS:
        if head.startswith(mark):
            return head[len(mark) :].decode(encoding, errors="ignore")
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        try:
            text = head.decode("cp1252")  # older pages
        except UnicodeDecodeError:
            return None
        return text if text.lstrip().startswith("<") and "\x00" not in text else None
    return None if re.search(r"[\x00-\x08\x0e-\x1f]", text) else text


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as err:
        raise UsageError(
            f"{path} is not a whole safetensors file: {err}", fix="download or save it again"
        ) from err


def _read_pickle(path: Path) -> Any:
    if any(len(part) > _LONGEST for text in _texts(path) for part in text.split()):
        raise UsageError(
            f"{path} is no checkpoint: it has a name or a text of more than {_LONGEST:,} letters "
            "without a blank",
            fix="save model.state_dict()",
        )
    try:
        # timm's training checkpoints hold their arguments in a Namespace, which is plain data.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # about TorchScript, which is refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, *_DAMAGED) as err:
        script = "TorchScript" in str(err) or "torch.jit" in str(err)
        if script or isinstance(err, pickle.UnpicklingError):
            raise _refused(path, err) from err
        words = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
        raise UsageError(
            f"{path} is neither a safetensors file nor one that torch {torch.__version__} saved: "
            f"{words}"
        ) from err


def _texts(path: Path) -> Iterator[str | bytes]:
    """Names and texts in a file's pickles, as far as they can be read."""
    try:
        with path.open("rb") as file:
            if file.read(4) != b"PK\x03\x04":
                file.seek(0)
                for _ in range(_PICKLES):
                    yield from _texts_of(file)
                return
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith("data.pkl"):
                    yield from _texts_of(io.BytesIO(archive.read(name)))
    except (zipfile.BadZipFile, *_DAMAGED):
        return  # torch says it better


def _texts_of(pickled: IO[bytes]) -> Iterator[str | bytes]:
    for _, argument, _ in pickletools.genops(pickled):
        if isinstance(argument, str | bytes):
            yield argument


def _refused(path: Path, err: Exception) -> UsageError:
    wanted = re.search(
        r"(Unsupported (?:global|class|operand|op)[^\n]*?|Trying to [^\n]*?|Can only [^\n]*?|"
        r"Cannot use[^\n]*?TorchScript[^\n]*?)(?: was not an allowed|\.\s|\.?\n|$)",
        str(err),
    )
    reason = wanted.group(1).strip() if wanted else " ".join(str(err).split())[:300]
    what = "a pickle that holds more than tensors"
    if _is_lightning(path):
        what = "a PyTorch Lightning checkpoint, a pickle that holds more than tensors (hyper-"
        what += "parameters, most likely)"
    plain = path.with_suffix(".safetensors")
    return UsageError(
        f"{path} is {what}; nothing of it was run. torch {torch.__version__} (weights_only=True): "
        f"{reason}",
        fix="where you trust it, save its state_dict with safetensors.torch.save_file and pass "
        "that file (this runs what is in it, where its classes can be imported):\n    "
        'python -c "import torch; from safetensors.torch import save_file; '
        f"c = torch.load({str(path)!r}, map_location='cpu', weights_only=False); "
        "c = c.get('state_dict', c.get('model', c)) if isinstance(c, dict) else c; "
        "c = c if isinstance(c, dict) else c.state_dict(); "
        "save_file({k: v.clone().contiguous() for k, v in c.items() if torch.is_tensor(v)}, "
        f'{str(plain)!r})"',
    )


def _is_lightning(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            return any(b"pytorch-lightning_version" in archive.read(name) for name in pickles)
    except (zipfile.BadZipFile, OSError, *_DAMAGED):
        return False
