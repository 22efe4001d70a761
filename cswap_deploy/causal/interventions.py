"""What takes a unit's place when it is removed, and how that becomes part of the weights.

    zero       do(a_n := 0)         the paper's: the unit is deleted
    mean       do(a_n := E[a_n])    a constant
    predicted  do(a_n := â_n)       what the other inputs of each layer that reads the unit
                                    predict for it, by linear regression at the same position

All three are ``a_B := A a + c`` with constant A and c, and what reads a unit is linear. So each
has an exact physical counterpart: the weights that read the unit are spread over the other inputs
(``W_O += W_B A``), the constant goes into the bias, and the unit is cut off.

Away from padding the constant is exact too; within a kernel's reach of a padded border the bias
counts positions that lie in the padding, in the intervention as in the pruned network.

Source: the zero intervention: C-SWAP (arXiv:2510.18636). Regression on the other units is the step
of the optimal brain surgeon: Hassibi & Stork, "Second order derivatives for network pruning",
NIPS 1992.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx, nn

from cswap_deploy.network.graph import Graph
from cswap_deploy.network.moments import CentredMoments
from cswap_deploy.network.nodes import input_of
from cswap_deploy.network.offsets import shift_output
from cswap_deploy.network.placing import HOST, placed
from cswap_deploy.network.pooling import Pool, balanced, pool_before
from cswap_deploy.network.unfolding import rows_of
from cswap_deploy.network.units import (
    Consumer,
    channel_dim,
    input_sum,
    mask_weight,
    weight_columns,
)  # fmt: skip

Intervention = Literal["zero", "mean", "predicted"]

RIDGE = 1e-3
"""Ridge of the regression on the other units, as a fraction of the mean variance."""

_ROWS = 65_536
"""Positions the moments are taken over; more change nothing but the time."""

_MOST_INPUTS = 8192
"""Above this many inputs a layer's covariance would not fit; its units are replaced by means."""

_SOLVED_AT_ONCE = 1 << 22
"""Elements of the systems that are solved in one call."""


@dataclass(frozen=True, slots=True)
class AblationValue:
    """``a_B := A a + c`` for the inputs B of one layer."""

    index: Tensor
    """(b,) the inputs B."""
    weights: Tensor | None
    """(b, I) A, zero in the columns of B; ``None`` where it is zero everywhere."""
    constant: Tensor | None
    """(b,) c; ``None`` where it is zero."""


def stack(values: Sequence[AblationValue]) -> AblationValue:
    """Those of U units as one: index (U, b), weights (U * b, I), constant (U * b,)."""
    weights = [v.weights for v in values if v.weights is not None]
    constants = [v.constant for v in values if v.constant is not None]
    return AblationValue(
        torch.stack([v.index for v in values]),
        torch.cat(weights) if weights else None,
        torch.cat(constants) if constants else None,
    )


class Moments:
    """First and second moments of one layer's inputs over images and positions."""

    def __init__(
        self, mean: Tensor, covariance: Tensor | None, alive: Tensor, *, ridge: float = RIDGE
    ) -> None:
        """Invert the covariance (I, I) float64; without it there are constants only.

        ``mean`` is (I,) float32, ``alive`` (I,) bool: the inputs the layer still reads.
        """
        self.mean = mean
        self._inverse: Tensor | None = None
        if covariance is not None:
            rows = torch.nonzero(alive).flatten()
            part = covariance[rows][:, rows]
            part.diagonal().add_(ridge * part.diagonal().mean().clamp_min(1e-12))
            self._inverse = torch.zeros_like(covariance)
            self._inverse[rows[:, None], rows] = torch.linalg.inv(part)

    def ablation_values(self, index: Tensor) -> list[AblationValue]:
        """What takes the place of each unit's inputs; ``index`` is (U, b)."""
        if self._inverse is None or index.shape[1] == len(self.mean):  # nothing left to predict by
            return [AblationValue(own, None, self.mean[own]) for own in index]
        found: list[AblationValue] = []
        at_once = max(1, _SOLVED_AT_ONCE // max(1, index.shape[1] * len(self.mean)))
        for part in torch.split(index, at_once):
            own = part[:, None].expand(-1, part.shape[1], -1)
            rows = self._inverse[part]
            block = rows.gather(2, own)
            # An input that is not read any more has a row of zeros: nothing needs to predict it.
            block.diagonal(dim1=1, dim2=2).add_(block.diagonal(dim1=1, dim2=2) == 0)
            weights = -torch.linalg.solve(block, rows)
            weights.scatter_(2, own, 0.0)
            constants = self.mean[part] - (weights @ self.mean.double()).float()
            found += map(AblationValue, part, weights.float(), constants)
        return found


def ablation_values(
    moments: Moments | None, indices: Iterable[Sequence[int]], *, device: torch.device = HOST
) -> list[AblationValue]:
    """What takes the place of each unit's inputs in a layer; zero where there are no moments.

    Units of a group have equally many inputs. ``device`` is the network's.
    """
    listed = torch.tensor([list(index) for index in indices], dtype=torch.long)
    wanted = placed(listed, device)
    if moments is None or not len(wanted):
        return [AblationValue(index, None, None) for index in wanted]
    return moments.ablation_values(wanted)


def input_moments(
    graph: Graph,
    layers: Iterable[str],
    images: Tensor,
    *,
    intervention: Intervention,
    chunk: int,
    ridge: float = RIDGE,
) -> dict[str, Moments]:
    """Moments of every input of some layers, for the interventions that need them.

    Args:
        graph: The network as it stands.
        layers: Consumers.
        images: (N, C, H, W).
        intervention: ``mean`` takes means only; ``zero`` nothing.
        chunk: Images per forward.
        ridge: See ``RIDGE``.

    Returns:
        Layer -> its moments. Grouped convolutions get means only: a unit's channels in one group
        cannot be predicted from another's.
    """
    if intervention == "zero":
        return {}
    sums: dict[str, CentredMoments] = {}
    per_image = max(1, _ROWS // len(images))
    layer_of = {node: layer for layer in layers for node in graph.readers(layer)}
    predicted = intervention == "predicted"
    joint = {layer for layer in layer_of.values() if predicted and _joint(graph.layer(layer))}
    pools = _pools(graph, joint, len(images))
    averaged = {pool.node: layer for layer, pool in pools.items()}
    around: dict[str, CentredMoments] = {}
    with torch.no_grad():
        for part in torch.split(images, chunk):
            for node, env in graph.step(placed(part, graph.device)):
                if node in averaged:
                    behind = averaged[node]
                    rows = pools[behind].rows(graph.value(pools[behind].source, env), per_image)
                    summed = around.setdefault(behind, CentredMoments(rows.mean(0)))
                    summed.add(rows := rows - summed.centre, rows)
                layer = layer_of.get(node)
                if layer is None:
                    continue
                x = graph.value(input_of(node), env).movedim(channel_dim(graph.layer(layer)), -1)
                rows = x.reshape(-1, x.shape[-1])
                if layer not in sums:
                    sums[layer] = CentredMoments(rows.mean(0))
                if layer in joint:
                    rows = rows_of(x, per_image)
                rows = rows - sums[layer].centre
                sums[layer].add(rows, *(rows,) * (layer in joint))
    found = {}
    for layer, summed in sums.items():
        mean = summed.mean
        alive = graph.layer(layer).weight.detach().movedim(1, 0).flatten(1).abs().amax(1) > 0
        covariance = summed.covariance(0, mean) if layer in joint else None
        if covariance is not None and layer in around:
            covariance = balanced(covariance, around[layer].covariance(0, around[layer].mean))
        found[layer] = Moments((mean + summed.centre).float(), covariance, alive, ridge=ridge)
    return found


def _pools(graph: Graph, layers: Iterable[str], images: int) -> dict[str, Pool]:
    """Layer -> the average that it reads, where so many images say too little of it."""
    found = {}
    for layer in layers:
        first, *others = graph.readers(layer)
        pool = pool_before(first, _inputs(graph.layer(layer)), images)
        if pool is not None and not others:
            found[layer] = pool
    return found


def _joint(layer: Consumer) -> bool:
    """Whether each input of a layer can be predicted from all the others."""
    grouped = isinstance(layer, nn.Conv2d) and layer.groups > 1
    return not grouped and _inputs(layer) <= _MOST_INPUTS


def _inputs(layer: Consumer) -> int:
    return int(layer.weight.shape[1])


def contribution(
    layer: Consumer, node: fx.Node, x: Tensor, ablation_value: AblationValue
) -> Tensor:
    """What a layer's output loses by an ablation value, but for the constant: W_B (a_B - A a).

    ``node`` is the layer's, for the settings of the convolution; ``x`` is its input.
    """
    dim = channel_dim(layer)
    rest = x.index_select(dim if dim >= 0 else x.ndim + dim, ablation_value.index)
    if ablation_value.weights is not None:
        rest = rest - mix(ablation_value.weights, x, dim)
    if isinstance(layer, nn.Linear):
        return torch.nn.functional.linear(rest, layer.weight[:, ablation_value.index])
    weight = layer.weight[:, weight_columns(layer, ablation_value.index)]
    # The node's own stride and padding: a layer's attributes may differ ("same" padding, for one).
    return torch.nn.functional.conv2d(rest, weight, None, *node.args[3:])  # type: ignore[arg-type]


def mix(weights: Tensor, x: Tensor, dim: int) -> Tensor:
    """A linear map of channels at every position: (..., I, ...) -> (..., b, ...)."""
    if dim == 1:
        return torch.nn.functional.conv2d(x, weights[:, :, None, None])
    return torch.nn.functional.linear(x, weights)


def constant_output(layer: Consumer, ablation_value: AblationValue) -> Tensor | None:
    """(O,) what an ablation value's constant adds to a layer's output; ``None`` for nothing."""
    if ablation_value.constant is None:
        return None
    return input_sum(layer, ablation_value.index, ablation_value.constant)


def fold(graph: Graph, layer: str, ablation_value: AblationValue) -> None:
    """Make an intervention part of the weights of a layer, in place."""
    module = graph.layer(layer)
    constant = constant_output(module, ablation_value)
    with torch.no_grad():
        if ablation_value.weights is not None:
            gone = module.weight[:, ablation_value.index]
            module.weight += torch.einsum("ob...,bi->oi...", gone, ablation_value.weights)
    mask_weight(module, ablation_value.index)
    if constant is not None:
        shift_output(graph, layer, constant)
