"""Measure, remove, solve again: the pruned network as a plan and its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cswap_deploy.errors import ArtifactError, MissingDependencyError
from cswap_deploy.records.bundle import PLAN, read_plan
from cswap_deploy.records.files import compare_files
from cswap_deploy.records.plan import PrunePlan
from cswap_deploy.records.store import stage_key
from cswap_deploy.records.value import read_value, sha256_text
from cswap_deploy.stages.run import (
    BUILD,
    WEIGHTS,
    BuildRecord,
    Run,
    calibration,
    once,
    tool_versions,
)

if TYPE_CHECKING:
    from torch import Tensor

    from cswap_deploy.pruning.plan import Prepared
    from cswap_deploy.pruning.rounds import Scorers

_VERSION = 4
"""Raised when this stage's code changes what it writes."""


def prune_stage(run: Run) -> tuple[Path, PrunePlan]:
    """Score and remove; a folder with ``plan.json`` and ``pruned.safetensors``."""
    from cswap_deploy.pruning.saved_rounds import RoundStore

    config = run.config
    run.progress.stage("prune", f"{config.ratio:.0%} of {config.ratio_of}")
    names = (
        "ratio", "ratio_of", "round_to", "criterion", "scoring_samples", "measuring", "error_rate",
        "rounds", "effect", "intervention", "select", "alpha", "min_effect", "refit",
        "refit_producers", "mix", "seed",
    )  # fmt: skip
    key = run.keys["prune"] = stage_key(
        "prune",
        version=_VERSION,
        inputs={
            "weights": run.spec.weights_sha256,
            "architecture": _architecture(run),
            "preprocessing": run.spec.preprocessing.model_dump(mode="json"),
            "calibration": run.samples.calibration.spec.sha256,
        },
        settings={name: getattr(config, name) for name in names},
        tools=tool_versions("cswap-deploy", "torch", "timm", "torch-pruning", "scipy"),
    )
    folder = once(run, "prune", key, lambda out: _prune(run, key, out))
    if run.stages["prune"] == "run":
        RoundStore(run.store, key).forget(config.rounds)
    plan = read_plan(folder)
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
            fix="put the same weights there, or prune again",
        )
    run.keys["prune"], run.stages["prune"] = record.prune_key, "reused"
    return folder, read_plan(folder)


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

    from cswap_deploy.causal.memory import Budget, keep_freed_memory
    from cswap_deploy.pruning.plan import dense_plan, loop_settings, prepare, prune
    from cswap_deploy.pruning.saved_rounds import RoundStore

    config = run.config
    keep_freed_memory()
    images, labels = calibration(run)
    if config.ratio == 0:
        plan, module = dense_plan(run.loaded.module, images[:2], config.ratio_of), run.loaded.module
    else:
        run.progress.begin("tracing the network", 0)
        prepared = prepare(
            run.loaded.module, images=images, ratio=config.ratio, ratio_of=config.ratio_of,
            round_to=config.round_to,
        )  # fmt: skip
        run.progress.end()
        settings = loop_settings(config, prepared, len(images))
        rounds = RoundStore(run.store, key)
        state = rounds.load(prepared.module, most=settings.rounds) if config.resume else None
        if state is not None:
            run.progress.note(f"going on after round {state.round} of an interrupted run")
        with _scorers(run, prepared, images) as scorers:
            result = prune(
                prepared, images=images, labels=labels, settings=settings,
                criterion=config.criterion, budget=Budget.of(config.memory_budget),
                scorers=scorers, watcher=run.progress, state=state, checkpoint=rounds.save,
            )  # fmt: skip
        plan, module = result.plan, result.module
    (out / PLAN).write_text(plan.model_dump_json(indent=1))
    state_dict = {k: v.detach().contiguous() for k, v in module.state_dict().items()}
    save_file(state_dict, out / WEIGHTS, metadata={"format": "pt"})


@contextmanager
def _scorers(run: Run, prepared: Prepared, images: Tensor) -> Iterator[Scorers]:
    """Who measures: this process, or the workers that were asked for."""
    from cswap_deploy.causal.scoring import Local, independent

    if len(images) >= 4 and not independent(prepared.graph, images):
        note = (
            "an image's prediction depends on the others of its batch: each unit is measured by "
            "whole forwards of its own, which is slow"
        )
        run.progress.note(note)
        run.fallbacks.append(note)
        yield partial(Local, together=False)
        return
    where = run.config.workers
    if run.config.scoring_device == "cuda":
        yield _on_gpu(run.config.memory_budget)
        return
    if where is None:
        yield Local
        return
    from cswap_deploy.causal.ray_workers import Recipe, pool_of

    recipe = Recipe(run.spec, prepared.biased, prepared.example.numpy())
    run.progress.begin(f"starting workers ({where})", 0)
    with pool_of(where, recipe, memory_budget=run.config.memory_budget) as pool:
        run.progress.end()
        yield pool.scorer
        if pool.lost:
            run.fallbacks.append(f"{pool.lost} worker(s) died; their pieces were measured again")


def _on_gpu(memory_budget: int | None) -> Scorers:
    """Measures on the GPU, within a third of its free memory unless said.

    Raises:
        MissingDependencyError: There is none, or PyTorch cannot use it.
    """
    import torch

    from cswap_deploy.causal.memory import Budget
    from cswap_deploy.causal.scoring import Local

    if not torch.cuda.is_available():
        raise MissingDependencyError(
            f"--scoring-device cuda: PyTorch {torch.__version__} finds no GPU it can use",
            fix="install a CUDA build of PyTorch and the driver, or leave the flag out",
        )
    free, _ = torch.cuda.mem_get_info()
    budget = Budget.of(memory_budget if memory_budget is not None else free // 3)
    device = torch.device("cuda")
    return lambda graph, images, labels, moments, _: Local(
        graph, images, labels, moments, budget, device=device
    )


def _architecture(run: Run) -> dict[str, Any]:
    """What, beside the weights, decides what a network computes."""
    spec = run.spec
    if spec.source != "factory":
        return {"name": spec.name, "arguments": spec.arguments}
    from cswap_deploy.network.graph import trace

    # A user's forward can change while its weights stay; the graph shows it.
    return {"graph": sha256_text(trace(run.loaded.module, calibration(run)[0][:2]).code)}
