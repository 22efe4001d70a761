"""A bundle as the device sees it: plain JSON, NumPy and Pillow, Python 3.10 and later."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cswap_deploy.errors import ArtifactError
from cswap_deploy.runtime.documents import regular_file
from cswap_deploy.runtime.manifest import read_manifest
from cswap_deploy.runtime.probabilities import OutputKind

_FIX = "copy the bundle again, or build it again"
_PART = 1 << 20
"""Bytes that are hashed at once."""


@dataclass(frozen=True)
class Transform:
    """A network's preprocessing; see :class:`cswap_deploy.runtime.preprocess.Preprocessing`."""

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize_shorter: int
    interpolation: str
    exif_rotate: bool = False


@dataclass(frozen=True)
class EngineFile:
    """One target's engine and what it needs to run."""

    target: str
    path: str
    """Relative to the bundle."""
    version: str
    """Version of the runtime that built it."""
    compute_capability: str = ""
    """Compute capability of the GPU that it is bound to; empty where it is not bound to one."""
    version_compatible: bool = False
    """Runs with later versions of the runtime too."""
    stripped: bool = False
    """Takes its weights from the ONNX model."""


@dataclass(frozen=True)
class DeviceBundle:
    """The part of a manifest that running the bundle needs."""

    folder: Path
    model: str
    task: str
    """What the outputs are; only ``classify`` has classes."""
    precision: str
    rows: frozenset[str]
    """Outputs with one row an image."""
    onnx_path: str
    transform: Transform
    class_names: tuple[str, ...]
    engines: tuple[EngineFile, ...]
    files: dict[str, tuple[str, int]]
    """Path in the bundle -> sha256 and size (bytes)."""
    output_kind: OutputKind = "logits"
    """What a classifier gives."""

    @classmethod
    def open(cls, folder: Path) -> DeviceBundle:
        """Read the manifest; files are verified when they are used.

        Raises:
            ArtifactError: There is no manifest, or it is damaged or of another schema version.
        """
        told, _ = read_manifest(folder)
        model, steps = told["model"], told["model"]["preprocessing"]
        return cls(
            folder=folder, model=model["name"], task=model.get("task", "classify"),
            precision=told["onnx"].get("precision", "fp32"),
            rows=frozenset(_with_rows(told["onnx"]["outputs"])),
            onnx_path=told["onnx"]["path"], class_names=tuple(model.get("class_names", ())),
            transform=Transform(
                input_size=tuple(steps["input_size"]), mean=tuple(steps["mean"]),
                std=tuple(steps["std"]), resize_shorter=steps["resize_shorter"],
                interpolation=steps.get("interpolation", "bicubic"),
                exif_rotate=steps.get("exif_rotate", False),
            ),
            engines=tuple(_engine(result["engine"]) for result in told["targets"]),
            files={ref["path"]: (ref["sha256"], ref["size_bytes"]) for ref in told["files"]},
            output_kind=model.get("output_kind", "logits"),
        )  # fmt: skip

    def read(self, name: str) -> bytes:
        """A file of the bundle, named relative to it, if its digest is the recorded one.

        The bytes returned are the bytes that were hashed: deserialising an engine runs native code.

        Raises:
            ArtifactError: It is absent, not listed, outside the bundle, or altered.
        """
        if name not in self.files:
            raise ArtifactError(f"{self.folder / name} is not listed in the manifest")
        sha256, size = self.files[name]
        return read_verified(
            self.folder / name, sha256, size=size, within=self.folder, fix=_FIX,
            absent_fix="copy the bundle again",
        )  # fmt: skip

    def verify(self) -> None:
        """Hold every file that is here against its recorded digest, whether it is needed or not.

        A file that is not here is missed by whoever reads it: a device may have only some.

        Raises:
            ArtifactError: A file was altered; names it.
        """
        for name, (sha256, size) in self.files.items():
            path = self.folder / name
            if not os.path.lexists(path):
                continue
            try:
                with regular_file(path, within=self.folder) as file:
                    there, found = os.fstat(file.fileno()).st_size, hashlib.sha256()
                    while there == size and (part := file.read(_PART)):
                        found.update(part)
            except OSError as err:
                raise ArtifactError(f"cannot read {path}: {err.strerror or err}", fix=_FIX) from err
            if there != size or found.hexdigest() != sha256:
                raise _altered(path, there, size, found.hexdigest(), sha256, _FIX)


def read_verified(
    path: Path, sha256: str, *, fix: str, absent_fix: str | None = None, size: int | None = None,
    within: Path | None = None,
) -> bytes:  # fmt: skip
    """A file's content, if its digest is the recorded one.

    Args:
        path: Of the file.
        sha256: Recorded.
        fix: Of a file that differs.
        absent_fix: Of a file that cannot be read.
        size: Recorded (bytes), where it is; another one is not read.
        within: The folder that it may not leave.

    Raises:
        ArtifactError: The file cannot be read, or differs.
    """
    try:
        with regular_file(path, within=within) as file:
            there = os.fstat(file.fileno()).st_size
            content = b"" if size not in (None, there) else file.read()
    except OSError as err:
        raise ArtifactError(f"cannot read {path}: {err.strerror or err}", fix=absent_fix) from err
    found = hashlib.sha256(content).hexdigest()
    if size not in (None, there) or found != sha256:
        raise _altered(path, there, there if size is None else size, found, sha256, fix)
    return content


def _altered(path: Path, there: int, size: int, found: str, sha256: str, fix: str) -> ArtifactError:
    """The error for a file whose size (bytes) or digest is another than recorded."""
    words = f"sha256 {found[:12]}…, recorded {sha256[:12]}…"
    if there != size:
        words = f"{there:,} bytes, recorded {size:,}"
    return ArtifactError(f"{path} is not the file that was built: {words}", fix=fix)


def _with_rows(outputs: list[dict[str, Any]]) -> Iterator[str]:
    """Names of outputs whose first dimension is the batch, which has a name and no size."""
    for output in outputs:
        if output["shape"] and isinstance(output["shape"][0], str):
            yield output["name"]


def _engine(told: dict[str, Any]) -> EngineFile:
    options = told.get("options") or {}
    return EngineFile(
        target=told["target"], path=told["path"],
        version=told.get("versions", {}).get(told["target"], ""),
        compute_capability=told.get("compute_capability", ""),
        version_compatible=bool(options.get("version_compatible", False)),
        stripped=bool(told.get("stripped", False)),
    )  # fmt: skip
