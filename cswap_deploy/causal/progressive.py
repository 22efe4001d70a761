"""The loop: measure every unit on the network as it is now, remove the least, make up, again.

Removing all units that look harmless at once breaks a network: each effect was measured with all
the others in place. So the ratio is reached in rounds, and each round measures again on what is
left. Within a round units leave in bundles (one unit, or as many as ``round_to`` asks for), the
bundle that disturbs the prediction least for what it saves first.

The network keeps its dense shape all along: a removed unit is masked at its consumers, which gives
the same outputs as deleting it. It is deleted once, at the end, by ``pruning.apply``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from cswap_deploy.artifacts import RatioOf, RoundLog, Verdict
from cswap_deploy.causal.effects import Effects, likely_harm, measure_group
from cswap_deploy.causal.interventions import Intervention, Moments, input_moments
from cswap_deploy.causal.mixtures import lightly_mixed
from cswap_deploy.causal.partition import Graph
from cswap_deploy.causal.selection import Limits, Ranking, remaining
from cswap_deploy.causal.sets import (
    Goal,
    Order,
    Rival,
    best_ridge,
    consumers,
    least,
    orders,
    start_afresh,
)
from cswap_deploy.causal.significance import judge
from cswap_deploy.causal.trials import FIRST_RIDGE, Trials, clearly_less, solve_behind, take_out
from cswap_deploy.causal.units import Group
from cswap_deploy.progress import Phases
from cswap_deploy.pruning.budget import SizeModel, amount

_NARROW = 2
"""A round measures this many times as many units as it is to remove, those with the least effects,
before it looks which of them would go."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How to measure and remove. Defaults are the command's; see ``config.BuildConfig``."""

    ratio: float
    ratio_of: RatioOf = "params"
    rounds: int = 4
    scoring_samples: int = 128
    effect: Literal["kl", "true-class"] = "kl"
    intervention: Intervention = "predicted"
    alpha: float = 0.05
    min_effect: float = 0.01
    refit: bool = True
    refit_producers: bool = True
    mix: bool = True
    select: Literal["set", "unit"] = "set"
    seed: int = 0


@dataclass(slots=True)
class Measurement:
    """A unit's latest effect."""

    true_class: float
    harm: float
    kl: float
    low: float
    high: float
    verdict: Verdict
    round: int
    serves: tuple[int, ...] = ()
    harms: tuple[int, ...] = ()


@dataclass(slots=True)
class State:
    """Where the loop stands; enough, with the module's weights, to go on after an interruption."""

    round: int = 0
    removed: dict[str, list[int]] = field(default_factory=dict)
    measured: dict[str, dict[int, Measurement]] = field(default_factory=dict)
    rounds: list[RoundLog] = field(default_factory=list)
    refitted: tuple[str, ...] = ()
    not_refitted: tuple[str, ...] = ()
    producers: tuple[str, ...] = ()
    """Layers whose units took over what others carried."""
    ridge: float = FIRST_RIDGE
    """Of the last round's refit."""


def prune_progressively(
    graph: Graph,
    dense: Graph,
    groups: tuple[Group, ...],
    sizes: SizeModel,
    *,
    settings: Settings,
    limits: Limits,
    dense_amount: int,
    fine: bool = False,
    images: Tensor,
    labels: Tensor,
    scores: Order | None = None,
    rivals: Mapping[str, Rival] | None = None,
    state: State | None = None,
    watcher: Phases,
    checkpoint: Callable[[State, nn.Module], None] | None = None,
) -> State:
    """Remove units until the ratio is reached, in place.

    Args:
        graph: Over the module to mask; its consumers have biases.
        dense: The same graph over the network as it was.
        groups: What can be removed.
        sizes: Of the network before anything is removed.
        settings: How.
        limits: Of each group.
        dense_amount: What the ratio is a fraction of (parameters, units or MACs).
        fine: In the last round let a group end between multiples of its granule where that
            meets the ratio.
        images: (N, C, H, W) float32, the calibration set. Every round measures on the next
            ``scoring_samples`` of them, balanced by class; all of them serve the refit.
        labels: (N,) int64.
        scores: A baseline's order instead of measured effects.
        rivals: Other orders to try beside the measured effects, where ``settings.select`` is
            ``set``; in the last round also from the dense network on.
        state: Of an interrupted run, with the module's weights as they were then.
        watcher: Progress.
        checkpoint: Called after every round.

    Returns:
        What was removed and what was measured.
    """
    state = state if state is not None else State()
    total = dense_amount
    for name, units in state.removed.items():
        sizes.remove(name, units)
    order = torch.from_numpy(balanced_order(labels.numpy()))
    trials = Trials(graph, dense, groups, state.removed, images[order])
    while state.round < settings.rounds:
        state.round += 1
        begun = time.perf_counter()
        target = total * (1 - settings.ratio * state.round / settings.rounds)
        last = state.round == settings.rounds
        ridge = state.ridge if settings.refit else None
        goal = Goal(groups, limits, target, settings.ratio_of, fine and last)
        moments: Mapping[str, Moments] = input_moments(
            graph, consumers(groups), images, intervention=settings.intervention, chunk=64
        )
        measured = 0
        if scores is None:
            rows = _window(order, state.round, settings.scoring_samples)
            shown = images[rows]
            if settings.mix:
                shown = _half_mixed(shown, seed=state.round)
            measured = _measure(
                graph, goal, state, settings, sizes, shown, labels[rows], moments, watcher
            )
            ranking = {g.name: _ranking(state, g, settings) for g in groups}
        else:
            ranking = {g.name: scores(g) for g in groups}
        tried = {"effect": Ranking(ranking)}
        if settings.select == "set" and scores is None:
            tried = orders(graph.module, groups, state.removed, ranking, rivals or {})
        sets = goal.sets(sizes, state.removed, tried)
        chosen, judged = least(trials, sets, moments, ridge=ridge, watcher=watcher)
        gone = sets[chosen]
        if last and state.round > 1 and judged is not None and ridge is not None:
            afresh = start_afresh(
                trials, goal, sizes, rivals or {},
                intervention=settings.intervention, ridge=ridge, watcher=watcher,
            )  # fmt: skip
            # What saw no image does not fit the images by chance: the measured set must be better
            # than they could tell by luck.
            if afresh is not None and not clearly_less(judged, afresh.effect):
                chosen, gone, judged = afresh.name, afresh.gone, afresh.effect
                moments = afresh.moments
                _put_back(graph, dense, sizes, state)
        effect = None if judged is None else float(judged.mean())
        if last and ridge is not None and gone:
            state.ridge, effect = best_ridge(
                trials, gone, moments, ridge=ridge, effect=effect, watcher=watcher
            )
        take_out(graph, groups, gone, moments)
        for name, units in gone.items():
            sizes.remove(name, units)
            state.removed.setdefault(name, []).extend(units)
        if settings.refit and gone:
            done = solve_behind(
                graph, dense, groups, state.removed, trials.images,
                ridge=state.ridge, watcher=watcher,
                # Every round solves all layers anew, so what the units take over counts at the end.
                producers=settings.refit_producers and last,
            )  # fmt: skip
            state.refitted, state.not_refitted = done.layers, done.skipped
            state.producers = done.producers
        state.rounds.append(
            RoundLog(
                round=state.round,
                measured=measured,
                removed=sum(map(len, gone.values())),
                params=sizes.size().params,
                order=chosen,
                kl=effect,
                ridge=state.ridge if settings.refit else None,
                seconds=round(time.perf_counter() - begun, 2),
            )
        )
        if checkpoint is not None:
            checkpoint(state, graph.module)
    return state


def balanced_order(labels: np.ndarray) -> np.ndarray:
    """Rows of all images such that every prefix holds each class about equally often."""
    turn = np.zeros(len(labels), dtype=np.int64)
    for c in np.unique(labels):
        rows = np.flatnonzero(labels == c)
        turn[rows] = np.arange(len(rows))
    return np.lexsort((labels, turn))


def _window(order: Tensor, round_: int, size: int) -> Tensor:
    """The images of a round: the next ones, so that a lucky effect is not believed twice."""
    start = (round_ - 1) * size
    return order[torch.arange(start, start + min(size, len(order))) % len(order)]


def _half_mixed(images: Tensor, *, seed: int) -> Tensor:
    """The first half as they are, the others lightly mixed; see :mod:`causal.mixtures`."""
    half = len(images) // 2
    return torch.cat([images[:half], lightly_mixed(images, seed=seed)[half:]])


def _measure(
    graph: Graph,
    goal: Goal,
    state: State,
    settings: Settings,
    sizes: SizeModel,
    images: Tensor,
    labels: Tensor,
    moments: Mapping[str, Moments],
    watcher: Phases,
) -> int:
    """Measure what may go in this round, and judge it together; returns how many units.

    Effects mostly grow as the network shrinks, so an effect from an earlier round is a lower bound,
    about: the units with the least ones are measured again, then those that have the least now,
    until every unit that would go was measured in this round (lazy greedy selection; Minoux,
    "Accelerated greedy algorithms for maximizing submodular set functions", 1978). A unit that
    goes on what it did to a healthier network breaks this one: ResNet-20, nothing made up for,
    30 % gone: top-1 .46 instead of .78 (benchmarks/LOG.md).
    """
    ranks = {g: _ranking(state, g, settings) for g in goal.groups}
    old = {g: set(remaining(g, state.removed)) for g in goal.groups}
    found: list[Effects] = []
    where = f"round {state.round}/{settings.rounds}"
    batch = 0
    while candidates := _candidates(goal, ranks, old, state, sizes):
        batch += 1
        if batch == 1:
            watcher.begin(f"measuring effects, {where}", sum(map(len, candidates.values())))
        elif batch == 2:  # one phase for all that follow: how many there are is not known yet
            watcher.begin(f"measuring what now has the least effect, {where}", 0)
        for group, units in candidates.items():
            effects = measure_group(
                graph, group, units, images=images, labels=labels, moments=moments,
                tick=_Steps(watcher, len(images)),
            )  # fmt: skip
            ranks[group][units] = _costs(effects, settings)
            old[group] -= {*units}
            found.append(effects)
    watcher.end()
    _judge(found, state, settings, labels)
    return sum(len(effects.units) for effects in found)


def _candidates(
    goal: Goal,
    ranks: Mapping[Group, np.ndarray],
    old: Mapping[Group, set[int]],
    state: State,
    sizes: SizeModel,
) -> dict[Group, list[int]]:
    """Units that may go in this round and were not measured in it; in the first one all.

    Args:
        goal: Of the round.
        ranks: Group -> (units,) latest costs.
        old: Group -> units that are there and whose cost is of an earlier round.
        state: Of the loop.
        sizes: Of the network as it is.
    """
    if state.round == 1:
        wanted = old
    else:
        share = _NARROW * (1 - goal.target / amount(sizes.size(), goal.of))
        if share <= 0:  # a coarse bundle went past this target already
            return {}
        worth = {g: ranks[g] / sizes.saving(g.name, [0], goal.of) for g in goal.groups}
        there = [worth[g][u] for g in goal.groups for u in remaining(g, state.removed)]
        limit = np.quantile(there, min(1.0, share))
        wanted = {g: {u for u in units if worth[g][u] <= limit} for g, units in old.items()}
        if not any(wanted.values()):
            order = Ranking({g.name: values for g, values in ranks.items()})
            (gone,) = goal.sets(sizes, state.removed, {"effect": order}).values()
            wanted = {g: units & {*gone.get(g.name, ())} for g, units in old.items()}
    return {g: sorted(units) for g, units in wanted.items() if units}


def _judge(found: list[Effects], state: State, settings: Settings, labels: Tensor) -> None:
    """Verdicts on all units that a round measured; their latest effects are kept."""
    if not found:
        return
    judgement = judge(
        np.concatenate([e.true_class for e in found]),
        labels.numpy(),
        alpha=settings.alpha,
        min_effect=settings.min_effect,
    )
    row = 0
    for effects in found:
        latest = state.measured.setdefault(effects.group, {})
        harms = likely_harm(effects.true_class)
        for unit, harm, divergence in zip(
            effects.units.tolist(), harms, effects.kl.mean(1), strict=True
        ):
            latest[unit] = Measurement(
                true_class=float(judgement.mean[row]),
                harm=float(harm),
                kl=float(divergence),
                low=float(judgement.low[row]),
                high=float(judgement.high[row]),
                verdict=judgement.verdicts[row],
                round=state.round,
                serves=judgement.serves[row],
                harms=judgement.harms[row],
            )
            row += 1


class _Steps:
    """Turns (variants x images) into finished units."""

    def __init__(self, watcher: Phases, images: int) -> None:
        self.watcher, self.images, self.pending = watcher, images, 0

    def __call__(self, runs: int) -> None:
        units, self.pending = divmod(self.pending + runs, self.images)
        self.watcher.advance(units)


def _costs(effects: Effects, settings: Settings) -> np.ndarray:
    """(units,) how much each removal disturbs the prediction; the smallest goes first."""
    if settings.effect == "kl":
        mean: np.ndarray = effects.kl.mean(1)
        return mean
    return likely_harm(effects.true_class)


def _ranking(state: State, group: Group, settings: Settings) -> np.ndarray:
    """(units,) the latest costs; zero where nothing was measured yet."""
    latest = state.measured.get(group.name)
    if latest is None:
        return np.zeros(group.units)
    kl = settings.effect == "kl"
    return np.array([latest[u].kl if kl else latest[u].harm for u in range(group.units)])


def _put_back(graph: Graph, dense: Graph, sizes: SizeModel, state: State) -> None:
    """Undo every removal, in place."""
    graph.module.load_state_dict(dense.module.state_dict())
    for name, units in state.removed.items():
        sizes.restore(name, units)
    state.removed.clear()
