"""Accuracy, parity and latency of what was built, and the manifest that says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cswap_deploy.artifacts import (
    AccuracyChange,
    BatchRange,
    Latency,
    Manifest,
    PrunePlan,
    TargetResult,
    read_value,
    sha256_text,
)
from cswap_deploy.stages.run import (
    PARITY_BATCHES,
    SCORING_BATCH,
    ExportRecord,
    Floats,
    Run,
    calibration,
    once,
    parity_images,
    pruned_module,
    require_parity,
    runner,
    tool_versions,
)
from cswap_deploy.store import stage_key

if TYPE_CHECKING:
    from cswap_deploy.targets import Session, Target


_VERSION = 1
"""Raised when this stage's code changes what it writes."""
ALL_TOOLS = (
    "torch", "torchvision", "timm", "torch-pruning", "onnx", "onnxscript", "onnxsim", "onnxruntime",
    "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "numpy", "scipy", "pillow", "safetensors",
)  # fmt: skip


def validate_stage(
    run: Run, plan: PrunePlan, pruned: Path, exported: Path, engines: Mapping[str, Path]
) -> Manifest:
    """Accuracy, parity and latency of every engine that this machine can run."""
    from cswap_deploy import __version__
    from cswap_deploy.measure.device import describe_device

    record = read_value(exported / "export.json", ExportRecord)
    device = describe_device()
    config = run.config
    settings = {
        name: getattr(config, name)
        for name in ("latency_batch", "latency_runs", "threads", "parity_tolerance")
    }
    inputs = {
        "onnx": record.model.sha256,
        "dense": record.dense.sha256,
        "validation": run.samples.validation.spec.sha256,
        "device": sha256_text(device.canonical_json()),
    }
    scores = score_stage(run, plan, pruned)
    results = []
    for target, folder in engines.items():
        run.progress.stage("validate", target)
        name = f"validate/{target}"
        key = run.keys[name] = stage_key(
            "validate",
            version=_VERSION,
            inputs=inputs | {"engine": run.keys[f"engine/{target}"], "scores": run.keys["score"]},
            settings=settings,
            tools=tool_versions("cswap-deploy", "torch", "timm", "onnxruntime"),
        )
        done = once(
            run, name, key,
            partial(_validate, run, plan, pruned, exported, folder, scores / "classes.npz"),
        )  # fmt: skip
        results.append(read_value(done / "result.json", TargetResult))
        run.progress.done(_summary(results[-1]), reused=run.stages[name] == "reused")
    return Manifest(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        tool_version=__version__,
        model=run.spec,
        calibration=run.samples.calibration.spec,
        validation=run.samples.validation.spec,
        shared_images=run.samples.shared_images,
        ratio_requested=config.ratio,
        ratio_of=config.ratio_of,
        ratio_effective={of: plan.effective(of) for of in ("params", "channels", "macs")},
        dense=plan.dense,
        pruned=plan.pruned,
        onnx=record.model,
        export_parity=record.parity,
        torch_accuracy=read_value(scores / "accuracy.json", AccuracyChange),
        targets=tuple(results),
        scoring=plan.scoring,
        settings=config.model_dump(mode="json"),
        versions=tool_versions(*ALL_TOOLS),
        device=device,
        fallbacks=tuple(dict.fromkeys(run.fallbacks + run.store.damaged)),
        stages=dict(run.stages),
    )


def score_stage(run: Run, plan: PrunePlan, pruned: Path) -> Path:
    """What both networks predict in PyTorch: ``classes.npz`` and ``accuracy.json``."""
    run.progress.stage("score", "PyTorch, dense and pruned")
    key = run.keys["score"] = stage_key(
        "score",
        version=_VERSION,
        inputs={"pruned": run.keys["prune"], "validation": run.samples.validation.spec.sha256},
        settings={},
        tools=tool_versions("cswap-deploy", "torch", "timm"),
    )

    def make(out: Path) -> None:
        from cswap_deploy.measure.accuracy import accuracy_change

        dense = _classify(run, runner(run.loaded.module), "the dense network")
        smaller = _classify(run, runner(pruned_module(run, pruned, plan)), "the pruned network")
        np.savez(out / "classes.npz", dense=dense, pruned=smaller)
        change = accuracy_change(dense, smaller, run.samples.validation.labels)
        (out / "accuracy.json").write_text(change.canonical_json())

    folder = once(run, "score", key, make)
    change = read_value(folder / "accuracy.json", AccuracyChange)
    run.progress.done(
        f"top-1 {change.dense.top1:.2%} -> {change.pruned.top1:.2%}",
        reused=run.stages["score"] == "reused",
    )
    return folder


def _validate(
    run: Run,
    plan: PrunePlan,
    pruned: Path,
    exported: Path,
    folder: Path,
    classes: Path,
    out: Path,
) -> None:
    from cswap_deploy.measure.accuracy import accuracy_change
    from cswap_deploy.measure.parity import parity
    from cswap_deploy.targets import get_target

    config = run.config
    result = read_value(folder / "result.json", TargetResult)
    engine = result.engine.model_copy(update={"path": _engine_file(result, folder, exported)})
    if engine.runnable:
        adapter = get_target(engine.target)
        session = adapter.load(engine, threads=config.threads)
        compared = parity(
            runner(pruned_module(run, pruned, plan)), session.run, parity_images(run),
            reference_name="pruned network, PyTorch", candidate_name=f"engine, {engine.target}",
            tolerance=config.parity_tolerance, batches=PARITY_BATCHES,
        )  # fmt: skip
        found = _classify(run, session.run, f"the engine of {engine.target}")
        dense = np.load(classes)["dense"]
        change = accuracy_change(dense, found, run.samples.validation.labels)
        latency, dense_latency = _latency(run, adapter, session, exported)
        result = TargetResult(
            engine=result.engine, parity=require_parity(compared), accuracy=change, latency=latency,
            dense_latency=dense_latency,
        )  # fmt: skip
    (out / "result.json").write_text(result.canonical_json())


def _classify(run: Run, network: Callable[[Floats], Floats], what: str) -> Any:
    """Predicted class of every validation image, (N,)."""
    from cswap_deploy.data import normalised_batches
    from cswap_deploy.measure.accuracy import predict

    images = run.samples.validation
    run.progress.begin(f"scoring {what}", len(images.labels))

    def batches() -> Any:
        for batch, _ in normalised_batches(images, run.spec.preprocessing, batch=SCORING_BATCH):
            yield batch
            run.progress.advance(len(batch))

    logits = predict(network, batches(), batch=min(SCORING_BATCH, run.config.max_batch))
    run.progress.end()
    return logits.argmax(1)


def _latency(
    run: Run, adapter: Target, session: Session, exported: Path
) -> tuple[Latency, Latency]:
    """Pruned and dense graph on the same runtime, interleaved."""
    from cswap_deploy.measure.latency import measure_latency

    config = run.config
    record = read_value(exported / "export.json", ExportRecord)
    graph = record.dense.model_copy(update={"path": exported / "dense.onnx"})
    run.progress.begin(f"timing {config.latency_runs} calls of each network", 0)
    batch = BatchRange(min=1, opt=config.latency_batch, max=config.max_batch)
    with run.store.scratch() as folder:
        dense = adapter.build(graph, batch=batch, out_dir=folder)
        images = calibration(run)[0].contiguous().numpy()
        rows = np.arange(config.latency_batch) % len(images)
        times = measure_latency(
            {"pruned": session, "dense": adapter.load(dense, threads=config.threads)},
            images=images[rows], runs=config.latency_runs,
        )  # fmt: skip
    run.progress.end()
    return times["pruned"], times["dense"]


def _engine_file(result: TargetResult, folder: Path, exported: Path) -> Path:
    """Where an engine's file lies in the store: its own folder, or the graph itself."""
    name = result.engine.path.name
    own = folder / name
    return own if own.is_file() else exported / name


def _summary(result: TargetResult) -> str:
    if result.accuracy is None or result.latency is None:
        return f"not run on this machine: {result.engine.reason}"
    change = result.accuracy
    text = f"top-1 {change.dense.top1:.2%} -> {change.pruned.top1:.2%}"
    if result.dense_latency is not None:
        text += f", p50 {result.dense_latency.p50_ms:.2f} -> {result.latency.p50_ms:.2f} ms"
    return text
