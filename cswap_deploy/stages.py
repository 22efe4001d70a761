"""One function for each stage: find its result in the store, or make it there.

A stage's key is over everything that shapes its result (see ``store``), so a second run of the
same build only reads, and a changed input, weight, setting or tool version does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cswap_deploy.artifacts import (
    AccuracyChange,
    BatchRange,
    FileRef,
    Latency,
    Manifest,
    ModelSpec,
    OnnxArtifact,
    Parity,
    PrunePlan,
    TargetResult,
    Value,
    read_value,
    sha256_file,
    sha256_text,
)
from cswap_deploy.bundle import PLAN
from cswap_deploy.config import BuildConfig
from cswap_deploy.errors import ArtifactError, ExportError
from cswap_deploy.progress import Progress
from cswap_deploy.store import Store, compare_files, stage_key

if TYPE_CHECKING:
    import torch
    from torch import nn

    from cswap_deploy.data import Samples
    from cswap_deploy.models.load import LoadedModel
    from cswap_deploy.targets import Session, Target

Floats = np.ndarray[Any, np.dtype[np.float32]]
State = Literal["run", "reused"]
WEIGHTS = "pruned.safetensors"
MODEL = "model.onnx"
BUILD = "build.json"
PARITY_BATCHES = (1, 8)
SCORING_BATCH = 64
_VERSIONS = {"prune": 1, "export": 1, "engine": 1, "score": 1, "validate": 1}
"""Raised when a stage's code changes what it writes."""
EXPORT_TOOLS = (
    "cswap-deploy", "torch", "timm", "onnx", "onnxscript", "onnxsim", "onnxruntime",
)  # fmt: skip
ALL_TOOLS = (
    "torch", "torchvision", "timm", "torch-pruning", "onnx", "onnxscript", "onnxsim", "onnxruntime",
    "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "numpy", "scipy", "pillow", "safetensors",
)  # fmt: skip


class BuildRecord(Value):
    """``build.json``: the settings of a build, and where its pruned network came from."""

    schema_version: Literal[1] = 1
    settings: dict[str, Any]
    prune_key: str
    dense_weights_sha256: str
    files: tuple[FileRef, ...]
    """The plan and the pruned weights."""


class ExportRecord(Value):
    """``export.json`` in the store: both graphs and how true they are."""

    model: OnnxArtifact
    dense: OnnxArtifact
    parity: tuple[Parity, ...]


@dataclass(slots=True)
class Run:
    """What the stages of one build share."""

    config: BuildConfig
    loaded: LoadedModel
    samples: Samples
    store: Store
    progress: Progress
    stages: dict[str, State] = field(default_factory=dict)
    """Stage -> whether it ran or was found."""
    keys: dict[str, str] = field(default_factory=dict)
    """Stage -> its key in the store."""
    fallbacks: list[str] = field(default_factory=list)

    @property
    def spec(self) -> ModelSpec:
        """Of the model."""
        return self.loaded.spec


def prune_stage(run: Run) -> tuple[Path, PrunePlan]:
    """Score and remove; a folder with ``plan.json`` and ``pruned.safetensors``."""
    from cswap_deploy.pruning.resume import RoundStore

    config = run.config
    run.progress.stage("prune", f"{config.ratio:.0%} of {config.ratio_of}")
    names = (
        "ratio", "ratio_of", "round_to", "criterion", "scoring_samples", "rounds", "effect",
        "intervention", "alpha", "min_effect", "refit", "seed",
    )  # fmt: skip
    key = run.keys["prune"] = stage_key(
        "prune",
        version=_VERSIONS["prune"],
        inputs={
            "weights": run.spec.weights_sha256,
            "architecture": _architecture(run),
            "preprocessing": run.spec.preprocessing.model_dump(mode="json"),
            "calibration": run.samples.calibration.spec.sha256,
        },
        settings={name: getattr(config, name) for name in names},
        tools=tool_versions("cswap-deploy", "torch", "timm", "torch-pruning", "scipy"),
    )
    folder = _once(run, "prune", key, lambda out: _prune(run, key, out))
    if run.stages["prune"] == "run":
        RoundStore(run.store, key).forget(config.rounds)
    plan = read_value(folder / PLAN, PrunePlan)
    left = plan.pruned.params / plan.dense.params
    run.progress.done(
        f"{plan.dense.params:,} -> {plan.pruned.params:,} parameters ({1 - left:.1%} removed)",
        reused=run.stages["prune"] == "reused",
    )
    return folder, plan


def take_pruned(run: Run, folder: Path) -> tuple[Path, PrunePlan]:
    """The pruned network that an earlier build left in a folder, checked.

    Raises:
        ArtifactError: A file is missing or changed, or the model is not the one that was pruned.
    """
    record = read_record(folder)
    wrong, _ = compare_files(folder, record.files)
    if wrong:
        raise ArtifactError(
            f"{folder} is damaged: " + "; ".join(wrong),
            fix="copy the folder again, or prune again",
        )
    if record.dense_weights_sha256 != run.spec.weights_sha256:
        raise ArtifactError(
            f"{folder} was pruned from other weights of {run.spec.name}: sha256 "
            f"{record.dense_weights_sha256[:12]}…, these are {run.spec.weights_sha256[:12]}…",
            fix="pass the same --checkpoint, or prune again",
        )
    run.keys["prune"], run.stages["prune"] = record.prune_key, "reused"
    return folder, read_value(folder / PLAN, PrunePlan)


def read_record(folder: Path) -> BuildRecord:
    """What a folder says of the build that made it.

    Raises:
        ArtifactError: The folder holds no build, or its record is damaged.
    """
    if not (folder / BUILD).is_file():
        raise ArtifactError(
            f"{folder} holds no build: it has no {BUILD}",
            fix="name a folder that `cswap-deploy prune -o` or `build -o` wrote",
        )
    return read_value(folder / BUILD, BuildRecord)


def _prune(run: Run, key: str, out: Path) -> None:
    from safetensors.torch import save_file

    from cswap_deploy.causal.progressive import Settings
    from cswap_deploy.pruning.plan import dense_plan, prepare, prune, scoring_images
    from cswap_deploy.pruning.resume import RoundStore

    config = run.config
    images, labels = _calibration(run)
    if config.ratio == 0:
        plan, module = dense_plan(run.loaded.module, images[:2], config.ratio_of), run.loaded.module
    else:
        run.progress.begin("tracing the network", 0)
        prepared = prepare(
            run.loaded.module, images=images, ratio=config.ratio, ratio_of=config.ratio_of,
            round_to=config.round_to,
        )  # fmt: skip
        run.progress.end()
        cswap = config.criterion == "cswap"
        settings = Settings(
            ratio=config.ratio,
            ratio_of=config.ratio_of,
            rounds=config.rounds if cswap else 1,
            scoring_samples=min(scoring_images(config, prepared), len(images)),
            effect=config.effect,
            intervention=config.intervention,
            alpha=config.alpha,
            min_effect=config.min_effect,
            refit=config.refit,
            seed=config.seed,
        )
        rounds = RoundStore(run.store, key)
        state = rounds.load(prepared.module, most=settings.rounds) if config.resume else None
        if state is not None:
            run.progress.note(f"going on after round {state.round} of an interrupted run")
        result = prune(
            prepared, images=images, labels=labels, settings=settings, criterion=config.criterion,
            watcher=run.progress, state=state, checkpoint=rounds.save,
        )  # fmt: skip
        plan, module = result.plan, result.module
    (out / PLAN).write_text(plan.model_dump_json(indent=1))
    state_dict = {k: v.detach().contiguous() for k, v in module.state_dict().items()}
    save_file(state_dict, out / WEIGHTS, metadata={"format": "pt"})


def export_stage(run: Run, pruned: Path, plan: PrunePlan) -> Path:
    """Both networks as ONNX, simplified, each pass compared with PyTorch."""
    config = run.config
    run.progress.stage("export", f"ONNX opset {config.opset}")
    key = run.keys["export"] = stage_key(
        "export",
        version=_VERSIONS["export"],
        inputs={"pruned": run.keys["prune"], "weights": sha256_file(pruned / WEIGHTS)},
        settings={
            name: getattr(config, name) for name in ("opset", "precision", "parity_tolerance")
        },
        tools=tool_versions(*EXPORT_TOOLS),
    )
    folder = _once(run, "export", key, lambda out: _export(run, pruned, plan, out))
    record = read_value(folder / "export.json", ExportRecord)
    run.fallbacks += record.model.notes
    run.progress.done(
        f"{record.model.size_bytes / 2**20:.2f} MiB, {record.model.nodes} nodes, logits within "
        f"{max(p.max_abs for p in record.parity):.1e}",
        reused=run.stages["export"] == "reused",
    )
    return folder


def _export(run: Run, pruned: Path, plan: PrunePlan, out: Path) -> None:
    from cswap_deploy.export.onnx import export_onnx
    from cswap_deploy.export.precision import cast_precision
    from cswap_deploy.export.simplify import simplify_onnx

    images = _parity_images(run)
    networks = {"model": pruned_module(run, pruned, plan), "dense": run.loaded.module}
    graphs: dict[str, OnnxArtifact] = {}
    parities = []
    for name, module in networks.items():
        run.progress.begin(f"exporting the {'pruned' if name == 'model' else 'dense'} network", 0)
        exported = export_onnx(
            module, input_size=run.spec.preprocessing.input_size,
            path=out / f"{name}.exported.onnx", opset=run.config.opset,
        )  # fmt: skip
        simple = simplify_onnx(exported, path=out / f"{name}.onnx")
        graph = cast_precision(simple, precision=run.config.precision, path=out / f"{name}.onnx")
        run.progress.end()
        steps = (
            {"exported": exported, "simplified": graph}
            if name == "model"
            else {"dense, simplified": graph}
        )
        parities += [
            _require(_onnx_parity(run, module, step, images, label))
            for label, step in steps.items()
        ]
        exported.path.unlink()
        graphs[name] = graph.model_copy(update={"path": Path(f"{name}.onnx")})
    record = ExportRecord(model=graphs["model"], dense=graphs["dense"], parity=tuple(parities))
    (out / "export.json").write_text(record.canonical_json())


def engine_stage(run: Run, target: str, exported: Path) -> Path:
    """One target's engine; a folder with ``result.json`` and, where it has one, its file."""
    from cswap_deploy.targets import get_target

    config = run.config
    run.progress.stage("engine", target)
    adapter = get_target(target)
    record = read_value(exported / "export.json", ExportRecord)
    key = run.keys[f"engine/{target}"] = stage_key(
        "engine",
        version=_VERSIONS["engine"],
        inputs={"onnx": record.model.sha256},
        settings={"target": target, "max_batch": config.max_batch, "opt": config.latency_batch},
        tools=adapter.versions(),
    )

    def make(out: Path) -> None:
        graph = record.model.model_copy(update={"path": exported / MODEL})
        batch = BatchRange(min=1, opt=config.latency_batch, max=config.max_batch)
        engine = adapter.build(graph, batch=batch, out_dir=out)
        inside = engine.path.is_relative_to(out)
        relative = engine.path.relative_to(out) if inside else Path("..") / MODEL
        result = TargetResult(engine=engine.model_copy(update={"path": relative}))
        (out / "result.json").write_text(result.canonical_json())

    folder = _once(run, f"engine/{target}", key, make)
    engine = read_value(folder / "result.json", TargetResult).engine
    run.fallbacks += engine.notes
    state = "" if engine.runnable else f"; not run here: {engine.reason}"
    run.progress.done(
        f"{engine.size_bytes / 2**20:.2f} MiB in {engine.build_seconds:.1f} s{state}",
        reused=run.stages[f"engine/{target}"] == "reused",
    )
    return folder


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
            version=_VERSIONS["validate"],
            inputs=inputs | {"engine": run.keys[f"engine/{target}"], "scores": run.keys["score"]},
            settings=settings,
            tools=tool_versions("cswap-deploy", "torch", "timm", "onnxruntime"),
        )
        done = _once(
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
        version=_VERSIONS["score"],
        inputs={"pruned": run.keys["prune"], "validation": run.samples.validation.spec.sha256},
        settings={},
        tools=tool_versions("cswap-deploy", "torch", "timm"),
    )

    def make(out: Path) -> None:
        from cswap_deploy.measure.accuracy import accuracy_change

        dense = _classify(run, _runner(run.loaded.module), "the dense network")
        smaller = _classify(run, _runner(pruned_module(run, pruned, plan)), "the pruned network")
        np.savez(out / "classes.npz", dense=dense, pruned=smaller)
        change = accuracy_change(dense, smaller, run.samples.validation.labels)
        (out / "accuracy.json").write_text(change.canonical_json())

    folder = _once(run, "score", key, make)
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
            _runner(pruned_module(run, pruned, plan)), session.run, _parity_images(run),
            reference_name="pruned network, PyTorch", candidate_name=f"engine, {engine.target}",
            tolerance=config.parity_tolerance, batches=PARITY_BATCHES,
        )  # fmt: skip
        found = _classify(run, session.run, f"the engine of {engine.target}")
        dense = np.load(classes)["dense"]
        change = accuracy_change(dense, found, run.samples.validation.labels)
        latency, dense_latency = _latency(run, adapter, session, exported)
        result = TargetResult(
            engine=result.engine, parity=_require(compared), accuracy=change, latency=latency,
            dense_latency=dense_latency,
        )  # fmt: skip
    (out / "result.json").write_text(result.canonical_json())


def pruned_module(run: Run, pruned: Path, plan: PrunePlan) -> nn.Module:
    """The pruned network, made from the dense architecture, the plan and the weights."""
    import copy

    from safetensors.torch import load_file

    from cswap_deploy.pruning.apply import apply_plan

    module = copy.deepcopy(run.loaded.module)
    if plan.groups:
        module = apply_plan(plan, module, _calibration(run)[0][:2])
    module.load_state_dict(load_file(pruned / WEIGHTS), strict=True)
    return module.eval()


def _once(run: Run, stage: str, key: str, make: Callable[[Path], None]) -> Path:
    """The stage's folder, made unless the store has it."""
    found = run.store.find(key) if run.config.resume else None
    run.stages[stage] = "run" if found is None else "reused"
    if found is None:
        with run.store.create(key) as out:
            make(out)
        found = run.store.find(key)
        assert found is not None
    return found


def _calibration(run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, C, H, W) float32, channels last in memory, and labels (N,)."""
    import torch

    from cswap_deploy.data import normalised

    images = normalised(run.samples.calibration, run.spec.preprocessing)
    tensor = torch.from_numpy(images).contiguous(memory_format=torch.channels_last)
    return tensor, torch.from_numpy(run.samples.calibration.labels)


def _parity_images(run: Run) -> Floats:
    images: Floats = _calibration(run)[0][: max(PARITY_BATCHES)].contiguous().numpy()
    return images


def _runner(module: nn.Module) -> Callable[[Floats], Floats]:
    """A network as a function on arrays."""
    import torch

    def run(images: Floats) -> Floats:
        with torch.inference_mode():
            logits: Floats = module(torch.from_numpy(images)).numpy()
        return logits

    return run


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
        images = _calibration(run)[0].contiguous().numpy()
        rows = np.arange(config.latency_batch) % len(images)
        times = measure_latency(
            {"pruned": session, "dense": adapter.load(dense, threads=config.threads)},
            images=images[rows], runs=config.latency_runs,
        )  # fmt: skip
    run.progress.end()
    return times["pruned"], times["dense"]


def _onnx_parity(
    run: Run, module: nn.Module, graph: OnnxArtifact, images: Floats, label: str
) -> Parity:
    """A graph in ONNX Runtime against the network in PyTorch."""
    from cswap_deploy.measure.parity import parity
    from cswap_deploy.targets.onnxruntime import CpuSession

    return parity(
        _runner(module), CpuSession(graph.path, threads=None).run, images,
        reference_name="PyTorch", candidate_name=f"ONNX, {label}",
        tolerance=run.config.parity_tolerance, batches=PARITY_BATCHES,
    )  # fmt: skip


def _require(compared: Parity) -> Parity:
    if not compared.ok:
        raise ExportError(
            f"{compared.candidate} does not agree with {compared.reference}: logits differ by up "
            f"to {compared.max_abs:.2e} on {compared.images} images, allowed "
            f"{compared.tolerance:.0e}",
            fix="try another --opset, or raise --parity-tolerance if accuracy is what counts",
        )
    return compared


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


def _architecture(run: Run) -> dict[str, Any]:
    """What, beside the weights, decides what a network computes."""
    spec = run.spec
    if spec.source != "factory":
        return {"name": spec.name, "arguments": spec.arguments}
    from cswap_deploy.causal.partition import trace

    # A user's forward can change while its weights stay; the graph shows it.
    return {"graph": sha256_text(trace(run.loaded.module, _calibration(run)[0][:2]).code)}


def tool_versions(*packages: str) -> dict[str, str]:
    """Installed versions; ``absent`` where a package is not installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found
