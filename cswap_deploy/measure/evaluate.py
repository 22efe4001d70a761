"""What networks predict on the validation images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from cswap_deploy.config import Task
from cswap_deploy.data import ImageSet, normalised_batches
from cswap_deploy.measure.accuracy import Predicted, accuracy_change, predict, predicted
from cswap_deploy.measure.metric import measure_metric
from cswap_deploy.measure.outputs import OutputRun, output_change
from cswap_deploy.measure.parity import Run
from cswap_deploy.models.outputs import named_outputs
from cswap_deploy.progress import Progress
from cswap_deploy.records.measurements import AccuracyChange, MetricChange, OutputChange
from cswap_deploy.records.model import Preprocessing
from cswap_deploy.runtime.probabilities import OutputKind
from cswap_deploy.runtime.session import Floats, Outputs

EVALUATION_BATCH = 64
"""Largest batch (samples) that runs at once."""


@dataclass(frozen=True, slots=True)
class Predictions:
    """What both networks predict in PyTorch."""

    dense: Predicted
    pruned: Predicted


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Evaluates networks on one set of images."""

    images: ImageSet
    preprocessing: Preprocessing
    progress: Progress
    kind: OutputKind = "logits"
    """What classifiers give."""

    @property
    def labelled(self) -> bool:
        """Whether the images have labels of their own, not those of the dense network."""
        return self.images.spec.labelled

    def classify(self, network: Run, *, what: str, largest: int = EVALUATION_BATCH) -> Predicted:
        """Predicted class of every image.

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
        return predicted(logits, self.kind)

    def outputs(self, *networks: OutputRun, what: str, largest: int) -> Iterator[list[Outputs]]:
        """What networks return for the same images, a batch of up to ``largest`` at a time.

        ``what`` names them on the screen.
        """
        self.progress.begin(f"evaluating {what}", len(self.images.labels))
        size = min(EVALUATION_BATCH, largest)
        for batch, _ in normalised_batches(self.images, self.preprocessing, batch=size):
            images = np.ascontiguousarray(batch, dtype=np.float32)
            yield [network(images) for network in networks]
            self.progress.advance(len(images))
        self.progress.end()

    def output_change(
        self, before: OutputRun, after: OutputRun, task: Task, *, what: str, largest: int
    ) -> OutputChange:
        """From one network's outputs to another's; see :func:`measure.outputs.output_change`."""
        pairs = self.outputs(before, after, what=what, largest=largest)
        return output_change(((one, other) for one, other in pairs), task)

    def metric(
        self, name: str, dense: OutputRun, pruned: OutputRun, *, largest: int
    ) -> MetricChange:
        """The user's own figure of both networks; see :func:`measure.metric.measure_metric`."""
        labels = self.images.labels if self.images.spec.labelled else self.images.targets

        def of(network: OutputRun, what: str) -> float:
            batches = self.outputs(network, what=f"{what} by {name}", largest=largest)
            count = len(self.images.labels)
            only = (outputs for (outputs,) in batches)
            return measure_metric(name, only, labels, images=count, what=what)

        return MetricChange(
            name=name,
            dense=of(dense, "the dense network"),
            pruned=of(pruned, "the pruned network"),
        )

    def change(self, before: Predicted, after: Predicted) -> AccuracyChange:
        """From one network's predictions to another's."""
        return accuracy_change(before, after, self.images.labels)

    def networks(self, dense: nn.Module, pruned: nn.Module, *, largest: int) -> Predictions:
        """Both networks in PyTorch; see :meth:`classify`."""
        return Predictions(
            self.classify(torch_run(dense), what="the dense network", largest=largest),
            self.classify(torch_run(pruned), what="the pruned network", largest=largest),
        )


def torch_run(module: nn.Module) -> Run:
    """A classifier in PyTorch as a function on arrays."""

    def run(images: Floats) -> Floats:
        with torch.inference_mode():
            (logits,) = named_outputs(module(torch.from_numpy(images))).values()
        found: Floats = logits.numpy()
        return found

    return run
