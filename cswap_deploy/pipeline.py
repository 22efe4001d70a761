"""A build: the stages in order, and the folder they leave.

A folder that holds the results so far (``build.json`` and the stages' files) can be carried to
another machine and gone on with; a bundle is such a folder with all stages done.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cswap_deploy.old_config import BuildConfig, load_config
from cswap_deploy.progress import Progress, Silent
from cswap_deploy.records.bundle import MANIFEST, PLAN
from cswap_deploy.records.files import atomic_folder, check_output, list_files
from cswap_deploy.records.manifest import Manifest, TargetResult
from cswap_deploy.records.plan import PrunePlan
from cswap_deploy.records.store import Store
from cswap_deploy.records.value import read_value
from cswap_deploy.stages import (
    BUILD,
    MODEL,
    WEIGHTS,
    BuildRecord,
    Run,
    State,
    engine_stage,
    export_stage,
    precision_stage,
    prune_stage,
    read_record,
    take_pruned,
    validate_stage,
)

if TYPE_CHECKING:
    from torch import nn

    from cswap_deploy.data import Samples
    from cswap_deploy.gate.budgets import BudgetVerdict
    from cswap_deploy.models.load import LoadedModel

Stage = Literal["prune", "export", "engine", "validate"]
_ORDER: tuple[Stage, ...] = ("prune", "export", "engine", "validate")


@dataclass(frozen=True, slots=True)
class Bundle:
    """What a build left: a bundle, or the first stages of one."""

    path: Path
    plan: PrunePlan
    manifest: Manifest | None
    """None where validation was not reached."""
    stages: dict[str, State]
    verdicts: tuple[BudgetVerdict, ...] = ()
    """On the budgets, where some were given."""


def build(
    config: BuildConfig,
    *,
    module: nn.Module | None = None,
    until: Stage = "validate",
    source: Path | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Run the stages up to one of them and leave the result in ``config.bundle_path()``.

    Args:
        config: What to build and how.
        module: The network itself, where ``config.model`` only labels it.
        until: The last stage to run.
        source: A folder of an earlier, shorter build to go on from.
        progress: Told of everything that takes time.

    Returns:
        Where the result is, and what it holds.

    Raises:
        CswapError: A subclass says what failed; see ``errors``.
    """
    from cswap_deploy.gate.budgets import check_budgets, read_budgets

    progress = progress if progress is not None else Silent()
    output = config.bundle_path()
    check_output(output)
    budgets = None if config.budget is None else read_budgets(config.budget)
    _check_names(config, until)

    run = Run(config, *_load(config, module, progress), Store(config.store), progress)
    folders: dict[str, Path] = {}
    folders["prune"], plan = prune_stage(run) if source is None else take_pruned(run, source)
    if _reached(until, "export"):
        folders["export"] = export_stage(run, folders["prune"], plan)
        graphs = precision_stage(run, folders["export"])
    engines: dict[str, Path] = {}
    if _reached(until, "engine"):
        for target in config.target:
            engines[target] = engine_stage(run, target, graphs)
            folders[f"engine/{target}"] = engines[target]
    manifest = None
    if _reached(until, "validate"):
        manifest = validate_stage(run, plan, folders["prune"], folders["export"], graphs, engines)
    verdicts: tuple[BudgetVerdict, ...] = ()
    if manifest is not None and budgets is not None:
        verdicts = check_budgets(manifest, budgets)

    with atomic_folder(output) as folder:
        shutil.copyfile(folders["prune"] / PLAN, folder / PLAN)
        shutil.copyfile(folders["prune"] / WEIGHTS, folder / WEIGHTS)
        record = BuildRecord(
            settings=config.model_dump(mode="json"),
            prune_key=run.keys["prune"],
            dense_weights_sha256=run.spec.weights_sha256,
            files=list_files(folder),
        )
        (folder / BUILD).write_text(record.model_dump_json(indent=1))
        if "export" in folders:
            shutil.copyfile(graphs.folder / MODEL, folder / MODEL)
        for target, made in engines.items():
            _place_engine(folder / "engine" / target, made)
        if manifest is not None:
            manifest = _finish(folder, manifest, plan, config, verdicts)
    return Bundle(output, plan, manifest, run.stages, verdicts)


def forecast(config: BuildConfig, *, progress: Progress | None = None) -> dict[str, Any]:
    """What a build would do and how long measuring would take; nothing is written.

    Args:
        config: What to build and how.
        progress: Told of loading and of the trial measurement.

    Returns:
        Plain data: groups and units, what cannot be removed, the network's size, and the seconds
        that measuring takes, from a few units timed on this machine.

    Raises:
        CswapError: What would fail early fails here too, with the same message.
    """
    from cswap_deploy.pruning.forecast import forecast_pruning

    progress = progress if progress is not None else Silent()
    check_output(config.bundle_path())
    _check_names(config, "validate")
    loaded, samples = _load(config, None, progress)
    told: dict[str, Any] = {
        "model": loaded.spec.name,
        "weights": loaded.spec.weights,
        "calibration_images": samples.calibration.spec.count,
        "validation_images": samples.validation.spec.count,
        "output": str(config.bundle_path()),
        "targets": list(config.target),
    }
    if config.ratio > 0:
        progress.begin("timing a few units", 0)
        told |= forecast_pruning(loaded, samples.calibration, config)
        progress.end()
    return told


def settings_of(folder: Path) -> BuildConfig:
    """The settings that a folder was built with, for going on from it.

    Raises:
        ArtifactError: The folder holds no build, or its record is damaged.
    """
    return load_config(**read_record(folder).settings)


def _load(
    config: BuildConfig, module: nn.Module | None, progress: Progress
) -> tuple[LoadedModel, Samples]:
    """The network and its images."""
    from cswap_deploy.data import load_samples
    from cswap_deploy.models.load import load_model, wrap_module

    progress.stage("load", config.model)
    size, mean, std = config.input_size, config.mean, config.std
    progress.begin(f"loading {config.model}", 0)
    if module is not None:
        loaded = wrap_module(module, name=config.model, input_size=size, mean=mean, std=std)
    else:
        loaded = load_model(
            config.model, checkpoint=config.checkpoint, pretrained=config.pretrained,
            seed=config.seed, input_size=size, mean=mean, std=std,
        )  # fmt: skip
    progress.end()
    samples = load_samples(
        data=config.data,
        validation_data=config.validation_data,
        model=loaded.spec,
        calibration_samples=config.calibration_samples,
        validation_samples=config.validation_samples,
        class_map=config.class_map,
        allow_overlap=config.allow_overlap,
        seed=config.seed,
    )
    calibration, validation = samples.calibration.spec, samples.validation.spec
    progress.done(
        f"{loaded.spec.weights}; {calibration.count} calibration and {validation.count} "
        f"validation images",
        reused=False,
    )
    notes = []
    for spec in (calibration, validation):
        if spec.mapping:
            notes.append(f"{spec.source}: {spec.mapping}")
        if spec.unreadable:
            notes.append(f"{spec.source}: unreadable, left out: {', '.join(spec.unreadable)}")
    for note in dict.fromkeys(notes):  # both sets often come from one source
        progress.note(note)
    if samples.shared_images:
        progress.note(f"{samples.shared_images} images are in both sets, as allowed")
    return loaded, samples


def _check_names(config: BuildConfig, until: Stage) -> None:
    """Fail on a mistyped name or what is not there now rather than after minutes of work."""
    from cswap_deploy.pruning.importance import get_criterion
    from cswap_deploy.targets import get_target

    if config.criterion != "cswap":
        get_criterion(config.criterion)
    for target in config.target if _reached(until, "engine") else ():
        get_target(target).check(config.engine_options, int8=config.int8)
    if config.int8_quantizer == "modelopt" and _reached(until, "export"):
        from cswap_deploy.export.modelopt import modelopt_version

        modelopt_version()


def _reached(until: Stage, stage: Stage) -> bool:
    return _ORDER.index(stage) <= _ORDER.index(until)


def _place_engine(place: Path, made: Path) -> None:
    """``engine/<target>/...``, where the engine is a file of its own."""
    engine = read_value(made / "result.json", TargetResult).engine
    if (made / engine.path).is_file():
        place.mkdir(parents=True)
        for name in (engine.path.name, *engine.extra_files):
            shutil.copyfile(made / name, place / name)


def _finish(
    folder: Path,
    manifest: Manifest,
    plan: PrunePlan,
    config: BuildConfig,
    verdicts: tuple[BudgetVerdict, ...],
) -> Manifest:
    """Name every engine's file, add budgets and reports, and close with the manifest."""
    from cswap_deploy.report.render import render_html, render_markdown

    results = []
    for result in manifest.targets:
        own = Path("engine", result.engine.target, result.engine.path.name)
        path = own if (folder / own).is_file() else Path(MODEL)
        results.append(
            result.model_copy(update={"engine": result.engine.model_copy(update={"path": path})})
        )
    manifest = manifest.model_copy(update={"targets": tuple(results)})
    if config.budget is not None:
        shutil.copyfile(config.budget, folder / "budgets.toml")
    (folder / "report.md").write_text(render_markdown(manifest, plan, verdicts=verdicts))
    (folder / "report.html").write_text(render_html(manifest, plan, verdicts=verdicts))
    manifest = manifest.model_copy(update={"files": list_files(folder)})
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1))
    return manifest
