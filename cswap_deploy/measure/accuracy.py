"""Top-1 accuracy, its change from the dense to the pruned network, and by class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cswap_deploy.data.archives import read_arrays
from cswap_deploy.errors import ArtifactError, UsageError
from cswap_deploy.measure.parity import Run, check_finite
from cswap_deploy.measure.statistics import mcnemar, paired_difference_interval, wilson_interval
from cswap_deploy.records.measurements import Accuracy, AccuracyChange, Agreement
from cswap_deploy.runtime.probabilities import LEAST, OutputKind, to_probabilities
from cswap_deploy.runtime.session import Floats

Classes = npt.NDArray[np.integer[Any]]
PREDICTIONS = "predictions.npz"
"""Of a bundle: labels, and of each network the classes and how sure it was of them."""
_BINS = 15
_MOST_LOGS = 8_000_000
"""Numbers: 2,000 images of 4,000 classes."""


@dataclass(frozen=True, slots=True)
class Predicted:
    """What a network says of N images."""

    classes: Classes
    """(N,) the likeliest."""
    confidence: Floats
    """(N,) its probability."""
    logs: Floats | None = None
    """(N, classes) logarithms of all probabilities, where they are few enough to keep."""


def predicted(outputs: Floats, kind: OutputKind) -> Predicted:
    """(N, classes) outputs of a network as predictions."""
    probabilities = to_probabilities(outputs, kind)
    logs = None
    if outputs.size <= _MOST_LOGS:
        logs = np.log(np.maximum(probabilities, LEAST)).astype(np.float32)
    return Predicted(outputs.argmax(1), probabilities.max(1).astype(np.float32), logs)


def write_predictions(
    path: Path, networks: Mapping[str, Predicted], labels: Classes | None = None, *,
    whole: bool = False,
) -> None:  # fmt: skip
    """Save predictions of the same N images, compressed.

    Args:
        path: Of the file.
        networks: By name.
        labels: (N,) where they are known.
        whole: Also all probabilities.
    """
    arrays: dict[str, Any] = {} if labels is None else {"labels": np.asarray(labels, np.int32)}
    for name, one in networks.items():
        arrays[f"{name}.classes"] = one.classes.astype(np.int32)
        arrays[f"{name}.confidence"] = one.confidence
        if whole and one.logs is not None:
            arrays[f"{name}.logs"] = one.logs
    np.savez_compressed(path, **arrays)


def read_predictions(path: Path) -> tuple[dict[str, Predicted], Classes | None]:
    """Networks by name, and the labels.

    Raises:
        ArtifactError: The file is damaged.
    """
    try:
        arrays = read_arrays(path)
        names = [key.removesuffix(".classes") for key in arrays if key.endswith(".classes")]
        found = {
            n: Predicted(
                arrays[f"{n}.classes"], arrays[f"{n}.confidence"], arrays.get(f"{n}.logs")
            )
            for n in names
        }  # fmt: skip
        return found, arrays.get("labels")
    except (UsageError, KeyError) as err:
        raise ArtifactError(f"{path} holds no predictions: {err}") from err


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


def accuracy(found: Predicted, labels: Classes) -> Accuracy:
    """Top-1 with a 95 % Wilson score interval, and the expected calibration error.

    Args:
        found: Of N > 0 images.
        labels: (N,) class indices.
    """
    right = _right(found.classes, labels)
    low, high = wilson_interval(int(right.sum()), len(right))
    # Rounding can put an end a hair beyond the estimate at 0 and at 1.
    top1 = float(right.mean())
    return Accuracy(
        top1=top1, low=min(low, top1), high=max(high, top1), images=len(right),
        calibration_error=calibration_error(found.confidence, right),
    )  # fmt: skip


def calibration_error(confidence: Floats, right: npt.NDArray[np.bool_]) -> float:
    """Mean distance between how sure a network is and how often it is right, a fraction.

    Over bins of equal width of the confidence, weighted by their images.

    Source:
        Guo et al. 2017, "On Calibration of Modern Neural Networks" (arXiv:1706.04599), section 2.
    """
    place = np.minimum((confidence * _BINS).astype(np.int64), _BINS - 1)
    gaps = [
        abs(float(right[held].sum()) - float(confidence[held].sum()))
        for held in (place == at for at in range(_BINS))
    ]
    # Confidences differ in their last digits from batch to batch.
    return min(1.0, round(sum(gaps) / len(right), 4))


def by_class(
    dense: Predicted, pruned: Predicted, labels: Classes
) -> list[tuple[int, int, int, int]]:
    """Class, its images, and how many of them either network gets right; ascending."""
    first, second = _right(dense.classes, labels), _right(pruned.classes, labels)
    return [
        (int(k), int((held := labels == k).sum()), int(first[held].sum()), int(second[held].sum()))
        for k in np.unique(labels)
    ]


def accuracy_change(dense: Predicted, pruned: Predicted, labels: Classes) -> AccuracyChange:
    """What pruning cost, paired by image.

        drop = (b - c) / n

    with b the images that only the dense network predicts right and c those that only the pruned
    one does, its 95 % interval (``statistics.paired_difference_interval``), and McNemar's test.

    All arguments are of the same images in the same order, N > 0.
    """
    first, second = _right(dense.classes, labels), _right(pruned.classes, labels)
    only_dense = int((first & ~second).sum())
    only_pruned = int((second & ~first).sum())
    low, high = paired_difference_interval(only_dense, only_pruned, len(labels))
    return AccuracyChange(
        dense=accuracy(dense, labels), pruned=accuracy(pruned, labels),
        drop=(only_dense - only_pruned) / len(labels), low=low, high=high,
        agreement=float((dense.classes == pruned.classes).mean()),
        p_value=mcnemar(only_dense, only_pruned),
    )  # fmt: skip


def agreement(before: Predicted, after: Predicted) -> Agreement:
    """How alike two networks predict N > 0 images."""
    same = before.classes == after.classes
    low, high = wilson_interval(int(same.sum()), len(same))
    kl = None
    if before.logs is not None and after.logs is not None:
        first, second = (logs.astype(np.float64) for logs in (before.logs, after.logs))
        kl = max(0.0, float((np.exp(first) * (first - second)).sum(1).mean()))
    share = float(same.mean())
    return Agreement(
        share=share, low=min(low, share), high=max(high, share), kl=kl, images=len(same)
    )


def _right(predicted: Classes, labels: Classes) -> npt.NDArray[np.bool_]:
    if predicted.ndim != 1 or predicted.shape != labels.shape or not len(labels):
        raise ValueError(
            f"need (N,) classes and labels, N > 0: got {predicted.shape} and {labels.shape}"
        )
    return np.asarray(predicted == labels)
