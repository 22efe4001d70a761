"""Accuracy, parity and latency of what was built, and the manifest that says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cswap_deploy.errors import GateError
from cswap_deploy.records.manifest import Manifest, TargetResult
from cswap_deploy.records.measurements import AccuracyChange, Latency
from cswap_deploy.records.plan import PrunePlan
from cswap_deploy.records.store import stage_key
from cswap_deploy.records.value import read_value, sha256_text
from cswap_deploy.runtime.preprocess import filled_up
from cswap_deploy.stages.precision import Graphs
from cswap_deploy.stages.run import (
    MODEL,
    PARITY_BATCHES,
    SCORING_BATCH,
    ExportRecord,
    Floats,
    Run,
    few_images,
    once,
    parity_images,
    pruned_module,
    require_parity,
    runner,
    tool_versions,
)

if TYPE_CHECKING:
    from cswap_deploy.targets import Session, Target


_VERSION = 3
"""Raised when this stage's code changes what it writes."""
ALL_TOOLS = (
    "torch", "torchvision", "timm", "torch-pruning", "onnx", "onnxscript", "onnxsim", "onnxruntime",
    "onnxruntime-gpu", "onnx-ir", "openvino", "nncf", "tensorrt", "tensorrt-rtx", "pycuda", "numpy",
    "scipy", "pillow", "safetensors",
)  # fmt: skip


def validate_stage(
    run: Run,
    plan: PrunePlan,
    pruned: Path,
    exported: Path,
    graphs: Graphs,
    engines: Mapping[str, Path],
) -> Manifest:
    """Accuracy, parity and latency of every engine that this machine can run."""
    from cswap_deploy import __version__
    from cswap_deploy.measure.device import describe_device

    record = read_value(exported / "export.json", ExportRecord)
    device = describe_device()
    config = run.config
    settings = {
        name: getattr(config, name)
        for name in (
            "timed_batch", "latency_runs", "threads", "parity_tolerance", "precision", "drop_limit",
        )
    }  # fmt: skip
    inputs = {
        "onnx": graphs.model.sha256,
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
            partial(_validate, run, plan, pruned, graphs, folder, scores / "classes.npz"),
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
        onnx=graphs.model.model_copy(update={"path": Path(MODEL)}),
        precision=graphs.precision,
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
    run: Run, plan: PrunePlan, pruned: Path, graphs: Graphs, folder: Path, classes: Path, out: Path
) -> None:
    from cswap_deploy.measure.accuracy import accuracy_change
    from cswap_deploy.measure.parity import parity
    from cswap_deploy.targets import get_target

    config = run.config
    result = read_value(folder / "result.json", TargetResult)
    path = _engine_file(result, folder, graphs)
    engine = result.engine.model_copy(update={"path": path})
    before, labels = np.load(classes), run.samples.validation.labels
    found = None
    if engine.runnable:
        adapter = get_target(engine.target)
        session = adapter.load(engine, threads=config.threads, onnx=graphs.model.path)
        network = _of_any_batch(session.run, config.batch.min)
        compared = parity(
            runner(pruned_module(run, pruned, plan)), network, parity_images(run),
            reference_name="pruned network, PyTorch", candidate_name=f"engine, {engine.target}",
            tolerance=config.parity_tolerance if config.precision == "fp32" else None,
            batches=tuple(min(size, config.batch.max) for size in PARITY_BATCHES),
        )  # fmt: skip
        found, judge = _classify(run, network, f"the engine of {engine.target}"), "this engine"
        latency, dense_latency = _latency(run, adapter, session, graphs)
        result = TargetResult(
            engine=result.engine, parity=require_parity(compared), latency=latency,
            accuracy=accuracy_change(before["dense"], found, labels), dense_latency=dense_latency,
        )  # fmt: skip
    elif config.precision != "fp32":
        stand_in, judge = graphs.stand_in()
        found = _classify(run, stand_in, f"the {config.precision} graph")
    if found is not None and config.precision != "fp32":
        reduced = accuracy_change(before["pruned"], found, labels)
        require_precision(reduced, engine.target, config.precision, config.drop_limit, judge)
        result = result.model_copy(update={"reduced": reduced, "judged_by": judge})
    (out / "result.json").write_text(result.canonical_json())


def require_precision(
    change: AccuracyChange, target: str, precision: str, limit: float, judge: str
) -> None:
    """The gate that every reduced precision must pass; a single image never fails it.

    Raises:
        GateError: More of the top-1 is lost than allowed.
    """
    images = change.dense.images
    if change.drop * images > max(1.0, limit * images) + 1e-6:
        raise GateError(
            f"{target} in {precision} loses {100 * change.drop:.2f} points of top-1 against the "
            f"pruned float32 network ({change.dense.top1:.2%} -> {change.pruned.top1:.2%} on "
            f"{images} images, by {judge}); allowed are {100 * limit:.2f}",
            fix="a wider --precision, --keep-fp32 for what is sensitive, or raise --precision-drop",
        )


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

    logits = predict(network, batches(), batch=min(SCORING_BATCH, run.config.batch.max))
    run.progress.end()
    return logits.argmax(1)


def _of_any_batch(run: Callable[[Floats], Floats], smallest: int) -> Callable[[Floats], Floats]:
    """An engine that takes batches below its profile too, filled up."""

    def network(images: Floats) -> Floats:
        return run(filled_up(images, smallest))[: len(images)]

    return network


def _latency(
    run: Run, adapter: Target, session: Session, graphs: Graphs
) -> tuple[Latency, Latency]:
    """The engine and the dense float32 graph on the same runtime, interleaved."""
    from cswap_deploy.measure.latency import measure_latency

    config = run.config
    run.progress.begin(f"timing {config.latency_runs} calls of each network", 0)
    with run.store.scratch() as folder:
        dense = adapter.build(
            graphs.dense, batch=config.batch, out_dir=folder, options=config.engine_options,
            store=run.store.root,
        )  # fmt: skip
        loaded = adapter.load(dense, threads=config.threads, onnx=graphs.dense.path)
        images = few_images(run, config.timed_batch)
        rows = np.arange(config.timed_batch) % len(images)
        times = measure_latency(
            {"pruned": session, "dense": loaded}, images=images[rows], runs=config.latency_runs
        )
    run.progress.end()
    return times["pruned"], times["dense"]


def _engine_file(result: TargetResult, folder: Path, graphs: Graphs) -> Path:
    """Where an engine's file lies in the store: its own folder, or the graph itself."""
    name = result.engine.path.name
    own = folder / name
    return own if own.is_file() else graphs.folder / name


def _summary(result: TargetResult) -> str:
    if result.accuracy is None or result.latency is None:
        text = f"not run on this machine: {result.engine.reason}"
        if result.reduced is not None:
            text += f"; {result.reduced.pruned.top1:.2%} top-1 by {result.judged_by}"
        return text
    change = result.accuracy
    text = f"top-1 {change.dense.top1:.2%} -> {change.pruned.top1:.2%}"
    if result.dense_latency is not None:
        text += f", p50 {result.dense_latency.p50_ms:.2f} -> {result.latency.p50_ms:.2f} ms"
    return text
