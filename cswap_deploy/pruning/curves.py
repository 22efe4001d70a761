"""Curves of groups: what removing a part of one group does, measured, and an allocation by them.

Effects of single units add up to less than what they do together, and in one group far more so than
in another: of EfficientNet-Lite0's last expanding layer half costs fourteen times as much as of the
one before it. So the first k units of each group, in the order of a ranking, are removed together,
for a few k; groups then give up units where the curve is flattest for what it saves.

Points are measured only as far as an allocation goes: a group whose first eighth is dear needs no
more of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from cswap_deploy.causal.interventions import Moments
from cswap_deploy.network.units import Group
from cswap_deploy.progress import Phases
from cswap_deploy.pruning.allocation import Goal, Ranking, Values
from cswap_deploy.pruning.trials import Trials

PARTS = 1 / 8, 1 / 4, 1 / 2, 3 / 4, 7 / 8
"""Of a group's remaining units: what goes at the points of its curve."""
_STEEPER = 1.5
"""Beyond the last point the root of the effect grows so much faster than before it."""
_LEAST = 1e-12


@dataclass(slots=True)
class Curve:
    """One group's."""

    group: Group
    queue: list[int]
    """Its remaining units, in the order in which they go."""
    counts: list[int]
    """Where points may lie: numbers of units, ascending."""
    effects: list[float] = field(default_factory=list)
    """At the first of them, never falling."""

    @property
    def next(self) -> int | None:
        """Units of the next point; ``None`` at the end."""
        return self.counts[len(self.effects)] if len(self.effects) < len(self.counts) else None

    @property
    def reached(self) -> int:
        """Units of the last point that was measured."""
        return self.counts[len(self.effects) - 1] if self.effects else 0

    def costs(self) -> np.ndarray:
        """(units,) what each one adds, in the order of removal; never falling.

        Between points the root of the effect is linear: a loss of second order, such as this is
        about, grows with the square.
        """
        at = np.array([0, *self.counts[: len(self.effects)]], dtype=float)
        root = np.sqrt([0.0, *self.effects])
        every = np.arange(len(self.queue) + 1, dtype=float)
        found = np.interp(every, at, root)
        slope = _STEEPER * (root[-1] - root[-2]) / (at[-1] - at[-2]) if len(at) > 1 else 0.0
        found = np.where(every > at[-1], root[-1] + slope * (every - at[-1]), found)
        return np.maximum.accumulate(np.diff(found**2) + _LEAST)


def by_curves(
    trials: Trials, goal: Goal, order: Values, moments: Mapping[str, Moments], progress: Phases
) -> Ranking:
    """A ranking that keeps an order within groups, and allocates by what parts of them cost.

    Args:
        trials: What parts are tried on, before any refit (:meth:`Trials.screen`).
        goal: Says how far the curves must be known.
        order: The lowest of a group goes first.
        moments: Of the consumers' inputs, for the ablation values.
        progress: Told of each point.
    """
    curves = [_curve(goal, group, order[group.name]) for group in goal.groups]
    curves = [curve for curve in curves if curve.counts]
    base = trials.screen({}, moments)
    trials = trials.front_to_back()

    def first(curve: Curve) -> int:
        return trials.network.graph.position[trials.first_changed({curve.group.name: curve.queue})]

    wanted, ranking = curves, _ranking(goal, curves)
    while wanted:
        progress.begin(f"comparing parts of {len(wanted)} groups", len(wanted))
        for curve in sorted(wanted, key=first):
            count = curve.next
            assert count is not None
            effect = trials.screen({curve.group.name: curve.queue[:count]}, moments) - base
            curve.effects.append(max(effect, *curve.effects, 0.0))
            progress.advance(1)
        progress.end()
        ranking = _ranking(goal, curves)
        gone = goal.choose(ranking)
        wanted = [
            curve for curve in curves
            if curve.next is not None and len(gone.get(curve.group.name, ())) > curve.reached
        ]  # fmt: skip
    return ranking


def _curve(goal: Goal, group: Group, order: np.ndarray) -> Curve:
    queue = sorted(goal.remaining(group), key=lambda unit: (order[unit], unit))
    if group.kind == "branch":
        return Curve(group, queue, [1] if queue else [])
    most = len(queue) - goal.limits.floors[group.name]
    aligned = goal.limits.alignments[group.name]
    counts = {max(aligned, int(part * len(queue)) // aligned * aligned) for part in PARTS}
    return Curve(group, queue, sorted(count for count in counts if count <= most))


def _ranking(goal: Goal, curves: list[Curve]) -> Ranking:
    values = {group.name: np.full(group.units, np.inf) for group in goal.groups}
    for curve in curves:
        values[curve.group.name][curve.queue] = curve.costs()
    return Ranking(values)
