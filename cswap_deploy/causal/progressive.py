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
from cswap_deploy.causal.compensate import refit, remove
from cswap_deploy.causal.effects import Effects, Intervention, Means, input_means, measure_group
from cswap_deploy.causal.partition import Graph
from cswap_deploy.causal.significance import judge
from cswap_deploy.causal.units import Consumer, Group
from cswap_deploy.progress import Phases
from cswap_deploy.pruning.budget import SizeModel, amount

_NEAR = 0.005
"""How near a round comes to its target, as a fraction of it, before coarse bundles are searched
for one that fits better."""


_MOST_ELEMENTS = 1 << 29
"""The refit holds some activations of all its images at once: at most 2 GiB each."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How to measure and remove. Defaults are the command's; see ``config.BuildConfig``."""

    ratio: float
    ratio_of: RatioOf = "params"
    rounds: int = 4
    scoring_samples: int = 128
    effect: Literal["kl", "true-class"] = "kl"
    intervention: Intervention = "mean"
    alpha: float = 0.05
    min_effect: float = 0.01
    refit: bool = True
    seed: int = 0


@dataclass(slots=True)
class Measurement:
    """A unit's latest effect."""

    true_class: float
    kl: float
    low: float
    high: float
    verdict: Verdict
    round: int


@dataclass(slots=True)
class State:
    """Where the loop stands; enough, with the module's weights, to go on after an interruption."""

    round: int = 0
    removed: dict[str, list[int]] = field(default_factory=dict)
    measured: dict[str, dict[int, Measurement]] = field(default_factory=dict)
    rounds: list[RoundLog] = field(default_factory=list)
    refitted: tuple[str, ...] = ()
    not_refitted: tuple[str, ...] = ()


def prune_progressively(
    graph: Graph,
    dense: Graph,
    groups: tuple[Group, ...],
    sizes: SizeModel,
    *,
    settings: Settings,
    granules: Mapping[str, int],
    floors: Mapping[str, int],
    dense_amount: int,
    fine: bool = False,
    images: Tensor,
    labels: Tensor,
    scores: Callable[[Group], np.ndarray] | None = None,
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
        granules: Group -> kept units must be a multiple of this.
        floors: Group -> units that must stay.
        dense_amount: What the ratio is a fraction of (parameters, units or MACs).
        fine: In the last round let a group end between multiples of its granule where that
            meets the ratio.
        images: (N, C, H, W) float32, the calibration set. Every round measures on the next
            ``scoring_samples`` of them, balanced by class; all of them serve the refit.
        labels: (N,) int64.
        scores: A baseline's ranking instead of measured effects.
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
    order = balanced_order(labels.numpy())
    while state.round < settings.rounds:
        state.round += 1
        begun = time.perf_counter()
        target = total * (1 - settings.ratio * state.round / settings.rounds)
        means = None
        if settings.intervention == "mean":
            means = input_means(graph, _consumers(groups), images, chunk=64)
        measured = 0
        if scores is None:
            rows = torch.from_numpy(_window(order, state.round, settings.scoring_samples))
            candidates = _candidates(groups, state, settings, sizes, total)
            measured = _measure(
                graph, candidates, state, settings, images[rows], labels[rows], means, watcher
            )
            ranking = {g.name: _ranking(state, g, settings) for g in groups}
        else:
            ranking = {g.name: scores(g) for g in groups}
        gone = _choose(
            groups, sizes, state, ranking, granules, floors, target, settings.ratio_of,
            fine=fine and state.round == settings.rounds,
        )  # fmt: skip
        for group in groups:
            for unit in gone.get(group.name, ()):
                remove(graph, group, unit, means)
        if settings.refit and gone:
            _refit(graph, dense, groups, state, images, watcher)
        state.rounds.append(
            RoundLog(
                round=state.round,
                measured=measured,
                removed=sum(map(len, gone.values())),
                params=sizes.size().params,
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


def _window(order: np.ndarray, round_: int, size: int) -> np.ndarray:
    """The images of a round: the next ones, so that a lucky effect is not believed twice."""
    start = (round_ - 1) * size
    return np.take(order, np.arange(start, start + min(size, len(order))), mode="wrap")


def _candidates(
    groups: tuple[Group, ...], state: State, settings: Settings, sizes: SizeModel, total: int
) -> dict[Group, list[int]]:
    """Units worth measuring: all in the first round, then those that may still have to go.

    A unit that ranked behind twice what is still to be removed is left alone; its last effect
    stands.
    """
    alive = {g: _alive(state, g) for g in groups}
    if state.round == 1:
        return alive
    now = amount(sizes.size(), settings.ratio_of)
    share = min(1.0, 2 * (1 - total * (1 - settings.ratio) / now))
    if share <= 0:  # a coarse bundle went past the last target already
        return {g: [] for g in groups}
    rank = {
        g: _ranking(state, g, settings) / sizes.saving(g.name, [0], settings.ratio_of)
        for g in groups
    }
    everything = np.concatenate([rank[g][units] for g, units in alive.items()])
    limit = np.quantile(everything, share)
    return {g: [u for u in units if rank[g][u] <= limit] for g, units in alive.items()}


def _measure(
    graph: Graph,
    candidates: Mapping[Group, list[int]],
    state: State,
    settings: Settings,
    images: Tensor,
    labels: Tensor,
    means: Means | None,
    watcher: Phases,
) -> int:
    """Measure the candidates and judge them together; returns how many."""
    count = sum(map(len, candidates.values()))
    found: list[Effects] = []
    watcher.begin(f"measuring effects, round {state.round}/{settings.rounds}", count)
    for group, units in candidates.items():
        if units:
            steps = _Steps(watcher, len(images))
            found.append(
                measure_group(
                    graph, group, units, images=images, labels=labels, means=means, tick=steps
                )
            )
    watcher.end()
    if not found:
        return 0
    judgement = judge(
        np.concatenate([e.true_class for e in found]),
        labels.numpy(),
        alpha=settings.alpha,
        min_effect=settings.min_effect,
    )
    row = 0
    for effects in found:
        latest = state.measured.setdefault(effects.group, {})
        for unit, divergence in zip(effects.units.tolist(), effects.kl.mean(1), strict=True):
            latest[unit] = Measurement(
                true_class=float(judgement.mean[row]),
                kl=float(divergence),
                low=float(judgement.low[row]),
                high=float(judgement.high[row]),
                verdict=judgement.verdicts[row],
                round=state.round,
            )
            row += 1
    return count


class _Steps:
    """Turns (variants x images) into finished units."""

    def __init__(self, watcher: Phases, images: int) -> None:
        self.watcher, self.images, self.pending = watcher, images, 0

    def __call__(self, runs: int) -> None:
        units, self.pending = divmod(self.pending + runs, self.images)
        self.watcher.advance(units)


def _ranking(state: State, group: Group, settings: Settings) -> np.ndarray:
    """(units,) how much a unit's removal disturbs the prediction; the smallest goes first."""
    latest = state.measured[group.name]
    if settings.effect == "kl":
        return np.array([latest[u].kl for u in range(group.units)])
    return np.array([abs(latest[u].true_class) for u in range(group.units)])


def _choose(
    groups: tuple[Group, ...],
    sizes: SizeModel,
    state: State,
    ranking: Mapping[str, np.ndarray],
    granules: Mapping[str, int],
    floors: Mapping[str, int],
    target: float,
    of: RatioOf,
    *,
    fine: bool,
) -> dict[str, list[int]]:
    """Mark bundles as removed, least disturbance per saving first, until the target is nearest.

    A bundle that goes far past the target waits while smaller ones from further down the order are
    tried. Where none fits and ``fine`` is set, units of the waiting ones leave one by one: a
    group or two then end at odd widths, and the ratio is met.
    """
    gone: dict[str, list[int]] = {}

    def take(group: str, units: list[int]) -> int:
        sizes.remove(group, units)
        gone.setdefault(group, []).extend(units)
        state.removed.setdefault(group, []).extend(units)
        return amount(sizes.size(), of)

    near = _NEAR * target
    left = amount(sizes.size(), of)
    waiting: dict[str, list[int]] = {}
    for group, units in _bundles(groups, sizes, state, ranking, granules, floors, of):
        if left <= target + (near if waiting else 0):
            break
        if group in waiting:
            continue
        over = target - (left - sizes.saving(group, units, of))
        nearest = not fine and not waiting and over <= left - target
        if over <= near or nearest:
            left = take(group, units)
        else:
            waiting[group] = units
    for group, units in waiting.items() if fine else ():
        for unit in units:
            if abs(left - target) <= near:
                return gone
            if abs(left - sizes.saving(group, [unit], of) - target) < abs(left - target):
                left = take(group, [unit])
    return gone


def _bundles(
    groups: tuple[Group, ...],
    sizes: SizeModel,
    state: State,
    ranking: Mapping[str, np.ndarray],
    granules: Mapping[str, int],
    floors: Mapping[str, int],
    of: RatioOf,
) -> list[tuple[str, list[int]]]:
    """What can go together, in order. A bundle leaves its group at a multiple of its granule."""
    entries = []
    for position, group in enumerate(groups):
        alive = _alive(state, group)
        scores = ranking[group.name]
        queue = sorted(alive, key=lambda u: (scores[u], u))
        granule = granules[group.name]
        size = len(alive) % granule or granule
        at = 0
        while len(alive) - at - size >= floors[group.name]:
            units = queue[at : at + size]
            worth = sizes.saving(group.name, units, of)
            cost = float(sum(scores[u] for u in units)) / max(worth, 1)
            entries.append((cost, position, at, group.name, units))
            at, size = at + size, granule
    # Within a group a later bundle never precedes an earlier one, whatever the rounding of costs.
    highest: dict[int, float] = {}
    ordered = []
    for cost, position, at, name, units in entries:
        highest[position] = max(cost, highest.get(position, cost))
        ordered.append((highest[position], position, at, name, units))
    ordered.sort(key=lambda e: e[:3])
    return [(name, units) for *_, name, units in ordered]


def _refit(
    graph: Graph,
    dense: Graph,
    groups: tuple[Group, ...],
    state: State,
    images: Tensor,
    watcher: Phases,
) -> None:
    """Solve every consumer that has lost an input, in order of execution."""
    touched = [g for g in groups if state.removed.get(g.name)]
    lost: dict[str, set[int]] = {}
    for group in touched:
        for entry in group.consumers:
            gone = {i for u in state.removed[group.name] for i in entry.indices[u]}
            lost.setdefault(entry.layer, set()).update(gone)
    kept = {}
    for name in graph.order(lost):
        layer: Consumer = graph.module.get_submodule(name)  # type: ignore[assignment]
        inputs = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features
        kept[name] = torch.tensor([i for i in range(inputs) if i not in lost[name]])
    watcher.begin(f"solving {len(kept)} layer{'s' if len(kept) > 1 else ''} again", len(kept))
    images = images[: max(1, _MOST_ELEMENTS // graph.largest())]
    done = refit(graph, dense, kept, images, tick=watcher.advance)
    watcher.end()
    state.refitted, state.not_refitted = done.layers, done.skipped


def _alive(state: State, group: Group) -> list[int]:
    gone = set(state.removed.get(group.name, ()))
    return [u for u in range(group.units) if u not in gone]


def _consumers(groups: tuple[Group, ...]) -> list[str]:
    return sorted({c.layer for g in groups for c in g.consumers})
