"""Which images to take: balanced by class, seeded, and never the same in both sets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]


def balanced_shares(available: Counts, count: int, order: Sequence[int]) -> Counts:
    """How many images of each class make ``count`` in all, as evenly as the classes allow.

    Args:
        available: (K,) images that each class has.
        count: Images wanted; at most ``available.sum()`` are given.
        order: Which classes come first when the last ones do not divide evenly.

    Returns:
        (K,) with 0 <= shares <= available, differing by at most one among classes not used up.
    """
    shares = np.zeros_like(available)
    left = min(count, int(available.sum()))
    while left:
        open_classes = [c for c in order if shares[c] < available[c]]
        step = min(int((available - shares)[open_classes].min()), left // len(open_classes))
        if step == 0:
            shares[open_classes[:left]] += 1
            break
        shares[open_classes] += step
        left -= step * len(open_classes)
    return shares


def split_shares(
    available: Counts, *, calibration: int, validation: int, order: Sequence[int]
) -> tuple[Counts, Counts]:
    """Shares of two disjoint sets drawn from the same images.

    No class gives more than half of its images (rounded up) to the calibration set as long as
    others can fill it, so that validation sees every class that has two.
    """
    half = (available + 1) // 2
    first = balanced_shares(half, calibration, order)
    first += balanced_shares(available - first, calibration - int(first.sum()), order)
    return first, balanced_shares(available - first, validation, list(reversed(order)))


def split_counts(total: int, *, calibration: int, validation: int) -> tuple[int, int]:
    """What each set gets of a source that may have fewer images than both ask for together.

    A set that asks for less than half gets what it asks for; the other one the rest.
    """
    if total >= calibration + validation:
        return calibration, validation
    first = min(calibration, total // 2)
    second = min(validation, total - first)
    return min(calibration, total - second), second


def shuffled_queues(labels: NDArray[np.int64], seed: int) -> dict[int, list[int]]:
    """Class -> its image indices in seeded order, to be taken from the end."""
    rng = np.random.default_rng(seed)
    queues: dict[int, list[int]] = {}
    for label in np.unique(labels):
        indices = np.flatnonzero(labels == label)
        queues[int(label)] = rng.permutation(indices).tolist()
    return queues
