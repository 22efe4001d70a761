"""The effect of each unit: intervene on it, run the rest of the network, compare the predictions.

A consumer is linear in the unit, so its output under an intervention (``interventions``) is

    z - W_n * (a_n - A a) + W_n * c

and only what follows the consumer has to run. A group with several consumers (residual streams,
squeeze-and-excitation) is cut at the first and masked again at each later one.

Source: C-SWAP (arXiv:2510.18636).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from cswap_deploy.causal.interventions import (
    Moments,
    StandIn,
    constant_output,
    contribution,
    mix,
    stand_ins,
)
from cswap_deploy.causal.partition import Env, Graph, elements
from cswap_deploy.causal.units import Consumer, Group, channel_dim
from cswap_deploy.errors import StageError

_LEAST_RATIO = 1e-12
"""A true class that all but vanishes must not outweigh everything else."""


@dataclass(frozen=True, slots=True)
class Effects:
    """Effects of some units of one group, on N images."""

    group: str
    units: np.ndarray
    """(U,) int64."""
    true_class: np.ndarray
    """(U, N) float64, relative change of the true class's probability."""
    kl: np.ndarray
    """(U, N) float64, KL divergence from the network's output to the masked one's (nats)."""


def relative_effect(p_masked: Tensor, p: Tensor) -> Tensor:
    """Causal effect of each unit on the true class's probability.

        xi[u, x] = (p_masked[u, x] - p[x]) / p[x]

    Below zero the unit helps the prediction (removing it hurts); above zero it harms it.

    Args:
        p_masked: (U, N) float64, probability of image n's true class with unit u intervened on.
        p: (N,) float64, the same without intervention, > 0.

    Returns:
        (U, N) float64.

    Source:
        C-SWAP (arXiv:2510.18636), the global causal effect before averaging over images.
    """
    return (p_masked - p) / p


def likely_harm(effect: np.ndarray) -> np.ndarray:
    """From a unit's effects on single images to what removing it costs among many.

        harm[u] = -mean_x l[u, x] + std_x l[u, x] / 2,    l = log(1 + xi) = log(p_masked / p)

    The mean alone calls units harmless, even helpful, that help some images as much as they hurt
    others; gone together they break the network. The mean size of the effect cannot tell help from
    harm once the network is damaged. ResNet-20, nothing made up for, 30 % of the channels gone:
    top-1 .35 by the mean, .25 by the mean size, .75 by this (benchmarks/LOG.md).

    Args:
        effect: (U, N), of :func:`relative_effect`.

    Returns:
        (U,) nats; the smallest goes first.
    """
    logs = np.log1p(np.maximum(effect, -1 + _LEAST_RATIO))
    harm: np.ndarray = logs.std(1) / 2 - logs.mean(1)
    return harm


def kl_divergence(logits_masked: Tensor, logits: Tensor) -> Tensor:
    """How far an intervention moves the whole output distribution; needs no labels.

        kl[u, x] = sum_k p[x, k] * (log p[x, k] - log p_masked[u, x, k])

    Args:
        logits_masked: (U, N, K) float64.
        logits: (N, K) float64.

    Returns:
        (U, N) float64, nats, >= 0.
    """
    log_p = F.log_softmax(logits, -1)
    log_q = F.log_softmax(logits_masked, -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0.0)


def measure_group(
    graph: Graph,
    group: Group,
    units: Sequence[int],
    *,
    images: Tensor,
    labels: Tensor,
    moments: Mapping[str, Moments],
    variant_bytes: int = 32 << 20,
    tick: Callable[[int], None] | None = None,
) -> Effects:
    """Measure, exactly, what each unit of a group does to the prediction.

    Args:
        graph: The network as it stands.
        group: Where the units are.
        units: Which of them, by index.
        images: (N, C, H, W) float32.
        labels: (N,) int64, the true classes.
        moments: Of the consumers' inputs; empty for the zero intervention.
        variant_bytes: Variants are batched until the largest activation after the cut has this
            many bytes; larger does not run faster, and costs memory.
        tick: Called with the number of units finished, for progress.

    Returns:
        Effects in the order of ``units``.

    Raises:
        StageError: A prediction is not finite; names the group.
    """
    consumers = [
        (node, entry.layer, stand_ins(moments.get(entry.layer), [entry.indices[u] for u in units]))
        for entry in group.consumers
        for node in graph.readers(entry.layer)
    ]
    suffix = graph.suffix(node for node, _, _ in consumers)
    inside = set(suffix.nodes)
    first = [c for c in consumers if _input_of(c[0]) not in inside]
    keep = {*suffix.cached, *(c[0] for c in first), *(_input_of(c[0]) for c in first)}
    per_image = 4 * max((elements(n) for n in suffix.nodes), default=1)
    image_chunk = max(1, min(len(images), variant_bytes // per_image))
    true_class, kl = [], []
    with torch.inference_mode():
        for part, truth in zip(
            torch.split(images, image_chunk), torch.split(labels, image_chunk), strict=True
        ):
            logits, kept = graph.run(part, keep=keep)
            cached = {n: kept[n] for n in suffix.cached}
            step = max(1, variant_bytes // (per_image * len(part)))
            rows_true, rows_kl = [], []
            for at in range(0, len(units), step):
                chosen = range(at, min(at + step, len(units)))
                replace = {
                    node: _Intervention(
                        graph,
                        layer,
                        [all_of[v] for v in chosen],
                        kept.get(node),
                        kept.get(_input_of(node)),
                        cut=_input_of(node) not in inside,
                    )
                    for node, layer, all_of in consumers
                    if node in inside
                }
                masked = graph.run_suffix(
                    suffix, cached, images=len(part), variants=len(chosen), replace=replace
                )
                xi, divergence = _compare(masked, logits, truth, len(chosen), group.name)
                rows_true.append(xi)
                rows_kl.append(divergence)
                if tick is not None:
                    tick(len(chosen) * len(part))
            true_class.append(torch.cat(rows_true))
            kl.append(torch.cat(rows_kl))
    return Effects(
        group=group.name,
        units=np.asarray(units, dtype=np.int64),
        true_class=torch.cat(true_class, 1).numpy(),
        kl=torch.cat(kl, 1).numpy(),
    )


class _Intervention:
    """A consumer's output for several variants, one unit intervened on in each."""

    def __init__(
        self,
        graph: Graph,
        layer: str,
        stand_ins: list[StandIn],
        output: Tensor | None,
        input_: Tensor | None,
        *,
        cut: bool,
    ) -> None:
        self.graph, self.stand_ins = graph, stand_ins
        self.layer: Consumer = graph.module.get_submodule(layer)  # type: ignore[assignment]
        self.output, self.input = output, input_
        self.cut = cut

    def __call__(self, node: fx.Node, env: Env) -> Tensor:
        out = self._subtract(node) if self.cut else self._replace(node, env)
        shape = [1] * out.ndim
        shape[channel_dim(self.layer)] = -1
        for part, stand_in in zip(out.chunk(len(self.stand_ins)), self.stand_ins, strict=True):
            constant = constant_output(self.layer, stand_in)
            if constant is not None:
                part.add_(constant.view(shape))
        return out

    def _subtract(self, node: fx.Node) -> Tensor:
        """(V * N, ...): z - W_n * (a_n - A a), from the cached input and output."""
        assert self.output is not None
        assert self.input is not None
        out = self.output.repeat([len(self.stand_ins)] + [1] * (self.output.ndim - 1))
        if self.output.ndim == 4 and self.output.is_contiguous(memory_format=torch.channels_last):
            out = out.contiguous(memory_format=torch.channels_last)
        for part, stand_in in zip(out.chunk(len(self.stand_ins)), self.stand_ins, strict=True):
            part.sub_(contribution(self.layer, node, self.input, stand_in))
        return out

    def _replace(self, node: fx.Node, env: Env) -> Tensor:
        """(V * N, ...): the consumer run on inputs of which each variant has its own replaced."""
        source = _input_of(node)
        x: Tensor = self.graph.value(source, env).clone()
        dim = channel_dim(self.layer)
        for part, stand_in in zip(x.chunk(len(self.stand_ins)), self.stand_ins, strict=True):
            new = 0.0 if stand_in.weights is None else mix(stand_in.weights, part, dim)
            rows = part.movedim(dim, 1)
            rows[:, stand_in.index] = new if isinstance(new, float) else new.movedim(dim, 1)
        out: Tensor = self.graph.execute(node, {**env, source: x}, batch=len(x))
        return out


def _compare(
    masked: Tensor, logits: Tensor, labels: Tensor, variants: int, group: str
) -> tuple[Tensor, Tensor]:
    """Both effects, (V, N) each, computed in float64."""
    base = logits.double()
    changed = masked.double().view(variants, len(logits), -1)
    if not torch.isfinite(changed).all() or not torch.isfinite(base).all():
        raise StageError(
            f"the network's output is not finite while the units of {group} are measured",
            fix="check the weights and the preprocessing (--mean, --std) of this model",
        )
    rows = torch.arange(len(labels))
    p = F.softmax(base, -1)[rows, labels].clamp_min(torch.finfo(torch.float64).tiny)
    p_masked = F.softmax(changed, -1)[:, rows, labels]
    return relative_effect(p_masked, p), kl_divergence(changed, base)


def _input_of(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source
