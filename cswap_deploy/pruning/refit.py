"""What the rest of the network takes over when units are gone: every layer solved again by ridge.

Closed form from forward passes: no gradient is computed and no training happens here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from cswap_deploy.network.branches import LAYOUT, Branch, branch_of, shape_of
from cswap_deploy.network.graph import Graph
from cswap_deploy.network.offsets import set_offset
from cswap_deploy.network.unfolding import Geometry, Positions, at, draw, geometry, laid_out, seen
from cswap_deploy.network.units import Consumer, depthwise
from cswap_deploy.pruning.producers import Chain, find_chains, take_over

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
    producers: tuple[str, ...] = ()
    """Layers whose remaining units took over what the removed ones did."""


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
    taken_over: Collection[str] = (),
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
        taken_over: Of the layers in ``kept``, those whose producer's remaining units take over too,
            where that can be done; see :mod:`pruning.producers`. The layer is solved before and
            after.
        tick: Called with 1 after each layer.

    Returns:
        Which layers were solved, which were skipped.

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
    chains = {c.producer: c for c in find_chains(pruned, taken_over)}
    waiting: dict[str, tuple[Chain, Tensor]] = {}
    """Consumer -> its chain, and what the chain's producer reads."""
    with torch.no_grad():
        for (node, env), (_, dense_env) in zip(
            pruned.step(images), dense.step(images), strict=True
        ):
            if node in chains:
                x = pruned.value(chains[node].source, env)
                waiting[chains[node].consumer_layer] = chains[node], x
            layer = by_node.get(node)
            if layer is None:
                continue
            target = dense.execute(node, dense_env)
            branch = branch_of(node)
            if branch is not None and branch.stream in env:
                lost = dense.value(branch.stream, dense_env) - pruned.value(branch.stream, env)
                target = target + to_layer(dense, branch, lost)
            problem = _Problem(pruned, dense, node, layer, kept[layer], target, ridge)
            done = problem.solve(pruned.value(node.args[0], env))  # type: ignore[arg-type]
            if layer in waiting:
                chain, x = waiting.pop(layer)
                inputs = kept.get(chain.producer_layer)
                if done and problem.let_take_over(chain, x, inputs):
                    env[chain.end] = chain.run(pruned, x)
                    problem.solve(env[chain.end])
                    producers.append(chain.producer_layer)
            (solved if done else skipped).append(layer)
            if tick is not None:
                tick(1)
    return Refit(tuple(solved), tuple(skipped), tuple(producers))


class _Problem:
    """Least squares for one layer: what it should say at some positions."""

    def __init__(
        self,
        pruned: Graph,
        dense: Graph,
        node: fx.Node,
        name: str,
        kept: Tensor,
        target: Tensor,
        ridge: float,
    ) -> None:
        self.pruned, self.dense, self.name, self.kept, self.ridge = pruned, dense, name, kept, ridge
        self.layer: Consumer = pruned.module.get_submodule(name)  # type: ignore[assignment]
        self.before: Consumer = dense.module.get_submodule(name)  # type: ignore[assignment]
        self.look = geometry(node, self.layer)
        target = laid_out(target, self.layer)
        self.where = draw(target.shape, MAX_ROWS)
        self.wanted = at(target, self.where)

    def solve(self, x: Tensor) -> bool:
        """Set the layer's weights and constant; False where it is too wide.

        Args:
            x: Its input in the pruned network.
        """
        layer = self.layer
        x = laid_out(x, layer)
        groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
        in_group, out_group = layer.weight.shape[1], layer.weight.shape[0] // groups
        bias = torch.zeros(layer.weight.shape[0])
        for g in range(groups):
            mine = self.kept[(self.kept >= g * in_group) & (self.kept < (g + 1) * in_group)]
            local = mine - g * in_group
            rows = slice(g * out_group, (g + 1) * out_group)
            prior = self.before.weight[rows][:, local].movedim(1, -1)
            if prior[0].numel() > MAX_FEATURES:
                return False
            gram, cross, mean_u, mean_y = _moments(
                x[..., mine], self.where, self.look, self.wanted[:, rows]
            )
            strength = self.ridge * gram.diagonal().mean().clamp_min(1e-12)
            gram.diagonal().add_(strength)
            factor = torch.linalg.cholesky(gram)
            pull = strength * prior.flatten(1).double()
            weight = torch.cholesky_solve(cross + pull.T, factor).T
            layer.weight[rows] = 0.0
            layer.weight[rows, local] = weight.view(prior.shape).movedim(-1, 1).float()
            bias[rows] = (mean_y - weight @ mean_u).float()
        set_offset(self.pruned, self.dense, self.name, bias)
        return True

    def let_take_over(self, chain: Chain, x: Tensor, inputs: Tensor | None) -> bool:
        """See :func:`producers.take_over`."""
        return take_over(self.pruned, chain, x, self.kept, self.where, self.wanted, inputs=inputs)


def _moments(
    x: Tensor, where: Positions, look: Geometry, wanted: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centred second moments of a layer's inputs and of its wanted outputs, float64.

    Args:
        x: (N, H, W, C), inputs that are left.
        where: R positions.
        look: The layer's.
        wanted: (R, o).

    Returns:
        gram (f, f), cross (f, o), mean input (f,), mean output (o,); f counts taps, then channels.
    """
    features = look.taps * x.shape[-1]
    gram = torch.zeros(features, features, dtype=torch.float64)
    cross = torch.zeros(features, wanted.shape[1], dtype=torch.float64)
    sum_u = torch.zeros(features, dtype=torch.float64)
    # Float32 products of centred values keep their digits; any nearby centre will do.
    shift_u, shift_y = torch.zeros(features), wanted.mean(0)
    x = x.contiguous()
    chunk = max(1, (64 << 20) // (4 * features))
    for start in range(0, len(where), chunk):
        part = slice(start, start + chunk)
        u = seen(x, where[part], look)[0].flatten(1)
        if start == 0:
            shift_u = u.mean(0)
        u, y = u.sub_(shift_u), wanted[part] - shift_y
        gram += (u.T @ u).double()
        cross += (u.T @ y).double()
        sum_u += u.sum(0).double()
    count = len(where)
    mean_u, mean_y = sum_u / count, (wanted - shift_y).double().mean(0)
    gram = gram / count - torch.outer(mean_u, mean_u)
    cross = cross / count - torch.outer(mean_u, mean_y)
    return gram, cross, mean_u + shift_u.double(), mean_y + shift_y.double()


def to_layer(graph: Graph, branch: Branch, difference: Tensor) -> Tensor:
    """What must be added to a layer's output to add ``difference`` where the branch joins.

    Args:
        graph: The network.
        branch: The layer's.
        difference: Of the addition's shape.

    Returns:
        Of the layer's output's shape; zero for channels that the branch scales to nothing.
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
