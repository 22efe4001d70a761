"""How far an intervention moves a network's outputs, by what the outputs are.

All outputs of one image are one row (``Graph.rows``). The effect of a unit on an image is

    classify   KL(p, p*) of the classes; beside it the true class's relative change
    binary     sum_k KL of the k-th yes or no,
               p_k log(p_k / p*_k) + (1 - p_k) log((1 - p_k) / (1 - p*_k)),  p = sigmoid(o),
               or p = o where the network ends in a sigmoid
    dense      sum over outputs of the mean over pixels of KL(p, p*) of the channels, which are
               classes; of outputs that are no such maps as below
    others     sum over outputs of ||o* - o||^2 / ||o||^2, the relative squared change

with o the output as it is and o* the masked one. Each output is normalised by its own energy, so
none dominates. An output that was all zero counts 1 where it changes.

Each effect is d' F d / 2 to second order in the change d = o* - o, with F the Fisher information of
the output's distribution:

    classify   diag(p) - p p'
    binary     diag(p (1 - p))
    dense      diag(p) - p p' at each of P pixels, over P
    others     diag(2 / ||o||^2), that of a Gaussian of variance ||o||^2 / 2

Source: Amari, "Natural Gradient Works Efficiently in Learning", Neural Computation 10 (1998).
Random signs as directions: Hutchinson, "A Stochastic Estimator of the Trace of the Influence
Matrix", Communications in Statistics 19 (1990).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cswap_deploy.causal.effects import kl_divergence
from cswap_deploy.config import Task
from cswap_deploy.network.outputs import Output
from cswap_deploy.network.placing import placed

_LEAST = 1e-7
"""Probabilities are kept so far from 0 and 1."""
PROBES = 4
"""Random directions of each image; a unit's mean over many images is much closer."""


@dataclass(frozen=True, slots=True)
class OutputEffect:
    """The effect on the outputs of one network."""

    task: Task
    outputs: tuple[Output, ...]

    def divergence(self, masked: Tensor, base: Tensor) -> Tensor:
        """The effect on each image of each variant; see the module's docstring.

        Args:
            masked: (V, N, K) float64, rows of all outputs.
            base: (N, K) float64, the same without intervention.

        Returns:
            (V, N) float64, >= 0; nats, or without a unit.
        """
        if self.task == "classify":
            return kl_divergence(masked, base)
        # One variant at a time: rows of maps are long.
        return torch.stack([self._change(variant, base) for variant in masked])

    def directions(self, base: Tensor, *, probes: int = PROBES) -> list[Tensor]:
        """(N, K) each: vectors v with sum (v' d)^2 = d' F d, exactly or on average.

        Random signs through the root of F; single coordinates where there are so few.

        Args:
            base: (N, K) rows.
            probes: How many at most.
        """
        base = base.double()
        count, size = base.shape
        if size <= probes:
            drawn = torch.eye(size, dtype=base.dtype)[:, None].expand(size, count, size)
        else:
            generator = torch.Generator().manual_seed(0)
            signs = torch.randint(0, 2, (probes, count, size), generator=generator)
            drawn = (2.0 * signs - 1.0).to(base.dtype) / probes**0.5
        return [
            torch.cat([self._root(o, part, value) for o, value, part in self._split(base, one)], 1)
            for one in placed(drawn, base.device)
        ]

    def _change(self, masked: Tensor, base: Tensor) -> Tensor:
        """(N, K), (N, K) -> (N,)."""
        parts = [self._one(o, before, after) for o, before, after in self._split(base, masked)]
        return torch.stack(parts).sum(0)

    def _one(self, output: Output, base: Tensor, masked: Tensor) -> Tensor:
        """The effect on one output; (N, k), (N, k) -> (N,)."""
        if self.task == "binary":
            if output.probabilities:
                base, masked = (x.logit(_LEAST) for x in (base, masked))
            return binary_divergence(masked, base)
        if self._is_map(output):
            before, after = (x.view(len(x), output.shape[0], -1).mT for x in (base, masked))
            return kl_divergence(after, before).mean(1)
        return relative_squared_change(masked, base)

    def _root(self, output: Output, drawn: Tensor, base: Tensor) -> Tensor:
        """The root of F times vectors; (N, k), (N, k) -> (N, k)."""
        if self.task == "binary" and output.probabilities:
            # of p itself, F is 1 / (p (1 - p))
            return drawn / (base * (1 - base)).clamp_min(_LEAST).sqrt()
        if self.task == "binary":
            return drawn * (F.logsigmoid(base) + F.logsigmoid(-base)).div(2).exp()
        if self._is_map(output):
            shape = (len(base), output.shape[0], -1)
            p, g = base.view(shape).softmax(1), drawn.reshape(shape)
            # diag(p) - p p' = B B', B = diag(s) (1 - s s'), s = sqrt(p)
            root: Tensor = p.sqrt() * g - p * (p.sqrt() * g).sum(1, keepdim=True)
            return (root / math.sqrt(root.shape[2])).flatten(1)
        energy = base.square().sum(1, keepdim=True)
        return drawn * (2 / energy.clamp_min(torch.finfo(base.dtype).tiny)).sqrt() * (energy > 0)

    def _is_map(self, output: Output) -> bool:
        return self.task == "dense" and len(output.shape) == 3 and output.shape[0] > 1

    def _split(self, *rows: Tensor) -> Iterator[tuple[Output, Tensor, Tensor]]:
        """Each output with its part of two sets of rows."""
        sizes = [output.elements for output in self.outputs]
        first, second = (torch.split(part, sizes, 1) for part in rows)
        yield from zip(self.outputs, first, second, strict=True)


def relative_squared_change(masked: Tensor, base: Tensor) -> Tensor:
    """What an output has changed by, over what it is.

        change[x] = ||masked[x] - base[x]||^2 / ||base[x]||^2

    Where the output was zero: 1 if it is not any more, else 0.

    Args:
        masked: (N, k) float64.
        base: (N, k) float64.

    Returns:
        (N,) float64, >= 0, without a unit.
    """
    change, energy = (masked - base).square().sum(1), base.square().sum(1)
    return torch.where(energy > 0, change / energy, (change > 0).to(change.dtype))


def binary_divergence(masked: Tensor, base: Tensor) -> Tensor:
    """KL divergence of independent yes-or-no outputs, summed over them.

        kl[x] = sum_k p log(p / q) + (1 - p) log((1 - p) / (1 - q)),   p = sigmoid(base[x, k]),
                                                                     q = sigmoid(masked[x, k])

    Args:
        masked: (N, k) float64, logits.
        base: (N, k) float64, logits.

    Returns:
        (N,) float64, nats, >= 0.
    """
    p = base.sigmoid()
    yes = p * (F.logsigmoid(base) - F.logsigmoid(masked))
    no = (1 - p) * (F.logsigmoid(-base) - F.logsigmoid(-masked))
    return (yes + no).sum(1).clamp_min(0.0)
