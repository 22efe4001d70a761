"""From a ratio to a plan: what may go, in which steps, and what was decided."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from cswap_deploy.causal.cost import (
    BUDGET_MACS,
    MOST_IMAGES,
    affordable_forwards,
    affordable_images,
    loop_macs,
)
from cswap_deploy.causal.memory import Budget
from cswap_deploy.causal.scoring import Local
from cswap_deploy.errors import PruneError
from cswap_deploy.network.deletion import delete_removed, exact_groups
from cswap_deploy.network.graph import Graph, trace
from cswap_deploy.network.groups import find_groups
from cswap_deploy.network.offsets import needs_bias
from cswap_deploy.network.sizes import SizeModel, amount, smallest
from cswap_deploy.network.units import Group, give_bias
from cswap_deploy.old_config import BuildConfig
from cswap_deploy.progress import Phases
from cswap_deploy.pruning.allocation import Limits
from cswap_deploy.pruning.candidates import Order, Rival
from cswap_deploy.pruning.importance import get_criterion, lamp, magnitude_l2
from cswap_deploy.pruning.refit import solvable
from cswap_deploy.pruning.rounds import Scorers, prune_progressively
from cswap_deploy.pruning.state import Settings, State
from cswap_deploy.records.plan import GroupPlan, PrunePlan, RatioOf, Size, UnitEffect

_ALIGNED = 8
"""Widths that are no multiple of this run slower than wider ones that are: on ONNX Runtime's CPU
kernels (measured, benchmarks/LOG.md) as on tensor cores."""
_TINY = 32
"""``--round-to auto`` leaves smaller groups alone: a step of 8 would be over a quarter of them."""


_RIVALS = {"magnitude": Rival(magnitude_l2), "lamp": Rival(lamp, own_spread=True)}
"""Orders that propose sets beside the measured effects; they cost nothing to compute, and data did
not choose them, so their sets do not owe anything to the calibration images."""


@dataclass(slots=True)
class Prepared:
    """A network ready to be pruned: traced, grouped, counted."""

    module: nn.Module
    """A copy, with a bias on every consumer; this is what will be masked."""
    graph: Graph
    """Over ``module``."""
    dense: Graph
    """Over an untouched copy."""
    groups: tuple[Group, ...]
    excluded: dict[str, str]
    biased: tuple[str, ...]
    sizes: SizeModel
    dense_size: Size
    """Of the network as the user gave it."""
    limits: Limits
    fine: bool
    """Whether a last group may end at an odd width, to meet the ratio."""
    example: Tensor

    def copy(self) -> Prepared:
        """Another one to use up: preparing takes seconds, a copy does not."""
        module = copy.deepcopy(self.module)
        return replace(
            self, module=module, graph=self.dense.on(module), sizes=copy.deepcopy(self.sizes)
        )


def prepare(
    module: nn.Module, *, images: Tensor, ratio: float, ratio_of: RatioOf, round_to: int | str
) -> Prepared:
    """Find what can be removed and check that the ratio is within reach.

    Args:
        module: In eval mode, float32; not changed.
        images: (N, C, H, W), N >= 2, real ones.
        ratio: Fraction to remove, 0 < ratio < 1.
        ratio_of: Of what.
        round_to: Kept units of a group are a multiple of this; ``auto``: 8 where that is fine
            enough, else 1.

    Returns:
        Everything the loop needs.

    Raises:
        ExportError: The network cannot be traced.
        PruneError: Nothing can be removed, or the ratio is out of reach; says the range.
    """
    example = images[:2]
    structure = find_groups(module, example)
    groups, inexact = exact_groups(module, torch.randn_like(example), structure.groups)
    base = copy.deepcopy(module)
    dense = trace(base, example)
    changed = {c.layer for g in groups for c in g.consumers} | set(solvable(dense))
    biased = [n for n in dense.layers() if n in changed and needs_bias(dense, n)]
    for name in biased:
        give_bias(base.get_submodule(name))  # type: ignore[arg-type]
    if biased:
        dense = trace(base, example)
    hidden = {
        g.name: "its weights are not read directly by a convolution or linear layer"
        for g in groups
        if any(not dense.readers(c.layer) for c in g.consumers)
    }
    groups = [g for g in groups if g.name not in hidden]
    excluded = structure.excluded | inexact | hidden
    if not groups:
        why = "".join(f"\n    {name}: {reason}" for name, reason in excluded.items())
        raise PruneError(
            f"{type(module).__name__} has no structure that can be removed{why}",
            fix="pass --ratio 0 to export the dense model",
        )
    work = copy.deepcopy(base)
    sizes = SizeModel(work, example, groups)
    dense_size = SizeModel(module, example, groups).size()
    granules = {g.name: _granule(g, round_to) for g in groups}
    floors = {g.name: min(granules[g.name], g.units) for g in groups}
    fine = round_to == "auto"
    steps = dict.fromkeys(granules, 1) if fine else granules
    _check_reach(sizes, dense_size, groups, steps, floors, ratio, ratio_of)
    return Prepared(
        module=work,
        graph=dense.on(work),
        dense=dense,
        groups=tuple(groups),
        excluded=excluded,
        biased=tuple(biased),
        sizes=sizes,
        dense_size=dense_size,
        limits=Limits(granules, floors),
        fine=fine,
        example=example,
    )


def scoring(
    config: BuildConfig, prepared: Prepared, images: int
) -> tuple[int, Literal["exact", "bf16", "adaptive"], int | None]:
    """How effects are measured: as asked, or what costs allow.

    Args:
        config: What was asked for.
        prepared: The network.
        images: How many calibration images there are.

    Returns:
        Images that each unit's effect is known on, how, and the most forwards of the first round
        (``None``: no limit).
    """
    graph, groups, rounds = prepared.graph, prepared.groups, config.rounds
    asked = config.scoring_samples
    if asked != "auto":
        count = asked
    elif config.measuring == "exact":
        count = affordable_images(graph, groups, rounds=rounds)
    else:
        count = MOST_IMAGES
    count = min(count, images)
    if config.measuring != "auto":
        return count, config.measuring, None
    if loop_macs(graph, groups, images=count, rounds=rounds) <= BUDGET_MACS:
        return count, "exact", None
    return count, "adaptive", affordable_forwards(graph, groups, rounds=rounds)


def loop_settings(config: BuildConfig, prepared: Prepared, images: int) -> Settings:
    """How a build measures and removes.

    Args:
        config: What was asked for; a baseline criterion takes one round.
        prepared: The network.
        images: How many calibration images there are.
    """
    count, measuring, most = scoring(config, prepared, images)
    return Settings(
        ratio=config.ratio,
        ratio_of=config.ratio_of,
        rounds=config.rounds if config.criterion == "cswap" else 1,
        scoring_samples=count,
        measuring=measuring,
        error_rate=config.error_rate,
        most_forwards=most,
        effect=config.effect,
        intervention=config.intervention,
        select=config.select,
        alpha=config.alpha,
        min_effect=config.min_effect,
        refit=config.refit,
        refit_producers=config.refit_producers,
        mix=config.mix,
        seed=config.seed,
    )


def remove_progressively(
    prepared: Prepared,
    *,
    images: Tensor,
    labels: Tensor,
    settings: Settings,
    criterion: str = "cswap",
    scores: Order | None = None,
    budget: Budget | None = None,
    scorers: Scorers = Local,
    watcher: Phases,
    state: State | None = None,
    checkpoint: Callable[[State, nn.Module], None] | None = None,
) -> State:
    """The loop on a prepared network: units end up masked in ``prepared.module``, not deleted.

    Args:
        prepared: By :func:`prepare`; changed.
        images: (N, C, H, W) float32, the calibration set.
        labels: (N,) int64, true classes.
        settings: How to measure and remove.
        criterion: ``cswap``, or the name of a baseline ranking.
        scores: An order of one's own instead of the criterion's.
        budget: Of memory, for measuring; a third of what is free unless said.
        scorers: Who measures; this process unless said.
        watcher: Progress.
        state: Of an interrupted run; ``prepared.module`` must hold its weights.
        checkpoint: Called after every round.
    """
    rng = np.random.default_rng(settings.seed)
    if scores is None and criterion != "cswap":
        rank = get_criterion(criterion)

        def scores(group: Group) -> np.ndarray:
            return rank(prepared.module, group, rng)

    return prune_progressively(
        prepared.graph,
        prepared.dense,
        prepared.groups,
        prepared.sizes,
        settings=settings,
        limits=prepared.limits,
        fine=prepared.fine,
        dense_amount=amount(prepared.dense_size, settings.ratio_of),
        images=images,
        labels=labels,
        scores=scores,
        rivals=_RIVALS,
        state=state,
        budget=budget,
        scorers=scorers,
        watcher=watcher,
        checkpoint=checkpoint,
    )


@dataclass(frozen=True, slots=True)
class Pruned:
    """The result: a plan, and the smaller network with its weights."""

    plan: PrunePlan
    module: nn.Module


def prune(
    prepared: Prepared,
    *,
    images: Tensor,
    labels: Tensor,
    settings: Settings,
    criterion: str,
    budget: Budget | None = None,
    scorers: Scorers = Local,
    watcher: Phases,
    state: State | None = None,
    checkpoint: Callable[[State, nn.Module], None] | None = None,
) -> Pruned:
    """Prune a prepared network to its ratio, without training.

    Args:
        prepared: By :func:`prepare`; used up.
        images: (N, C, H, W) float32, the calibration set.
        labels: (N,) int64, true classes.
        settings: How to measure and remove.
        criterion: ``cswap``, or the name of a baseline ranking.
        budget: Of memory, for measuring; a third of what is free unless said.
        scorers: Who measures; this process unless said.
        watcher: Progress.
        state: Of an interrupted run; ``prepared.module`` must hold its weights.
        checkpoint: Called after every round.

    Returns:
        Plan and network; the network's logits equal those of the masked one.

    Raises:
        PruneError: Nothing was removed, or deleting changed the outputs.
        StageError: A prediction was not finite.
    """
    state = remove_progressively(
        prepared, images=images, labels=labels, settings=settings, criterion=criterion,
        budget=budget, scorers=scorers, watcher=watcher, state=state, checkpoint=checkpoint,
    )  # fmt: skip
    module = delete_removed(
        prepared.module, prepared.example, state.removed, prepared.groups, images[:8]
    )
    plan = PrunePlan(
        criterion=criterion,
        settings=asdict(settings),
        ratio_requested=settings.ratio,
        ratio_of=settings.ratio_of,
        dense=prepared.dense_size,
        pruned=prepared.sizes.size(),
        groups=tuple(_group_plan(g, state) for g in prepared.groups),
        excluded=prepared.excluded
        | dict.fromkeys(state.not_refitted, "too wide to solve again; means were folded"),
        biased=prepared.biased,
        refitted=state.refitted,
        producers=state.producers,
        rounds=tuple(state.rounds),
        alpha=settings.alpha,
    )
    counted = sum(p.numel() for p in module.parameters())
    if counted != plan.pruned.params:
        raise AssertionError(f"counted {counted} parameters, expected {plan.pruned.params}")
    return Pruned(plan, module)


def dense_plan(module: nn.Module, example: Tensor, ratio_of: RatioOf) -> PrunePlan:
    """The plan of ratio 0: nothing is removed."""
    size = SizeModel(module, example, ()).size()
    return PrunePlan(
        criterion="none",
        settings={},
        ratio_requested=0.0,
        ratio_of=ratio_of,
        dense=size,
        pruned=size,
        groups=(),
    )


def _granule(group: Group, round_to: int | str) -> int:
    """How many units leave at a time."""
    if group.kind == "heads":
        return 1
    if isinstance(round_to, int):
        return min(round_to, group.units)
    return 1 if group.units < _TINY or group.units % _ALIGNED else _ALIGNED


def _check_reach(
    sizes: SizeModel,
    dense: Size,
    groups: list[Group],
    steps: dict[str, int],
    floors: dict[str, int],
    ratio: float,
    of: RatioOf,
) -> None:
    total = amount(dense, of)
    most = 1 - amount(smallest(sizes, groups, floors), of) / total
    savings = [
        sizes.saving(g.name, range(g.units % steps[g.name] or steps[g.name]), of)
        for g in groups
        if g.units > floors[g.name]
    ]
    least = min(savings, default=0) / total
    if ratio > most or ratio < least / 2:
        what = {"params": "parameters", "channels": "units", "macs": "MACs"}[of]
        raise PruneError(
            f"--ratio {ratio:g} of the {what} cannot be met: this network can lose "
            f"{least:.2%} to {most:.2%} of its {total:,} {what}",
            fix=f"pass a ratio from {least:.4f} to {np.floor(most * 1e4) / 1e4:.4f}, or 0 to "
            "export the dense model",
        )


def _group_plan(group: Group, state: State) -> GroupPlan:
    gone = set(state.removed.get(group.name, ()))
    effects = tuple(
        UnitEffect(unit=unit, **asdict(m))
        for unit, m in sorted(state.measured.get(group.name, {}).items())
    )
    return GroupPlan(
        name=group.name,
        kind=group.kind,
        units=group.units,
        kept=tuple(u for u in range(group.units) if u not in gone),
        effects=effects,
    )
