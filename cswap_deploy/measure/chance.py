"""Whether the dense network knows its classes: if it only guesses, something is mixed up."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from cswap_deploy.config import Config
from cswap_deploy.data import ImageSet, Samples
from cswap_deploy.data.load import Part
from cswap_deploy.errors import UsageError
from cswap_deploy.measure.accuracy import predict
from cswap_deploy.measure.evaluate import EVALUATION_BATCH, torch_run
from cswap_deploy.models.load import LoadedModel
from cswap_deploy.progress import Progress
from cswap_deploy.records.measurements import DenseCheck, Verdict
from cswap_deploy.runtime.preprocess import normalise
from cswap_deploy.runtime.session import Floats

CHECK_IMAGES = 128
"""Of each set, at most: the first ones, which are balanced by class."""
FEWEST_IMAGES = 16
"""Below, nothing is stopped: a few images may all be hard ones."""
LEVEL = 0.05
_PER_CLASS = 5
"""Images of each class from which on another class order can be seen."""


def check_labels(
    config: Config, loaded: LoadedModel, samples: Samples, progress: Progress
) -> tuple[DenseCheck, ...]:
    """Stop before anything takes long where the dense network only guesses on the images.

    Tasks without classes are not checked, nor random weights, nor images without labels. Of
    validation images only those with a source of their own are: the others have the labels of the
    calibration images.

    Raises:
        UsageError: It is no better than guessing, and ``allow_chance`` was not given.
    """
    spec = loaded.spec
    if spec.task != "classify":
        return ()
    if spec.is_random:
        progress.note(f"the weights are {spec.weights}: accuracy says nothing")
        return ()
    sets: dict[Part, ImageSet] = {"calibration": samples.calibration}
    if config.data.validation_data is not None:
        sets["validation"] = samples.validation
    found = []
    for part, images in sets.items():
        if not images.spec.labelled:
            continue
        progress.begin(f"evaluating the dense network on {part} images", 0)
        check = check_dense(
            loaded.module, normalise(images.images[:CHECK_IMAGES], spec.preprocessing),
            images.labels[:CHECK_IMAGES], part=part,
            batch=min(EVALUATION_BATCH, config.engine.batch.max),
        )  # fmt: skip
        progress.end()
        if check is None:
            continue
        if check.verdict == "at" and not config.data.allow_chance:
            raise UsageError(
                f"{check.words}.\n  This is what labels in another class order look like (here: "
                f"{images.spec.mapping.partition('; ')[0]}), or another --mean and --std than in "
                f"training, or wrong weights (here: {spec.weights})",
                fix="pass the class order with --class-map FILE, the --mean and --std of the "
                "training, the right --checkpoint; or --allow-chance to go on all the same",
            )
        if check.verdict != "above":
            progress.note(check.words)
        found.append(check)
    return tuple(found)


def check_dense(
    module: nn.Module,
    images: Floats,
    labels: npt.NDArray[np.int64],
    *,
    part: Part,
    batch: int,
) -> DenseCheck | None:
    """Top-1 of the network on a set's images, held against guessing.

    Args:
        module: The dense network.
        images: (N, C, H, W) float32, as the network takes them, N > 0.
        labels: (N,) class indices.
        part: Name of the set.
        batch: Largest batch (samples) that the network is given.

    Returns:
        None where the network fails or gives no (N, classes) logits, all finite: the stages after
        this one say what is wrong with it, and where.
    """
    try:
        logits = predict(torch_run(module), images, batch=batch)
    except Exception:  # noqa: BLE001 - the user's code may raise anything
        return None
    if logits.ndim != 2 or len(logits) != len(labels):
        return None
    predicted = logits.argmax(1)
    classes = len(np.unique(labels))
    right = int((predicted == labels).sum())
    return DenseCheck(
        part=part, right=right, images=len(labels), classes=classes,
        verdict=verdict(right, len(labels), classes), reordered=_reordered(predicted, labels),
    )  # fmt: skip


def verdict(right: int, images: int, classes: int) -> Verdict:
    """Whether so many right predictions are more than guessing among the classes gives.

    Two exact one-sided binomial tests at :data:`LEVEL`. With chance 1 / K, predictions are "above"
    chance where P(X >= right; 1 / K) is at most the level; else "at" chance where half-way to
    perfect is ruled out, P(X <= right; (1 + 1 / K) / 2) at most the level; else, and below
    :data:`FEWEST_IMAGES`, there are too "few" to tell.

    Args:
        right: 0 to ``images``.
        images: N > 0.
        classes: K > 0, that occur among the images.
    """
    from scipy.stats import binom

    chance = 1 / classes
    if classes > 1 and binom.sf(right - 1, images, chance) <= LEVEL:
        return "above"
    enough = classes > 1 and images >= FEWEST_IMAGES
    return "at" if enough and binom.cdf(right, images, (1 + chance) / 2) <= LEVEL else "few"


def _reordered(predicted: npt.NDArray[Any], labels: npt.NDArray[np.int64]) -> float | None:
    """Top-1 (fraction) with the best one-to-one match of predicted classes to labels.

    None where there are too few images for it, or it is less than half-way to perfect: some match
    fits any predictions a little.
    """
    from scipy.optimize import linear_sum_assignment

    found, rows = np.unique(labels, return_inverse=True)
    if len(labels) < _PER_CLASS * len(found):
        return None
    guessed, columns = np.unique(predicted, return_inverse=True)
    counts = np.zeros((len(found), len(guessed)))
    np.add.at(counts, (rows, columns), 1)
    share = float(counts[linear_sum_assignment(counts, maximize=True)].sum() / len(labels))
    return share if share >= (1 + 1 / len(found)) / 2 else None
