"""What networks predict on the validation images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from cswap_deploy.data import ImageSet, normalised_batches
from cswap_deploy.measure.accuracy import accuracy_change, predict
from cswap_deploy.measure.parity import Run
from cswap_deploy.progress import Progress
from cswap_deploy.records.measurements import AccuracyChange
from cswap_deploy.records.model import Preprocessing
from cswap_deploy.runtime.session import Floats

Classes = npt.NDArray[np.integer[Any]]
EVALUATION_BATCH = 64
"""Largest batch (samples) that runs at once."""


@dataclass(frozen=True, slots=True)
class Predictions:
    """Predicted class of every validation image, (N,), in PyTorch."""

    dense: Classes
    pruned: Classes


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Evaluates networks on one set of images."""

    images: ImageSet
    preprocessing: Preprocessing
    progress: Progress

    def classify(self, network: Run, *, what: str, largest: int = EVALUATION_BATCH) -> Classes:
        """Predicted class of every image, (N,).

        The network takes up to ``largest`` images at once; ``what`` names it on the screen.

        Raises:
            StageError: A logit is not finite.
        """
        self.progress.begin(f"evaluating {what}", len(self.images.labels))

        def batches() -> Iterator[Floats]:
            size = EVALUATION_BATCH
            for batch, _ in normalised_batches(self.images, self.preprocessing, batch=size):
                yield batch
                self.progress.advance(len(batch))

        logits = predict(network, batches(), batch=min(EVALUATION_BATCH, largest))
        self.progress.end()
        classes: Classes = logits.argmax(1)
        return classes

    def change(self, before: Classes, after: Classes) -> AccuracyChange:
        """From one network's predictions to another's."""
        return accuracy_change(before, after, self.images.labels)

    def networks(self, dense: nn.Module, pruned: nn.Module, *, largest: int) -> Predictions:
        """Both networks in PyTorch; see :meth:`classify`."""
        return Predictions(
            self.classify(torch_run(dense), what="the dense network", largest=largest),
            self.classify(torch_run(pruned), what="the pruned network", largest=largest),
        )


def torch_run(module: nn.Module) -> Run:
    """A network in PyTorch as a function on arrays."""

    def run(images: Floats) -> Floats:
        with torch.inference_mode():
            logits: Floats = module(torch.from_numpy(images)).numpy()
        return logits

    return run
