"""What pruning changed in PyTorch: accuracy, or outputs, and the user's own figure."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import nn

from cswap_deploy.measure.accuracy import (
    PREDICTIONS,
    agreement,
    read_predictions,
    write_predictions,
)
from cswap_deploy.measure.engine import OutputReference
from cswap_deploy.measure.evaluate import Evaluation, Predictions
from cswap_deploy.measure.outputs import torch_outputs, worst_words
from cswap_deploy.records.amounts import percent
from cswap_deploy.records.engine import TensorSpec
from cswap_deploy.records.graphs import Score
from cswap_deploy.records.measurements import Agreement
from cswap_deploy.records.model import ModelSpec


def score_networks(
    evaluation: Evaluation, dense: nn.Module, pruned: nn.Module, *, spec: ModelSpec,
    metric: str | None, largest: int, folder: Path,
) -> Score:  # fmt: skip
    """Compare both networks on the validation images.

    Args:
        evaluation: The images.
        dense: The network.
        pruned: What became of it.
        spec: Gives the task.
        metric: ``package.module:function`` of the user's, or none.
        largest: Images that run at once, at most.
        folder: Is left the predicted classes of a classifier, for :func:`reference_of`.

    Raises:
        StageError: A value is not finite.
        UsageError: The user's function fails.
    """
    before, after = (torch_outputs(module, spec.outputs) for module in (dense, pruned))
    if spec.task == "classify":
        found = evaluation.networks(dense, pruned, largest=largest)
        both = {"dense": found.dense, "pruned": found.pruned}
        write_predictions(folder / PREDICTIONS, both, whole=True)
        score = Score(agreement=agreement(found.dense, found.pruned))
        if evaluation.labelled:
            change = evaluation.change(found.dense, found.pruned)
            score = score.model_copy(update={"accuracy": change})
    else:
        what = "the dense and the pruned network"
        outputs = evaluation.output_change(before, after, spec.task, what=what, largest=largest)
        score = Score(outputs=outputs)
    if metric is None:
        return score
    figures = evaluation.metric(metric, before, after, largest=largest)
    return score.model_copy(update={"metric": figures})


def reference_of(
    folder: Path, dense: nn.Module, spec: ModelSpec, outputs: Iterable[TensorSpec], *, batch: str
) -> Predictions | OutputReference:
    """What engines are compared with.

    Args:
        folder: That :func:`score_networks` wrote to.
        dense: The network.
        spec: Gives the task.
        outputs: Of the graph.
        batch: Name of the dimension that counts images.
    """
    if spec.task == "classify":
        found, _ = read_predictions(folder / PREDICTIONS)
        return Predictions(found["dense"], found["pruned"])
    rows = frozenset(tensor.name for tensor in outputs if tensor.shape[:1] == (batch,))
    return OutputReference(dense, spec, rows)


def agreement_words(found: Agreement) -> str:
    """The same where there are no labels."""
    kl = "" if found.kl is None else f", KL {found.kl:.3g} nats"
    return f"same class as the dense network on {percent(found.share, 2)} of the images{kl}"


def summary(score: Score) -> str:
    """One line for the screen."""
    told = []
    if score.accuracy is not None:
        dense, smaller = (x.top1 for x in (score.accuracy.dense, score.accuracy.pruned))
        told.append(f"top-1 {percent(dense, 2)} -> {percent(smaller, 2)}")
    elif score.agreement is not None:
        told.append(agreement_words(score.agreement))
    if score.outputs is not None:
        told.append(worst_words(score.outputs))
    if score.metric is not None:
        told.append(f"{score.metric.name} {score.metric.dense:.4g} -> {score.metric.pruned:.4g}")
    return "; ".join(told)
