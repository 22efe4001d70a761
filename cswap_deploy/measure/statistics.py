"""Confidence intervals: of top-1 accuracy, of its change, and of a speed-up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist


def wilson_interval(successes: int, trials: int, *, level: float = 0.95) -> tuple[float, float]:
    """Lower and upper end (fractions) of Wilson's score interval of a proportion; ``trials`` > 0.

    Source:
        Wilson 1927, J. Am. Stat. Assoc. 22:209; as in ``scipy.stats.binomtest``.
    """
    from scipy.stats import binomtest

    interval = binomtest(successes, trials).proportion_ci(confidence_level=level, method="wilson")
    return float(interval.low), float(interval.high)


def paired_difference_interval(
    only_first: int, only_second: int, trials: int, *, level: float = 0.95
) -> tuple[float, float]:
    """Interval of the difference of two proportions measured on the same images.

        p1 = (b + 1) / (n + 2),  p2 = (c + 1) / (n + 2)
        p1 - p2 ± z sqrt((p1 + p2 - (p1 - p2)²) / (n + 2))

    Images on which both networks are right, or both wrong, say nothing about the difference; so it
    is much narrower than two separate intervals. The added counts keep it honest for few
    disagreements: with none at all it still has a width.

    Args:
        only_first: b, images that only the first network predicts right.
        only_second: c, images that only the second network predicts right.
        trials: n, images, > 0.
        level: Coverage.

    Returns:
        Lower and upper end of (first - second), within [-1, 1].

    Source:
        Bonett & Price 2012, J. Educ. Behav. Stat. 37:479 (Wald interval with Laplace adjustment);
        recommended by Fagerland, Lydersen & Laake 2014, Stat. Med. 33:2850.
    """
    if trials < 1 or only_first < 0 or only_second < 0 or only_first + only_second > trials:
        raise ValueError(f"impossible counts: {only_first} and {only_second} of {trials}")
    z = NormalDist().inv_cdf(0.5 + level / 2)
    p1, p2 = (only_first + 1) / (trials + 2), (only_second + 1) / (trials + 2)
    half = z * math.sqrt((p1 + p2 - (p1 - p2) ** 2) / (trials + 2))
    return max(-1.0, p1 - p2 - half), min(1.0, p1 - p2 + half)


def median_ratio_interval(
    first: Sequence[float], second: Sequence[float], *, level: float = 0.95
) -> tuple[float, float]:
    """Interval of the median of ``first[i] / second[i]``: calls that alternated, pair by pair.

    Order statistics at ``n / 2 -+ z sqrt(n) / 2``, whatever the distribution; what disturbs the
    machine disturbs both calls of a pair.

    Args:
        first: n > 0 latencies (milliseconds), in the order taken.
        second: As many of the other network.
        level: Coverage.

    Source:
        Conover 1999, "Practical Nonparametric Statistics", confidence interval of a quantile.
    """
    ratios = sorted(a / b for a, b in zip(first, second, strict=True))
    count = len(ratios)
    half = NormalDist().inv_cdf(0.5 + level / 2) * math.sqrt(count) / 2
    low = max(0, math.floor(count / 2 - half))
    high = min(count - 1, math.ceil(count / 2 + half))
    return ratios[low], ratios[high]
