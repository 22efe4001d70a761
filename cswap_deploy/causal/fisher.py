"""An estimate of every unit's effect from a few backward passes, to second order in the logits.

An intervention changes a consumer's output by ``-W_n r_n``, where ``r_n`` is the unit's value less
its ablation value, and the logits, to first order, by ``d = -J W_n r_n``. With
``F = diag(p) - p p'``, the Fisher information of the prediction,

    KL(p, p_masked)             ~  d' F d / 2
    log p_masked[y] - log p[y]  ~  (e_y - p)' d - d' F d / 2

``F`` is close to low rank: two of its eigenvectors hold nearly all of it where the prediction
hesitates between a few classes. For each of them one backward pass gives ``v' J W_n r_n`` of all
units of all layers at once. Outputs that are no classes have another F (:mod:`causal.tasks`), and
random directions through its root.

This orders images and spares measurements (:mod:`causal.adaptive`); it decides about no unit. On
ResNet-56 it agrees with measured effects to a rank correlation of .99 (benchmarks/LOG.md). No
weight is changed by these gradients.

Source: the Fisher metric as the second-order term of the KL divergence: Amari, "Natural Gradient
Works Efficiently in Learning", Neural Computation 10 (1998).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx

from cswap_deploy.causal.arithmetic import ieee_float32
from cswap_deploy.causal.experiment import Experiment, not_finite
from cswap_deploy.causal.interventions import AblationValue, stack
from cswap_deploy.causal.masked_forward import MaskedForward
from cswap_deploy.network.graph import Env, Graph
from cswap_deploy.network.nodes import batch_dim, bytes_of, input_of
from cswap_deploy.network.placing import HOST, placed
from cswap_deploy.network.units import Group, channel_dim

DIRECTIONS = 2
"""Eigenvectors of the Fisher information; more agree no better (benchmarks/LOG.md)."""
_EXACT_CLASSES = 64
"""Up to so many classes all eigenvectors are computed, and the first are taken."""
_SWEEPS = 6
_OVERSAMPLED = 4
_MOST_IMAGES = 64
"""Images of one forward and its backward passes."""


@dataclass(frozen=True, slots=True)
class FisherEstimate:
    """Estimated effects of U units of one group, on N images."""

    kl: np.ndarray
    """(U, N) float64, nats, >= 0."""
    log_true: np.ndarray
    """(U, N) float64, change of the log-probability of the true class; zero without classes."""


@ieee_float32()
def estimate_effects(
    experiment: Experiment,
    wanted: Mapping[Group, Sequence[int]],
    *,
    directions: int = DIRECTIONS,
    tick: Callable[[int], None] | None = None,
) -> list[FisherEstimate]:
    """Estimate both effects of units.

    Args:
        experiment: What to estimate on.
        wanted: Group -> units by index; groups without units are left out.
        directions: Eigenvectors of the Fisher information.
        tick: Called with the number of images finished.

    Raises:
        StageError: A prediction is not finite; names the layer.
    """
    graph = experiment.graph
    forwards = [
        MaskedForward(graph, group, units, experiment.moments)
        for group, units in wanted.items()
        if len(units)
    ]
    readers = [
        {node: _Reader(graph, node, layer, values) for node, layer, values in forward.consumers}
        for forward in forwards
    ]
    kept = sum(map(bytes_of, graph.nodes))  # by a backward pass, about
    count = max(1, min(_MOST_IMAGES, experiment.budget.total // (2 * kept)))
    if any(batch_dim(node) is None for of in readers for node in of):
        count = 1  # what all images share shows no image's own gradient
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in forwards]
    parts = (torch.split(values, count) for values in (experiment.images, experiment.labels))
    for images, labels in zip(*parts, strict=True):
        here, truth = placed(images, graph.device), placed(labels, graph.device)
        part = _estimate_part(experiment, readers, here, truth, directions)
        for at, effects in enumerate(part):
            found[at].append(effects)
        if tick is not None:
            tick(len(images))
    return [
        FisherEstimate(
            kl=placed(torch.cat([kl for kl, _ in effects], 1), HOST).numpy(),
            log_true=placed(torch.cat([true for _, true in effects], 1), HOST).numpy(),
        )
        for effects in found
    ]


def _estimate_part(
    experiment: Experiment,
    readers: Sequence[Mapping[fx.Node, _Reader]],
    images: Tensor,
    labels: Tensor,
    directions: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each group the divergence and the change of the true class's log-probability."""
    graph, classes = experiment.graph, experiment.task == "classify"
    with torch.enable_grad():
        logits, inputs = _forward(graph, images, frozenset().union(*readers))
    if not torch.isfinite(logits).all():
        raise not_finite(graph, images)
    residuals = [
        {node: reader.residuals(inputs[node].detach(), len(images)) for node, reader in of.items()}
        for of in readers
    ]
    changes = []
    wanted = (
        fisher_directions(logits.detach(), labels, directions)
        if classes
        else experiment.effect.directions(logits.detach())
    )
    for weights in wanted:
        gradient = _gradient(logits, weights, inputs)
        changes.append(
            [
                sum(reader.changes(gradient[node], rest[node]) for node, reader in of.items())
                for of, rest in zip(readers, residuals, strict=True)
            ]
        )
    for first, *fisher in zip(*changes, strict=True):
        if not classes:
            kl = sum((d.square() for d in fisher), start=first.square()) / 2
            yield kl, torch.zeros_like(kl)
            continue
        kl = sum((d.square() for d in fisher), start=torch.zeros_like(first)) / 2
        yield kl, first - kl


class _Reader:
    """A consumer, and the ablation value of each unit that it reads."""

    def __init__(
        self, graph: Graph, node: fx.Node, layer: str, values: list[AblationValue]
    ) -> None:
        self._dim = channel_dim(graph.layer(layer))
        self._batch = batch_dim(node) or 0
        self._values = stack(values)

    def residuals(self, x: Tensor, images: int) -> Tensor:
        """(N, ...) input -> (N, positions, I): ``a_B - A a - c`` of every unit, zero elsewhere."""
        rows = self._rows(x, images)
        values, index = self._values, self._values.index.flatten()
        found = rows[..., index]
        if values.weights is not None:
            found = found - rows @ values.weights.T
        if values.constant is not None:
            found = found - values.constant
        whole = torch.zeros_like(rows)
        whole[..., index] = found
        return whole

    def changes(self, gradient: Tensor, residuals: Tensor) -> Tensor:
        """(U, N): the derivative along ``gradient``, that of the input, of each unit's change."""
        index = self._values.index
        each = (self._rows(gradient, len(residuals)) * residuals).sum(1).double()
        return -each[:, index.flatten()].T.reshape(*index.shape, -1).sum(1)

    def _rows(self, x: Tensor, images: int) -> Tensor:
        """(N, positions, I)."""
        rows = x.movedim((self._batch, self._dim), (0, -1))
        return rows.reshape(images, -1, rows.shape[-1])


def _forward(
    graph: Graph, images: Tensor, readers: frozenset[fx.Node]
) -> tuple[Tensor, dict[fx.Node, Tensor]]:
    """Outputs, and the input of each consumer as a tensor that only the consumer reads."""
    inputs: dict[fx.Node, Tensor] = {}
    restore: tuple[fx.Node, Tensor] | None = None
    env: Env = {}
    for node, env in graph.step(images):
        if restore is not None and restore[0] in env:
            env[restore[0]] = restore[1]
        restore = None
        if node in readers:
            source = input_of(node)
            value = graph.value(source, env)
            own = value.view_as(value) if value.requires_grad else value.detach()
            inputs[node] = env[source] = own if own.requires_grad else own.requires_grad_()
            restore = source, value
    return graph.rows(env), inputs


def _gradient(
    logits: Tensor, weights: Tensor, inputs: Mapping[fx.Node, Tensor]
) -> dict[fx.Node, Tensor]:
    """The gradient of ``weights . logits`` by each consumer's input, through that consumer only."""
    found = torch.autograd.grad(
        (logits * weights.to(logits.dtype)).sum(), list(inputs.values()), retain_graph=True,
        # Of what leads to outputs that are not measured, or lies before a rounding or an index.
        materialize_grads=True,
    )  # fmt: skip
    return dict(zip(inputs, found, strict=True))


def fisher_directions(logits: Tensor, labels: Tensor, count: int) -> list[Tensor]:
    """(N, K) each: the gradient of the true class's log-probability, then of the Fisher metric.

    The latter are eigenvectors of ``diag(p) - p p'``, the largest first, times the root of their
    eigenvalue.
    """
    p = logits.double().softmax(-1)
    true = -p
    true[torch.arange(len(labels), device=p.device), labels] += 1
    wanted = min(count, p.shape[1] - 1)
    if p.shape[1] <= _EXACT_CLASSES:
        fisher = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        values, vectors = torch.linalg.eigh(fisher)
    else:
        values, vectors = _largest(p, wanted)
    roots = values.clamp_min(0).sqrt()
    return [true, *(vectors[:, :, -k] * roots[:, -k, None] for k in range(1, wanted + 1))]


def _largest(p: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues of ``diag(p) - p p'``, ascending, by subspace iteration.

    Source:
        Halko, Martinsson & Tropp 2011, "Finding structure with randomness" (arXiv:0909.4061).
    """

    def times(q: Tensor) -> Tensor:
        return p[:, :, None] * q - p[:, :, None] * (p[:, None, :] @ q)

    generator, size = torch.Generator().manual_seed(0), (p.shape[1], wanted + _OVERSAMPLED)
    drawn = torch.randn(size, generator=generator, dtype=p.dtype)
    q = placed(drawn, p.device).expand(len(p), -1, -1)
    for _ in range(1 + _SWEEPS):
        q = torch.linalg.qr(times(q)).Q
    values, rotation = torch.linalg.eigh(q.mT @ times(q))
    return values, q @ rotation
