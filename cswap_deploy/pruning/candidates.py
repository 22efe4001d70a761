"""Candidates of a round: what proposes them, and the one with the least effect as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from cswap_deploy.causal.interventions import Moments
from cswap_deploy.progress import Phases
from cswap_deploy.pruning.allocation import Goal, Ranking, Removal, Values
from cswap_deploy.pruning.curves import by_curves
from cswap_deploy.pruning.importance import IMPORTANCES, View
from cswap_deploy.pruning.trials import Trial, Trials, less_beyond_chance

PROPOSERS = "magnitude", "lamp"
"""Importances that propose candidates beside the measured effects: they cost nothing to compute,
and as no image chose them, their candidates do not fit the calibration images by chance."""
CURVED = "effect", "lamp"
"""Orders whose groups' curves are measured."""
_FINALISTS = 2
"""Candidates that are tried after the screening."""
NEIGHBOURS = 3
"""Of the search over branches: so many are tried in each step."""
_STEPS = 6
"""At most."""
_NONE = 1e-6
"""An effect (nats) that is float32's rounding: such candidates are as good as one another."""
_LATE = 1e30
"""Value of units that go last, though before whole branches, of which weights say nothing."""
_EQUAL = 1.01
"""Effects within this factor are equal, far within chance: the fewest multiply-accumulates win."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The candidate that a round removes."""

    name: str
    gone: Removal
    moments: Mapping[str, Moments]
    """Moments of the consumers' inputs in the network that it was proposed for."""
    trial: Trial | None
    """What came of it; ``None`` where it was not tried."""
    goal: Goal
    ranking: Ranking
    """Which removes it for the goal's target."""
    stepped: bool = False
    """Whether it is some steps away from what the ranking removes."""

    def at(self, target: float) -> Choice:
        """What the same ranking removes for another target."""
        goal = replace(self.goal, target=target)
        return replace(self, gone=goal.choose(self.ranking), goal=goal)

    @property
    def effect(self) -> float | None:
        """Its mean effect, where it was tried."""
        return None if self.trial is None else float(self.trial.effect.mean())


def proposals(view: View) -> dict[str, Values]:
    """Importance -> its values, of those that propose candidates."""
    return {name: IMPORTANCES[name].of(view) for name in PROPOSERS}


def allocations(proposed: Mapping[str, Values]) -> dict[str, Values]:
    """Those of them that say how much each group gives up."""
    return {n: values for n, values in proposed.items() if IMPORTANCES[n].allocates}


def rankings(goal: Goal, effects: Values, proposed: Mapping[str, Values]) -> dict[str, Ranking]:
    """All rankings that a round tries, by measured effects and by :func:`proposals`."""
    found = goal.by_effect(effects, allocations(proposed)) | _by_weights(goal, proposed)
    places = [r for name, r in found.items() if name.endswith(", uniform")]
    together = {g.name: np.mean([p.values[g.name] for p in places], 0) for g in goal.groups}
    return found | {"together, uniform": goal.uniform(together)}


def curved(
    trials: Trials, goal: Goal, orders: Mapping[str, Values], moments: Mapping[str, Moments],
    progress: Phases,
) -> dict[str, Ranking]:  # fmt: skip
    """Rankings that keep an importance's order in each group; what parts of it cost allocates.

    Where images are few: else they are refitted too well for what parts cost before to tell.
    """
    ground = trials.ground
    if not (ground.few and ground.possible and moments):
        return {}
    return {
        f"{name}, by curves": by_curves(trials, goal, orders[name], moments, progress)
        for name in CURVED if name in orders
    }  # fmt: skip


def branches_in_turn(
    trials: Trials, goal: Goal, effects: Values, moments: Mapping[str, Moments], progress: Phases
) -> Values:  # fmt: skip
    """The same effects, but of each whole branch what it adds to those that go before it.

    By itself a branch says little of what it does once others are gone: several that carry the same
    look harmless, each of them. They go one by one, the cheapest for what it saves first; an effect
    that was measured with fewer gone is measured again before it is believed (no refit meanwhile).

    Args:
        trials: What they are tried on.
        goal: Says when enough of them are gone.
        effects: As measured.
        moments: Of the consumers' inputs, for the ablation values.
        progress: Told of each branch that goes.

    Source:
        Minoux 1978, "Accelerated greedy algorithms for maximizing submodular set functions".
    """
    whole = goal.branches
    if len(whole) < 2 or not trials.ground.possible:
        return effects
    worth = {g.name: goal.worth(g) for g in whole}
    cost = {name: float(effects[name][0]) / worth[name] for name in worth}
    found = dict(effects)
    left = goal.sizes.size().amount(goal.of) - goal.target
    progress.begin("removing branches in turn", len(whole))
    gone: Removal = {}
    total, highest = trials.screen({}, moments), 0.0
    fresh: dict[str, float] = {}
    while cost and left > 0:
        name = min(cost, key=cost.__getitem__)
        if name not in fresh:
            fresh[name] = trials.screen(gone | {name: [0]}, moments)
            cost[name] = max(fresh[name] - total, 0.0) / worth[name]
            continue
        highest = max(highest, cost.pop(name))
        found[name] = np.full(1, highest * worth[name])
        gone[name], total, left = [0], fresh[name], left - worth[name]
        fresh = {}
        progress.advance(1)
    # What was measured with others gone is told beside those that are not: they cost no less.
    found |= {name: np.full(1, max(each, highest) * worth[name]) for name, each in cost.items()}
    progress.end()
    return found


def best_candidate(
    trials: Trials, goal: Goal, rankings: Mapping[str, Ranking], moments: Mapping[str, Moments],
    *, progress: Phases, always: bool = False,
) -> Choice:  # fmt: skip
    """Of what rankings remove, the candidate with the least effect of its own.

    A single one is tried only if ``always``.

    Successive halving: all are screened on few images, and the first few of them tried.
    ``moments`` are those of :meth:`Trials.trial`.

    Source:
        Jamieson & Talwalkar 2016, "Non-stochastic Best Arm Identification and Hyperparameter
        Optimization" (arXiv:1502.07943).
    """
    candidates = goal.candidates(rankings)
    count = len(candidates)
    if (count == 1 and not always) or not trials.ground.possible:
        name = next(iter(candidates))
        return Choice(name, candidates[name], moments, None, goal, rankings[name])
    finalists = list(candidates)
    progress.begin(f"trying {count} candidate{'s' if count > 1 else ''}", count)
    # What is not folded into other weights is far worse before the refit than after it.
    if count > _FINALISTS and moments:
        values = {n: max(trials.screen(gone, moments), _NONE) for n, gone in candidates.items()}
        finalists = sorted(values, key=lambda name: values[name])[:_FINALISTS]
        progress.advance(count - _FINALISTS)
    tried: dict[str, Trial] = {}
    for name in finalists:
        tried[name] = trials.trial(candidates[name], moments)
        progress.advance(1)
    progress.end()
    effects = {name: max(float(trial.effect.mean()), _NONE) for name, trial in tried.items()}
    equal = [name for name in tried if effects[name] <= _EQUAL * min(effects.values())]
    best = min(equal, key=lambda name: goal.without(candidates[name]).macs)  # the faster, about
    return Choice(best, candidates[best], moments, tried[best], goal, rankings[best])


def search_branches(
    trials: Trials, goal: Goal, choice: Choice, moments: Mapping[str, Moments],
    *, progress: Phases,
) -> Choice:  # fmt: skip
    """A tried candidate with one whole branch more or fewer, as long as that is better.

    A branch's effect by itself says little of what it is once others are gone, and a ranking has it
    for good or not at all. Each step screens every such neighbour at the same target, tries the
    first few, and goes on from the one that is better beyond chance. Arguments as those of
    :func:`best_candidate`.
    """
    whole = goal.branches
    for _ in range(_STEPS if whole and choice.trial is not None else 0):
        rankings = {
            f"{choice.name}, {'with' if g.name in choice.gone else 'without'} {g.name}": replace(
                choice.ranking,
                values={**choice.ranking.values}
                | {g.name: np.full(1, np.inf if g.name in choice.gone else 0.0)},
            )
            for g in whole
        }
        near = {n: gone for n, gone in goal.candidates(rankings).items() if gone != choice.gone}
        if not near:
            break
        progress.begin(f"trying {len(near)} with a branch more or fewer", len(near))
        values = {}
        for name, gone in near.items():
            values[name] = trials.screen(gone, moments)
            progress.advance(1)
        tried = {
            name: trials.trial(near[name], moments)
            for name in sorted(values, key=lambda name: values[name])[:NEIGHBOURS]
        }
        progress.end()
        best = min(tried, key=lambda name: float(tried[name].effect.mean()))
        assert choice.trial is not None
        if not less_beyond_chance(tried[best].effect, choice.trial.effect):
            break
        choice = Choice(best, near[best], moments, tried[best], goal, rankings[best])
    return choice


def best_from_dense(
    trials: Trials, goal: Goal, view: View,
    *, moments: Mapping[str, Moments], progress: Phases,
) -> Choice:  # fmt: skip
    """The best candidate that removes everything at once from the dense network.

    Early rounds may have bound the late ones badly. ``trials``, ``goal`` and ``view`` are those of
    the last round, ``moments`` those of the dense network.
    """
    network = replace(trials.network, graph=trials.network.dense)
    whole = goal.sizes.copy()
    for name, units in goal.removed.items():
        whole.restore(name, units)
    start = replace(goal, sizes=whole, removed={})
    found = proposals(replace(view, graph=network.dense))
    alone = replace(trials, network=network, removed={})
    proposed = _by_weights(start, found) | curved(alone, start, found, moments, progress)
    return best_candidate(
        alone, start,
        {f"{name}, from dense": ranking for name, ranking in proposed.items()}, moments,
        progress=progress, always=True,
    )  # fmt: skip


def _by_weights(goal: Goal, proposed: Mapping[str, Values]) -> dict[str, Ranking]:
    """Rankings by importances that look at no image: as they are, uniform, with streams whole.

    Many layers share a stream's units, and weights say nothing of that: ResNet-20 without half of
    its channels, magnitude alike in all layers: KL .84, with the stream whole .39.
    """
    found = {}
    for name, values in proposed.items():
        if IMPORTANCES[name].allocates:
            found[name] = Ranking(values, per_saving=False)
        else:
            found |= {name: Ranking(values), f"{name}, uniform": goal.uniform(values)}
    whole = {g.name: np.full(g.units, _LATE) for g in goal.groups if g.stream}
    return found | {
        f"{name}, streams whole": replace(ranking, values={**ranking.values} | whole)
        for name, ranking in (found.items() if whole else ())
    }
