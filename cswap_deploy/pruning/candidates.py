"""Sets of units that a round may remove: who proposes them, and which one is taken."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from cswap_deploy.causal.interventions import Intervention, Moments, input_moments
from cswap_deploy.network.sizes import SizeModel
from cswap_deploy.network.units import Group
from cswap_deploy.progress import Phases
from cswap_deploy.pruning.allocation import Limits, Ranking, choose, even, spread_like
from cswap_deploy.pruning.trials import Trials
from cswap_deploy.records.plan import RatioOf

Order = Callable[[Group], np.ndarray]
"""Group -> (units,) scores on the network as it stands; the lowest goes first."""
Sets = dict[str, dict[str, list[int]]]
"""Who proposed it -> group -> units that would go."""

_RIDGES = 0.9e-4, 1.1


@dataclass(frozen=True, slots=True)
class Rival:
    """An order that no image has a say in, for any network of an architecture."""

    order: Callable[[nn.Module, Group, np.random.Generator], np.ndarray]
    """(module, group, random numbers) -> (units,) scores; the lowest goes first."""
    own_spread: bool = False
    """Whether the scores themselves say how much each group gives up. Otherwise they count by what
    a unit saves, or evenly over all groups."""

    def scores(self, module: nn.Module, groups: tuple[Group, ...]) -> dict[str, np.ndarray]:
        """Group -> (units,)."""
        rng = np.random.default_rng(0)
        return {g.name: self.order(module, g, rng) for g in groups}


@dataclass(frozen=True, slots=True)
class Goal:
    """What a round is to reach."""

    groups: tuple[Group, ...]
    limits: Limits
    target: float
    of: RatioOf
    fine: bool
    """See :func:`selection.choose`."""

    def sets(
        self, sizes: SizeModel, removed: Mapping[str, list[int]], tried: Mapping[str, Ranking]
    ) -> Sets:
        """What each order removes; orders that say the same as an earlier one are left out.

        Args:
            sizes: Of the network as it is.
            removed: What is gone from it.
            tried: Name -> order.
        """
        found: Sets = {}
        for name, order in tried.items():
            gone = choose(
                self.groups, copy.deepcopy(sizes), {g: [*units] for g, units in removed.items()},
                order, self.limits, target=self.target, of=self.of, fine=self.fine,
            )  # fmt: skip
            if gone not in found.values():
                found[name] = gone
        return found


@dataclass(frozen=True, slots=True)
class Afresh:
    """The best of the sets that do not follow from what earlier rounds removed."""

    name: str
    gone: dict[str, list[int]]
    effect: Tensor
    """(N,), see :meth:`Trials.effect`."""
    moments: Mapping[str, Moments]
    """Of the dense network."""


def effect_orders(
    groups: tuple[Group, ...],
    removed: Mapping[str, list[int]],
    scores: Mapping[str, np.ndarray],
    spreads: Mapping[str, Mapping[str, np.ndarray]],
) -> dict[str, Ranking]:
    """What measured effects propose: by themselves, evenly over all groups, with others' spread.

    Args:
        groups: What can be removed.
        removed: What is gone.
        scores: Group -> (units,) by measured effects.
        spreads: Name -> scores of an order that says how much each group gives up.
    """
    found = {"effect": Ranking(scores), "effect, even": even(groups, removed, scores)}
    for name, values in spreads.items():
        found[f"effect, {name}"] = spread_like(groups, removed, scores, values)
    return found


def orders(
    groups: tuple[Group, ...],
    removed: Mapping[str, list[int]],
    scores: Mapping[str, np.ndarray],
    rivals: Mapping[str, Rival],
    proposed: Mapping[str, Mapping[str, np.ndarray]],
) -> dict[str, Ranking]:
    """The orders a round tries: each by itself and evenly over all groups, and all together.

    Args:
        groups: What can be removed.
        removed: What is gone.
        scores: Group -> (units,) by measured effects.
        rivals: Other orders.
        proposed: Name of a rival -> group -> its scores on the network as it stands.
    """
    own = {name: proposed[name] for name, rival in rivals.items() if rival.own_spread}
    found = effect_orders(groups, removed, scores, own)
    places = [found["effect, even"]]
    for name, rival in rivals.items():
        more = _proposals(name, rival, proposed[name], groups, removed)
        found |= more
        if not rival.own_spread:
            places.append(more[f"{name}, even"])
    together = {g.name: np.mean([p.scores[g.name] for p in places], 0) for g in groups}
    found["together, even"] = even(groups, removed, together)
    return found


def least(
    trials: Trials,
    sets: Sets,
    moments: Mapping[str, Moments],
    *,
    ridge: float | None,
    always: bool = False,
    watcher: Phases,
) -> tuple[str, Tensor | None]:
    """The set with the least effect of its own, and that effect where it was measured.

    Args:
        trials: What they are tried on.
        sets: At least one.
        moments: See :meth:`Trials.effect`.
        ridge: Likewise.
        always: Measure even if there is nothing to choose from.
        watcher: Progress.
    """
    if (len(sets) == 1 and not always) or not trials.possible:
        return next(iter(sets)), None
    watcher.begin(f"trying {len(sets)} set{'s' if len(sets) > 1 else ''}", len(sets))
    found = {}
    for name, gone in sets.items():
        found[name] = trials.effect(gone, moments, ridge=ridge)
        watcher.advance(1)
    watcher.end()
    best = min(found, key=lambda name: float(found[name].mean()))
    return best, found[best]


def start_afresh(
    trials: Trials,
    goal: Goal,
    sizes: SizeModel,
    rivals: Mapping[str, Rival],
    *,
    intervention: Intervention,
    ridge: float,
    watcher: Phases,
) -> Afresh | None:
    """Try the rivals on the dense network: early rounds may have bound the late ones badly.

    Args:
        trials: The run's, as it stands.
        goal: Of the last round.
        sizes: Of the network as it is.
        rivals: Their orders are taken on the dense network.
        intervention: For the moments.
        ridge: See :meth:`Trials.effect`.
        watcher: Progress.

    Returns:
        ``None`` where nothing could be tried.
    """
    if not rivals:
        return None
    dense, whole = trials.dense, copy.deepcopy(sizes)
    for name, units in trials.removed.items():
        whole.restore(name, units)
    tried = {
        f"{proposal}, afresh": ranking
        for name, rival in rivals.items()
        for proposal, ranking in _proposals(
            name, rival, rival.scores(dense.module, goal.groups), goal.groups, {}
        ).items()
    }
    sets = goal.sets(whole, {}, tried)
    moments = input_moments(
        dense, consumers(goal.groups), trials.images, intervention=intervention, chunk=64
    )
    start = Trials(dense, dense, goal.groups, {}, trials.images)
    name, effect = least(start, sets, moments, ridge=ridge, always=True, watcher=watcher)
    return None if effect is None else Afresh(name, sets[name], effect, moments)


def best_ridge(
    trials: Trials,
    gone: Mapping[str, list[int]],
    moments: Mapping[str, Moments],
    *,
    ridge: float,
    effect: float | None,
    watcher: Phases,
) -> tuple[float, float | None]:
    """The ridge that leaves a set the least effect, better than a tenth of it and ten times it.

    With few images for many weights a layer follows its images too closely; how many are few
    depends on the network, so it is measured.

    Args:
        trials: What the set is tried on.
        gone: The set.
        moments: See :meth:`Trials.effect`.
        ridge: Where to begin.
        effect: Of the set with this ridge, where it is known.
        watcher: Progress.

    Returns:
        The ridge, and the effect with it.
    """
    if not trials.possible:
        return ridge, effect
    found: dict[float, float] = {} if effect is None else {ridge: effect}
    low, high = _RIDGES
    watcher.begin("choosing the ridge", 0)
    best = ridge
    while wanted := {r for r in (best / 10, best, best * 10) if low <= r <= high} - found.keys():
        for strength in sorted(wanted):
            found[strength] = float(trials.effect(gone, moments, ridge=strength).mean())
        best = min(found, key=lambda strength: found[strength])
    watcher.end()
    return best, found[best]


def consumers(groups: tuple[Group, ...]) -> list[str]:
    """Every layer that reads a unit."""
    return sorted({c.layer for g in groups for c in g.consumers})


def _proposals(
    name: str,
    rival: Rival,
    scores: Mapping[str, np.ndarray],
    groups: tuple[Group, ...],
    removed: Mapping[str, list[int]],
) -> dict[str, Ranking]:
    """The rankings that a rival's scores give."""
    if rival.own_spread:
        return {name: Ranking(scores, per_saving=False)}
    return {name: Ranking(scores), f"{name}, even": even(groups, removed, scores)}
