"""What effects are measured on: a network as it stands, images, and moments of its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cswap_deploy.causal.interventions import Moments
from cswap_deploy.causal.memory import Budget
from cswap_deploy.causal.tasks import OutputEffect
from cswap_deploy.config import Task
from cswap_deploy.errors import StageError
from cswap_deploy.network.graph import Graph
from cswap_deploy.network.placing import placed


@dataclass(frozen=True, slots=True)
class Experiment:
    """One network and one set of images to intervene on."""

    graph: Graph
    """The network as it stands."""
    images: Tensor
    """(N, C, H, W) float32, in the host's memory."""
    labels: Tensor
    """(N,) int64, the true classes; without meaning where the task has none."""
    moments: Mapping[str, Moments] = field(default_factory=dict)
    """Layer -> moments of its inputs; empty for the zero intervention."""
    budget: Budget = field(default_factory=Budget.of)
    task: Task = "classify"
    """What the network's outputs are."""

    @property
    def effect(self) -> OutputEffect:
        """How far outputs move."""
        return OutputEffect(self.task, self.graph.measured)


def independent(graph: Graph, images: Tensor) -> bool:
    """Whether an image's prediction does not depend on the others of its batch.

    Networks that normalise over the batch, for example, cannot run many variants in one batch.
    ``images`` are (N, C, H, W), real ones, N >= 4.
    """
    few = placed(images[:4], graph.device)
    with torch.inference_mode():
        together = graph.run(few)[0]
        apart = torch.cat([graph.run(part)[0] for part in torch.split(few, 2)])
    sizes = [output.elements for output in graph.measured]
    pairs = zip(torch.split(together, sizes, 1), torch.split(apart, sizes, 1), strict=True)
    return all(torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max())) for a, b in pairs)


def not_finite(graph: Graph, images: Tensor) -> StageError:
    """The error for predictions that are not finite; names the first layer whose output is not."""
    layer, found = graph.first_not_finite(images)
    return StageError(
        f"the network's output is not finite: the first to go wrong is {layer} ({found})",
        fix="check the weights and the preprocessing (--mean, --std) of this model",
    )
