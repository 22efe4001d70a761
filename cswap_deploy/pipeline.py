"""A build: the stages in order, and the folder they leave.

A folder that holds the results so far (``build.json`` and the stages' files) can be carried to
another machine and gone on with; a bundle is such a folder with all stages done.
"""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cswap_deploy.config import Config, load_config, sections
from cswap_deploy.errors import ArtifactError, UsageError
from cswap_deploy.progress import Progress, Silent
from cswap_deploy.records.bundle import (
    BUILD,
    DENSE,
    MODEL,
    PLAN,
    SIGNATURE,
    WEIGHTS,
    BuildRecord,
    describe,
    read_build,
    read_bundle,
    verify_bundle,
)
from cswap_deploy.records.files import atomic_folder, check_output, list_files
from cswap_deploy.records.graphs import SCORE, Score
from cswap_deploy.records.manifest import Manifest, TargetResult
from cswap_deploy.records.plan import PrunePlan
from cswap_deploy.records.store import Store
from cswap_deploy.records.value import now, read_value, write_sealed
from cswap_deploy.runtime.manifest import MANIFEST
from cswap_deploy.settings import flag_of

if TYPE_CHECKING:
    from torch import nn

    from cswap_deploy.data import Samples
    from cswap_deploy.export.stage import Graphs
    from cswap_deploy.gate.budgets import BudgetResult
    from cswap_deploy.models.load import LoadedModel
    from cswap_deploy.report.classes import Evidence
    from cswap_deploy.report.document import Section
    from cswap_deploy.run import Run, State
    from cswap_deploy.stages import PrunedFiles

    Inputs = tuple[LoadedModel, Samples]

Stage = Literal["prune", "export", "engine", "validate"]
_EVALUATIONS, _EXPORTS = 4, 3
"""Passes over the validation images, and times of tracing, that the stages after pruning take."""
_TIMED = 9
"""Networks that are exported to be timed, where a latency is the aim."""
_ORDER: tuple[Stage, ...] = ("prune", "export", "engine", "validate")
_TOOLS = (
    "torch", "torchvision", "timm", "onnx", "onnxscript", "onnxsim", "onnxruntime",
    "onnxruntime-gpu", "onnx-ir", "openvino", "nncf", "tensorrt", "tensorrt-rtx", "pycuda", "numpy",
    "scipy", "pillow", "safetensors",
)  # fmt: skip
"""Whose versions the manifest has."""


@dataclass(frozen=True, slots=True)
class Built:
    """What a build left: a bundle, or the first stages of one."""

    path: Path
    plan: PrunePlan
    manifest: Manifest | None
    """None where validation was not reached."""
    stages: dict[str, State]
    results: tuple[BudgetResult, ...] = ()
    """Results of the budgets, where some were given."""

    def plain(self) -> dict[str, Any]:
        """The same as plain data, for ``--json``."""
        plan = self.plan
        told = {
            "ratio_requested": plan.ratio_requested,
            "ratio_of": plan.ratio_of,
            "ratio_effective": plan.removed,
            "dense": plan.dense.model_dump(),
            "pruned": plan.pruned.model_dump(),
        }
        if self.manifest is not None:
            told = describe(self.manifest)
        return {"bundle": str(self.path), "stages": self.stages} | told


def build(
    config: Config,
    *,
    module: nn.Module | None = None,
    until: Stage = "validate",
    source: Path | None = None,
    inputs: Inputs | None = None,
    goes_on: bool = False,
    progress: Progress | None = None,
) -> Built:
    """Run the stages up to one of them and leave the result in ``config.bundle_path()``.

    Args:
        config: What to build and how.
        module: The network itself, where ``config.model`` only labels it.
        until: The last stage to run.
        source: A folder of an earlier, shorter build to go on from.
        inputs: The network and its images, where they are loaded already.
        goes_on: Whether a deeper pruning will go on from this one's last round.
        progress: Told of everything that takes time.

    Raises:
        CswapError: A subclass says what failed; see ``errors``.
    """
    from cswap_deploy import stages
    from cswap_deploy.gate.budgets import check_budgets, read_budgets
    from cswap_deploy.measure.chance import check_labels
    from cswap_deploy.run import Run

    progress = progress if progress is not None else Silent()
    output = config.bundle_path()
    check_output(output)
    budgets = None if config.measure.budget is None else read_budgets(config.measure.budget)
    check_names(config, until)

    loaded, samples = inputs or stages.load(config, module, progress)
    run = Run(config, loaded, samples, Store(config.run.store), progress, goes_on=goes_on)
    run.fallbacks += loaded.notes
    run.dense_checks = check_labels(config, loaded, samples, progress)
    pruned = stages.prune(run) if source is None else stages.take_pruned(run, source)
    if source is None and config.prune.recover is not None and config.prune.ratio > 0:
        pruned = stages.recover(run, pruned)
    graphs = stages.export(run, pruned) if _reached(until, "export") else None
    engines: dict[str, Path] = {}
    if graphs is not None and _reached(until, "engine"):
        engines = {name: stages.engine(run, name, graphs) for name in config.engine.target}
    manifest: Manifest | None = None
    results: tuple[BudgetResult, ...] = ()
    if graphs is not None and _reached(until, "validate"):
        manifest = _measure(run, pruned, graphs, engines)
        results = check_budgets(manifest, budgets) if budgets is not None else ()

    with atomic_folder(output) as folder:
        _assemble(run, folder, pruned, graphs, engines)
        if manifest is not None:
            manifest = _close(run, folder, manifest, pruned.plan, results)
    return Built(output, pruned.plan, manifest, run.stages, results)


def forecast(config: Config, *, progress: Progress | None = None) -> dict[str, Any]:
    """What a build would do and how long it would take; nothing is written.

    Args:
        config: What to build and how.
        progress: Told of loading and of the trial measurement.

    Returns:
        Plain data: groups and units, what cannot be removed, the network's size, and the seconds
        that measuring, pruning and the whole build take, from what was timed on this machine.

    Raises:
        CswapError: What would fail early fails here too, with the same message.
    """
    from cswap_deploy.data import calibration_set
    from cswap_deploy.measure.chance import check_labels
    from cswap_deploy.pruning.forecast import forecast_pruning
    from cswap_deploy.stages import load

    begun = time.perf_counter()
    progress = progress if progress is not None else Silent()
    check_output(config.bundle_path())
    check_names(config, "validate")
    loaded, samples = load(config, None, progress)
    checks = check_labels(config, loaded, samples, progress)
    told: dict[str, Any] = {
        "model": loaded.spec.name,
        "weights": loaded.spec.weights,
        "task": loaded.spec.task,
        "calibration_images": samples.calibration.spec.count,
        "validation_images": samples.validation.spec.count,
        "output": str(config.bundle_path()),
        "targets": list(config.engine.target),
        "dense_top1": {check.part: check.right / check.images for check in checks},
    }
    if config.prune.ratio > 0:
        progress.begin("timing a few units", 0)
        steps, task = loaded.spec.preprocessing, loaded.spec.task
        calibration = calibration_set(samples.calibration, steps, task=task)
        told |= forecast_pruning(loaded.module, calibration, config=config.prune)
        told["build_seconds"] = round(time.perf_counter() - begun + _remaining(told, config))
        progress.end()
    return told


def _remaining(told: Mapping[str, Any], config: Config) -> float:
    """Seconds of a build after loading: pruning, two exports, evaluations, timing the engines.

    A TensorRT build takes minutes more, which its builder alone knows.
    """
    one = told["pass_seconds"] / told["calibration_images"]
    evaluated = _EVALUATIONS * one * told["validation_images"]
    timed = 2 * one * config.measure.latency_runs * len(config.engine.target)
    exports = _EXPORTS + _TIMED * (config.prune.ratio_of == "latency")
    seconds: float = told["prune_seconds"] + exports * told["tracing_seconds"] + evaluated + timed
    return seconds


def profile_kit(
    config: Config, *, output: Path, progress: Progress | None = None
) -> dict[str, Any]:
    """Leave graphs of a network at several widths, to be timed on the device that counts.

    No images are needed: what a call takes does not depend on them, nor on the weights.

    Args:
        config: The network, what may be removed from it, opset and timed batch.
        output: Folder to leave the kit in.
        progress: Told of everything that takes time.

    Returns:
        Plain data: the folder, its graphs, and what to run there.

    Raises:
        CswapError: The network cannot be loaded, has nothing to remove, or cannot be exported.
    """
    import torch

    from cswap_deploy.models.load import load_model
    from cswap_deploy.pruning.prepare import prepare
    from cswap_deploy.targets.aim import write_kit

    progress = progress if progress is not None else Silent()
    check_output(output)
    progress.stage("profile-kit", config.model.model)
    progress.begin("exporting networks of several widths", 0)
    loaded = load_model(config.model, seed=config.run.seed)
    size = loaded.spec.preprocessing.input_size
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    network = prepare(loaded.module, images, config.prune)
    kit = write_kit(network, loaded.spec, config, output)
    progress.done(f"{len(kit.graphs)} graphs, batch {kit.batch}", reused=False)
    return {
        "kit": str(output), "model": kit.model, "graphs": len(kit.graphs), "batch": kit.batch,
        "then": f"cswap-run --profile {output.name} -o device.json, and --latency-table here",
    }  # fmt: skip


def add_to_report(bundle: Path, more: Section) -> None:
    """Put another section into a bundle's page, and its digest into the manifest."""
    from cswap_deploy.report.pages import with_section

    page = bundle / "report.html"
    page.write_text(with_section(page.read_text(), more))
    _seal(bundle, read_bundle(bundle))


def going_on(folder: Path, given: dict[str, Any], until: Stage) -> Config:
    """The settings that a folder was built with, under those that are given now.

    A folder may come from anyone: what names code or a file of this machine is not taken from it.

    Args:
        folder: What an earlier stage left, or a bundle.
        given: By name; ``None`` counts as not given.
        until: The last stage that is to run.

    Raises:
        ArtifactError: The folder holds no build, or is damaged.
        UsageError: It names what must be named by whoever goes on, or would lose its manifest.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if (folder / MANIFEST).exists():
        _refuse_to_undo(folder, given, until)
        verify_bundle(folder)
    record = read_build(folder)
    try:
        before = load_config(**record.settings).settings()
    except UsageError as err:
        raise ArtifactError(
            f"{folder / BUILD} has no settings of this version: {err}", fix="prune again"
        ) from err
    named = {name: before[name] for name in before if _is_of_a_machine(name, before[name])}
    if odd := [name for name, value in named.items() if not str(value).isprintable()]:
        raise ArtifactError(f"{folder / BUILD} names no file and no code as {', '.join(odd)}")
    if unsaid := {name: named[name] for name in named.keys() - given.keys() - {"output", "store"}}:
        flags = [
            f"--{n.replace('_', '-')} {shlex.quote(str(v))}" for n, v in sorted(unsaid.items())
        ]
        raise UsageError(
            f"{folder} was built with code or files that it only names, which may be anyone's; "
            "they are used when you name them",
            fix=f"if these are yours, add {' '.join(flags)}",
        )
    if given.get("precision") not in (None, before["precision"]):
        # What was set for another precision is not for this one.
        for name in ("int8_calibration", "int8_quantizer", "keep_fp32", "precision_drop"):
            del before[name]
    kept = {name: value for name, value in before.items() if name not in named}
    return load_config(**(kept | {"output": folder} | given))


def _refuse_to_undo(folder: Path, given: dict[str, Any], until: Stage) -> None:
    output = given.get("output")
    if until != "validate" and (output is None or Path(output).resolve() == folder.resolve()):
        raise UsageError(
            f"{folder} is a finished bundle: {until} would leave it without manifest and reports",
            fix=f"pass another folder with -o, or go to the end: `cswap-deploy validate {folder}`",
        )


def _is_of_a_machine(name: str, value: Any) -> bool:
    """Whether a setting names code, or a file of the machine that it was made on."""
    section = next(kind for kind in sections().values() if name in kind.model_fields)
    if value is None or not flag_of(section, name).local:
        return False
    if name == "model":
        return ":" in value
    return not (isinstance(value, str) and value.startswith("hf:"))


def check_names(config: Config, until: Stage) -> None:
    """Fail on a mistyped name or what is not there now rather than after minutes of work."""
    from cswap_deploy.pruning.importance import importance_of
    from cswap_deploy.targets import get_target

    importance_of(config.prune.criterion)
    if config.measure.metric is not None and _reached(until, "validate"):
        from cswap_deploy.measure.metric import load_metric

        load_metric(config.measure.metric)
    for target in config.engine.target if _reached(until, "engine") else ():
        get_target(target).check(config.engine.options, int8=config.export.int8)
    if config.export.int8_quantizer == "modelopt" and _reached(until, "export"):
        from cswap_deploy.export.modelopt import modelopt_version

        modelopt_version()


def _reached(until: Stage, stage: Stage) -> bool:
    return _ORDER.index(stage) <= _ORDER.index(until)


def _measure(run: Run, pruned: PrunedFiles, graphs: Graphs, engines: dict[str, Path]) -> Manifest:
    """Measure every engine, and say what was built from what."""
    from cswap_deploy import stages
    from cswap_deploy.run import tool_versions

    scores = stages.score(run, pruned)
    before = stages.Measured(pruned, graphs, scores)
    results = tuple(stages.validate(run, name, built, before) for name, built in engines.items())
    plan, samples, score = pruned.plan, run.samples, read_value(scores / SCORE, Score)
    return Manifest(
        created=now(),
        tool_version=tool_versions("cswap-deploy")["cswap-deploy"],
        model=run.loaded.spec,
        calibration=samples.calibration.spec,
        validation=samples.validation.spec,
        shared_images=samples.shared_images,
        dense_checks=run.dense_checks,
        ratio_effective=plan.removed,
        dense=plan.dense,
        pruned=plan.pruned,
        onnx=graphs.model.model_copy(update={"path": Path(MODEL)}),
        precision=graphs.precision,
        export_parity=graphs.parity,
        torch_accuracy=score.accuracy,
        torch_agreement=score.agreement,
        torch_outputs=score.outputs,
        metric=score.metric,
        targets=results,
        scoring=plan.scoring,
        # A latency that was asked for is a ratio once the dense network was timed.
        settings=run.config.settings() | {"ratio": plan.settings["ratio"]},
        versions=tool_versions(*_TOOLS),
        device=run.device,
        fallbacks=tuple(dict.fromkeys([*run.loaded.notes, *run.fallbacks, *run.store.damaged])),
        stages=dict(run.stages),
    )


def _assemble(
    run: Run, folder: Path, pruned: PrunedFiles, graphs: Graphs | None, engines: dict[str, Path]
) -> None:
    """Copy what the stages left in the store, and say where the pruned network came from."""
    for name in (PLAN, WEIGHTS):
        shutil.copyfile(pruned.folder / name, folder / name)
    record = BuildRecord(
        settings=run.config.settings(),
        prune_key=run.keys["prune"],
        dense_weights_sha256=run.loaded.spec.weights_sha256,
        files=list_files(folder),
    )
    write_sealed(folder / BUILD, record)
    if graphs is not None:
        shutil.copyfile(graphs.folder / MODEL, folder / MODEL)
        if run.config.export.with_dense:
            shutil.copyfile(graphs.dense.path, folder / DENSE)
    for target, made in engines.items():
        engine = read_value(made / "result.json", TargetResult).engine
        if (made / engine.path).is_file():  # else the graph is the engine
            place = folder / "engine" / target
            place.mkdir(parents=True)
            for name in (engine.path.name, *engine.extra_files):
                shutil.copyfile(made / name, place / name)
    _gather_predictions(run, folder)


def _evidence(run: Run, folder: Path) -> Evidence | None:
    """What was predicted, for the report; with the images where they may be shown."""
    from cswap_deploy.measure.accuracy import PREDICTIONS, read_predictions
    from cswap_deploy.report.classes import Evidence

    if not (folder / PREDICTIONS).is_file():
        return None
    images = None if run.config.measure.no_images else run.samples.validation.images
    return Evidence(*read_predictions(folder / PREDICTIONS), images)


def _gather_predictions(run: Run, folder: Path) -> None:
    """What every network predicted of the validation images, in one file."""
    from cswap_deploy.measure.accuracy import PREDICTIONS, read_predictions, write_predictions

    networks: dict[str, Any] = {}
    for name, made in run.made.items():
        if name.partition("/")[0] in ("score", "validate") and (made / PREDICTIONS).is_file():
            networks |= read_predictions(made / PREDICTIONS)[0]
    if networks:
        images = run.samples.validation
        write_predictions(
            folder / PREDICTIONS, networks, images.labels if images.spec.labelled else None
        )


def _close(
    run: Run, folder: Path, manifest: Manifest, plan: PrunePlan, checked: tuple[BudgetResult, ...]
) -> Manifest:
    """Name every engine's file, add budgets and reports, and close with the manifest."""
    from cswap_deploy.report.pages import render_html, render_markdown

    results = []
    for result in manifest.targets:
        own = Path("engine", result.engine.target, result.engine.path.name)
        path = own if (folder / own).is_file() else Path(MODEL)
        results.append(
            result.model_copy(update={"engine": result.engine.model_copy(update={"path": path})})
        )
    manifest = manifest.model_copy(update={"targets": tuple(results)})
    if (budget := run.config.measure.budget) is not None:
        shutil.copyfile(budget, folder / "budgets.toml")
    told: dict[str, Any] = {"results": checked, "evidence": _evidence(run, folder)}
    for name, render in (("report.md", render_markdown), ("report.html", render_html)):
        (folder / name).write_text(render(manifest, plan, **told))
    return _seal(folder, manifest)


def _seal(folder: Path, manifest: Manifest) -> Manifest:
    """List what is in the folder now, for people's tools and in the manifest; no longer signed."""
    from cswap_deploy.models.load import weights_licence
    from cswap_deploy.report.sbom import SBOM, render_sbom

    (folder / SIGNATURE).unlink(missing_ok=True)
    files = [ref for ref in list_files(folder) if ref.path not in (MANIFEST, SBOM)]
    licence = weights_licence(manifest.model, manifest.settings)
    (folder / SBOM).write_text(render_sbom(manifest, files, weights_licence=licence))
    files = [ref for ref in list_files(folder) if ref.path != MANIFEST]
    return write_sealed(folder / MANIFEST, manifest.model_copy(update={"files": tuple(files)}))
