"""Candidates of a round: what proposes them, and the one with the least effect as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from cswap_deploy.causal.interventions import Intervention, Moments, input_moments
from cswap_deploy.network.units import consumers
from cswap_deploy.progress import Phases
from cswap_deploy.pruning.allocation import Goal, Ranking, Removal, Values
from cswap_deploy.pruning.importance import IMPORTANCES, View
from cswap_deploy.pruning.trials import Trial, Trials

PROPOSERS = "magnitude", "lamp"
"""Importances that propose candidates beside the measured effects: they cost nothing to compute,
and as no image chose them, their candidates do not fit the calibration images by chance."""
_RIDGES = 0.9e-4, 1.1
_FINALISTS = 2
"""Candidates that are tried after the screening."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The candidate that a round removes."""

    name: str
    gone: Removal
    moments: Mapping[str, Moments]
    """Moments of the consumers' inputs in the network that it was proposed for."""
    trial: Trial | None
    """What came of it; ``None`` where it was not tried."""

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


def best_candidate(
    trials: Trials, candidates: Mapping[str, Removal], moments: Mapping[str, Moments],
    *, ridge: float | None, progress: Phases, always: bool = False,
) -> Choice:  # fmt: skip
    """The candidate with the least effect of its own; a single one is tried only if ``always``.

    Successive halving: all are screened on few images, and the first few of them tried.
    ``moments`` and ``ridge`` are those of :meth:`Trials.trial`.

    Source:
        Jamieson & Talwalkar 2016, "Non-stochastic Best Arm Identification and Hyperparameter
        Optimization" (arXiv:1502.07943).
    """
    count = len(candidates)
    if (count == 1 and not always) or not trials.possible:
        name = next(iter(candidates))
        return Choice(name, candidates[name], moments, None)
    finalists = list(candidates)
    progress.begin(f"trying {count} candidate{'s' if count > 1 else ''}", count)
    # What is not folded into other weights is far worse before the refit than after it.
    if count > _FINALISTS and moments:
        values = {name: trials.screen(gone, moments) for name, gone in candidates.items()}
        finalists = sorted(values, key=lambda name: values[name])[:_FINALISTS]
        progress.advance(count - _FINALISTS)
    tried: dict[str, Trial] = {}
    for name in finalists:
        tried[name] = trials.trial(candidates[name], moments, ridge=ridge)
        progress.advance(1)
    progress.end()
    best = min(tried, key=lambda name: float(tried[name].effect.mean()))
    return Choice(best, candidates[best], moments, tried[best])


def best_from_dense(
    trials: Trials, goal: Goal, view: View,
    *, intervention: Intervention, ridge: float, progress: Phases,
) -> Choice:  # fmt: skip
    """The best candidate that removes everything at once from the dense network.

    Early rounds may have bound the late ones badly. ``trials``, ``goal`` and ``view`` are those of
    the last round.
    """
    network = replace(trials.network, graph=trials.network.dense)
    whole = goal.sizes.copy()
    for name, units in goal.removed.items():
        whole.restore(name, units)
    start = replace(goal, sizes=whole, removed={})
    proposed = _by_weights(start, proposals(replace(view, graph=network.dense)))
    candidates = start.candidates({f"{name}, from dense": r for name, r in proposed.items()})
    moments = input_moments(
        network.dense, consumers(network.groups), trials.images, intervention=intervention, chunk=64
    )
    return best_candidate(
        Trials(network, {}, trials.images, trials.task), candidates, moments,
        ridge=ridge, progress=progress, always=True,
    )  # fmt: skip


def best_ridge(
    trials: Trials, choice: Choice, *, ridge: float, effect: float | None, progress: Phases
) -> tuple[float, float | None]:
    """The ridge that leaves a candidate the least effect, better than a tenth and ten times it.

    With few images for many weights a refit follows its images too closely; how many are few
    depends on the network, so it is measured.

    Args:
        trials: What the candidate is tried on.
        choice: The candidate.
        ridge: Where to begin.
        effect: Mean effect with that ridge, where it is known; returned for the best one.
        progress: Told that it goes on.
    """
    if not trials.possible:
        return ridge, effect
    found: dict[float, float] = {} if effect is None else {ridge: effect}
    low, high = _RIDGES
    progress.begin("choosing the ridge", 0)
    best = ridge
    while wanted := {r for r in (best / 10, best, best * 10) if low <= r <= high} - found.keys():
        for strength in sorted(wanted):
            tried = trials.trial(choice.gone, choice.moments, ridge=strength)
            found[strength] = float(tried.effect.mean())
        best = min(found, key=lambda strength: found[strength])
    progress.end()
    return best, found[best]


def _by_weights(goal: Goal, proposed: Mapping[str, Values]) -> dict[str, Ranking]:
    """Rankings by importances that look at no image: as they are, and uniform."""
    found = {}
    for name, values in proposed.items():
        if IMPORTANCES[name].allocates:
            found[name] = Ranking(values, per_saving=False)
        else:
            found |= {name: Ranking(values), f"{name}, uniform": goal.uniform(values)}
    return found
