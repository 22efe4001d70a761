"""The stages: each finds its result in the store, or makes it there.

A stage's key is over everything that shapes its result (see ``records.store``), so a second run of
the same build only reads, and a changed input, weight, setting or tool version does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from cswap_deploy.causal.arithmetic import measured_on
from cswap_deploy.config import AIMS, Config
from cswap_deploy.data import Samples, load_samples
from cswap_deploy.errors import ArtifactError
from cswap_deploy.export import precision
from cswap_deploy.export.child import ChildLimits
from cswap_deploy.export.modelopt import modelopt_version
from cswap_deploy.export.onnx import BATCH
from cswap_deploy.export.stage import DENSE, Graphs, export_network
from cswap_deploy.measure import score as scoring
from cswap_deploy.measure.engine import EngineTest, check_graph, images_needed, summary
from cswap_deploy.measure.metric import metric_digest
from cswap_deploy.measure.own_labels import with_own_labels
from cswap_deploy.measure.parity import PARITY_BATCHES
from cswap_deploy.models.load import LoadedModel, load_model, wrap_module
from cswap_deploy.network.deletion import contiguous_state, load_pruned
from cswap_deploy.network.placing import HOST, device_for
from cswap_deploy.network.probabilities import with_output_kind
from cswap_deploy.progress import Progress
from cswap_deploy.pruning.prune import prune as prune_network
from cswap_deploy.pruning.recover import HELD_OUT, Lesson, ProgressStore, recovery_words
from cswap_deploy.pruning.recover import recover as train
from cswap_deploy.pruning.rounds import NEAR
from cswap_deploy.pruning.state import RoundStore
from cswap_deploy.records.amounts import fixed, mebibytes, percent
from cswap_deploy.records.bundle import MODEL, PLAN, WEIGHTS, read_build, read_plan
from cswap_deploy.records.graphs import SCORE, PrecisionRecord, Score
from cswap_deploy.records.manifest import TargetResult
from cswap_deploy.records.plan import PrunePlan
from cswap_deploy.records.value import read_value, sha256_file, sha256_text
from cswap_deploy.run import Run, key_of, tool_versions
from cswap_deploy.targets import (
    MOST_INT8_IMAGES,
    BuildRequest,
    Int8,
    build_and_load,
    get_target,
)
from cswap_deploy.targets.aim import TableAim, aim_at


def load(
    config: Config, module: nn.Module | None, progress: Progress
) -> tuple[LoadedModel, Samples]:
    """The network and its images."""
    progress.stage("load", config.model.model)
    progress.begin(f"loading {config.model.model}", 0)
    if module is not None:
        loaded = wrap_module(module, config.model)
    else:
        loaded = load_model(config.model, seed=config.run.seed)
    progress.end()
    if config.model.task == "auto" and loaded.spec.task != "classify":
        shown = ", ".join(loaded.spec.outputs)
        progress.note(f"taken for task {loaded.spec.task} (outputs {shown}); --task says otherwise")
    samples = load_samples(config.data, model=loaded.spec, seed=config.run.seed, progress=progress)
    calibration, validation = samples.calibration.spec, samples.validation.spec
    progress.done(
        f"{loaded.spec.weights}; {calibration.count} calibration and {validation.count} "
        f"validation images",
        reused=False,
    )
    loaded = with_output_kind(loaded, samples)
    samples = with_own_labels(loaded, samples)
    for note in (*samples.notes(), *loaded.notes):
        progress.note(note)
    return loaded, samples


@dataclass(frozen=True)
class PrunedFiles:
    """``plan.json`` and ``pruned.safetensors`` in a folder."""

    folder: Path
    plan: PrunePlan
    run: Run

    @cached_property
    def module(self) -> nn.Module:
        """The pruned network, made from the dense architecture, the plan and the weights."""
        example = self.run.calibration.images[:2]
        return load_pruned(self.folder / WEIGHTS, self.plan, self.run.loaded.module, example)


def prune(run: Run) -> PrunedFiles:
    """Measure, remove, refit."""
    config = run.config.prune
    run.progress.stage("prune", config.aim)
    aim = aim_at(run.config, run.loaded.spec, run.images, store=run.store, network=run.network_key)
    if isinstance(aim, TableAim):
        table = aim.table
        run.fallbacks.append(
            f"the speed is what {aim.file.name} makes of it ({table.device}, {table.runtime}): it "
            "was not measured there"
        )

    def make(out: Path) -> None:
        done = prune_network(
            run.loaded.module, run.calibration, config=config, seed=run.config.run.seed,
            spec=run.loaded.spec, rounds=rounds, device=aim, progress=run.progress,
        )  # fmt: skip
        run.fallbacks += done.notes
        (out / PLAN).write_text(done.plan.model_dump_json(indent=1))
        save_file(contiguous_state(done.module), out / WEIGHTS, metadata={"format": "pt"})

    settings = config.key() | {"seed": run.config.run.seed}
    if config.recover is not None:
        settings["held_out"] = HELD_OUT
    key: dict[str, Any] = {
        "inputs": {"aim": aim and aim.key, "measured_on": measured_on(device_for(config))}
        | run.calibration_key
        | run.network_key,
        "tools": tool_versions("cswap-deploy", "torch", "timm", "scipy"),
    }
    said = (*AIMS, "waypoints")  # by the path of the rounds
    along = {name: value for name, value in settings.items() if name not in said}
    rounds = RoundStore(
        run.store, key_of("prune", settings=along, **key), resume=run.config.run.resume
    )
    folder = run.stage("prune", make, settings=settings, **key)
    rounds.forget(last=not run.goes_on)
    plan = read_plan(folder)
    run.done(
        "prune",
        f"{plan.dense.params:,} -> {plan.pruned.params:,} parameters "
        f"({percent(plan.effective('params'), 1)} removed)",
    )
    return PrunedFiles(folder, plan, run)


def recover(run: Run, pruned: PrunedFiles) -> PrunedFiles:
    """Train the pruned network towards the dense one for the minutes that were asked for."""
    minutes, seed, task = run.config.prune.recover, run.config.run.seed, run.loaded.spec.task
    assert minutes is not None
    device = device_for(run.config.prune)
    run.progress.stage("recover", f"{minutes:g} min of training, without labels")
    inputs = {
        "weights": sha256_file(pruned.folder / WEIGHTS), "measured_on": measured_on(device),
        **run.calibration_key, **run.network_key,
    }  # fmt: skip
    settings = {"minutes": minutes, "seed": seed}
    tools = tool_versions("cswap-deploy", "torch")
    key = key_of("recover", inputs=inputs, settings=settings, tools=tools)
    kept = ProgressStore(run.store, key, resume=run.config.run.resume)

    def make(out: Path) -> None:
        module, record = train(
            pruned.module, run.loaded.module, run.calibration.images,
            Lesson(minutes, task, seed, device), progress=run.progress, before=kept.load(),
            save=kept.save,
        )  # fmt: skip
        plan = pruned.plan.model_copy(update={"recovery": record})
        (out / PLAN).write_text(plan.model_dump_json(indent=1))
        save_file(contiguous_state(module), out / WEIGHTS, metadata={"format": "pt"})

    folder = run.stage("recover", make, inputs=inputs, settings=settings, tools=tools)
    kept.forget()
    plan = read_plan(folder)
    assert plan.recovery is not None
    run.done("recover", recovery_words(plan.recovery))
    return PrunedFiles(folder, plan, run)


def take_pruned(run: Run, folder: Path) -> PrunedFiles:
    """The pruned network that an earlier build left in a folder, checked.

    Raises:
        ArtifactError: A file is missing or changed, or the model is not the one that was pruned.
    """
    record, spec = read_build(folder), run.loaded.spec
    if record.dense_weights_sha256 != spec.weights_sha256:
        raise ArtifactError(
            f"{folder} was pruned from other weights of {spec.name}: sha256 "
            f"{record.dense_weights_sha256[:12]}…, these are {spec.weights_sha256[:12]}…",
            fix="put the same weights there, or prune again",
        )
    run.keys["prune"], run.stages["prune"] = record.prune_key, "reused"
    return PrunedFiles(folder, read_plan(folder), run)


def export(run: Run, pruned: PrunedFiles) -> Graphs:
    """Both networks as ONNX; the pruned one in the number formats that the engine is to have."""
    config, spec = run.config.export, run.loaded.spec
    run.progress.stage("export", f"ONNX opset {config.graph_opset}")
    weights = {"pruned": run.keys["prune"], "weights": sha256_file(pruned.folder / WEIGHTS)}
    graphs = Graphs.exported(
        _exported(run, MODEL, lambda: pruned.module, weights),
        # apart: the next ratio finds it
        _exported(run, DENSE, lambda: run.loaded.module, run.network_key),
    )
    run.fallbacks += graphs.model.notes
    run.done(
        "export",
        f"{mebibytes(graphs.model.size_bytes)}, {graphs.model.nodes} nodes, "
        f"{'logits' if spec.task == 'classify' else 'outputs'} within "
        f"{max(p.max_abs for p in graphs.parity):.1e}",
    )
    return graphs if config.precision == "fp32" else narrow(run, graphs)


def _exported(
    run: Run, name: str, module: Callable[[], nn.Module], weights: Mapping[str, str]
) -> Path:
    """The folder of one network's graph, ``MODEL`` or ``DENSE``."""
    config, spec = run.config.export, run.loaded.spec

    def make(out: Path) -> None:
        check = partial(
            check_graph, spec=spec, images=run.images(max(PARITY_BATCHES)),
            tolerance=config.parity_tolerance,
        )  # fmt: skip
        run.progress.begin(f"exporting the {'dense' if name == DENSE else 'pruned'} network", 0)
        export_network(module(), name, config=config, spec=spec, check=check, folder=out)
        run.progress.end()

    return run.stage(
        "export" if name == MODEL else "export/dense",
        make,
        inputs=run.calibration_key | {**weights, "outputs": list(spec.outputs)},
        settings=config.export_key(),
        tools=tool_versions(
            "cswap-deploy", "torch", "timm", "onnx", "onnxscript", "onnxsim", "onnxruntime"
        ),
    )


def narrow(run: Run, graphs: Graphs) -> Graphs:
    """The pruned network's graph in the number formats that the engine is to have."""
    config = run.config.export
    run.progress.stage("precision", config.precision)
    tools = tool_versions("cswap-deploy", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu")
    if config.int8_quantizer == "modelopt":
        tools |= {"modelopt": modelopt_version()}

    def make(out: Path) -> None:
        record = precision.narrow(
            graphs.float32, config=config, images=run.images(precision.PRECISION_IMAGES),
            labels=run.labels(precision.PRECISION_IMAGES), path=out / MODEL,
            progress=run.progress, kind=run.loaded.spec.output_kind,
        )  # fmt: skip
        (out / "precision.json").write_text(record.canonical_json())

    folder = run.stage(
        "precision",
        make,
        inputs={"onnx": graphs.float32.sha256} | run.calibration_key,
        settings=config.precision_key(),
        tools=tools,
    )
    record = read_value(folder / "precision.json", PrecisionRecord)
    run.done("precision", precision.summary(record))
    return graphs.narrowed(folder, record)


def engine(run: Run, target: str, graphs: Graphs) -> Path:
    """One target's engine: a folder with ``result.json`` and, where it has one, its file."""
    config = run.config
    run.progress.stage("engine", target)
    adapter = get_target(target)
    # Such a runtime quantises by itself: the layers it fuses are not those of TensorRT.
    itself = adapter.own_int8 and config.export.int8
    graph = graphs.float32 if itself else graphs.model
    settings: dict[str, Any] = {"target": target} | {
        "batch": str(config.engine.batch),
        "options": config.engine.options.model_dump(mode="json"),
    }
    inputs: dict[str, Any] = {"onnx": graph.sha256}
    if itself:
        settings |= {"precision": config.export.precision, "keep_fp32": config.export.keep_fp32}
        inputs |= run.calibration_key

    def make(out: Path) -> None:
        run.progress.begin(f"building the {target} engine", 0)
        int8 = Int8(run.images(MOST_INT8_IMAGES), config.export.keep_fp32) if itself else None
        built = adapter.build(
            BuildRequest(
                onnx=graph, batch=config.engine.batch,
                options=config.engine.options, out_dir=out, int8=int8,
                progress=run.progress, store=run.store.root, trial=ChildLimits.of(config.export),
            )
        )  # fmt: skip
        run.progress.end()
        inside = built.path.is_relative_to(out)
        relative = built.path.relative_to(out) if inside else Path("..") / MODEL
        result = TargetResult(engine=built.model_copy(update={"path": relative}))
        (out / "result.json").write_text(result.canonical_json())

    name = f"engine/{target}"
    folder = run.stage(name, make, inputs=inputs, settings=settings, tools=adapter.fingerprint())
    built = read_value(folder / "result.json", TargetResult).engine
    run.fallbacks += built.notes
    state = "" if built.runnable else f"; not run here: {built.reason}"
    seconds = fixed(built.build_seconds, 1)
    run.done(name, f"{mebibytes(built.size_bytes)} in {seconds} s{state}")
    return folder


def score(run: Run, pruned: PrunedFiles) -> Path:
    """What both networks predict in PyTorch: ``score.json``, and a classifier's predictions."""
    run.progress.stage("score", "PyTorch, dense and pruned")
    spec, metric = run.loaded.spec, run.config.measure.metric

    def make(out: Path) -> None:
        record = scoring.score_networks(
            run.evaluation, run.loaded.module, pruned.module, spec=spec, metric=metric,
            largest=run.config.engine.batch.max, folder=out,
        )  # fmt: skip
        (out / SCORE).write_text(record.canonical_json())

    folder = run.stage(
        "score",
        make,
        inputs={
            "pruned": sha256_file(pruned.folder / WEIGHTS),
            "network": run.network_key,
            "preprocessing": spec.preprocessing.model_dump(mode="json"),
            "validation": run.samples.validation.spec.sha256,
            "metric": "" if metric is None else metric_digest(metric),
            "measured_on": measured_on(HOST),
        },
        settings={"task": spec.task, "metric": metric},
        tools=tool_versions("cswap-deploy", "torch", "timm"),
    )
    run.done("score", scoring.summary(read_value(folder / SCORE, Score)))
    return folder


@dataclass(frozen=True, slots=True)
class Measured:
    """What engines are measured against: the stages before."""

    pruned: PrunedFiles
    graphs: Graphs
    scores: Path
    """See :func:`score`."""


def validate(run: Run, target: str, built: Path, before: Measured) -> TargetResult:
    """Accuracy, parity and latency of one engine; what stands for it where it does not run here.

    Args:
        run: The build.
        target: Of the engine.
        built: See :func:`engine`.
        before: What the engine is measured against.
    """
    config, graphs, name = run.config, before.graphs, f"validate/{target}"
    run.progress.stage("validate", target)

    def make(out: Path) -> None:
        engine = read_value(built / "result.json", TargetResult)
        result = _measure(run, engine, built, before, out)
        (out / "result.json").write_text(result.canonical_json())

    folder = run.stage(
        name,
        make,
        inputs={
            "onnx": graphs.model.sha256,
            "dense": graphs.dense.sha256,
            "validation": run.samples.validation.spec.sha256,
            "device": sha256_text(run.device.canonical_json()),
            "engine": run.keys[f"engine/{target}"],
            "scores": run.keys["score"],
        },
        settings=config.measure.key()
        | {
            "timed_batch": config.timed_batch,
            "parity_tolerance": config.export.parity_tolerance,
            "precision": config.export.precision,
            "drop_limit": config.export.drop_limit,
            "task": run.loaded.spec.task,
            "least_speedup": _least_speedup(run, before.pruned.plan, target),
        },
        tools=tool_versions("cswap-deploy", "torch", "timm", "onnxruntime"),
    )
    result = read_value(folder / "result.json", TargetResult)
    run.done(name, summary(result, pruned=config.prune.ratio > 0))
    return result


def _least_speedup(run: Run, plan: PrunePlan, target: str) -> float:
    """What an engine must reach: the first target's, where this machine was aimed at."""
    config = run.config
    here = config.prune.ratio_of == "latency" and config.prune.latency_table is None
    if not here or target != config.engine.target[0] or plan.ratio_requested == 0:
        return 0.0
    return (1 - NEAR) / (1 - plan.ratio_requested)


def _measure(
    run: Run, result: TargetResult, built: Path, before: Measured, out: Path
) -> TargetResult:
    config, graphs, loaded = run.config, before.graphs, run.loaded
    reference = scoring.reference_of(
        before.scores, loaded.module, loaded.spec, graphs.model.outputs, batch=BATCH
    )
    test = EngineTest(
        before.pruned.module, reference,
        run.images(images_needed(config)), run.evaluation, config, loaded.spec.output_kind,
        _least_speedup(run, before.pruned.plan, result.engine.target), out,
    )  # fmt: skip
    if not result.engine.runnable:
        if config.export.precision == "fp32":
            return result
        return test.emulate(result.engine, *graphs.emulate())
    own = built / result.engine.path.name
    path = own if own.is_file() else graphs.folder / result.engine.path.name
    here = result.engine.model_copy(update={"path": path})
    adapter, threads = get_target(result.engine.target), config.measure.threads
    with run.store.scratch() as scratch:
        dense = BuildRequest(
            graphs.dense, batch=config.engine.batch, options=config.engine.options,
            out_dir=scratch, store=run.store.root,
        )  # fmt: skip
        return test.measure(
            result.engine,
            adapter.load(here, threads=threads, onnx=graphs.model.path),
            partial(build_and_load, adapter, dense, threads=threads),
        )
