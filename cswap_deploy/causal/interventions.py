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

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx, nn

from cswap_deploy.network.graph import Env, Graph
from cswap_deploy.network.offsets import shift_output
from cswap_deploy.network.units import Consumer, channel_dim, input_sum, mask_weight, select_input

Intervention = Literal["zero", "mean", "predicted"]

_RIDGE = 1e-3
"""Of the regression on the other units, as a fraction of the mean variance."""

_ROWS = 65_536
"""Positions the moments are taken over; more change nothing but the time."""

_MOST_INPUTS = 8192
"""Above this many inputs a layer's covariance would not fit; its units are replaced by means."""


@dataclass(frozen=True, slots=True)
class StandIn:
    """``a_B := A a + c`` for the inputs B of one layer."""

    index: Tensor
    """(b,) the inputs B."""
    weights: Tensor | None
    """(b, I) A, zero in the columns of B; ``None`` where it is zero everywhere."""
    constant: Tensor | None
    """(b,) c; ``None`` where it is zero."""

    def to(self, device: torch.device) -> StandIn:
        """On another device."""
        return StandIn(
            self.index.to(device),
            None if self.weights is None else self.weights.to(device),
            None if self.constant is None else self.constant.to(device),
        )


class Moments:
    """First and second moments of one layer's inputs over images and positions."""

    def __init__(self, mean: Tensor, covariance: Tensor | None, alive: Tensor) -> None:
        """Invert the covariance.

        Args:
            mean: (I,) float32.
            covariance: (I, I) float64, or ``None`` for constants only.
            alive: (I,) bool, the inputs the layer still reads.
        """
        self.mean = mean
        self._inverse: Tensor | None = None
        if covariance is not None:
            rows = torch.nonzero(alive).flatten()
            part = covariance[rows][:, rows]
            part.diagonal().add_(_RIDGE * part.diagonal().mean().clamp_min(1e-12))
            self._inverse = torch.zeros_like(covariance)
            self._inverse[rows[:, None], rows] = torch.linalg.inv(part)

    def stand_in(self, index: Tensor) -> StandIn:
        """What takes the place of some inputs together."""
        mean = self.mean[index]
        if self._inverse is None:
            return StandIn(index, None, mean)
        rows = self._inverse[index]
        block = rows[:, index]
        # An input that is not read any more has a row of zeros: nothing needs to predict it.
        block = block + torch.diag((block.diagonal() == 0).double())
        weights = -torch.linalg.solve(block, rows)
        weights[:, index] = 0.0
        constant = mean - (weights @ self.mean.double()).float()
        return StandIn(index, weights.float(), constant)


def stand_ins(moments: Moments | None, indices: Iterable[Sequence[int]]) -> list[StandIn]:
    """What takes the place of each unit of a layer.

    Args:
        moments: Of the layer's inputs; ``None`` for the zero intervention.
        indices: For each unit its inputs.
    """
    wanted = [torch.tensor(list(index)) for index in indices]
    if moments is None:
        return [StandIn(index, None, None) for index in wanted]
    return [moments.stand_in(index) for index in wanted]


def input_moments(
    graph: Graph, layers: Iterable[str], images: Tensor, *, intervention: Intervention, chunk: int
) -> dict[str, Moments]:
    """Moments of every input of some layers, for the interventions that need them.

    Args:
        graph: The network as it stands.
        layers: Consumers.
        images: (N, C, H, W).
        intervention: ``mean`` takes means only; ``zero`` nothing.
        chunk: Images per forward.

    Returns:
        Layer -> its moments; empty for ``zero``. Grouped convolutions get means only: a unit's
        channels in one group cannot be taken over by another.
    """
    if intervention == "zero":
        return {}
    sums: dict[str, Tensor] = {}
    products: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    shifts: dict[str, Tensor] = {}
    per_image = max(1, _ROWS // len(images))

    def observe(layer: str) -> Callable[[fx.Node, Env], None]:
        module: Consumer = graph.module.get_submodule(layer)  # type: ignore[assignment]
        dim = channel_dim(module)
        inputs = module.weight.shape[1]
        joint = (
            intervention == "predicted"
            and getattr(module, "groups", 1) == 1
            and inputs <= _MOST_INPUTS
        )

        def hook(node: fx.Node, env: Env) -> None:
            x = graph.value(node.args[0], env).movedim(dim, -1)  # type: ignore[arg-type]
            rows = x.reshape(-1, x.shape[-1])
            if layer not in shifts:
                # Float32 products of centred values keep their digits; any nearby centre will do.
                shifts[layer] = rows.mean(0)
                sums[layer] = torch.zeros(rows.shape[1], dtype=torch.float64)
                counts[layer] = 0
                if joint:
                    products[layer] = torch.zeros(inputs, inputs, dtype=torch.float64)
            if joint:
                positions = x.reshape(len(x), -1, x.shape[-1])
                rows = _some_positions(positions, per_image) - shifts[layer]
                products[layer] += (rows.T @ rows).double()
            else:
                rows = rows - shifts[layer]
            sums[layer] += rows.sum(0, dtype=torch.float64)
            counts[layer] += len(rows)

        return hook

    hooks = {node: observe(layer) for layer in layers for node in graph.readers(layer)}
    with torch.no_grad():
        for part in torch.split(images, chunk):
            graph.run(part, observe=hooks)
    found = {}
    for layer, total in sums.items():
        module: Consumer = graph.module.get_submodule(layer)  # type: ignore[assignment]
        mean = total / counts[layer]
        covariance = None
        if layer in products:
            covariance = products[layer] / counts[layer] - torch.outer(mean, mean)
        alive = module.weight.detach().movedim(1, 0).flatten(1).abs().amax(1) > 0
        found[layer] = Moments((mean + shifts[layer]).float(), covariance, alive)
    return found


def contribution(layer: Consumer, node: fx.Node, x: Tensor, stand_in: StandIn) -> Tensor:
    """What a layer's output loses when some inputs become their stand-in, but for the constant.

    Args:
        layer: The consumer.
        node: Its node, for the settings of the convolution.
        x: Its input.
        stand_in: What takes the place of which inputs.

    Returns:
        Of the shape of the layer's output: ``W_B (a_B - A a)``.
    """
    dim = channel_dim(layer)
    rest = x.index_select(dim if dim >= 0 else x.ndim + dim, stand_in.index)
    if stand_in.weights is not None:
        rest = rest - mix(stand_in.weights, x, dim)
    if isinstance(layer, nn.Linear):
        return torch.nn.functional.linear(rest, layer.weight[:, stand_in.index])
    weight = select_input(layer.weight, stand_in.index, layer.groups)
    # The node's own stride, padding and so on: what the layer does may differ from what its
    # attributes say ("same" padding, for one).
    settings = list(node.args[3:])
    return torch.nn.functional.conv2d(rest, weight, None, *settings)  # type: ignore[arg-type]


def mix(weights: Tensor, x: Tensor, dim: int) -> Tensor:
    """A linear map of channels at every position: (..., I, ...) -> (..., b, ...)."""
    if dim == 1:
        return torch.nn.functional.conv2d(x, weights[:, :, None, None])
    return torch.nn.functional.linear(x, weights)


def constant_output(layer: Consumer, stand_in: StandIn) -> Tensor | None:
    """(O,) what the constants of a stand-in add to a layer's output; ``None`` for nothing."""
    if stand_in.constant is None:
        return None
    return input_sum(layer, stand_in.index, stand_in.constant)


def fold(graph: Graph, layer: str, stand_in: StandIn) -> None:
    """Make an intervention part of a layer's weights, in place.

    Args:
        graph: Over the module to change.
        layer: The consumer.
        stand_in: Which inputs go, and what takes their place.
    """
    module: Consumer = graph.module.get_submodule(layer)  # type: ignore[assignment]
    constant = constant_output(module, stand_in)
    with torch.no_grad():
        if stand_in.weights is not None:
            gone = module.weight[:, stand_in.index]
            module.weight += torch.einsum("ob...,bi->oi...", gone, stand_in.weights)
    mask_weight(module, stand_in.index)
    if constant is not None:
        shift_output(graph, layer, constant)


def _some_positions(x: Tensor, most: int) -> Tensor:
    """(N, P, I) -> (rows, I): the same ``most`` positions of every image, spread at random."""
    if x.shape[1] > most:
        generator = torch.Generator().manual_seed(0)
        x = x[:, torch.randperm(x.shape[1], generator=generator)[:most].sort().values]
    return x.reshape(-1, x.shape[-1])
