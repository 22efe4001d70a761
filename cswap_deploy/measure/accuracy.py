"""Top-1 accuracy, and its change from the dense to the pruned network."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from cswap_deploy.measure.parity import Run, check_finite
from cswap_deploy.measure.statistics import paired_difference_interval, wilson_interval
from cswap_deploy.records.measurements import Accuracy, AccuracyChange
from cswap_deploy.runtime.session import Floats

Classes = npt.NDArray[np.integer[Any]]


def predict(run: Run, images: Floats | Iterable[Floats], *, batch: int) -> Floats:
    """Run a network over many images.

    Args:
        run: The network.
        images: (N, C, H, W) float32, or an iterable of such arrays, of which memory then holds one
            at a time.
        batch: Largest batch that ``run`` is given (samples).

    Returns:
        (N, classes) float32 logits, in order.

    Raises:
        StageError: A logit is not finite.
    """
    logits: list[Floats] = []
    done = 0
    for chunk in [images] if isinstance(images, np.ndarray) else images:
        for start in range(0, len(chunk), batch):
            part = np.ascontiguousarray(chunk[start : start + batch], dtype=np.float32)
            logits.append(np.asarray(run(part), dtype=np.float32))
            where = f"images {done} to {done + len(part) - 1}"
            check_finite(logits[-1], name="the network", where=where)
            done += len(part)
    if not logits:
        raise ValueError("no images to predict")
    return np.concatenate(logits)


def accuracy(predicted: Classes, labels: Classes) -> Accuracy:
    """Top-1 with a 95 % Wilson score interval.

    Both arguments are (N,) class indices, N > 0.
    """
    right = _right(predicted, labels)
    low, high = wilson_interval(int(right.sum()), len(right))
    # Rounding can put an end a hair beyond the estimate at 0 and at 1.
    top1 = float(right.mean())
    return Accuracy(top1=top1, low=min(low, top1), high=max(high, top1), images=len(right))


def accuracy_change(
    dense_predicted: Classes, pruned_predicted: Classes, labels: Classes
) -> AccuracyChange:
    """What pruning cost, paired by image.

        drop = (b - c) / n

    with b the images that only the dense network predicts right and c those that only the pruned
    one does, and its 95 % interval (``statistics.paired_difference_interval``).

    All arguments are (N,) class indices of the same images in the same order, N > 0.
    """
    dense, pruned = _right(dense_predicted, labels), _right(pruned_predicted, labels)
    only_dense = int((dense & ~pruned).sum())
    only_pruned = int((pruned & ~dense).sum())
    low, high = paired_difference_interval(only_dense, only_pruned, len(labels))
    return AccuracyChange(
        dense=accuracy(dense_predicted, labels), pruned=accuracy(pruned_predicted, labels),
        drop=(only_dense - only_pruned) / len(labels), low=low, high=high,
        agreement=float((dense_predicted == pruned_predicted).mean()),
    )  # fmt: skip


def _right(predicted: Classes, labels: Classes) -> npt.NDArray[np.bool_]:
    if predicted.ndim != 1 or predicted.shape != labels.shape or not len(labels):
        raise ValueError(
            f"need (N,) classes and labels, N > 0: got {predicted.shape} and {labels.shape}"
        )
    return np.asarray(predicted == labels)
