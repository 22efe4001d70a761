"""What the rest of the network takes over when units are gone: every layer solved again by ridge.

Closed form from forward passes: no gradient is computed and no training happens here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from cswap_deploy.causal.branches import branch_of, to_layer
from cswap_deploy.causal.interventions import set_offset
from cswap_deploy.causal.partition import Env, Graph
from cswap_deploy.causal.units import Consumer, channel_dim, depthwise

MAX_FEATURES = 8192
"""A consumer with more inputs (channels times kernel positions) is not solved again: its normal
matrix would not fit."""
MAX_ROWS = 65_536
"""Positions a solution is fitted on; more change nothing but the time."""


@dataclass(frozen=True, slots=True)
class Refit:
    """What one pass of :func:`refit` did."""

    layers: tuple[str, ...]
    skipped: tuple[str, ...]
    """Layers above ``MAX_FEATURES``."""


def solvable(graph: Graph) -> list[str]:
    """Layers that :func:`refit` can solve, in order of execution.

    Those that run once. A depthwise convolution has one input for each output: it can neither take
    over nor hand on.
    """
    return [
        name
        for name in graph.layers()
        if len(graph.readers(name)) == 1 and not depthwise(graph.module.get_submodule(name))
    ]


def refit(
    pruned: Graph,
    dense: Graph,
    kept: Mapping[str, Tensor],
    images: Tensor,
    *,
    ridge: float = 1e-3,
    tick: Callable[[int], None] | None = None,
) -> Refit:
    """Solve layers again so that they give the dense network's outputs from what is left.

    Both networks advance through the same images side by side. At each layer, in order of
    execution, with U the pruned network's own (centred) inputs at the kept positions, Y the wanted
    (centred) outputs and W0 the dense weights for the kept inputs,

        (U'U / n + lambda I) W = U'Y / n + lambda W0,    lambda = ridge * mean(diag(U'U / n))

    and the bias makes the means agree. What an earlier layer lost is thus made up for later. The
    wanted output is the dense layer's; at the end of a residual branch, that plus what the stream
    has lost so far, so that the sum is the dense network's again.

    Args:
        pruned: The network to change, in place.
        dense: The same graph on the network as it was.
        kept: Layer -> (k,) input positions that are left, ascending; see :func:`solvable`. A layer
            that lost nothing itself is worth solving too: its inputs have changed.
        images: (N, C, H, W), the calibration set.
        ridge: Strength of the pull towards the dense weights.
        tick: Called with 1 after each layer.

    Returns:
        Which layers were solved, which were skipped.

    Source:
        Channel reconstruction by least squares: He et al. 2017, "Channel Pruning for Accelerating
        Very Deep Neural Networks" (arXiv:1707.06168), sections 3.1 and 3.3, here with a ridge
        towards W0. Own inputs against the dense network's outputs: Zhang et al. 2015,
        "Accelerating Very Deep Convolutional Networks" (arXiv:1505.06798), section 3.3.
    """
    solved, skipped = [], []
    by_node = {pruned.readers(layer)[0]: layer for layer in kept}
    with torch.no_grad():
        for (node, env), (_, dense_env) in zip(
            pruned.step(images), dense.step(images), strict=True
        ):
            layer = by_node.get(node)
            if layer is None:
                continue
            target = dense.execute(node, dense_env)
            branch = branch_of(node)
            if branch is not None and branch.stream in env:
                lost = dense.value(branch.stream, dense_env) - pruned.value(branch.stream, env)
                target = target + to_layer(dense, branch, lost)
            if _solve(pruned, dense, node, env, target, layer, kept[layer], ridge):
                solved.append(layer)
            else:
                skipped.append(layer)
            if tick is not None:
                tick(1)
    return Refit(tuple(solved), tuple(skipped))


def _solve(
    pruned: Graph,
    dense: Graph,
    node: fx.Node,
    env: Env,
    target: Tensor,
    name: str,
    kept: Tensor,
    ridge: float,
) -> bool:
    layer: Consumer = pruned.module.get_submodule(name)  # type: ignore[assignment]
    before: Consumer = dense.module.get_submodule(name)  # type: ignore[assignment]
    x = pruned.value(node.args[0], env)  # type: ignore[arg-type]
    groups = layer.groups if isinstance(layer, torch.nn.Conv2d) else 1
    in_group, out_group = layer.weight.shape[1], layer.weight.shape[0] // groups
    bias = torch.zeros(layer.weight.shape[0])
    for g in range(groups):
        mine = kept[(kept >= g * in_group) & (kept < (g + 1) * in_group)]
        local = mine - g * in_group
        rows = slice(g * out_group, (g + 1) * out_group)
        prior = before.weight[rows][:, local].flatten(1).double()
        if prior.shape[1] > MAX_FEATURES:
            return False
        dim = channel_dim(layer)
        part = target.narrow(dim, rows.start, out_group)
        gram, cross, mean_u, mean_y = _moments(node, layer, x, mine, part)
        strength = ridge * gram.diagonal().mean().clamp_min(1e-12)
        gram.diagonal().add_(strength)
        factor = torch.linalg.cholesky(gram)
        weight = torch.cholesky_solve(cross + strength * prior.T, factor).T
        layer.weight[rows] = 0.0
        layer.weight[rows, local] = weight.view(-1, len(local), *layer.weight.shape[2:]).float()
        bias[rows] = (mean_y - weight @ mean_u).float()
    set_offset(pruned, dense, name, bias)
    return True


def _moments(
    node: fx.Node, layer: Consumer, x: Tensor, kept: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centred second moments of a consumer's inputs and of its wanted outputs, float64.

    Returns:
        gram (f, f), cross (f, o), mean input (f,), mean output (o,).
    """
    positions = max(1, target.numel() // target.shape[0] // target.shape[channel_dim(layer)])
    per_image = max(1, MAX_ROWS // len(x))
    pick = None
    if positions > per_image:
        g = torch.Generator().manual_seed(0)
        pick = torch.randperm(positions, generator=g)[:per_image].sort().values
    count = 0
    features = layer.weight[0, 0].numel() * len(kept)
    outputs = target.shape[channel_dim(layer)]
    gram = torch.zeros(features, features, dtype=torch.float64)
    cross = torch.zeros(features, outputs, dtype=torch.float64)
    sum_u = torch.zeros(features, dtype=torch.float64)
    sum_y = torch.zeros(outputs, dtype=torch.float64)
    shift_u = shift_y = None
    chunk = max(1, (64 << 20) // (4 * features * positions))
    for part, wanted in zip(torch.split(x, chunk), torch.split(target, chunk), strict=True):
        u, y = _rows(node, layer, part, kept, wanted, pick)
        if shift_u is None or shift_y is None:
            # Float32 products of centred values keep their digits; any nearby centre will do.
            shift_u, shift_y = u.mean(0), y.mean(0)
        u, y = u - shift_u, y - shift_y
        gram += (u.T @ u).double()
        cross += (u.T @ y).double()
        sum_u += u.sum(0, dtype=torch.float64)
        sum_y += y.sum(0, dtype=torch.float64)
        count += len(u)
    assert shift_u is not None
    assert shift_y is not None
    mean_u, mean_y = sum_u / count, sum_y / count
    gram = gram / count - torch.outer(mean_u, mean_u)
    cross = cross / count - torch.outer(mean_u, mean_y)
    return gram, cross, mean_u + shift_u.double(), mean_y + shift_y.double()


def _rows(
    node: fx.Node, layer: Consumer, x: Tensor, kept: Tensor, target: Tensor, pick: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Inputs and outputs of a consumer, one row per image and position: (rows, f), (rows, o)."""
    if isinstance(layer, torch.nn.Linear):
        u = x[..., kept].reshape(len(x), -1, len(kept))
        y = target.reshape(len(x), -1, target.shape[-1])
    else:
        stride, padding, dilation = _conv_settings(node)
        patches = x[:, kept]
        if layer.kernel_size == (1, 1) and padding == (0, 0):
            u = patches[:, :, :: stride[0], :: stride[1]].flatten(2).transpose(1, 2)
        else:
            u = F.unfold(patches.contiguous(), layer.kernel_size, dilation, padding, stride)
            u = u.transpose(1, 2)
        y = target.flatten(2).transpose(1, 2)
    if pick is not None:
        u, y = u[:, pick], y[:, pick]
    return u.reshape(-1, u.shape[-1]), y.reshape(-1, y.shape[-1])


def _conv_settings(node: fx.Node) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Stride, padding, dilation of a convolution node, defaults filled in."""
    given = list(node.args[3:6])
    stride, padding, dilation = given + [1, 0, 1][len(given) :]
    return _pair(stride), _pair(padding), _pair(dilation)


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return int(value[0]), int(value[-1])
