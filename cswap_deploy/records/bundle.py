"""Reading a bundle: open it, hold every file against its digest, say what is in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from cswap_deploy.errors import ArtifactError
from cswap_deploy.records.engine import TensorSpec
from cswap_deploy.records.files import require_files
from cswap_deploy.records.manifest import Manifest, TargetResult
from cswap_deploy.records.measurements import OutputChange
from cswap_deploy.records.plan import PrunePlan
from cswap_deploy.records.value import FileRef, Value, read_value

MANIFEST = "manifest.json"
PLAN = "plan.json"


BUILD = "build.json"
WEIGHTS = "pruned.safetensors"
MODEL = "model.onnx"
DENSE = "dense.onnx"
"""The dense network's graph, where the build was asked to keep it."""


class BuildRecord(Value):
    """``build.json``: the settings of a build, and where its pruned network came from."""

    schema_version: Literal[2] = 2
    settings: dict[str, Any]
    prune_key: str
    dense_weights_sha256: str
    files: tuple[FileRef, ...]
    """The plan and the pruned weights."""


@dataclass(frozen=True, slots=True)
class BundleCheck:
    """A bundle whose listed files are all as they were when it was built."""

    path: Path
    manifest: Manifest
    extra: tuple[str, ...]
    """Files that the manifest does not list; nothing reads them."""


def read_bundle(path: Path) -> Manifest:
    """Read a bundle's manifest. Digests are not verified; ``verify_bundle`` does that.

    Raises:
        ArtifactError: ``path`` is not a bundle, or its manifest is damaged, of another schema
            version, or names files outside the bundle.
    """
    if not path.is_dir():
        state = "is not a folder" if path.exists() else "does not exist"
        raise ArtifactError(
            f"{path} {state}; a bundle is the folder that `cswap-deploy build -o` writes"
        )
    if not (path / MANIFEST).is_file():
        raise ArtifactError(
            f"{path} is not a bundle: it has no {MANIFEST}",
            fix="name the folder that `cswap-deploy build -o` wrote",
        )
    manifest = read_value(path / MANIFEST, Manifest)
    outside = [ref.path for ref in manifest.files if not _inside(ref.path)]
    if outside:
        raise ArtifactError(
            f"{path / MANIFEST} names files outside the bundle: {', '.join(outside)}"
        )
    return manifest


def read_plan(path: Path) -> PrunePlan:
    """Read the plan of the bundle at ``path``.

    Raises:
        ArtifactError: The plan is absent, damaged or of another schema version.
    """
    return read_value(path / PLAN, PrunePlan)


def read_build(folder: Path) -> BuildRecord:
    """What a folder says of the build that made it, or of the first stages of one.

    Raises:
        ArtifactError: The folder holds no build, or its record is damaged.
    """
    if not (folder / BUILD).is_file():
        raise ArtifactError(
            f"{folder} holds no build: it has no {BUILD}",
            fix="name a folder that `cswap-deploy prune -o` or `build -o` wrote",
        )
    return read_value(folder / BUILD, BuildRecord)


def verify_bundle(path: Path) -> BundleCheck:
    """Read a bundle and hold every file against the manifest's sha256 and size.

    Do this before anything of the bundle is used: deserialising an engine runs native code.

    Raises:
        ArtifactError: The bundle is damaged; every file that is missing or differs is named.
    """
    manifest = read_bundle(path)
    extra = require_files(path, manifest.files, fix="copy the bundle again, or build it again")
    return BundleCheck(path, manifest, tuple(name for name in extra if name != MANIFEST))


def describe(manifest: Manifest) -> dict[str, Any]:
    """What a bundle holds, as plain data for ``inspect --json``.

    Accuracy and ratios are fractions, sizes bytes, latency milliseconds.
    """
    return {
        "model": manifest.model.name,
        "weights": manifest.model.weights,
        "weights_sha256": manifest.model.weights_sha256,
        "task": manifest.model.task,
        "created": manifest.created,
        "tool_version": manifest.tool_version,
        "ratio_requested": manifest.ratio_requested,
        "ratio_of": manifest.ratio_of,
        "ratio_effective": dict(manifest.ratio_effective),
        "dense": manifest.dense.model_dump(),
        "pruned": manifest.pruned.model_dump(),
        "onnx": {
            "path": str(manifest.onnx.path),
            "size_bytes": manifest.onnx.size_bytes,
            "opset": manifest.onnx.opset,
            "nodes": manifest.onnx.nodes,
            "precision": manifest.onnx.precision,
            "inputs": [tensor.model_dump(mode="json") for tensor in manifest.onnx.inputs],
            "outputs": [tensor.model_dump(mode="json") for tensor in manifest.onnx.outputs],
        },
        "output_kind": manifest.model.output_kind,
        "outputs": _outputs(manifest.torch_outputs),
        "metric": None if manifest.metric is None else manifest.metric.model_dump(),
        "preprocessing": manifest.model.preprocessing.model_dump(mode="json"),
        "targets": [_target(result) for result in manifest.targets],
        "files": {ref.path: ref.size_bytes for ref in manifest.files},
        "doubts": list(manifest.doubts),
        "fallbacks": list(manifest.fallbacks),
    }


def tensor_text(tensor: TensorSpec) -> str:
    """One input or output in a line, for example ``input: float32 (batch, 3, 224, 224)``."""
    return f"{tensor.name}: {tensor.dtype} ({', '.join(map(str, tensor.shape))})"


def _target(result: TargetResult) -> dict[str, Any]:
    accuracy, latency = result.accuracy, result.latency
    return {
        "target": result.engine.target,
        "path": str(result.engine.path),
        "size_bytes": result.engine.size_bytes,
        "precision": result.engine.precision,
        "device": result.engine.device,
        "run_here": result.engine.runnable,
        "reason": result.engine.reason,
        "top1": None if accuracy is None else accuracy.pruned.top1,
        "top1_drop": None if accuracy is None else accuracy.drop,
        "agreement": None if result.agreement is None else result.agreement.share,
        "kl": None if result.agreement is None else result.agreement.kl,
        "outputs": _outputs(result.outputs),
        "p50_ms": None if latency is None else latency.p50_ms,
        "p99_ms": None if latency is None else latency.p99_ms,
        "speedup": result.speedup,
        "speedup_low": result.speedup_low,
        "speedup_high": result.speedup_high,
        "parity_max_abs": None if result.parity is None else result.parity.max_abs,
    }


def _outputs(change: OutputChange | None) -> dict[str, Any] | None:
    """Output -> its error (dB) and the share of its decisions that stay."""
    if change is None:
        return None
    return {o.name: {"error_db": o.error_db, "agreement": o.agreement} for o in change.outputs}


def _inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts
