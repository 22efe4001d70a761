"""An estimate of every unit's effect from a few backward passes, to second order in the logits.

An intervention changes what a consumer passes on by ``-W_n r_n``, with ``r_n`` what the unit's
value differs from its stand-in by, and the logits, to first order, by ``d = -J W_n r_n``. With
``F = diag(p) - p p'``, the Fisher information of the prediction,

    KL(p, p_masked)             ~  d' F d / 2
    log p_masked[y] - log p[y]  ~  (e_y - p)' d - d' F d / 2

``F`` is close to low rank: two of its eigenvectors hold nearly all of it where the prediction
hesitates between a few classes. For each of them one backward pass gives ``v' J W_n r_n`` of all
units of all layers at once.

This orders images and spares measurements (:mod:`causal.adaptive`); it decides about no unit. On
ResNet-56 it agrees with measured effects to a rank correlation of .99 (benchmarks/LOG.md). No
weight is changed by these gradients.

Source: the Fisher metric as the second-order term of the KL divergence: Amari, "Natural Gradient
Works Efficiently in Learning", Neural Computation 10 (1998).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx

from cswap_deploy.causal.interventions import Moments, StandIn
from cswap_deploy.causal.masked_forward import Cut
from cswap_deploy.causal.memory import Budget
from cswap_deploy.causal.scoring import not_finite
from cswap_deploy.network.graph import Env, Graph
from cswap_deploy.network.nodes import input_of
from cswap_deploy.network.units import Group, channel_dim

DIRECTIONS = 2
"""Eigenvectors of the Fisher information; more agree no better (benchmarks/LOG.md)."""
_EXACT_CLASSES = 64
"""Up to so many classes all eigenvectors are computed, and the first are taken."""
_SWEEPS = 6
_OVERSAMPLED = 4
_MOST_IMAGES = 64
"""Of one forward and its backward passes."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of some units of one group, on N images."""

    kl: np.ndarray
    """(U, N) float64, nats, >= 0."""
    log_true: np.ndarray
    """(U, N) float64, change of the log-probability of the true class."""


def guess(
    graph: Graph,
    wanted: Mapping[Group, Sequence[int]],
    *,
    images: Tensor,
    labels: Tensor,
    moments: Mapping[str, Moments],
    budget: Budget | None = None,
    tick: Callable[[int], None] | None = None,
) -> list[Estimate]:
    """Estimate the effects of units, by group; see :func:`estimate`."""
    cuts = [Cut(graph, group, units, moments) for group, units in wanted.items() if len(units)]
    budget = budget if budget is not None else Budget.of()
    return estimate(graph, cuts, images=images, labels=labels, budget=budget, tick=tick)


def estimate(
    graph: Graph,
    cuts: Sequence[Cut],
    *,
    images: Tensor,
    labels: Tensor,
    budget: Budget,
    tick: Callable[[int], None] | None = None,
) -> list[Estimate]:
    """Estimate both effects of all units of all cuts.

    Args:
        graph: The network as it stands.
        cuts: Where, and which units.
        images: (N, C, H, W).
        labels: (N,).
        budget: Of memory; what a backward pass needs must fit.
        tick: Called with the number of images finished.

    Raises:
        StageError: A prediction is not finite; names the layer.
    """
    readers = [
        {node: _Reader(graph, layer, units) for node, layer, units in cut.consumers} for cut in cuts
    ]
    nodes = frozenset().union(*readers)
    count = max(1, min(_MOST_IMAGES, budget.total // (2 * graph.bytes_of_all())))
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in cuts]
    for part, truth in zip(torch.split(images, count), torch.split(labels, count), strict=True):
        with torch.enable_grad():
            logits, inputs = _forward(graph, part, nodes)
        if not torch.isfinite(logits).all():
            raise not_finite(graph, part)
        residuals = [
            {node: reader.residuals(inputs[node].detach()) for node, reader in of.items()}
            for of in readers
        ]
        changes = []
        for weights in _directions(logits.detach(), truth):
            gradient = _gradient(logits, weights, inputs)
            changes.append(
                [
                    sum(reader.changes(gradient[node], rest[node]) for node, reader in of.items())
                    for of, rest in zip(readers, residuals, strict=True)
                ]
            )
        for at, (first, *fisher) in enumerate(zip(*changes, strict=True)):
            quadratic = sum((d.square() for d in fisher), start=torch.zeros(())) / 2
            found[at].append((quadratic, first - quadratic))
        if tick is not None:
            tick(len(part))
    return [
        Estimate(
            kl=torch.cat([kl for kl, _ in parts], 1).numpy(),
            log_true=torch.cat([true for _, true in parts], 1).numpy(),
        )
        for parts in found
    ]


class _Reader:
    """A consumer and what stands in for each unit that it reads."""

    def __init__(self, graph: Graph, layer: str, units: list[StandIn]) -> None:
        module = graph.module.get_submodule(layer)
        self._dim = channel_dim(module)
        self._index = torch.stack([s.index for s in units])
        self._weights: Tensor | None = None
        if units[0].weights is not None:
            self._weights = torch.cat([s.weights for s in units])  # type: ignore[misc]
        self._constant: Tensor | None = None
        if units[0].constant is not None:
            self._constant = torch.cat([s.constant for s in units])  # type: ignore[misc]

    def residuals(self, x: Tensor) -> Tensor:
        """(N, ...) input -> (N, positions, U * b): ``a_B - A a - c`` of every unit."""
        rows = self._rows(x)
        found = rows[..., self._index.flatten()]
        if self._weights is not None:
            found = found - rows @ self._weights.T
        if self._constant is not None:
            found = found - self._constant
        return found

    def changes(self, gradient: Tensor, residuals: Tensor) -> Tensor:
        """(U, N): the derivative along ``gradient``, that of the input, of each unit's change."""
        rows = self._rows(gradient)[..., self._index.flatten()]
        each = torch.einsum("npu,npu->un", rows, residuals).double()
        return -each.view(*self._index.shape, -1).sum(1)

    def _rows(self, x: Tensor) -> Tensor:
        """(N, positions, I)."""
        rows = x.movedim(self._dim, -1)
        return rows.reshape(len(rows), -1, rows.shape[-1])


def _forward(
    graph: Graph, images: Tensor, readers: frozenset[fx.Node]
) -> tuple[Tensor, dict[fx.Node, Tensor]]:
    """Logits, and the input of each consumer as a tensor that only the consumer reads."""
    inputs: dict[fx.Node, Tensor] = {}
    restore: tuple[fx.Node, Tensor] | None = None
    env: Env = {}
    for node, env in graph.step(images):
        if restore is not None:
            source, value = restore
            if source in env:
                env[source] = value
            restore = None
        if node in readers:
            source = input_of(node)
            value = graph.value(source, env)
            own = value.view_as(value) if value.requires_grad else value.detach()
            inputs[node] = env[source] = own if own.requires_grad else own.requires_grad_()
            restore = source, value
    logits: Tensor = env[graph.output]
    return logits, inputs


def _gradient(
    logits: Tensor, weights: Tensor, inputs: Mapping[fx.Node, Tensor]
) -> dict[fx.Node, Tensor]:
    """The gradient of ``weights . logits`` by each consumer's input, through that consumer only."""
    found = torch.autograd.grad(
        (logits * weights.to(logits.dtype)).sum(), list(inputs.values()), retain_graph=True
    )
    return dict(zip(inputs, found, strict=True))


def _directions(logits: Tensor, labels: Tensor) -> list[Tensor]:
    """(N, K) each: the gradient of the true class's log-probability, then of the Fisher metric.

    The latter are eigenvectors of ``diag(p) - p p'``, the largest first, times the root of their
    eigenvalue.
    """
    p = logits.double().softmax(-1)
    true = -p
    true[torch.arange(len(labels)), labels] += 1
    wanted = min(DIRECTIONS, p.shape[1] - 1)
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

    generator = torch.Generator().manual_seed(0)
    start = torch.randn(
        p.shape[1], wanted + _OVERSAMPLED, generator=generator, dtype=p.dtype
    ).expand(len(p), -1, -1)
    q = torch.linalg.qr(times(start)).Q
    for _ in range(_SWEEPS):
        q = torch.linalg.qr(times(q)).Q
    values, rotation = torch.linalg.eigh(q.mT @ times(q))
    return values, q @ rotation
