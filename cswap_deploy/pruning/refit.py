"""Refit: layers get the weights that least squares gives them when inputs are gone.

Closed form from forward passes: no gradient is computed and no training happens here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from cswap_deploy.network.branches import LAYOUT, Branch, branch_of, shape_of
from cswap_deploy.network.graph import Env, Graph
from cswap_deploy.network.moments import CentredMoments
from cswap_deploy.network.nodes import input_of
from cswap_deploy.network.offsets import set_offset
from cswap_deploy.network.unfolding import Window, at, draw, laid_out, unfold, window_of
from cswap_deploy.network.units import depthwise
from cswap_deploy.pruning.producers import Chain, Target, find_chains, reconstruct_producer

MAX_FEATURES = 8192
"""A consumer with more inputs (channels times kernel positions) is not refitted: its normal matrix
would not fit."""
MAX_ROWS = 65_536
"""Positions that a refit uses at most."""


@dataclass(frozen=True, slots=True)
class Refit:
    """What one pass of :func:`refit` did."""

    layers: tuple[str, ...]
    skipped: tuple[str, ...]
    """Layers above ``MAX_FEATURES``."""
    producers: tuple[str, ...] = ()
    """Layers that were reconstructed."""


def solvable(graph: Graph) -> list[str]:
    """Layers that :func:`refit` can take, in order of execution: those that run once.

    A depthwise convolution has one input for each output, so its other inputs cannot make up for
    one that is gone.
    """
    return [
        name
        for name in graph.layers()
        if len(graph.readers(name)) == 1 and not depthwise(graph.layer(name))
    ]


def refit(
    pruned: Graph,
    dense: Graph,
    kept: Mapping[str, Tensor],
    images: Tensor,
    *,
    ridge: float = 1e-3,
    reconstruct: Collection[str] = (),
    rows: int = MAX_ROWS,
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
        kept: Layer -> (k,) input positions that are left, ascending; of :func:`solvable` ones. A
            layer that lost nothing itself is worth solving too: its inputs have changed.
        images: (N, C, H, W), the calibration set.
        ridge: Strength of the pull towards the dense weights.
        reconstruct: Layers in ``kept`` whose producer is reconstructed too, where that can be done
            (:mod:`pruning.producers`). The layer is refitted before and after.
        rows: Positions of each layer that are used, at most.
        tick: Called with 1 after each layer.

    Source:
        Channel reconstruction by least squares: He et al. 2017, "Channel Pruning for Accelerating
        Very Deep Neural Networks" (arXiv:1707.06168), sections 3.1 and 3.3, here with a ridge
        towards W0. Own inputs against the dense network's outputs: Zhang et al. 2015,
        "Accelerating Very Deep Convolutional Networks" (arXiv:1505.06798), section 3.3.
    """
    solved: list[str] = []
    skipped: list[str] = []
    producers: list[str] = []
    by_node = {pruned.readers(layer)[0]: layer for layer in kept}
    chains = {c.producer: c for c in find_chains(pruned, reconstruct)}
    waiting: dict[str, tuple[Chain, Tensor]] = {}
    """Consumer -> its chain, and what the chain's producer reads."""
    with torch.no_grad():
        for (node, env), (_, dense_env) in zip(
            pruned.step(images), dense.step(images), strict=True
        ):
            if node in chains:
                x = pruned.value(input_of(node), env)
                waiting[chains[node].consumer_layer] = chains[node], x
            layer = by_node.get(node)
            if layer is None:
                continue
            target = _target(pruned, dense, layer, env, dense_env, rows)
            solve = partial(_solve, pruned, dense, layer, kept[layer], target, ridge)
            done = solve(pruned.value(input_of(node), env))
            if layer in waiting:
                chain, x = waiting.pop(layer)
                inputs = kept.get(chain.producer_layer)
                if done and reconstruct_producer(
                    pruned, chain, x, target, units=kept[layer], inputs=inputs
                ):
                    env[input_of(node)] = chain.run(pruned, x)
                    solve(env[input_of(node)])
                    producers.append(chain.producer_layer)
            (solved if done else skipped).append(layer)
            if tick is not None:
                tick(1)
    return Refit(tuple(solved), tuple(skipped), tuple(producers))


def _target(pruned: Graph, dense: Graph, layer: str, env: Env, dense_env: Env, rows: int) -> Target:
    """The dense layer's output, plus what the stream has lost where the layer ends a branch."""
    node = pruned.readers(layer)[0]
    output: Tensor = dense.execute(node, dense_env)
    branch = branch_of(node)
    if branch is not None and branch.stream in env:
        lost = dense.value(branch.stream, dense_env) - pruned.value(branch.stream, env)
        output = output + to_layer(dense, branch, lost)
    output = laid_out(output, pruned.layer(layer))
    where = draw(output.shape, rows)
    return Target(where, at(output, where))


def _solve(
    pruned: Graph, dense: Graph, name: str, kept: Tensor, target: Target, ridge: float, x: Tensor
) -> bool:
    """Set a layer's weights and constant for its input x; False where it is too wide."""
    layer, before = pruned.layer(name), dense.layer(name)
    x, window = laid_out(x, layer), window_of(pruned.readers(name)[0], layer)
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    in_group, out_group = layer.weight.shape[1], layer.weight.shape[0] // groups
    bias = torch.zeros(layer.weight.shape[0])
    for g in range(groups):
        mine = kept[(kept >= g * in_group) & (kept < (g + 1) * in_group)]
        local = mine - g * in_group
        rows = slice(g * out_group, (g + 1) * out_group)
        prior = before.weight[rows][:, local].movedim(1, -1)
        if prior[0].numel() > MAX_FEATURES:
            return False
        part = replace(target, values=target.values[:, rows])
        gram, cross, mean_u, mean_y = _moments(x[..., mine], window, part)
        strength = ridge * gram.diagonal().mean().clamp_min(1e-12)
        gram.diagonal().add_(strength)
        factor = torch.linalg.cholesky(gram)
        pull = strength * prior.flatten(1).double()
        weight = torch.cholesky_solve(cross + pull.T, factor).T
        layer.weight[rows] = 0.0
        layer.weight[rows, local] = weight.view(prior.shape).movedim(-1, 1).float()
        bias[rows] = (mean_y - weight @ mean_u).float()
    set_offset(pruned, dense, name, bias)
    return True


def _moments(x: Tensor, window: Window, target: Target) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centred second moments of the inputs x (N, H, W, C) and of the target's o outputs.

    Returns:
        float64 gram (f, f), cross (f, o), mean input (f,), mean output (o,); f counts taps, then
        channels.
    """
    features = window.taps * x.shape[-1]
    centre = target.values.mean(0)
    inputs: CentredMoments | None = None
    x = x.contiguous()
    chunk = max(1, (64 << 20) // (4 * features))
    for start in range(0, len(target.where), chunk):
        part = slice(start, start + chunk)
        u = unfold(x, target.where[part], window)[0].flatten(1)
        if inputs is None:
            inputs = CentredMoments(u.mean(0))
        u.sub_(inputs.centre)
        inputs.add(u, u, target.values[part] - centre, dtype=torch.float32)
    assert inputs is not None
    mean_u, mean_y = inputs.mean, (target.values - centre).double().mean(0)
    gram, cross = inputs.covariance(0, mean_u), inputs.covariance(1, mean_y)
    return gram, cross, mean_u + inputs.centre.double(), mean_y + centre.double()


def to_layer(graph: Graph, branch: Branch, difference: Tensor) -> Tensor:
    """What must be added to a layer's output to add ``difference`` where its branch joins.

    Zero for channels that the branch scales to nothing.
    """
    node = branch.path[0]
    shape = [1, *shape_of(node)]
    zero, one = torch.zeros(shape), torch.ones(shape)
    scale = _through(graph, branch, one) - _through(graph, branch, zero)
    floor = 1e-3 * scale.abs().max()
    back = torch.where(scale.abs() > floor, difference / scale, torch.zeros(()))
    for step in reversed(branch.path[1:]):
        if step.target in LAYOUT:
            order: list[int] = step.args[1]  # type: ignore[assignment]
            back = back.permute([order.index(d) for d in range(len(order))])
    return back


def _through(graph: Graph, branch: Branch, value: Tensor) -> Tensor:
    env = {branch.path[0]: value}
    for node in branch.path[1:]:
        env[node] = graph.execute(node, env)
    return env[branch.path[-1]]
