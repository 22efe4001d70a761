from __future__ import annotations

import math

import pytest

from cswap_deploy.measure.statistics import paired_difference_interval, wilson_interval

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
