"""A bundle as the device sees it: plain JSON, NumPy and Pillow, Python 3.10 and later."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cswap_deploy.errors import ArtifactError
from cswap_deploy.runtime.probabilities import OutputKind

SCHEMA_VERSIONS = 3, 4


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
    digests: dict[str, str]
    output_kind: OutputKind = "logits"
    """What a classifier gives."""

    @classmethod
    def open(cls, folder: Path) -> DeviceBundle:
        """Read the manifest; files are verified when they are used.

        Raises:
            ArtifactError: There is no manifest, or it is damaged or of another schema version.
        """
        path = folder / "manifest.json"
        try:
            told = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise ArtifactError(
                f"{folder} is not a bundle: it has no manifest.json",
                fix="name the folder that `cswap-deploy build -o` wrote",
            ) from None
        except (OSError, ValueError) as err:
            raise ArtifactError(f"cannot read {path}: {err}", fix="copy the bundle again") from err
        try:
            return cls._from(folder, told)
        except (AttributeError, KeyError, TypeError, ValueError) as err:
            raise ArtifactError(
                f"{path} is not a manifest of schema version {SCHEMA_VERSIONS[-1]}: "
                f"{type(err).__name__} {err}",
                fix="build the bundle again with this version of cswap-deploy",
            ) from err

    @classmethod
    def _from(cls, folder: Path, told: dict[str, Any]) -> DeviceBundle:
        if told["schema_version"] not in SCHEMA_VERSIONS:
            raise ValueError(f"schema_version {told['schema_version']}")
        model, steps = told["model"], told["model"]["preprocessing"]
        return cls(
            folder=folder, model=model["name"], task=str(model["task"]),
            precision=told["onnx"]["precision"],
            rows=frozenset(_with_rows(told["onnx"]["outputs"])),
            onnx_path=told["onnx"]["path"], class_names=tuple(model["class_names"]),
            transform=Transform(
                input_size=tuple(steps["input_size"]), mean=tuple(steps["mean"]),
                std=tuple(steps["std"]), resize_shorter=steps["resize_shorter"],
                interpolation=steps["interpolation"],
                exif_rotate=steps.get("exif_rotate", False),  # manifests before it have none
            ),
            engines=tuple(_engine(result["engine"]) for result in told["targets"]),
            digests={ref["path"]: ref["sha256"] for ref in told["files"]},
            output_kind=model.get("output_kind", "logits"),
        )  # fmt: skip

    def read(self, name: str) -> bytes:
        """A file of the bundle, named relative to it, if its digest is the recorded one.

        The bytes returned are the bytes that were hashed: deserialising an engine runs native code.

        Raises:
            ArtifactError: It is absent, not listed, outside the bundle, or altered.
        """
        recorded = self.digests.get(name)
        if recorded is None or Path(name).is_absolute() or ".." in Path(name).parts:
            raise ArtifactError(f"{self.folder / name} is not listed in the manifest")
        fix, absent_fix = "copy the bundle again, or build it again", "copy the bundle again"
        return read_verified(self.folder / name, recorded, fix=fix, absent_fix=absent_fix)


def read_verified(path: Path, sha256: str, *, fix: str, absent_fix: str | None = None) -> bytes:
    """A file's content, if its digest is the recorded one.

    Raises:
        ArtifactError: The file cannot be read (with ``absent_fix``), or differs (with ``fix``).
    """
    try:
        content = path.read_bytes()
    except OSError as err:
        raise ArtifactError(f"cannot read {path}: {err.strerror or err}", fix=absent_fix) from err
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ArtifactError(
            f"{path} is not the file that was built: sha256 {found[:12]}…, recorded {sha256[:12]}…",
            fix=fix,
        )
    return content


def _with_rows(outputs: list[dict[str, Any]]) -> Iterator[str]:
    """Names of outputs whose first dimension is the batch, which has a name and no size."""
    for output in outputs:
        if output["shape"] and isinstance(output["shape"][0], str):
            yield output["name"]


def _engine(told: dict[str, Any]) -> EngineFile:
    options = told.get("options") or {}
    return EngineFile(
        target=told["target"], path=told["path"],
        version=told["versions"].get(told["target"], ""),
        compute_capability=told.get("compute_capability", ""),
        version_compatible=bool(options.get("version_compatible", False)),
        stripped=bool(told.get("stripped", False)),
    )  # fmt: skip
