"""The effect of each unit: intervene on it, run the rest of the network, compare the predictions.

A consumer is linear in the unit, so its output under an intervention (``interventions``) is

    z - W_n * (a_n - A a) + W_n * c

and only what follows the consumer has to run. A group with several consumers (residual streams,
squeeze-and-excitation) is cut at the first and masked again at each later one.

Source: C-SWAP (arXiv:2510.18636).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from torch import Tensor

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
    measured: np.ndarray | None = None
    """(U, N) bool, where the others are estimates; ``None``: everywhere."""

    @property
    def looked_at(self) -> int:
        """Units that were measured on one image at least."""
        return len(self.units) if self.measured is None else int(self.measured.any(1).sum())


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


def log_change(effect: np.ndarray) -> np.ndarray:
    """log(1 + xi) = log(p_masked / p), bounded where the true class all but vanishes."""
    logs: np.ndarray = np.log1p(np.maximum(effect, -1 + _LEAST_RATIO))
    return logs


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
    logs = log_change(effect)
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


def join(parts: Sequence[Effects]) -> Effects:
    """The same units on several parts of the images, in order."""
    true_class = np.concatenate([part.true_class for part in parts], 1)
    kl = np.concatenate([part.kl for part in parts], 1)
    return Effects(parts[0].group, parts[0].units, true_class, kl)
