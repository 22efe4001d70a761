"""What one round measures, and what it makes of it: latest effects, and verdicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor

from cswap_deploy.causal.adaptive import (
    FIRST_IMAGES,
    Spent,
    as_guesses,
    measure_adaptively,
)
from cswap_deploy.causal.cost import LATER_ROUNDS
from cswap_deploy.causal.effects import Effects, likely_harm
from cswap_deploy.causal.fisher import guess
from cswap_deploy.causal.interventions import Moments
from cswap_deploy.causal.memory import Budget
from cswap_deploy.causal.scoring import Scorer
from cswap_deploy.causal.significance import judge
from cswap_deploy.network.graph import Graph
from cswap_deploy.network.sizes import SizeModel, amount
from cswap_deploy.network.units import Group
from cswap_deploy.progress import Phases
from cswap_deploy.pruning.allocation import Ranking, remaining
from cswap_deploy.pruning.candidates import Goal, effect_orders
from cswap_deploy.pruning.state import Measurement, Settings, State

_NARROW = 2
"""A round measures this many times as many units as it is to remove, those with the least effects,
before it looks which of them would go."""


@dataclass(frozen=True, slots=True)
class Round:
    """Everything that measuring in a round depends on."""

    graph: Graph
    """The network as it stands."""
    goal: Goal
    state: State
    settings: Settings
    sizes: SizeModel
    spreads: Mapping[str, Mapping[str, np.ndarray]]
    """Name -> group -> scores of orders whose spread over the groups the effects may take."""
    images: Tensor
    labels: Tensor
    moments: Mapping[str, Moments]
    budget: Budget
    scorer: Scorer
    """On the same network and images."""

    def measure(self, watcher: Phases) -> tuple[int, Spent]:
        """Measure what may go in this round and judge it together.

        Returns:
            How many units were measured, and what that took.
        """
        if self.settings.measuring != "exact":
            found, spent = self._adaptively(watcher)
        else:
            found, spent = self._lazily(watcher)
        self._judge(found)
        return sum(len(effects.units) for effects in found), spent

    def _adaptively(self, watcher: Phases) -> tuple[list[Effects], Spent]:
        alive = {g: remaining(g, self.state.removed) for g in self.goal.groups}
        units = sum(map(len, alive.values()))
        if self.settings.measuring == "bf16":
            watcher.begin(f"measuring in bfloat16, {self._where}", units)
            steps = _Steps(watcher, len(self.images))
            guesses = as_guesses(self.scorer.effects(alive, half=True, tick=steps))
        else:
            watcher.begin(f"estimating effects, images, {self._where}", len(self.images))
            guesses = guess(
                self.graph, alive, images=self.images, labels=self.labels, moments=self.moments,
                budget=self.budget, tick=watcher.advance,
            )  # fmt: skip
        first, most = self.state.round == 1, self.settings.most_forwards
        if most is not None and not first:
            most = round(LATER_ROUNDS * most)
        watcher.begin(f"measuring effects as far as needed, {self._where}", units if first else 0)
        found = measure_adaptively(
            self.scorer, alive, guesses,
            effect=self.settings.effect, cuts=partial(self._cuts, alive),
            error_rate=self.settings.error_rate, everyone=first, most=most,
            tick=_Steps(watcher, min(FIRST_IMAGES, len(self.images))),
        )  # fmt: skip
        watcher.end()
        return found

    def _lazily(self, watcher: Phases) -> tuple[list[Effects], Spent]:
        """Every unit that would go is measured in this round, exactly.

        Effects mostly grow as the network shrinks, so an effect from an earlier round is a lower
        bound, about: the units with the least ones are measured again, then those that have the
        least now, until every unit that would go was measured in this round (lazy greedy selection;
        Minoux, "Accelerated greedy algorithms for maximizing submodular set functions", 1978). A
        unit that goes on what it did to a healthier network breaks this one: ResNet-20, nothing
        made up for, 30 % gone: top-1 .46 instead of .78 (benchmarks/LOG.md).
        """
        ranks = {g: self.state.costs(g, self.settings) for g in self.goal.groups}
        old = {g: set(remaining(g, self.state.removed)) for g in self.goal.groups}
        found: list[Effects] = []
        batch = 0
        while candidates := self._candidates(ranks, old):
            batch += 1
            if batch == 1:
                watcher.begin(
                    f"measuring effects, {self._where}", sum(map(len, candidates.values()))
                )
            elif batch == 2:  # one phase for all that follow: how many there are is not known yet
                watcher.begin(f"measuring what now has the least effect, {self._where}", 0)
            steps = _Steps(watcher, len(self.images))
            effects = self.scorer.effects(candidates, tick=steps)
            for (group, units), measured in zip(candidates.items(), effects, strict=True):
                ranks[group][units] = _costs(measured, self.settings)
                old[group] -= {*units}
            found += effects
        watcher.end()
        forwards = sum(effects.kl.size for effects in found)
        return found, Spent(forwards=forwards, exact=forwards)

    @property
    def _where(self) -> str:
        return f"round {self.state.round}/{self.settings.rounds}"

    def _cuts(
        self, alive: Mapping[Group, list[int]], costs: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Group -> the costs between what the proposed sets remove and what they keep."""
        scores = {}
        for group, units in alive.items():
            scores[group.name] = np.zeros(group.units)
            scores[group.name][units] = costs[group.name]
        orders = {"effect": Ranking(scores)}
        if self.settings.select == "set":
            orders = effect_orders(self.goal.groups, self.state.removed, scores, self.spreads)
        ends: dict[str, list[float]] = {g.name: [] for g in alive}
        for gone in self.goal.sets(self.sizes, self.state.removed, orders).values():
            for group, units in alive.items():
                leaving = gone.get(group.name, [])
                staying = sorted({*units} - {*leaving})
                if leaving and staying:
                    last, first = scores[group.name][leaving].max(), scores[group.name][staying]
                    ends[group.name].append((last + first.min()) / 2)
                elif staying:  # what would have to be less for a unit to go
                    ends[group.name].append(self._limit(group, gone, scores))
        return {name: np.array(found) for name, found in ends.items()}

    def _limit(
        self, group: Group, gone: Mapping[str, list[int]], scores: Mapping[str, np.ndarray]
    ) -> float:
        """The most that a unit of a group costs, per what it saves, where others of it go."""
        of = self.goal.of
        worth = [
            float(scores[name][units].mean()) / max(self.sizes.saving(name, units[:1], of), 1)
            for name, units in gone.items()
        ]
        return max(worth, default=0.0) * self.sizes.saving(group.name, [0], of)

    def _candidates(
        self, ranks: Mapping[Group, np.ndarray], old: Mapping[Group, set[int]]
    ) -> dict[Group, list[int]]:
        """Units that may go in this round and were not measured in it; in the first one all.

        Args:
            ranks: Group -> (units,) latest costs.
            old: Group -> units that are there and whose cost is of an earlier round.
        """
        goal, state, sizes = self.goal, self.state, self.sizes
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

    def _judge(self, found: list[Effects]) -> None:
        """Verdicts on all units that the round measured; their latest effects are kept."""
        found = [effects for effects in found if len(effects.units)]
        if not found:
            return
        seen = [
            np.ones(e.kl.shape, dtype=bool) if e.measured is None else e.measured for e in found
        ]
        judgement = judge(
            np.concatenate([e.true_class for e in found]),
            self.labels.numpy(),
            alpha=self.settings.alpha,
            min_effect=self.settings.min_effect,
            measured=np.concatenate(seen),
        )
        row = 0
        for effects, measured in zip(found, seen, strict=True):
            latest = self.state.measured.setdefault(effects.group, {})
            for unit, harm, divergence, images in zip(
                effects.units.tolist(), likely_harm(effects.true_class), effects.kl.mean(1),
                measured.sum(1).tolist(), strict=True,
            ):  # fmt: skip
                latest[unit] = Measurement(
                    true_class=float(judgement.mean[row]),
                    harm=float(harm),
                    kl=float(divergence),
                    low=float(judgement.low[row]),
                    high=float(judgement.high[row]),
                    verdict=judgement.verdicts[row],
                    round=self.state.round,
                    serves=judgement.serves[row],
                    harms=judgement.harms[row],
                    images=images,
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
