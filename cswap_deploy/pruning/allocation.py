"""From an order of the units to a set that meets a target: bundles, limits, what they save."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cswap_deploy.network.sizes import SizeModel, amount
from cswap_deploy.network.units import Group
from cswap_deploy.records.plan import RatioOf

_NEAR = 0.005
"""How near a round comes to its target, as a fraction of it, before coarse bundles are searched
for one that fits better."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a group must look like when a round is over."""

    granules: Mapping[str, int]
    """Group -> kept units must be a multiple of this."""
    floors: Mapping[str, int]
    """Group -> units that must stay."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """An order of all units: the lowest score goes first."""

    scores: Mapping[str, np.ndarray]
    """Group -> (units,)."""
    per_saving: bool = True
    """Whether a score counts against what removing the unit saves."""


def even(
    groups: tuple[Group, ...], removed: Mapping[str, list[int]], scores: Mapping[str, np.ndarray]
) -> Ranking:
    """The same order within each group, and the same fraction from all of them."""
    found = {}
    for group in groups:
        alive = remaining(group, removed)
        values = scores[group.name][alive]
        place = np.empty(len(alive))
        place[np.argsort(values, kind="stable")] = np.arange(len(alive)) + 0.5
        spread = np.zeros(group.units)
        spread[alive] = (group.units - len(alive) + place) / group.units
        found[group.name] = spread
    return Ranking(found, per_saving=False)


def spread_like(
    groups: tuple[Group, ...],
    removed: Mapping[str, list[int]],
    scores: Mapping[str, np.ndarray],
    other: Mapping[str, np.ndarray],
) -> Ranking:
    """The same order within each group, and from each group as much as another order takes.

    Args:
        groups: What can be removed.
        removed: What is gone.
        scores: Group -> (units,), the order.
        other: Group -> (units,), an order whose scores are ranked as they are.
    """
    found = {}
    for group in groups:
        alive = remaining(group, removed)
        values = np.zeros(group.units)
        order = np.argsort(scores[group.name][alive], kind="stable")
        values[np.array(alive, dtype=np.int64)[order]] = np.sort(other[group.name][alive])
        found[group.name] = values
    return Ranking(found, per_saving=False)


def remaining(group: Group, removed: Mapping[str, list[int]]) -> list[int]:
    """The units of a group that are still there, ascending."""
    gone = set(removed.get(group.name, ()))
    return [u for u in range(group.units) if u not in gone]


def choose(
    groups: tuple[Group, ...],
    sizes: SizeModel,
    removed: dict[str, list[int]],
    ranking: Ranking,
    limits: Limits,
    *,
    target: float,
    of: RatioOf,
    fine: bool,
) -> dict[str, list[int]]:
    """Mark bundles as removed, lowest score first, until the target is nearest.

    A bundle that goes far past the target waits while smaller ones from further down the order are
    tried. Where none fits and ``fine`` is set, units of the waiting ones leave one by one: a
    group or two then end at odd widths, and the ratio is met.

    Args:
        groups: What can be removed.
        sizes: Of the network as it is; kept current.
        removed: Group -> units that are gone; extended.
        ranking: The order.
        limits: Of each group.
        target: What should be left.
        of: Of what.
        fine: See above.

    Returns:
        Group -> the units that go now.
    """
    gone: dict[str, list[int]] = {}

    def take(group: str, units: list[int]) -> int:
        sizes.remove(group, units)
        gone.setdefault(group, []).extend(units)
        removed.setdefault(group, []).extend(units)
        return amount(sizes.size(), of)

    near = _NEAR * target
    left = amount(sizes.size(), of)
    waiting: dict[str, list[int]] = {}
    for group, units in _bundles(groups, sizes, removed, ranking, limits, of):
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
    removed: dict[str, list[int]],
    ranking: Ranking,
    limits: Limits,
    of: RatioOf,
) -> list[tuple[str, list[int]]]:
    """What can go together, in order. A bundle leaves its group at a multiple of its granule."""
    entries = []
    for position, group in enumerate(groups):
        alive = remaining(group, removed)
        scores = ranking.scores[group.name]
        queue = sorted(alive, key=lambda u: (scores[u], u))
        granule = limits.granules[group.name]
        size = len(alive) % granule or granule
        at = 0
        while len(alive) - at - size >= limits.floors[group.name]:
            units = queue[at : at + size]
            worth = sizes.saving(group.name, units, of) if ranking.per_saving else len(units)
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
