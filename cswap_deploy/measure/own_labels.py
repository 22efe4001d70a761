"""Classes for photos without any: what the dense network predicts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from torch import nn

from cswap_deploy.data import ImageSet, Samples, normalised_batches
from cswap_deploy.data.sets import Labels
from cswap_deploy.errors import UsageError
from cswap_deploy.measure.accuracy import predict
from cswap_deploy.measure.evaluate import EVALUATION_BATCH, torch_run
from cswap_deploy.models.load import LoadedModel
from cswap_deploy.runtime.session import Floats

WORDS = "no labels: the dense network's own predictions stand for them"


def with_own_labels(loaded: LoadedModel, samples: Samples) -> Samples:
    """Samples of a classifier whose unlabelled sets have the dense network's predictions.

    Raises:
        UsageError: It predicts one class alone: effects on the prediction cannot be compared then.
    """
    if loaded.spec.task != "classify":
        return samples
    calibration = _labelled(loaded, samples.calibration)
    spec, first = calibration.spec, calibration.labels[0]
    if spec.classes < 2:
        raise UsageError(
            f"{loaded.spec.name} predicts class {first} for all {spec.count} photos of "
            f"{spec.source}",
            fix="its weights are random: pass any photos in class folders with --data"
            if loaded.spec.is_random
            else "pass photos of more kinds, the right --checkpoint, --mean and --std",
        )
    validation = _labelled(loaded, samples.validation)
    return replace(samples, calibration=calibration, validation=validation)


def _labelled(loaded: LoadedModel, images: ImageSet) -> ImageSet:
    """With labels of its own, or these."""
    if images.spec.labelled:
        return images
    batches = normalised_batches(images, loaded.spec.preprocessing, batch=EVALUATION_BATCH)
    labels = own_labels(loaded.module, (batch for batch, _ in batches))
    update = {"mapping": WORDS, "classes": len(np.unique(labels))}
    return replace(images, labels=labels, spec=images.spec.model_copy(update=update))


def own_labels(module: nn.Module, images: Floats | Iterable[Floats]) -> Labels:
    """(N,) int64: what a classifier predicts of (N, C, H, W), or of such batches."""
    found: Labels = predict(torch_run(module), images, batch=EVALUATION_BATCH).argmax(1)
    return found
