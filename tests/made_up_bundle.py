"""A bundle with made-up figures, for tests of what reads bundles. Nothing here was measured."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from cswap_deploy.records.engine import EngineArtifact, OnnxArtifact, TensorSpec
from cswap_deploy.records.files import list_files
from cswap_deploy.records.manifest import Manifest, TargetResult
from cswap_deploy.records.measurements import Accuracy, AccuracyChange, Device, Latency, Parity
from cswap_deploy.records.model import DataSpec, ModelSpec, Preprocessing
from cswap_deploy.records.plan import GroupPlan, PrunePlan, RoundLog, Size, UnitEffect
from cswap_deploy.records.value import sha256_text, write_sealed
from cswap_deploy.runtime.documents import UNSEALED, sealed
from cswap_deploy.settings import BatchRange

DENSE = Size(units=336, params=272_186, macs=40_550_000)
PRUNED = Size(units=190, params=163_120, macs=27_910_000)
GROUPS = tuple(
    (f"layer{stage}.{block}.conv1", 16 * 2 ** (stage - 1))
    for stage in (1, 2, 3)
    for block in range(3)
)


def effect(rng: random.Random, unit: int, importance: float) -> UnitEffect:
    """A unit whose effects grow with its importance; classes 0 to 9."""
    true_class = -0.4 * importance**2 + rng.gauss(0.004, 0.004)
    width = 0.006 + 0.1 * importance**2
    verdict = (
        "critical" if true_class < -0.02 else "detrimental" if true_class > 0.006 else "neutral"
    )
    return UnitEffect(
        unit=unit,
        true_class=true_class,
        harm=0.002 - true_class,  # as if it spread by 0.004 over the images
        kl=0.0 if importance < 0.03 else 0.6 * importance**3 * math.exp(rng.gauss(0, 0.5)),
        low=true_class - width,
        high=true_class + width,
        verdict=verdict,  # type: ignore[arg-type]
        round=rng.randint(1, 4),
        serves=((3 * unit) % 10, unit % 3) if verdict == "critical" else (),
        harms=(unit % 10,) if verdict == "detrimental" else (),
    )


def made_up_plan() -> PrunePlan:
    """Nine blocks of channels, 146 of 336 units removed, the least important first."""
    rng = random.Random(0)
    groups = []
    for depth, (name, units) in enumerate(GROUPS):
        importance = [rng.random() ** (1 + depth / 6) for _ in range(units)]
        effects = tuple(effect(rng, u, importance[u]) for u in range(units))
        keep = max(2, round(units * (0.75 - 0.035 * depth)))
        kept = sorted(sorted(range(units), key=lambda u: -importance[u])[:keep])
        groups.append(
            GroupPlan(name=name, kind="channels", units=units, kept=tuple(kept), effects=effects)
        )
    return PrunePlan(
        settings={
            "criterion": "cswap",
            "ratio": 0.4,
            "ratio_of": "params",
            "alpha": 0.05,
            "effect": "kl",
            "intervention": "mean",
            "rounds": 4,
            "scoring_samples": 128,
            "min_effect": 0.01,
        },
        dense=DENSE,
        pruned=PRUNED,
        groups=tuple(groups),
        excluded={"conv1": "feeds the residual stream, which has 16 channels (below the minimum)"},
        biased=("layer1.0.conv2",),
        refitted=tuple(name.replace("conv1", "conv2") for name, _ in GROUPS),
        rounds=tuple(
            RoundLog(
                round=i, measured=336 - 35 * i, removed=35, params=272_186 - 27_000 * i, seconds=9.5
            )
            for i in range(1, 5)
        ),
    )


def magnitude_plan() -> PrunePlan:
    """The same removal, ranked by magnitude: no effects were measured."""
    plan = made_up_plan()
    groups = tuple(group.model_copy(update={"effects": ()}) for group in plan.groups)
    settings = plan.settings | {"criterion": "magnitude"}
    return plan.model_copy(update={"settings": settings, "groups": groups})


def accuracy_change(drop: float = 0.007) -> AccuracyChange:
    dense = Accuracy(top1=0.9205, low=0.9078, high=0.9316, images=2000)
    pruned = Accuracy(top1=0.9205 - drop, low=0.9003, high=0.9250, images=2000)
    return AccuracyChange(
        dense=dense, pruned=pruned, drop=drop, low=drop - 0.005, high=drop + 0.005, agreement=0.951
    )


def latency(p50: float, *, seed: int, batch: int = 1) -> Latency:
    rng = random.Random(seed)
    samples = [p50 * (1 + 0.04 * rng.expovariate(1.0)) for _ in range(200)]
    samples[17] = 6 * p50
    ordered = sorted(samples)
    return Latency(
        batch=batch,
        samples_ms=tuple(samples),
        warmup=20,
        p50_ms=ordered[99],
        p90_ms=ordered[179],
        p99_ms=ordered[197],
        mean_ms=sum(samples) / len(samples),
        threads=2,
        provider="CPUExecutionProvider",
    )


def made_up_targets() -> tuple[TargetResult, ...]:
    ran = TargetResult(
        engine=EngineArtifact(
            target="onnxruntime",
            path=Path("model.onnx"),
            sha256=sha256_text("onnx"),
            size_bytes=669_312,
            build_seconds=0.21,
            precision="fp32",
            runnable=True,
            versions={"onnxruntime": "1.31.1"},
            device="CPUExecutionProvider",
        ),
        parity=Parity(
            reference="PyTorch, pruned",
            candidate="onnxruntime",
            max_abs=4.1e-6,
            tolerance=1e-3,
            images=64,
            batches=(1, 16),
        ),
        accuracy=accuracy_change(),
        latency=latency(0.61, seed=1),
        dense_latency=latency(0.83, seed=2),
    )
    not_run = TargetResult(
        engine=EngineArtifact(
            target="tensorrt-rtx",
            path=Path("engine/tensorrt-rtx/model.engine"),
            sha256=sha256_text("engine"),
            size_bytes=1_402_880,
            build_seconds=0.9,
            precision="fp32",
            runnable=False,
            reason="no NVIDIA driver is present, so the engine was built ahead of time and not run",
            versions={"tensorrt-rtx": "1.7.1.116"},
            device="sm75, sm80, sm86, sm89, sm120",
        )
    )
    return ran, not_run


def made_up_manifest(**changes: Any) -> Manifest:
    plan = made_up_plan()
    images = {"count": 2000, "classes": 10, "mapping": "the set's own class indices"}
    manifest = Manifest(
        created="2026-11-22T12:00:00Z",
        tool_version="0.1.0",
        model=ModelSpec(
            name="demo-resnet",
            source="demo",
            weights="embedded, trained by this project",
            weights_sha256=sha256_text("weights"),
            num_classes=10,
            label_space="fashion-mnist",
            class_names=("T-shirt/top", "Trouser"),
            preprocessing=Preprocessing(
                input_size=(1, 28, 28), mean=(0.286,), std=(0.353,), resize_shorter=28
            ),
        ),
        calibration=DataSpec(
            source="fashion-mnist-calibration",
            sha256=sha256_text("calibration"),
            **(images | {"count": 512}),  # type: ignore[arg-type]
        ),
        validation=DataSpec(
            source="fashion-mnist-test",
            sha256=sha256_text("test"),
            **images,  # type: ignore[arg-type]
        ),
        ratio_effective={of: plan.effective(of) for of in ("params", "channels", "macs")},
        dense=DENSE,
        pruned=PRUNED,
        onnx=OnnxArtifact(
            path=Path("model.onnx"),
            sha256=sha256_text("onnx"),
            size_bytes=669_312,
            opset=18,
            nodes=62,
            inputs=(TensorSpec(name="input", dtype="float32", shape=("batch", 1, 28, 28)),),
            outputs=(TensorSpec(name="logits", dtype="float32", shape=("batch", 10)),),
        ),
        export_parity=(
            Parity(
                reference="PyTorch, pruned",
                candidate="export",
                max_abs=3.8e-6,
                tolerance=1e-3,
                images=64,
                batches=(1, 16),
            ),
        ),
        torch_accuracy=accuracy_change(),
        targets=made_up_targets(),
        settings={
            "seed": 0,
            "ratio": 0.4,
            "ratio_of": "params",
            "effect": "kl",
            "batch": BatchRange().model_dump(),
            "target": ["onnxruntime", "tensorrt-rtx"],
        },
        versions={"torch": "2.13.0", "onnx": "1.23.2", "onnxruntime": "1.31.1"},
        device=Device(cpu="Example CPU", cores=2, memory_mib=7963, platform="Linux x86_64"),
        stages={"load": "reused", "plan": "run", "export": "run"},
    )
    return manifest.model_copy(update=changes)


def write_made_up_bundle(folder: Path, **changes: Any) -> Manifest:
    """Fill a folder as a build does, with stand-in bytes for weights, graph and engine."""
    (folder / "engine" / "tensorrt-rtx").mkdir(parents=True)
    (folder / "plan.json").write_text(made_up_plan().canonical_json())
    (folder / "pruned.safetensors").write_bytes(b"weights")
    (folder / "model.onnx").write_bytes(b"graph")
    (folder / "engine" / "tensorrt-rtx" / "model.engine").write_bytes(b"engine")
    manifest = made_up_manifest(**({"files": list_files(folder)} | changes))
    return write_sealed(folder / "manifest.json", agreeing(manifest))


def agreeing(manifest: Manifest) -> Manifest:
    """The same with the digests and sizes that ``files`` has of the graph and the engines."""
    refs = {ref.path: ref.model_dump(exclude={"path"}) for ref in manifest.files}
    targets = tuple(
        target.model_copy(
            update={"engine": target.engine.model_copy(update=refs.get(str(target.engine.path)))}
        )
        for target in manifest.targets
    )
    onnx = manifest.onnx.model_copy(update=refs.get(str(manifest.onnx.path)))
    return manifest.model_copy(update={"onnx": onnx, "targets": targets})


def reseal(file: Path, told: dict[str, Any] | None = None) -> None:
    """Seal a manifest.json or build.json that a test has changed, or writes."""
    told = json.loads(file.read_text()) if told is None else told
    file.write_bytes(sealed(json.dumps(told | {"seal": UNSEALED})))
