from __future__ import annotations

import math

import numpy as np
import pytest

from cswap_deploy.measure.statistics import (
    mcnemar,
    mean_interval,
    paired_difference_interval,
    percentile_interval,
    ratio_interval,
    samples_for,
    undisturbed_ratio,
    wilson_interval,
)

Z = 1.959963984540054


def test_wilson_by_hand() -> None:
    """8 of 10: centre (p + z²/2n) / (1 + z²/n), half width z sqrt(pq/n + z²/4n²) / (1 + z²/n)."""
    n, p = 10, 0.8
    scale = 1 + Z**2 / n
    centre = (p + Z**2 / (2 * n)) / scale
    half = Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2)) / scale
    assert wilson_interval(8, 10) == pytest.approx((centre - half, centre + half), abs=1e-9)
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_paired_by_hand() -> None:
    """n = 98, b = 9, c = 3: p1 = 0.10, p2 = 0.04; 0.06 ± z sqrt((0.14 - 0.0036) / 100)."""
    half = Z * math.sqrt((0.14 - 0.0036) / 100)
    assert paired_difference_interval(9, 3, 98) == pytest.approx((0.06 - half, 0.06 + half))


def test_paired_is_antisymmetric_and_never_of_no_width() -> None:
    low, high = paired_difference_interval(9, 3, 98)
    assert paired_difference_interval(3, 9, 98) == pytest.approx((-high, -low))
    low, high = paired_difference_interval(0, 0, 2000)
    assert low == -high
    assert high == pytest.approx(Z * math.sqrt(2) / 2002)
    low, high = paired_difference_interval(1, 0, 1)
    assert -1 <= low < high <= 1


@pytest.mark.parametrize(("p1", "p2"), [(0.05, 0.05), (0.10, 0.04), (0.02, 0.0), (0.3, 0.1)])
def test_paired_covers_the_truth_as_often_as_it_says(p1: float, p2: float) -> None:
    """Exact coverage over every table of n = 60 images: at least 94 % where 95 % is promised."""
    n, truth, covered = 60, p1 - p2, 0.0
    for b in range(n + 1):
        for c in range(n + 1 - b):
            rest = n - b - c
            ways = math.comb(n, b) * math.comb(n - b, c)
            low, high = paired_difference_interval(b, c, n)
            if low <= truth <= high:
                covered += ways * p1**b * p2**c * (1 - p1 - p2) ** rest
    assert covered >= 0.94


def test_impossible_counts_are_a_bug() -> None:
    with pytest.raises(ValueError, match="impossible counts: 3 and 3 of 5"):
        paired_difference_interval(3, 3, 5)


def test_percentiles_have_intervals_where_the_samples_allow() -> None:
    """Of 1 .. 1000 the median lies between the 469th and the 532nd; 368 calls carry a p99."""
    ends = percentile_interval(range(1, 1001), 50)
    assert ends == (469, 532)
    assert percentile_interval(range(367), 99) is None
    assert percentile_interval(range(368), 99) is not None
    assert [samples_for(p) for p in (50, 90, 99)] == [6, 36, 368]
    for percent in (50, 90, 99):
        enough = samples_for(percent)
        assert percentile_interval(range(enough), percent) is not None
        assert percentile_interval(range(enough - 1), percent) is None


def test_percentile_intervals_cover_the_truth() -> None:
    rng = np.random.default_rng(0)
    for percent in (50, 90, 99):
        truth = float(-np.log(1 - percent / 100))  # of the exponential distribution
        draws = rng.exponential(size=(400, 500))
        ends = [percentile_interval(row, percent) for row in draws]
        held = [low <= truth <= high for low, high in filter(None, ends)]
        assert len(held) == 400
        assert np.mean(held) > 0.93


def test_mcnemar_by_hand() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 0) == pytest.approx(2 / 2**5)
    assert mcnemar(9, 3) == mcnemar(3, 9)


def test_ratios_of_calls_that_alternate_are_free_of_what_both_meet() -> None:
    rng = np.random.default_rng(1)
    load = np.repeat(rng.uniform(1, 3, size=20), 20)  # the machine, in stretches
    first = load * rng.normal(1.10, 0.02, size=400)
    second = load * rng.normal(1.00, 0.02, size=400)
    value, low, high = ratio_interval(first, second)
    assert low < 1.10 < high
    assert high - low < 0.02
    assert value == pytest.approx(1.10, abs=0.01)
    assert ratio_interval([2.0] * 9, [1.0] * 9) == (2.0, 2.0, 2.0)


def test_calls_that_are_held_up_do_not_count() -> None:
    """Most calls of the slower network, and a fifth of the other's, take twice as long."""
    rng = np.random.default_rng(0)
    slow, quick = (rng.lognormal(math.log(ms), 0.01, 202) for ms in (1.5, 1.0))
    slow *= np.where(rng.random(202) < 0.6, 2, 1)
    quick *= np.where(rng.random(202) < 0.2, 2, 1)
    assert np.median(slow) / np.median(quick) > 1.6
    assert undisturbed_ratio(slow.tolist(), quick.tolist()) == pytest.approx(1.5, rel=0.02)
    assert undisturbed_ratio([3.0, 2.0], [1.0, 4.0]) == 2.0


def test_bootstrap_intervals_of_ratios_cover_the_truth() -> None:
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(100):
        noise = np.exp(np.cumsum(rng.normal(0, 0.02, size=(400,))))  # drift
        first, second = (noise * rng.lognormal(0, 0.05, size=400) for _ in range(2))
        _, low, high = ratio_interval(first, second)
        held += low <= 1 <= high
    assert held >= 88


def test_mean_interval_by_hand() -> None:
    """1, 2, 3: mean 2, standard error 1 / sqrt(3), t with two degrees of freedom 4.3027."""
    low, high = mean_interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
