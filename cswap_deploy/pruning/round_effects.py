"""The effects that one round measures, and what they say: verdicts, and costs that rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from cswap_deploy.causal.adaptive import (
    FIRST_IMAGES,
    NOTHING,
    Spent,
    StoppingRule,
    as_estimates,
    measure_adaptively,
)
from cswap_deploy.causal.cost import LATER_ROUNDS
from cswap_deploy.causal.effects import Effects, likely_harm
from cswap_deploy.causal.experiment import Experiment
from cswap_deploy.causal.fisher import estimate_effects
from cswap_deploy.causal.measurement import EffectMeasurement
from cswap_deploy.causal.significance import find_verdicts
from cswap_deploy.network.units import Group
from cswap_deploy.progress import Phases
from cswap_deploy.pruning.allocation import Goal, Ranking, Removal, Values
from cswap_deploy.pruning.job import Job
from cswap_deploy.pruning.state import State
from cswap_deploy.records.plan import UnitEffect

_NARROW = 2
"""A round measures this many times as many units as it is to remove, those with the least effects,
before it looks which of them would go."""


@dataclass(slots=True)
class RoundEffects:
    """Measures the units that may go in one round."""

    job: Job
    state: State
    """The run's; its effects are updated."""
    goal: Goal
    experiment: Experiment
    """On the images of this round."""
    allocations: Mapping[str, Values]
    """Name -> an importance whose allocation over the groups the effects may take."""
    units: int = field(init=False, default=0)
    """How many were measured."""
    spent: Spent = field(init=False, default=NOTHING)

    def measure(self) -> dict[str, np.ndarray]:
        """Measure, and find the verdicts of everything that was measured together.

        Returns:
            Group -> (units,) latest costs of all units, those of earlier rounds included.
        """
        job = self.job
        how = self._lazily if job.resolved.measuring == "exact" else self._adaptively
        found = how(job.backend.measurements(self.experiment))
        self.units = sum(effects.looked_at for effects in found)
        self._record([effects for effects in found if len(effects.units)])
        return {g.name: self.state.costs(g, job.config.effect) for g in self.goal.groups}

    def _adaptively(self, measurement: EffectMeasurement) -> list[Effects]:
        job, progress, images = self.job, self.job.progress, len(self.experiment.images)
        there = {g: self.goal.remaining(g) for g in self.goal.groups}
        alive = {g: units for g, units in there.items() if units}
        units = sum(map(len, alive.values()))
        if job.resolved.measuring == "bf16":
            progress.begin(f"measuring in bfloat16, {self._where}", units)
            steps = _Steps(progress, images)
            estimates = as_estimates(measurement.effects(alive, bfloat16=True, tick=steps))
        else:
            progress.begin(f"estimating effects, images, {self._where}", images)
            estimates = estimate_effects(self.experiment, alive, tick=progress.advance)
        first, most = self.state.round == 1, job.resolved.most_forwards
        if most is not None and not first:
            most = round(LATER_ROUNDS * most)
        progress.begin(f"measuring effects as far as needed, {self._where}", units if first else 0)
        found, self.spent = measure_adaptively(
            measurement, alive, estimates,
            effect=job.config.effect,
            rule=StoppingRule(
                partial(self._thresholds, alive), job.config.error_rate, everyone=first, most=most
            ),
            tick=_Steps(progress, min(FIRST_IMAGES, images)),
        )  # fmt: skip
        progress.end()
        return found

    def _lazily(self, measurement: EffectMeasurement) -> list[Effects]:
        """Every unit that would go is measured in this round, exactly.

        Effects mostly grow as the network shrinks, so an effect from an earlier round is a lower
        bound, about: the units with the least ones are measured again, then those that have the
        least now, until every unit that would go was measured in this round (lazy greedy selection;
        Minoux, "Accelerated greedy algorithms for maximizing submodular set functions", 1978). A
        unit that goes on what it did to a healthier network breaks this one: ResNet-20, no refit,
        30 % gone: top-1 .46 instead of .78 (benchmarks/LOG.md).
        """
        effect, progress = self.job.config.effect, self.job.progress
        costs = {g: self.state.costs(g, effect) for g in self.goal.groups}
        old = {g: set(self.goal.remaining(g)) for g in self.goal.groups}
        found: list[Effects] = []
        batch = 0
        while wanted := self._wanted(costs, old):
            batch += 1
            if batch == 1:
                progress.begin(f"measuring effects, {self._where}", sum(map(len, wanted.values())))
            elif batch == 2:  # one phase for all that follow: how many there are is not known yet
                progress.begin(f"measuring what now has the least effect, {self._where}", 0)
            effects = measurement.effects(
                wanted, tick=_Steps(progress, len(self.experiment.images))
            )
            for (group, units), measured in zip(wanted.items(), effects, strict=True):
                kl = effect == "kl"
                costs[group][units] = (
                    measured.kl.mean(1) if kl else likely_harm(measured.true_class)
                )
                old[group] -= {*units}
            found += effects
        progress.end()
        forwards = sum(effects.kl.size for effects in found)
        self.spent = Spent(forwards=forwards, exact=forwards)
        return found

    @property
    def _where(self) -> str:
        return self.job.resolved.called(self.state.round)

    def _thresholds(
        self, alive: Mapping[Group, list[int]], costs: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Group -> the costs between what the candidates remove and what they keep."""
        values = {g.name: np.zeros(g.units) for g in self.goal.groups}
        for group, units in alive.items():
            values[group.name][units] = costs[group.name]
        rankings = {"effect": Ranking(values)}
        if self.job.config.select == "set":
            rankings = self.goal.by_effect(values, self.allocations)
        ends: dict[str, list[float]] = {g.name: [] for g in alive}
        for gone in self.goal.candidates(rankings).values():
            for group, units in alive.items():
                leaving = gone.get(group.name, [])
                staying = sorted({*units} - {*leaving})
                if leaving and staying:
                    last, first = values[group.name][leaving].max(), values[group.name][staying]
                    ends[group.name].append((last + first.min()) / 2)
                elif staying:  # what would have to be less for a unit to go
                    ends[group.name].append(self._highest(group, gone, values))
        return {name: np.array(found) for name, found in ends.items()}

    def _highest(self, group: Group, gone: Removal, values: Values) -> float:
        """The most that a unit of a group costs, per what it saves, where others of it go."""
        goal = self.goal
        worth = [
            float(values[g.name][gone[g.name]].mean()) / goal.worth(g)
            for g in goal.groups
            if g.name in gone
        ]
        return max(worth, default=0.0) * goal.worth(group)

    def _wanted(
        self, costs: Mapping[Group, np.ndarray], old: Mapping[Group, set[int]]
    ) -> dict[Group, list[int]]:
        """Units to measure again: those that may go on a cost of an earlier round; at first all.

        ``costs`` are the (units,) latest ones of each group.
        """
        goal = self.goal
        if self.state.round == 1:
            wanted = old
        else:
            share = _NARROW * (1 - goal.target / goal.sizes.size().amount(goal.of))
            if share <= 0:  # a coarse step went past this target already
                return {}
            worth = {g: costs[g] / goal.worth(g) for g in goal.groups}
            there = [worth[g][u] for g in goal.groups for u in goal.remaining(g)]
            limit = np.quantile(there, min(1.0, share))
            wanted = {g: {u for u in units if worth[g][u] <= limit} for g, units in old.items()}
            if not any(wanted.values()):
                gone = goal.choose(Ranking({g.name: values for g, values in costs.items()}))
                wanted = {g: units & {*gone.get(g.name, ())} for g, units in old.items()}
        return {g: sorted(units) for g, units in wanted.items() if units}

    def _record(self, found: list[Effects]) -> None:
        """Verdicts on all units that the round measured; their latest effects are kept."""
        if not found:
            return
        seen = [
            np.ones(e.kl.shape, dtype=bool) if e.measured is None else e.measured for e in found
        ]
        if self.experiment.task != "classify":
            self._record_without_classes(found, seen)
            return
        verdicts = find_verdicts(
            np.concatenate([e.true_class for e in found]),
            self.experiment.labels.numpy(),
            alpha=self.job.config.alpha,
            min_effect=self.job.config.min_effect,
            measured=np.concatenate(seen),
        )
        row = 0
        for effects, measured in zip(found, seen, strict=True):
            latest = self.state.effects.setdefault(effects.group, {})
            for unit, harm, divergence, images in zip(
                effects.units.tolist(), likely_harm(effects.true_class), effects.kl.mean(1),
                measured.sum(1).tolist(), strict=True,
            ):  # fmt: skip
                latest[unit] = UnitEffect(
                    unit=unit, true_class=float(verdicts.mean[row]), harm=float(harm),
                    kl=float(divergence),
                    low=float(verdicts.low[row]), high=float(verdicts.high[row]),
                    verdict=verdicts.verdicts[row], round=self.state.round,
                    serves=verdicts.serves[row], harms=verdicts.harms[row], images=images,
                )  # fmt: skip
                row += 1

    def _record_without_classes(self, found: list[Effects], seen: list[np.ndarray]) -> None:
        """Effects on the outputs alone: verdicts are about a true class."""
        for effects, measured in zip(found, seen, strict=True):
            latest = self.state.effects.setdefault(effects.group, {})
            rows = zip(
                effects.units.tolist(), effects.kl.mean(1), measured.sum(1).tolist(), strict=True
            )
            for unit, divergence, images in rows:
                latest[unit] = UnitEffect(
                    unit=unit, true_class=None, kl=float(divergence), low=None, high=None,
                    verdict=None, round=self.state.round, images=images,
                )  # fmt: skip


class _Steps:
    """Turns (variants x images) into finished units."""

    def __init__(self, progress: Phases, images: int) -> None:
        self.progress, self.images, self.pending = progress, images, 0

    def __call__(self, runs: int) -> None:
        units, self.pending = divmod(self.pending + runs, self.images)
        self.progress.advance(units)
