"""Which effects are real: a paired test per class, corrected for the number of tests.

For every unit and class the effects of that class's images are tested against zero (Wilcoxon's
signed-rank test), and so are those of all images together, the global causal effect. A few images
carry most of an effect, so a test on ranks sees what a t-test does not (benchmarks/LOG.md). Images
that the unit does not touch (effect exactly 0) are left out. Up to ``EXACT`` images the
distribution of the ranks is the exact one: the normal approximation is over-confident below seven
images and blunt above, which the correction for thousands of tests does not forgive. All tests of a
measurement are corrected together (Benjamini and Hochberg). A unit is

    critical      if removing it significantly hurts at least one class, or all on average,
    detrimental   if it hurts none, and removing it significantly helps at least one, or all,
    neutral       otherwise.

An effect below ``min_effect`` never counts, however certain it is. A unit *serves* the classes
that its removal hurts and *harms* those that it helps, by the same rule. The paper fixes neither
test nor correction; this is our reading.

Source: C-SWAP (arXiv:2510.18636); Wilcoxon, "Individual Comparisons by Ranking Methods", Biometrics
Bulletin 1 (1945); Benjamini & Hochberg, "Controlling the False Discovery Rate",
J. R. Stat. Soc. B 57 (1995).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cswap_deploy.records.plan import Verdict

MIN_IMAGES = 3
"""A class with fewer images is tested together with the other small ones."""
EXACT = 50
"""Images that react, up to which p-values are exact; the normal approximation is good beyond."""


@dataclass(frozen=True, slots=True)
class UnitVerdicts:
    """Verdicts of U units, with the interval of each mean effect over all images."""

    verdicts: tuple[Verdict, ...]
    mean: np.ndarray
    """(U,)"""
    low: np.ndarray
    """(U,) lower end of the 95 % t-interval."""
    high: np.ndarray
    p_values: np.ndarray
    """(U, classes + 1) after correction; the last column is of all images together."""
    serves: tuple[tuple[int, ...], ...]
    """For each unit the classes that removing it significantly hurts, strongest first; no small
    classes that were tested together: a critical unit may serve no class by name."""
    harms: tuple[tuple[int, ...], ...]
    """The same for the classes that removing it significantly helps."""


def find_verdicts(
    effects: np.ndarray,
    labels: np.ndarray,
    *,
    alpha: float,
    min_effect: float,
    measured: np.ndarray | None = None,
) -> UnitVerdicts:
    """Call every unit critical, neutral or detrimental.

    Args:
        effects: (U, N) relative effects on the true class's probability.
        labels: (N,) true classes; images of a class are that class's sample.
        alpha: False-discovery rate.
        min_effect: Smallest |mean effect| on a class that counts.
        measured: (U, N) bool, where the other effects are estimates: no test sees those, only means
            and intervals do. ``None``: everywhere.
    """
    tested = effects if measured is None else np.where(measured, effects, 0.0)
    samples = [*class_samples(labels), np.arange(len(labels))]
    means = np.stack([effects[:, rows].mean(1) for rows in samples], 1)
    raw = np.stack([_p_values(tested[:, rows]) for rows in samples], 1)
    corrected = false_discovery(raw)
    real = (corrected <= alpha) & (np.abs(means) >= min_effect)
    hurts = (real & (means < 0)).any(1)
    helps = (real & (means > 0)).any(1)
    verdicts = np.select([hurts, helps], ["critical", "detrimental"], "neutral")
    mean, half = effects.mean(1), _half_width(effects)
    # the last column, all images, is no class, and a sample that mixes several has none (-1)
    of_samples = [np.unique(labels[rows]) for rows in samples[:-1]]
    classes = np.array([found[0] if len(found) == 1 else -1 for found in of_samples])
    of_classes = np.where(real[:, :-1] & (classes >= 0), means[:, :-1], 0.0)
    return UnitVerdicts(
        verdicts=tuple(verdicts.tolist()),
        mean=mean,
        low=mean - half,
        high=mean + half,
        p_values=corrected,
        serves=_strongest_first(np.minimum(of_classes, 0.0), classes),
        harms=_strongest_first(np.maximum(of_classes, 0.0), classes),
    )


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


def _strongest_first(means: np.ndarray, classes: np.ndarray) -> tuple[tuple[int, ...], ...]:
    """Classes with an effect other than zero, for each unit; (U, C), (C,) -> U tuples."""
    order = np.argsort(-np.abs(means), axis=1, kind="stable")
    count = (means != 0).sum(1)
    return tuple(
        tuple(classes[row[:n]].tolist()) for row, n in zip(order, count.tolist(), strict=True)
    )


def _p_values(sample: np.ndarray) -> np.ndarray:
    """Two-sided signed-rank test against zero, without the zeros; (U, n) -> (U,).

    Equal entries share a rank; the rank sum is then rounded towards the null. A unit that changes
    nothing has p = 1.
    """
    from scipy.stats import wilcoxon

    reacting = (sample != 0).sum(1)
    p = np.ones(len(sample))
    few = (reacting > 0) & (reacting <= EXACT)
    for method, rows in (("exact", few), ("asymptotic", reacting > EXACT)):
        if rows.any():
            p[rows] = wilcoxon(sample[rows], axis=1, method=method, zero_method="wilcox").pvalue
    return p


def _half_width(sample: np.ndarray) -> np.ndarray:
    from scipy.stats import t

    n = sample.shape[1]
    if n < 2:
        return np.zeros(len(sample))
    width: np.ndarray = t.ppf(0.975, n - 1) * sample.std(1, ddof=1) / np.sqrt(n)
    return width
