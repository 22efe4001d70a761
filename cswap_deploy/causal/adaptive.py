"""Measure each unit on as many images as its decision needs.

Most units are far from the cut, and most of an effect comes from a few images. So the effects of
all units on all images are estimated first (:mod:`causal.fisher`); then units are measured on
the images that weigh most for them, a few more at a time, until it is certain at the chosen error
rate on which side of the cut each one is. An estimate fills in only for images that were not
measured, scaled by what was measured on the others; how well it does that, measured as well, is the
uncertainty. Measured to the last image an effect is the exact one, whatever was estimated.

Source: ratio estimation with an auxiliary variable, and taking the units of largest size with
certainty: Särndal, Swensson & Wretman, "Model Assisted Survey Sampling" (1992), chapters 3 and 7.
Sequential measuring until a decision is certain: Wald, "Sequential Tests of Statistical Hypotheses"
(1945).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
import torch

from cswap_deploy.causal.effects import Effects, likely_harm, log_change
from cswap_deploy.causal.fisher import Estimate
from cswap_deploy.causal.scoring import Scorer, Tick
from cswap_deploy.network.units import Group

FIRST_IMAGES = 8
"""Every look after the first doubles the images."""
_SCREENED = 4.0
"""Where a unit need not be measured at all: estimated this many times beyond the highest cut."""
_LEAST_GUESS = 1e-3
"""Of a unit on an image, as a part of its group's mean."""
_LEAST_ERROR = 0.02
"""Relative error of the estimate that is assumed at least, however well the first images fit."""

_TYPICAL = 0.9
"""Quantile of a group's units; a few that the estimate misses by far speak for themselves."""

Cuts = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]
"""Group -> (U,) costs; to group -> costs at which staying ends and going begins."""


@dataclass(frozen=True, slots=True)
class Spent:
    """What measuring took."""

    forwards: int
    """Masked forwards: one for each unit and image that was measured."""
    exact: int
    """What measuring the same units on every image would have taken."""


NOTHING = Spent(0, 0)


class Account:
    """What is known of one group's effects: estimated everywhere, measured here and there."""

    def __init__(self, guess: Estimate, effect: Literal["kl", "true-class"]) -> None:
        """Start with nothing measured.

        Args:
            guess: Of all units and images.
            effect: What the cost is made of.
        """
        # A unit that the estimate is blind to must be able to show that it is wrong.
        floor = _LEAST_GUESS * guess.kl.mean()
        self._guess = Estimate(kl=np.maximum(guess.kl, floor), log_true=guess.log_true)
        self._by_kl = effect == "kl"
        self.images = guess.kl.shape[1]
        self.measured = np.zeros(guess.kl.shape, dtype=bool)
        self._kl = np.zeros(guess.kl.shape)
        self._log = np.zeros(guess.kl.shape)

    def add(self, rows: np.ndarray, images: np.ndarray, xi: np.ndarray, kl: np.ndarray) -> None:
        """Note what was measured: (rows, images) of both effects."""
        at = np.ix_(rows, images)
        self.measured[at] = True
        self._kl[at] = kl
        self._log[at] = log_change(xi)

    def completed(self) -> tuple[np.ndarray, np.ndarray]:
        """(U, N) KL divergence and (U, N) change of the true class's log-probability."""
        kl = self._fill(self._kl, self._guess.kl)
        return kl, self._fill(self._log, self._guess.log_true)

    def cost(self) -> tuple[np.ndarray, np.ndarray]:
        """(U,) costs, and their standard errors."""
        kl, log = self.completed()
        if self._by_kl:
            return kl.mean(1), self._error(self._kl, self._guess.kl)
        # Half of a standard deviation moves by at most half of what its values move by.
        return likely_harm(np.expm1(log)), 1.5 * self._error(self._log, self._guess.log_true)

    def weight(self) -> np.ndarray:
        """(U, N) how much of each unit's estimate lies on an image that was not measured."""
        guess = self._guess.kl if self._by_kl else np.abs(self._guess.log_true)
        total = guess.sum(1, keepdims=True)
        left: np.ndarray = np.where(self.measured, 0.0, guess)
        left /= np.maximum(total, np.finfo(float).tiny)
        return left

    def _scales(self, known: np.ndarray, guess: np.ndarray) -> tuple[float, np.ndarray]:
        """The regression of what was measured on its estimate: of the group, of each unit."""
        seen = np.where(self.measured, guess, 0.0)
        square = float((seen * seen).sum())
        if square == 0.0:
            return 1.0, np.ones(len(guess))
        common = float((seen * known).sum()) / square
        own = (seen * seen).sum(1)
        prior = np.where(self.measured, 0.0, guess * guess).sum(1)
        weight = own + prior
        mixed = (seen * known).sum(1) + common * prior
        return common, np.where(weight > 0, mixed / np.where(weight > 0, weight, 1.0), common)

    def _fill(self, known: np.ndarray, guess: np.ndarray) -> np.ndarray:
        _, scales = self._scales(known, guess)
        filled: np.ndarray = np.where(self.measured, known, scales[:, None] * guess)
        return filled

    def _error(self, known: np.ndarray, guess: np.ndarray) -> np.ndarray:
        """(U,) standard error of the mean of what is filled in.

        Deviations are partly a unit's own on all images (``shared``), partly each image's.
        """
        common, _ = self._scales(known, guess)
        seen = np.where(self.measured, guess, 0.0)
        rest = np.where(self.measured, 0.0, guess)
        off = np.where(self.measured, known - common * guess, 0.0)
        looked = self.measured.any(1)
        shared = _ratio(np.abs(off.sum(1)), np.abs(seen).sum(1))
        spread = np.sqrt(_ratio((off * off).sum(1), (seen * seen).sum(1)))
        typical_shared, typical = 1.0, 1.0
        if looked.any():
            typical_shared = float(np.quantile(shared[looked], _TYPICAL))
            typical = float(np.quantile(spread[looked], _TYPICAL))
        # Few images say little about a unit's own spread: neither it nor the group's is trusted
        # when the other is larger. Of its own share about half was corrected.
        relative = np.maximum(np.maximum(spread, typical), _LEAST_ERROR)
        own = np.where(looked, np.maximum(shared, typical_shared) / 2, typical_shared)
        each = np.sqrt((rest * rest).sum(1)) * relative
        found: np.ndarray = np.hypot(each, own * np.abs(rest).sum(1)) / guess.shape[1]
        return found


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """Zero where there is nothing to divide by."""
    found: np.ndarray = np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)
    return found


def measure_adaptively(
    scorer: Scorer,
    wanted: Mapping[Group, Sequence[int]],
    guesses: Sequence[Estimate],
    *,
    effect: Literal["kl", "true-class"],
    cuts: Cuts,
    error_rate: float,
    everyone: bool = True,
    most: int | None = None,
    tick: Tick | None = None,
) -> tuple[list[Effects], Spent]:
    """Measure until each unit's side of every cut is certain.

    Args:
        scorer: Measures.
        wanted: Group -> units by index; groups without units are left out.
        guesses: Of each of the others.
        effect: What the costs that are cut are made of.
        cuts: From costs to the values at which staying ends and going begins.
        error_rate: Probability of being on the wrong side that ends a unit's measuring.
        everyone: Measure every unit on some images; otherwise those whose estimate is far beyond
            the cuts are not measured, nor returned.
        most: Forwards that may be spent; when they run short the most doubtful units come first,
            and what is open in the end is decided with the help of the estimate.
        tick: Called with the number of (unit, image) pairs measured.

    Returns:
        Of each group the effects, and what was spent.

    Raises:
        StageError: See :class:`scoring.Scorer`.
    """
    units = {group: np.asarray(asked) for group, asked in wanted.items() if len(asked)}
    accounts = {g.name: Account(guess, effect) for g, guess in zip(units, guesses, strict=True)}

    def look(active: Mapping[str, np.ndarray], images: np.ndarray) -> int:
        open_ = {g: of[active[g.name]].tolist() for g, of in units.items() if len(active[g.name])}
        found = scorer.effects(open_, torch.from_numpy(images), tick=tick)
        for effects in found:
            rows = active[effects.group]
            accounts[effects.group].add(rows, images, effects.true_class, effects.kl)
        return sum(effects.kl.size for effects in found)

    forwards = settle(accounts, look, cuts, error_rate=error_rate, everyone=everyone, most=most)
    found = []
    for group, asked in units.items():
        account = accounts[group.name]
        rows = np.flatnonzero(account.measured.any(1))
        kl, log = account.completed()
        found.append(
            Effects(
                group=group.name,
                units=asked[rows],
                true_class=np.expm1(log[rows]),
                kl=kl[rows],
                measured=account.measured[rows],
            )
        )
    exact = sum(len(effects.units) * effects.kl.shape[1] for effects in found)
    return found, Spent(forwards=forwards, exact=exact)


def as_guesses(effects: Sequence[Effects]) -> list[Estimate]:
    """Effects in bfloat16 as what to begin with: where they leave a side open, float32 decides."""
    return [Estimate(kl=e.kl, log_true=log_change(e.true_class)) for e in effects]


def settle(
    accounts: Mapping[str, Account],
    look: Callable[[Mapping[str, np.ndarray], np.ndarray], int],
    cuts: Cuts,
    *,
    error_rate: float,
    everyone: bool,
    most: int | None = None,
) -> int:
    """Look at more images until no unit's side of a cut is open; what is closed stays so.

    Args:
        accounts: Group -> what is known; extended.
        look: Measures units (group -> positions) on images (positions); returns how many forwards
            it took.
        cuts: See :func:`measure_adaptively`.
        error_rate: Likewise.
        everyone: Likewise.
        most: Likewise.

    Returns:
        Forwards taken.
    """
    images = next(iter(accounts.values())).images
    active = _first(accounts, cuts, everyone=everyone)
    forwards = 0
    for count, looks in _schedule(images):
        forwards += look(active, _heaviest(accounts, active, count))
        z = -NormalDist().inv_cdf(error_rate / (2 * looks))
        doubt = _doubt(accounts, cuts)
        active = {
            name: rows[doubt[name][rows] >= 1 / z] if z > 0 else rows[:0]
            for name, rows in active.items()
        }
        if most is not None:
            active = _most_doubtful(active, doubt, (most - forwards) // (2 * count))
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


def _first(accounts: Mapping[str, Account], cuts: Cuts, *, everyone: bool) -> dict[str, np.ndarray]:
    if everyone:
        return {name: np.arange(len(a.measured)) for name, a in accounts.items()}
    costs = {name: account.cost()[0] for name, account in accounts.items()}
    ends = cuts(costs)
    return {
        name: np.flatnonzero(cost <= _SCREENED * max(ends[name], default=0.0))
        if len(ends[name])
        else np.arange(0)
        for name, cost in costs.items()
    }


def _doubt(accounts: Mapping[str, Account], cuts: Cuts) -> dict[str, np.ndarray]:
    """Group -> (U,) standard error over the distance to the nearest cut."""
    known = {name: account.cost() for name, account in accounts.items()}
    ends = cuts({name: cost for name, (cost, _) in known.items()})
    found = {}
    for name, (cost, error) in known.items():
        near = np.full(len(cost), np.inf)
        for end in ends[name]:
            near = np.minimum(near, np.abs(cost - end))
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
    accounts: Mapping[str, Account], active: Mapping[str, np.ndarray], count: int
) -> np.ndarray:
    """The images on which the open units' estimates weigh most, ascending."""
    weight = sum(a.weight()[active[name]].sum(0) for name, a in accounts.items())
    return np.sort(np.argsort(-np.asarray(weight), kind="stable")[:count])
