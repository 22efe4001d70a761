"""Which images to take: balanced by class, seeded, and never the same in both sets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
Image = TypeVar("Image")
Read = TypeVar("Read")


def balanced_shares(available: Counts, count: int, order: Sequence[int]) -> Counts:
    """Divide ``count`` images among the classes, as evenly as these allow.

    Args:
        available: (K,) images that each class has.
        count: Images wanted; at most ``available.sum()`` are given.
        order: The classes; the first ones get the images that do not divide evenly.

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
    available: Counts, *, calibration: int, validation: int = 0, order: Sequence[int]
) -> tuple[Counts, Counts]:
    """Shares of two disjoint sets drawn from the same images.

    No class gives more than half of its images (rounded up) to the calibration set as long as
    others can fill it, so that validation sees every class that has two.
    """
    half = (available + 1) // 2
    first = balanced_shares(half, calibration, order)
    first += balanced_shares(available - first, calibration - int(first.sum()), order)
    return first, balanced_shares(available - first, validation, order[::-1])


def split_counts(total: int, *, calibration: int, validation: int) -> tuple[int, int]:
    """Divide a source that may have fewer images than both sets ask for together.

    A set that asks for less than half gets what it asks for, the other one the rest.
    """
    if total >= calibration + validation:
        return calibration, validation
    first = min(calibration, total // 2)
    second = min(validation, total - first)
    return min(calibration, total - second), second


def shuffled_queues(labels: NDArray[np.int64], seed: int) -> dict[int, list[int]]:
    """Class -> its image indices in seeded order, to be taken from the end."""
    rng = np.random.default_rng(seed)
    rows = _rows_by_class(labels)
    return {c: rng.permutation(indices).tolist() for c, indices in rows.items()}


def interleaved(
    images: Mapping[int, Sequence[Image]], order: Sequence[int]
) -> list[tuple[int, Image]]:
    """Images with their class; the classes take turns in ``order``, so every prefix is balanced."""
    columns = [[(c, image) for image in images[c]] for c in order if c in images]
    return [one for turn in zip_longest(*columns) for one in turn if one is not None]


def balanced_sample(labels: NDArray[np.int64], count: int, *, classes: int, seed: int) -> list[int]:
    """Choose at most ``count`` images from arrays, as they are chosen from a file.

    Returns:
        Positions in ``labels``; every prefix is balanced by class.
    """
    order = np.random.default_rng(seed).permutation(classes).tolist()
    available = np.bincount(labels, minlength=classes)
    shares, _ = split_shares(available, calibration=count, order=order)
    queues = shuffled_queues(labels, seed)
    chosen = {c: [queue.pop() for _ in range(shares[c])] for c, queue in queues.items()}
    return [position for _, position in interleaved(chosen, order)]


def take_balanced(
    stream: Iterable[tuple[int, Image]],
    read: Callable[[Image], Read | None],
    *,
    quota: Counts,
    count: int,
) -> tuple[list[Read], NDArray[np.int64]]:
    """Take ``count`` images from a stream, no class giving more than its quota.

    Where the stream ends before that, classes that have more images give them.

    Args:
        read: Called with what is taken; ``None`` if the image cannot be used.
        quota: (K,) most images of each class.
        count: Images in all; as many more are kept in memory at most.

    Returns:
        What ``read`` made of the images, and their classes.
    """
    quota = quota.copy()
    more: list[tuple[int, Image]] = []
    images: list[Read] = []
    labels: list[int] = []

    def take(label: int, image: Image) -> None:
        if (made := read(image)) is not None:
            quota[label] -= 1
            images.append(made)
            labels.append(label)

    for label, image in stream:
        if quota[label] > 0:
            take(label, image)
        elif len(more) < count:
            more.append((label, image))
        if len(images) == count:
            break
    available = np.bincount([label for label, _ in more], minlength=len(quota))
    quota = balanced_shares(available, count - len(images), range(len(quota)))
    for label, image in more:
        if quota[label] > 0:
            take(label, image)
    return images, np.array(labels, dtype=np.int64)


def balanced_order(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows of all images such that every prefix holds each class about equally often."""
    rows = {c: indices.tolist() for c, indices in _rows_by_class(labels).items()}
    return np.array([row for _, row in interleaved(rows, list(rows))], dtype=np.int64)


def _rows_by_class(labels: NDArray[np.int64]) -> dict[int, NDArray[np.int64]]:
    return {int(c): np.flatnonzero(labels == c) for c in np.unique(labels)}
