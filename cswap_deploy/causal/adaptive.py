"""Measure each unit on as many images as its decision needs.

Most units are far from the threshold, and most of an effect comes from a few images. So all effects
are estimated first (:mod:`causal.fisher`); then units are measured on the images that weigh most
for them, a few more at a time, until it is certain at the chosen error rate on which side of the
threshold each one is. An estimate fills in only for images that were not measured, scaled by what
was measured on the others; how well it does that is the uncertainty.

Source: ratio estimation with an auxiliary variable, and taking the units of largest size with
certainty: Särndal, Swensson & Wretman, "Model Assisted Survey Sampling" (1992), chapters 3 and 7.
Sequential measuring until a decision is certain: Wald, "Sequential Tests of Statistical Hypotheses"
(1945).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Literal

import numpy as np
import torch

from cswap_deploy.causal.effects import Effects, likely_harm, log_change
from cswap_deploy.causal.fisher import FisherEstimate
from cswap_deploy.causal.measurement import EffectMeasurement, Tick
from cswap_deploy.network.units import Group

FIRST_IMAGES = 8
"""Every look after the first doubles the images."""
_SCREENED = 4.0
"""Units whose estimate is this many times the highest threshold need not be measured."""
_LEAST_ESTIMATE = 1e-3
"""Floor of an estimate, as a part of its group's mean."""
_LEAST_ERROR = 0.02
"""Relative error of the estimate that is assumed at least, however well the first images fit."""

_TYPICAL = 0.9
"""Quantile of a group's units; a few that the estimate misses by far speak for themselves."""

Thresholds = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]
"""From group -> (U,) costs to group -> the costs where staying ends and going begins."""


@dataclass(frozen=True, slots=True)
class Spent:
    """What measuring took."""

    forwards: int
    """Masked forwards: one for each unit and image that was measured."""
    exact: int
    """What measuring the same units on every image would have taken."""


NOTHING = Spent(0, 0)


class KnownEffects:
    """What is known of one group's effects: estimated everywhere, measured here and there."""

    def __init__(self, estimate: FisherEstimate, effect: Literal["kl", "true-class"]) -> None:
        """Start with nothing measured; ``effect`` is what the cost is made of."""
        # A unit that the estimate is blind to must be able to show that it is wrong.
        floor = _LEAST_ESTIMATE * estimate.kl.mean()
        self._estimate = replace(estimate, kl=np.maximum(estimate.kl, floor))
        self._by_kl = effect == "kl"
        self.images = estimate.kl.shape[1]
        self.measured = np.zeros(estimate.kl.shape, dtype=bool)
        self._kl = np.zeros(estimate.kl.shape)
        self._log = np.zeros(estimate.kl.shape)

    def add(self, rows: np.ndarray, images: np.ndarray, xi: np.ndarray, kl: np.ndarray) -> None:
        """Note what was measured: (rows, images) of both effects."""
        at = np.ix_(rows, images)
        self.measured[at] = True
        self._kl[at] = kl
        self._log[at] = log_change(xi)

    def completed(self) -> tuple[np.ndarray, np.ndarray]:
        """(U, N) KL divergence and (U, N) change of the true class's log-probability."""
        kl = self._fill(self._kl, self._estimate.kl)
        return kl, self._fill(self._log, self._estimate.log_true)

    def cost(self) -> tuple[np.ndarray, np.ndarray]:
        """(U,) costs, and their standard errors."""
        kl, log = self.completed()
        if self._by_kl:
            return kl.mean(1), self._error(self._kl, self._estimate.kl)
        # Half of a standard deviation moves by at most half of what its values move by.
        return likely_harm(np.expm1(log)), 1.5 * self._error(self._log, self._estimate.log_true)

    def weight(self) -> np.ndarray:
        """(U, N) how much of each unit's estimate lies on an image that was not measured."""
        estimate = self._estimate.kl if self._by_kl else np.abs(self._estimate.log_true)
        total = estimate.sum(1, keepdims=True)
        left: np.ndarray = np.where(self.measured, 0.0, estimate)
        left /= np.maximum(total, np.finfo(float).tiny)
        return left

    def _scales(self, known: np.ndarray, estimate: np.ndarray) -> tuple[float, np.ndarray]:
        """The regression of what was measured on its estimate: of the group, of each unit."""
        used = np.where(self.measured, estimate, 0.0)
        square = float((used * used).sum())
        if square == 0.0:
            return 1.0, np.ones(len(estimate))
        common = float((used * known).sum()) / square
        own = (used * used).sum(1)
        prior = np.where(self.measured, 0.0, estimate * estimate).sum(1)
        weight = own + prior
        mixed = (used * known).sum(1) + common * prior
        return common, np.where(weight > 0, mixed / np.where(weight > 0, weight, 1.0), common)

    def _fill(self, known: np.ndarray, estimate: np.ndarray) -> np.ndarray:
        _, scales = self._scales(known, estimate)
        filled: np.ndarray = np.where(self.measured, known, scales[:, None] * estimate)
        return filled

    def _error(self, known: np.ndarray, estimate: np.ndarray) -> np.ndarray:
        """(U,) standard error of the mean of what is filled in.

        Deviations are partly a unit's own on all images (``shared``), partly each image's.
        """
        common, _ = self._scales(known, estimate)
        used = np.where(self.measured, estimate, 0.0)
        rest = np.where(self.measured, 0.0, estimate)
        off = np.where(self.measured, known - common * estimate, 0.0)
        looked = self.measured.any(1)
        shared = _ratio(np.abs(off.sum(1)), np.abs(used).sum(1))
        spread = np.sqrt(_ratio((off * off).sum(1), (used * used).sum(1)))
        typical_shared, typical = 1.0, 1.0
        if looked.any():
            typical_shared = float(np.quantile(shared[looked], _TYPICAL))
            typical = float(np.quantile(spread[looked], _TYPICAL))
        # Few images say little about a unit's own spread: neither it nor the group's is trusted
        # when the other is larger. Of its own share about half was corrected.
        relative = np.maximum(np.maximum(spread, typical), _LEAST_ERROR)
        own = np.where(looked, np.maximum(shared, typical_shared) / 2, typical_shared)
        each = np.sqrt((rest * rest).sum(1)) * relative
        found: np.ndarray = np.hypot(each, own * np.abs(rest).sum(1)) / estimate.shape[1]
        return found


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """Zero where there is nothing to divide by."""
    found: np.ndarray = np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)
    return found


@dataclass(frozen=True, slots=True)
class StoppingRule:
    """When a unit has been measured on enough images."""

    thresholds: Thresholds
    error_rate: float
    """Probability of being on the wrong side of a threshold that ends a unit's measuring."""
    everyone: bool = True
    """Measure and return every unit; otherwise those whose estimate is far beyond the thresholds
    are not measured, nor returned."""
    most: int | None = None
    """Forwards that may be spent; when they run short the most doubtful units come first, and what
    is open in the end is decided by the estimate, alone or as far as it was corrected."""


def measure_adaptively(
    measurement: EffectMeasurement,
    wanted: Mapping[Group, Sequence[int]],
    estimates: Sequence[FisherEstimate],
    *,
    effect: Literal["kl", "true-class"],
    rule: StoppingRule,
    tick: Tick | None = None,
) -> tuple[list[Effects], Spent]:
    """Measure until each unit's side of every threshold is certain.

    Args:
        measurement: Measures; raises StageError where it cannot.
        wanted: Group -> units by index; groups without units are left out.
        estimates: Of each of the other groups, all units and images.
        effect: What costs are made of.
        rule: When to stop.
        tick: Called with the number of (unit, image) pairs measured.
    """
    units = {group: np.asarray(asked) for group, asked in wanted.items() if len(asked)}
    known = {g.name: KnownEffects(e, effect) for g, e in zip(units, estimates, strict=True)}

    def look(active: Mapping[str, np.ndarray], images: np.ndarray) -> int:
        open_ = {g: of[active[g.name]].tolist() for g, of in units.items() if len(active[g.name])}
        found = measurement.effects(open_, torch.from_numpy(images), tick=tick)
        for effects in found:
            rows = active[effects.group]
            known[effects.group].add(rows, images, effects.true_class, effects.kl)
        return sum(effects.kl.size for effects in found)

    forwards = settle(known, look, rule)
    found = []
    for group, asked in units.items():
        of = known[group.name]
        seen = of.measured.any(1)
        rows = np.flatnonzero(seen | rule.everyone)
        kl, log = (values[rows] for values in of.completed())
        found.append(Effects(group.name, asked[rows], np.expm1(log), kl, of.measured[rows]))
    return found, Spent(forwards, exact=sum(effects.kl.size for effects in found))


def as_estimates(effects: Sequence[Effects]) -> list[FisherEstimate]:
    """Effects in bfloat16 as what to begin with: where they leave a side open, float32 decides."""
    return [FisherEstimate(kl=e.kl, log_true=log_change(e.true_class)) for e in effects]


def settle(
    known: Mapping[str, KnownEffects],
    look: Callable[[Mapping[str, np.ndarray], np.ndarray], int],
    rule: StoppingRule,
) -> int:
    """Look at more images until no unit's side of a threshold is open; what is closed stays so.

    Args:
        known: Group -> what is known; extended.
        look: Measures units (group -> positions) on images (positions); returns the forwards taken.
        rule: When to stop.

    Returns:
        Forwards taken in all.
    """
    images = next(iter(known.values())).images
    active = _first(known, rule)
    if rule.most is not None:
        doubt = _doubt(known, rule.thresholds)
        active = _most_doubtful(active, doubt, rule.most // FIRST_IMAGES)
    forwards = 0
    for count, looks in _schedule(images):
        forwards += look(active, _heaviest(known, active, count))
        z = -NormalDist().inv_cdf(rule.error_rate / (2 * looks))
        doubt = _doubt(known, rule.thresholds)
        active = {
            name: rows[doubt[name][rows] >= 1 / z] if z > 0 else rows[:0]
            for name, rows in active.items()
        }
        if rule.most is not None:
            active = _most_doubtful(active, doubt, (rule.most - forwards) // (2 * count))
        if not any(map(len, active.values())):
            break
    return forwards


def _schedule(images: int) -> Iterator[tuple[int, int]]:
    """(images of a look, looks at most): 8, 8, 16, 32, ..."""
    ends = [min(FIRST_IMAGES, images)]
    while ends[-1] < images:
        ends.append(min(2 * ends[-1], images))
    for begin, end in zip([0, *ends], ends, strict=False):
        yield end - begin, len(ends)


def _first(known: Mapping[str, KnownEffects], rule: StoppingRule) -> dict[str, np.ndarray]:
    """Group -> the units that are measured at all."""
    if rule.everyone:
        return {name: np.arange(len(of.measured)) for name, of in known.items()}
    costs = {name: of.cost()[0] for name, of in known.items()}
    highest = {name: max(found, default=-np.inf) for name, found in rule.thresholds(costs).items()}
    return {name: np.flatnonzero(cost <= _SCREENED * highest[name]) for name, cost in costs.items()}


def _doubt(known: Mapping[str, KnownEffects], find: Thresholds) -> dict[str, np.ndarray]:
    """Group -> (U,) standard error over the distance to the nearest threshold."""
    costs = {name: of.cost() for name, of in known.items()}
    thresholds = find({name: cost for name, (cost, _) in costs.items()})
    found = {}
    for name, (cost, error) in costs.items():
        near = np.abs(cost[:, None] - thresholds[name]).min(1, initial=np.inf)
        found[name] = error / np.maximum(near, np.finfo(float).tiny)
    return found


def _most_doubtful(
    active: Mapping[str, np.ndarray], doubt: Mapping[str, np.ndarray], most: int
) -> dict[str, np.ndarray]:
    """The units whose side is least certain, so many at most over all groups."""
    every = np.concatenate([doubt[name][rows] for name, rows in active.items()])
    if len(every) <= most:
        return dict(active)
    least = np.sort(every)[::-1][most - 1] if most > 0 else np.inf
    return {name: rows[doubt[name][rows] >= least] for name, rows in active.items()}


def _heaviest(
    known: Mapping[str, KnownEffects], active: Mapping[str, np.ndarray], count: int
) -> np.ndarray:
    """The images on which the open units' estimates weigh most, ascending."""
    weight = sum(of.weight()[active[name]].sum(0) for name, of in known.items())
    return np.sort(np.argsort(-np.asarray(weight), kind="stable")[:count])
