"""Confidence intervals and tests: of accuracy, percentiles, ratios and means."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from statistics import NormalDist

_TOGETHER = 4
"""Calls of which the quickest counts. Two to sixteen are alike (benchmarks/LOG.md)."""


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


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p-value that two networks are right equally often, of images on which they differ.

    Args:
        only_first: Images that only the first network predicts right.
        only_second: Images that only the second one does.

    Source:
        McNemar 1947, Psychometrika 12:153, with exact binomial probabilities.
    """
    from scipy.stats import binomtest

    trials = only_first + only_second
    return 1.0 if trials == 0 else float(binomtest(only_first, trials).pvalue)


def percentile_interval(
    samples: Sequence[float], percent: float, *, level: float = 0.95
) -> tuple[float, float] | None:
    """Interval of a percentile, whatever the distribution; ``None`` where samples are too few.

    Args:
        samples: n > 0 values.
        percent: Between 0 and 100.
        level: Coverage.

    Source:
        Conover 1999, "Practical Nonparametric Statistics", section 3.2, by order statistics; as in
        ``scipy.stats.quantile_test``.
    """
    from scipy.stats import quantile_test

    found = quantile_test(samples, q=0.0, p=percent / 100).confidence_interval(level)
    low, high = float(found.low), float(found.high)
    return None if math.isnan(low) or math.isnan(high) else (low, high)


def samples_for(percent: float, *, level: float = 0.95) -> int:
    """How many samples :func:`percentile_interval` needs: one must lie beyond with certainty."""
    tail = min(percent, 100 - percent) / 100
    return math.ceil(math.log((1 - level) / 2) / math.log(1 - tail))


def mean_interval(values: Sequence[float], *, level: float = 0.95) -> tuple[float, float]:
    """Student's interval of the mean of n > 1 values."""
    from scipy.stats import t

    count = len(values)
    mean = statistics.fmean(values)
    half = float(t.ppf(0.5 + level / 2, count - 1)) * statistics.stdev(values) / math.sqrt(count)
    return mean - half, mean + half


def ratio_interval(
    first: Sequence[float], second: Sequence[float], *, level: float = 0.95, blocks: int = 20
) -> tuple[float, float, float]:
    """Ratio of medians of calls that alternated, and its interval by bootstrap.

    Neighbours in time are alike, so whole blocks of consecutive pairs are drawn.

    Args:
        first: n > 1 latencies (milliseconds), in the order taken.
        second: As many of the other.
        level: Coverage.
        blocks: At most so many blocks.

    Returns:
        The geometric mean over blocks of the median of ``first[i] / second[i]``, and both ends.

    Source:
        Efron & Tibshirani 1993, "An Introduction to the Bootstrap", chapter 8 (moving blocks);
        ``scipy.stats.bootstrap``, percentile method.
    """
    import numpy as np
    from scipy.stats import bootstrap

    ratios = np.log(np.asarray(first, dtype=float) / np.asarray(second, dtype=float))
    parts = np.array_split(ratios, min(blocks, len(ratios)))
    medians = np.array([np.median(part) for part in parts])
    middle = float(medians.mean())
    if np.ptp(medians) == 0:
        return math.exp(middle), math.exp(middle), math.exp(middle)
    found = bootstrap(
        (medians,), np.mean, confidence_level=level, method="percentile", rng=0, n_resamples=4999
    ).confidence_interval
    return math.exp(middle), math.exp(float(found.low)), math.exp(float(found.high))


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


def undisturbed_ratio(first: Sequence[float], second: Sequence[float]) -> float:
    """Median of ``first / second`` over calls that alternated, of each four the quickest.

    On a core that others use many calls are held up, and not in proportion: where one ViT takes
    1.35 times as long as another, medians then said 1.30 to 1.33, this 1.34 (benchmarks/LOG.md).

    Args:
        first: n > 0 latencies (milliseconds), in the order taken.
        second: As many of the other network.
    """
    starts = range(0, len(first), _TOGETHER)
    return statistics.median(
        min(first[at : at + _TOGETHER]) / min(second[at : at + _TOGETHER]) for at in starts
    )
