"""Reading a bundle: open it, hold every file against its digest, say what is in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from cswap_deploy.config import RatioOf
from cswap_deploy.errors import ArtifactError, first_line
from cswap_deploy.records.engine import TensorSpec
from cswap_deploy.records.files import compare_files, differences, require_files
from cswap_deploy.records.manifest import Manifest, TargetResult
from cswap_deploy.records.measurements import OutputChange
from cswap_deploy.records.plan import PrunePlan
from cswap_deploy.records.value import Digest, FileRef, Sealed, read_value, validated
from cswap_deploy.runtime.manifest import MANIFEST, read_manifest

PLAN = "plan.json"


BUILD = "build.json"
WEIGHTS = "pruned.safetensors"
MODEL = "model.onnx"
DENSE = "dense.onnx"
"""The dense network's graph, where the build was asked to keep it."""
SIGNATURE = "bundle.sig"
"""Of every other file, where the bundle is signed; the manifest does not list it."""
_ROUNDING = 1e-9
_SAID_TWICE = (
    "criterion", "ratio", "ratio_of", "exclude", "include", "intervention", "select", "refit",
)  # fmt: skip
"""Settings of pruning that are in the plan as they were asked."""


class BuildRecord(Sealed):
    """``build.json``: the settings of a build, and where its pruned network came from."""

    sealed_since: ClassVar[int] = 3
    schema_version: Literal[1, 2, 3] = 3
    """What 1 and 2 lack is the seal; their settings had other names."""
    settings: dict[str, Any]
    prune_key: Digest
    dense_weights_sha256: Digest
    files: tuple[FileRef, ...]
    """The plan and the pruned weights."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at in a bundle."""

    what: str
    ok: bool
    words: str


@dataclass(frozen=True, slots=True)
class BundleCheck:
    """A bundle that was looked at, whatever was found."""

    path: Path
    manifest: Manifest
    findings: tuple[Finding, ...]
    extra: tuple[str, ...]
    """Files that the manifest does not list; nothing reads them."""

    @property
    def wrong(self) -> tuple[Finding, ...]:
        """What is not as it was when the bundle was built."""
        return tuple(finding for finding in self.findings if not finding.ok)


def read_bundle(path: Path) -> Manifest:
    """Read a bundle's manifest. Other files are not looked at; ``verify_bundle`` does that.

    Raises:
        ArtifactError: ``path`` is not a bundle, or its manifest is damaged, of another schema
            version, contradicts itself, or names files outside the bundle.
    """
    if not path.is_dir():
        state = "is not a folder" if path.exists() else "does not exist"
        raise ArtifactError(
            f"{path} {state}; a bundle is the folder that `cswap-deploy build -o` writes"
        )
    told, _ = read_manifest(path)
    manifest = validated(told, Manifest, path / MANIFEST)
    _require_settings(manifest.settings, {"ratio": float, "ratio_of": str}, path / MANIFEST)
    return manifest


def read_plan(path: Path) -> PrunePlan:
    """Read the plan of the bundle at ``path``.

    Raises:
        ArtifactError: The plan is absent, damaged or of another schema version.
    """
    plan = read_value(path / PLAN, PrunePlan)
    asked = {"criterion": str, "ratio": float, "ratio_of": str, "alpha": float}
    _require_settings(plan.settings, asked, path / PLAN)
    return plan


def _require_settings(settings: dict[str, Any], kinds: dict[str, type], path: Path) -> None:
    """Refuse a record without the settings that everyone reads."""
    for name, kind in kinds.items():
        value = settings.get(name)
        if not isinstance(value, (kind, int) if kind is float else kind):
            raise ArtifactError(f"{path} is damaged: the setting {name} is {value!r}")
    if settings["ratio_of"] not in get_args(RatioOf):
        raise ArtifactError(f"{path} is damaged: the setting ratio_of is {settings['ratio_of']!r}")


def read_build(folder: Path) -> BuildRecord:
    """What a folder says of the build that made it, or of the first stages of one.

    Raises:
        ArtifactError: The folder holds no build, its record is damaged, or it is not of the plan
            and the weights that lie beside it.
    """
    if not (folder / BUILD).exists():
        raise ArtifactError(
            f"{folder} holds no build: it has no {BUILD}",
            fix="name a folder that `cswap-deploy prune -o` or `build -o` wrote",
        )
    record = read_value(folder / BUILD, BuildRecord)
    fix = "copy the folder again, or prune again"
    if lacking := {PLAN, WEIGHTS} - {ref.path for ref in record.files}:
        raise ArtifactError(f"{folder / BUILD} does not list {', '.join(lacking)}", fix=fix)
    require_files(folder, record.files, fix=fix)
    if wrong := [*_against_the_plan(record.settings, read_plan(folder))]:
        raise ArtifactError(f"{folder / BUILD} is damaged: {'; '.join(wrong)}", fix=fix)
    return record


def examine_bundle(path: Path) -> BundleCheck:
    """Hold everything in a bundle against its manifest, and against each other.

    Raises:
        ArtifactError: The manifest cannot be read.
    """
    manifest = read_bundle(path)
    of = "sealed" if manifest.is_sealed else "without a seal: a change to it goes unnoticed"
    found = [Finding(MANIFEST, True, f"{of}; lists {len(manifest.files)} files")]
    wrong = differences(path, manifest.files)
    for ref in manifest.files:
        words = wrong.get(ref.path, f"{ref.size_bytes:,} bytes, sha256 {ref.sha256[:12]}…")
        found.append(Finding(ref.path, ref.path not in wrong, words))
    listed = {ref.path for ref in manifest.files}
    for name in sorted({PLAN, WEIGHTS} - listed):
        found.append(Finding(name, False, "is not listed in the manifest"))
    for name, look in ((PLAN, _plan_findings), (BUILD, _build_findings)):
        if name in listed - wrong.keys():
            try:
                found += look(path, manifest)
            except ArtifactError as err:
                found.append(Finding(name, False, first_line(err)))
    _, extra = compare_files(path, ())
    unlisted = tuple(name for name in extra if name not in listed | {MANIFEST, SIGNATURE})
    return BundleCheck(path, manifest, tuple(found), unlisted)


def verify_bundle(path: Path) -> BundleCheck:
    """Hold everything in a bundle against its manifest, and refuse it where something differs.

    Do this before anything of the bundle is used: deserialising an engine runs native code.

    Raises:
        ArtifactError: The bundle is damaged; every file that is missing or differs is named.
    """
    checked = examine_bundle(path)
    require_sound(checked)
    return checked


def require_sound(checked: BundleCheck) -> None:
    """Refuse a bundle in which something is not as it was.

    Raises:
        ArtifactError: Names all of it.
    """
    if checked.wrong:
        words = "; ".join(f"{finding.what} {finding.words}" for finding in checked.wrong)
        raise ArtifactError(
            f"{checked.path} is damaged: {words}", fix="copy the bundle again, or build it again"
        )


def _plan_findings(path: Path, manifest: Manifest) -> Iterator[Finding]:
    plan = read_plan(path)
    wrong = [*_against_the_plan(manifest.settings, plan)]
    for name in ("dense", "pruned"):
        if getattr(manifest, name) != getattr(plan, name):
            wrong.append(f"the manifest has another size of the {name} network")
    for of, removed in plan.removed.items():
        if abs(manifest.ratio_effective.get(of, removed) - removed) > _ROUNDING:
            wrong.append(f"the manifest has another effective ratio of {of}")
    yield Finding(PLAN, not wrong, "; ".join(wrong) or "says what the manifest says")


def _build_findings(path: Path, manifest: Manifest) -> Iterator[Finding]:
    record = read_value(path / BUILD, BuildRecord)
    wrong = []
    if record.is_sealed and not manifest.is_sealed:
        wrong.append("is sealed and the manifest is not")
    if record.dense_weights_sha256 != manifest.model.weights_sha256:
        wrong.append("is of another network's weights than the manifest")
    files = {ref.path: ref for ref in manifest.files}
    wrong += [
        f"has another digest of {ref.path} than the manifest"
        for ref in record.files
        if files.get(ref.path) != ref
    ]
    # A latency that was asked for is a ratio once the dense network was timed.
    both = (record.settings | {"ratio": None}, dict(manifest.settings) | {"ratio": None})
    differ = sorted(n for n in both[0] | both[1] if both[0].get(n, ...) != both[1].get(n, ...))
    if differ:
        wrong.append(f"has other settings than the manifest: {', '.join(differ)}")
    yield Finding(BUILD, not wrong, "; ".join(wrong) or "says what the manifest says")


def _against_the_plan(settings: dict[str, Any], plan: PrunePlan) -> Iterator[str]:
    """Settings of pruning that are not those of the plan, which knows what ``auto`` came to."""
    free = {"ratio"} if settings.get("max_latency") is not None else set()
    if not plan.ratio_requested:  # nothing was ranked
        free.add("criterion")
    for name in _SAID_TWICE:
        asked, done = settings.get(name), plan.settings.get(name)
        if None not in (asked, done) and asked != done and name not in free:
            yield f"the setting {name} is {asked!r}, in the plan {done!r}"


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
