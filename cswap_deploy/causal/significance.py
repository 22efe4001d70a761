"""Which effects are real: a paired test per class, corrected for the number of tests.

For every unit and class the effects of that class's images are tested against zero (Wilcoxon's
signed-rank test; each image is its own pair, with and without the unit), and so are those of all
images together, the global causal effect. Effects have long tails, a few images carry most of them,
so a test on ranks sees what a t-test does not (benchmarks/LOG.md). All tests of a measurement are
corrected together (Benjamini and Hochberg 1995). A unit is

    critical      if removing it significantly hurts at least one class, or all on average,
    detrimental   if it hurts none, and removing it significantly helps at least one, or all,
    neutral       otherwise.

An effect below ``min_effect`` never counts, however certain it is. The paper fixes neither test
nor correction; this is our reading.

Source: C-SWAP (arXiv:2510.18636); Wilcoxon, "Individual Comparisons by Ranking Methods", Biometrics
Bulletin 1 (1945); Benjamini & Hochberg, "Controlling the False Discovery Rate",
J. R. Stat. Soc. B 57 (1995).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cswap_deploy.artifacts import Verdict

MIN_IMAGES = 3
"""A class with fewer images is tested together with the other small ones."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """Verdicts of U units, with the interval of each mean effect over all images."""

    verdicts: tuple[Verdict, ...]
    mean: np.ndarray
    """(U,)"""
    low: np.ndarray
    """(U,) lower end of the 95 % t-interval."""
    high: np.ndarray
    p_values: np.ndarray
    """(U, classes + 1) after correction; the last column is of all images together."""


def judge(effects: np.ndarray, labels: np.ndarray, *, alpha: float, min_effect: float) -> Judgement:
    """Call every unit critical, neutral or detrimental.

    Args:
        effects: (U, N) relative effects on the true class's probability.
        labels: (N,) true classes; images of a class are that class's sample.
        alpha: False-discovery rate.
        min_effect: Smallest |mean effect| on a class that counts.
    """
    samples = [*class_samples(labels), np.arange(len(labels))]
    means = np.stack([effects[:, rows].mean(1) for rows in samples], 1)
    raw = np.stack([_p_values(effects[:, rows]) for rows in samples], 1)
    corrected = false_discovery(raw)
    real = (corrected <= alpha) & (np.abs(means) >= min_effect)
    hurts = (real & (means < 0)).any(1)
    helps = (real & (means > 0)).any(1)
    verdicts: list[Verdict] = [
        "critical" if bad else "detrimental" if good else "neutral"
        for bad, good in zip(hurts, helps, strict=True)
    ]
    mean = effects.mean(1)
    half = _half_width(effects)
    return Judgement(tuple(verdicts), mean, mean - half, mean + half, corrected)


def class_samples(labels: np.ndarray) -> list[np.ndarray]:
    """Rows of each class; classes with fewer than ``MIN_IMAGES`` images share one sample."""
    rows = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    large = [r for r in rows if len(r) >= MIN_IMAGES]
    small = [r for r in rows if len(r) < MIN_IMAGES]
    if small:
        pooled = np.sort(np.concatenate(small))
        if len(pooled) >= MIN_IMAGES or not large:
            large.append(pooled)
        else:
            large[-1] = np.sort(np.concatenate([large[-1], pooled]))
    return large


def false_discovery(p: np.ndarray) -> np.ndarray:
    """Benjamini-Hochberg adjusted p-values over all entries, same shape."""
    from scipy.stats import false_discovery_control

    adjusted: np.ndarray = false_discovery_control(p.ravel(), method="bh").reshape(p.shape)
    return adjusted


def _p_values(sample: np.ndarray) -> np.ndarray:
    """Two-sided signed-rank test against zero, normal approximation; (U, n) -> (U,).

    Zeros count half on each side, so a unit that changes nothing has p = 1.
    """
    from scipy.stats import wilcoxon

    if sample.shape[1] < 2:
        return np.ones(len(sample))
    with np.errstate(invalid="ignore", divide="ignore"):
        p = wilcoxon(sample, axis=1, method="asymptotic", zero_method="zsplit").pvalue
    return np.where(np.isnan(p) | (sample == 0).all(1), 1.0, p)


def _half_width(sample: np.ndarray) -> np.ndarray:
    from scipy.stats import t

    n = sample.shape[1]
    if n < 2:
        return np.zeros(len(sample))
    width: np.ndarray = t.ppf(0.975, n - 1) * sample.std(1, ddof=1) / np.sqrt(n)
    return width
