"""From a ranking of the units to a removal that meets a target: alignment, floors, savings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np

from cswap_deploy.config import RatioOf
from cswap_deploy.network.sizes import SizeModel
from cswap_deploy.network.units import Group
from cswap_deploy.records.plan import Size

Values = Mapping[str, np.ndarray]
"""Group -> (units,) float64 importance; the lowest goes first."""
Removal = dict[str, list[int]]
"""Group -> units by index."""
_NEAR = 0.005
"""How near a round comes to its target, as a fraction of it, before steps that go too far are
replaced by smaller ones."""
_LEAST = 1e-6
"""What a step saves at least, so that effects can be divided by it: of a millisecond, or of one."""
_WORTH_ITS_END = 0.75
"""A step ends where it saves at least so much, for each unit, of what the best longer one does."""
_DEPTH = {"no branches": np.inf, "branches sooner": 1 / 4, "branches first": 1 / 16}
"""What effects of whole branches are multiplied with, for candidates of their own. A branch's is
that of all its units together, and units' own add up to far less than that."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a group must look like when a round is over."""

    alignments: Mapping[str, int]
    """Group -> the number of units that stay is a multiple of this."""
    floors: Mapping[str, int]
    """Group -> units that must stay."""
    split: bool = False
    """Whether the last round may leave a group between two multiples to meet the ratio."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """Units of all groups in one order: the lowest value goes first."""

    values: Values
    per_saving: bool = True
    """Whether a value is divided by what removing the unit saves."""


@dataclass(frozen=True)
class Goal:
    """What a round is to reach, and the network that it starts from."""

    groups: tuple[Group, ...]
    limits: Limits
    sizes: SizeModel
    """Size of the network as it stands; not changed."""
    removed: Mapping[str, Sequence[int]]
    """Group -> units that are gone."""
    of: RatioOf
    """The quantity that the target counts."""
    target: float
    """What should be left of it."""
    split: bool = False
    """See :class:`Limits`; true in the last round only."""

    def remaining(self, group: Group) -> list[int]:
        """The units of a group that are still there, ascending."""
        if any(self.removed.get(branch) for branch in group.within):
            return []
        gone = set(self.removed.get(group.name, ()))
        return [u for u in range(group.units) if u not in gone]

    @property
    def layers(self) -> list[Group]:
        """The groups of units that lie beside one another; an allocation speaks of no branches."""
        return [g for g in self.groups if g.kind != "branch"]

    @property
    def branches(self) -> list[Group]:
        """Whole residual branches that are still there."""
        return [g for g in self.groups if g.kind == "branch" and self.remaining(g)]

    def worth(self, group: Group) -> float:
        """What a unit of a group saves, on average over the group's next step; above zero."""
        steps = self.steps[group.name]
        return steps[0][1] / steps[0][0] if steps else _LEAST

    @cached_property
    def steps(self) -> Mapping[str, list[tuple[int, float]]]:
        """Group -> how many units each of its steps removes, and what that saves.

        Where padded widths save nothing a step goes on to a width that does: alignment is what the
        device's model says it is.
        """
        return {group.name: self._steps_of(group) for group in self.groups}

    def _steps_of(self, group: Group) -> list[tuple[int, float]]:
        alive = self.remaining(group)
        alignment = self.limits.alignments[group.name]
        most = len(alive) - self.limits.floors[group.name]
        ends = np.arange(len(alive) % alignment or alignment, most + 1, alignment)
        saved = np.array([self.sizes.saving(group.name, alive[:end], self.of) for end in ends])
        found, at, before = [], 0, 0.0
        while len(ends):
            counts, more = ends - at, saved - before
            rates = more / counts
            first = int(np.argmax(rates >= _WORTH_ITS_END * rates.max()))
            found.append((int(counts[first]), max(float(more[first]), _LEAST)))
            at, before = int(ends[first]), float(saved[first])
            ends, saved = ends[first + 1 :], saved[first + 1 :]
        return found

    def without(self, gone: Mapping[str, Sequence[int]]) -> Size:
        """The size that is left once some more units are gone."""
        sizes = self.sizes.copy()
        for name, units in gone.items():
            sizes.remove(name, units)
        return sizes.size()

    def uniform(self, values: Values) -> Ranking:
        """The order of ``values`` within each group, and the same fraction of every group."""
        places = {}
        for group in self.layers:
            alive = len(self.remaining(group))
            places[group.name] = (group.units - alive + (np.arange(alive) + 0.5)) / group.units
        return self._in_order(values, places)

    def layer_adaptive(self, values: Values, allocation: Values) -> Ranking:
        """The order of ``values`` within each group, and as many of each as ``allocation`` takes.

        The latter are an importance that is compared as it is over all groups.
        """
        sizes = {g.name: np.sort(allocation[g.name][self.remaining(g)]) for g in self.layers}
        return self._in_order(values, sizes)

    def branches_times(self, values: Values, factor: float) -> Values:
        """The same, with those of whole branches scaled."""
        whole = {g.name for g in self.groups} - {g.name for g in self.layers}
        return {n: (v + 1e-12) * factor if n in whole else v for n, v in values.items()}

    def _in_order(self, values: Values, spread: Values) -> Ranking:
        """What is spread over the remaining units of each group, in the order of ``values``."""
        found = {g.name: np.full(g.units, np.inf) for g in self.groups}
        for group in self.layers:
            alive = np.array(self.remaining(group), dtype=np.int64)
            order = np.argsort(values[group.name][alive], kind="stable")
            found[group.name][alive[order]] = spread[group.name]
        return Ranking(found, per_saving=False)

    def by_effect(self, effects: Values, allocations: Mapping[str, Values]) -> dict[str, Ranking]:
        """Rankings by measured effects: as they are, uniform, and with each allocation."""
        found = {"effect": Ranking(effects)}
        if len(self.layers) < len(self.groups):
            for name, factor in _DEPTH.items():
                found[f"effect, {name}"] = Ranking(self.branches_times(effects, factor))
        return (
            found
            | {"effect, uniform": self.uniform(effects)}
            | {
                f"effect, {name}": self.layer_adaptive(effects, values)
                for name, values in allocations.items()
            }
        )

    def candidates(self, rankings: Mapping[str, Ranking]) -> dict[str, Removal]:
        """What each ranking removes; one that removes the same as an earlier one is left out."""
        found: dict[str, Removal] = {}
        for name, ranking in rankings.items():
            gone = self.choose(ranking)
            if gone not in found.values():
                found[name] = gone
        return found

    def choose(self, ranking: Ranking) -> Removal:
        """Remove in the order of a ranking until the target is nearest.

        A step that goes far past the target waits while smaller ones further down are tried. Where
        none fits and ``split`` is set, units of the waiting steps leave one by one: a group or two
        then end between multiples of their alignment, and the ratio is met.
        """
        sizes = self.sizes.copy()
        gone: Removal = {}

        def take(group: str, units: list[int]) -> float:
            sizes.remove(group, units)
            gone.setdefault(group, []).extend(units)
            return sizes.size().amount(self.of)

        target, near = self.target, _NEAR * self.target
        left = sizes.size().amount(self.of)
        waiting: Removal = {}
        for group, units in self._steps(ranking):
            if left <= target + (near if waiting else 0):
                break
            if group in waiting or sizes.saving(group, units, self.of) <= 0:
                continue  # what a branch took along saves nothing
            over = target - (left - sizes.saving(group, units, self.of))
            nearest = not self.split and not waiting and over <= left - target
            if over <= near or nearest:
                left = take(group, units)
            else:
                waiting[group] = units
        for group, units in waiting.items() if self.split else ():
            for unit in units:
                if abs(left - target) <= near:
                    return gone
                if abs(left - sizes.saving(group, [unit], self.of) - target) < abs(left - target):
                    left = take(group, [unit])
        return gone

    def one_step_on(self, gone: Removal, ranking: Ranking) -> Iterator[Removal]:
        """A removal with one more step of a group, for each group that has one left."""
        for group in self.groups:
            values, taken = ranking.values[group.name], gone.get(group.name, [])
            queue = [u for u in self._queue(group, ranking) if u not in taken]
            end = next((e for e in self._ends(group) if e > len(taken)), len(taken))
            units = queue[: end - len(taken)]
            if units and np.isfinite(values[units]).all():
                yield gone | {group.name: [*taken, *units]}

    def one_step_back(self, gone: Removal) -> Iterator[Removal]:
        """A removal without its last step of a group, for each group that it takes units of."""
        for group in self.groups:
            if taken := gone.get(group.name, []):
                end = max((e for e in self._ends(group) if e < len(taken)), default=0)
                yield gone | {group.name: taken[:end]}

    def _ends(self, group: Group) -> list[int]:
        """How many units of a group are gone after each of its steps."""
        return [*accumulate(count for count, _ in self.steps[group.name])]

    def _queue(self, group: Group, ranking: Ranking) -> list[int]:
        """The units of a group that are still there, in the order in which they leave."""
        values = ranking.values[group.name]
        return sorted(self.remaining(group), key=lambda u: (values[u], u))

    def _steps(self, ranking: Ranking) -> list[tuple[str, list[int]]]:
        """Units that leave together, in order; each step leaves its group aligned."""
        steps = []
        for position, group in enumerate(self.groups):
            values = ranking.values[group.name]
            queue = self._queue(group, ranking)
            at, highest = 0, -np.inf
            for count, saves in self.steps[group.name]:
                units = queue[at : at + count]
                cost = float(sum(values[u] for u in units))
                cost /= saves if ranking.per_saving else count
                # Within a group a later step never precedes an earlier one, whatever is rounded.
                highest = max(cost, highest)
                # Of what costs the same, whole branches first.
                place = position - len(self.groups) * (group.kind == "branch")
                steps.append((highest, place, at, group.name, units))
                at += count
        steps.sort(key=lambda step: step[:3])
        return [(name, units) for *_, name, units in steps]
