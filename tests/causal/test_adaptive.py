"""Measuring as far as decisions need: the same decisions, at a part of the cost."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_networks import pictures, small_cnn, traced

from cswap_deploy.causal.adaptive import (
    FIRST_IMAGES,
    KnownEffects,
    StoppingRule,
    measure_adaptively,
    settle,
)
from cswap_deploy.causal.effects import likely_harm
from cswap_deploy.causal.experiment import Experiment
from cswap_deploy.causal.fisher import FisherEstimate, estimate_effects
from cswap_deploy.causal.interventions import input_moments
from cswap_deploy.causal.measurement import LocalMeasurement
from cswap_deploy.network.units import consumers

UNITS, IMAGES_MANY = 200, 128


class Made:
    """Effects with long tails over images, known to the test; measured when asked for."""

    def __init__(self, *, quality: float, seed: int = 0, near: bool = False) -> None:
        rng = np.random.default_rng(seed)
        image = rng.lognormal(0, 2, IMAGES_MANY)
        unit = np.full(UNITS, 1.0) if near else rng.lognormal(0, 1.5, UNITS)
        self.kl = 1e-3 * unit[:, None] * image * rng.lognormal(0, 0.5, (UNITS, IMAGES_MANY))
        other = 1e-3 * rng.lognormal(0, 1, (UNITS, IMAGES_MANY))
        noise = rng.lognormal(0, 0.3, (UNITS, IMAGES_MANY))
        self.estimate = quality * 0.7 * self.kl * noise + (1 - quality) * other
        self.start()
        self.looks: list[tuple[int, int]] = []
        self.measured = np.zeros((UNITS, IMAGES_MANY), dtype=int)

    def start(self) -> None:
        estimate = FisherEstimate(kl=self.estimate, log_true=-self.estimate)
        self.known = KnownEffects(estimate, "kl")

    def look(self, active, images) -> int:
        rows = active["group"]
        kl = self.kl[np.ix_(rows, images)]
        self.known.add(rows, images, np.expm1(-kl), kl)
        self.measured[np.ix_(rows, images)] += 1
        self.looks.append((len(images), len(rows)))
        return kl.size

    def thresholds(self, costs):
        ordered = np.sort(costs["group"])
        return {"group": np.array([ordered[79:81].mean()])}

    def settle(self, error_rate=0.05, *, everyone=True, most=None) -> int:
        rule = StoppingRule(self.thresholds, error_rate, everyone=everyone, most=most)
        return settle({"group": self.known}, self.look, rule)

    def same(self) -> float:
        """Part of the 80 units with the least effects that are the right ones."""
        right = set(np.argsort(self.kl.mean(1))[:80])
        return len(right & set(np.argsort(self.known.cost()[0])[:80])) / 80


@pytest.mark.parametrize("seed", range(2))
def test_a_good_estimate_saves_most_of_the_measuring(seed) -> None:
    made = Made(quality=1.0, seed=seed)
    assert made.settle() < 0.15 * made.kl.size
    assert made.same() >= 0.98
    assert made.looks[0] == (FIRST_IMAGES, UNITS), "everyone is measured on some images"
    assert made.measured.max() == 1, "nothing is measured twice"


@pytest.mark.parametrize("seed", range(2))
def test_a_useless_estimate_costs_more_and_decides_nothing(seed) -> None:
    useless, good = Made(quality=0.0, seed=seed), Made(quality=1.0, seed=seed)
    assert useless.settle() > good.settle()
    assert useless.same() >= 0.95


def test_units_that_cannot_be_told_apart_are_measured_to_the_last_image() -> None:
    made = Made(quality=0.3, near=True)
    made.settle(1e-6)
    full = made.known.measured.all(1)
    assert full.mean() > 0.8
    np.testing.assert_allclose(made.known.cost()[0][full], made.kl.mean(1)[full], rtol=1e-12)
    assert made.known.cost()[1][full].max() == 0.0


def test_a_smaller_error_rate_measures_more() -> None:
    taken = [Made(quality=1.0, seed=5).settle(rate) for rate in (0.5, 0.05, 1e-4)]
    assert taken == sorted(taken)
    assert taken[0] < taken[-1]


def test_within_a_budget_the_most_doubtful_units_come_first() -> None:
    whole, short = Made(quality=0.5, seed=1), Made(quality=0.5, seed=1)
    taken = whole.settle()
    first = FIRST_IMAGES * UNITS
    limit = first + (taken - first) // 3
    assert first < short.settle(most=limit) <= limit
    more = np.flatnonzero(short.measured.sum(1) > FIRST_IMAGES)
    end = np.sort(short.kl.mean(1))[79:81].mean()
    off = np.abs(np.log(short.kl.mean(1) / end))
    assert np.median(off[more]) < np.median(off)
    assert short.same() > 0.95
    assert Made(quality=0.5, seed=1).settle(most=first // 2) == first // 2, "no more than that"
    assert Made(quality=0.5, seed=1).settle(most=0) == 0, "the estimate decides alone"


def test_screened_units_are_not_measured_but_the_near_ones_are() -> None:
    made = Made(quality=1.0, seed=2)
    everyone = Made(quality=1.0, seed=2)
    assert made.settle(everyone=False) < everyone.settle()
    left_out = ~made.known.measured.any(1)
    assert left_out.any()
    assert made.kl.mean(1)[left_out].min() > np.sort(made.kl.mean(1))[80]
    assert made.same() >= 0.98


def test_units_that_the_estimate_is_blind_to_do_not_look_harmless() -> None:
    """Estimated at nothing, and measured first on images where they do no more than elsewhere."""
    made = Made(quality=1.0, seed=3)
    blind = np.argsort(made.kl.mean(1))[80:140]
    made.estimate[blind] = 0.0
    made.kl[blind] = made.kl[blind].mean(1, keepdims=True)
    made.start()
    made.settle()
    right = set(np.argsort(made.kl.mean(1))[:80])
    gone = set(np.argsort(made.known.cost()[0])[:80])
    assert len(right & gone) >= 76


def test_standard_error_covers_what_is_missing() -> None:
    """Of 800 units half-way measured, about as many are within two errors as should be."""
    off = []
    for seed in range(4):
        made = Made(quality=1.0, seed=seed)
        made.look({"group": np.arange(UNITS)}, np.arange(0, IMAGES_MANY, 4))
        cost, error = made.known.cost()
        off.append(np.abs(cost - made.kl.mean(1)) / error)
    assert np.quantile(np.concatenate(off), 0.9) < 2
    assert np.median(np.concatenate(off)) > 0.05, "and the error is not absurdly large"


def _everything(effect):
    images, labels = pictures(12)
    graph, groups = traced(small_cnn)
    names = consumers(groups.values())
    moments = input_moments(graph, names, images, intervention="predicted", chunk=64)
    wanted = {g: list(range(g.units)) for g in groups.values()}

    def thresholds(costs):
        return {name: np.array([np.median(values)]) for name, values in costs.items()}

    experiment = Experiment(graph, images, labels, moments)
    measurement = LocalMeasurement(experiment)
    exact = measurement.effects(wanted)
    estimates = estimate_effects(experiment, wanted)
    found, spent = measure_adaptively(
        measurement, wanted, estimates, effect=effect, rule=StoppingRule(thresholds, 1e-300),
    )  # fmt: skip
    return exact, found, spent


@pytest.mark.parametrize("effect", ["kl", "true-class"])
def test_a_real_network_ends_on_the_same_side(effect) -> None:
    exact, found, spent = _everything(effect)
    assert 0 < spent.forwards <= spent.exact == sum(e.kl.size for e in exact)
    for one, other in zip(exact, found, strict=True):
        assert one.group == other.group
        np.testing.assert_array_equal(one.units, other.units)
        seen = other.measured
        assert seen.sum(1).min() >= min(FIRST_IMAGES, seen.shape[1])
        np.testing.assert_allclose(other.kl[seen], one.kl[seen], rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(
            other.true_class[seen], one.true_class[seen], rtol=1e-3, atol=1e-5
        )
        ranks = [
            likely_harm(e.true_class) if effect == "true-class" else e.kl.mean(1)
            for e in (one, other)
        ]
        below = [r < np.median(r) for r in ranks]
        assert (below[0] != below[1]).sum() <= 1
    assert torch.is_grad_enabled()
