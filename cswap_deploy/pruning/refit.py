"""Refit: layers get the weights that least squares gives them when inputs are gone.

Closed form from forward passes: no gradient is computed and no training happens here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, fx, nn

from cswap_deploy.network.graph import Graph
from cswap_deploy.network.moments import CentredMoments
from cswap_deploy.network.nodes import batch_dim, input_of
from cswap_deploy.network.offsets import constant_of, set_offset
from cswap_deploy.network.placing import placed
from cswap_deploy.network.pooling import balanced, pool_before
from cswap_deploy.network.unfolding import Positions, laid_out, unfold, window_of
from cswap_deploy.network.units import depthwise
from cswap_deploy.network.walk import Walk
from cswap_deploy.pruning.chains import Chain, find_chains, gate_of
from cswap_deploy.pruning.producers import Reads, held_out_error, reconstruct_producer
from cswap_deploy.pruning.targets import Targets, rows_at, stream_part

MAX_FEATURES = 8192
"""A consumer with more inputs (channels times kernel positions) is not refitted: its normal matrix
would not fit."""
RIDGE = 0.1
"""Ridge of a refit, times its unknowns for each row, and at most ``MOST_RIDGE``: what few rows say
about many weights is mostly noise. Ten times as much and as little is worse on one network or
another (benchmarks/LOG.md)."""
MOST_RIDGE = 1.0
SWEEPS = 3
"""A producer and its consumer are solved in turn, at most so many times: ResNet-56 without ten
branches, KL .184 with none, .142 with one, .130 with three and with five (benchmarks/LOG.md)."""
_UNFOLDED_BYTES = 64 << 20
"""Of the unfolded inputs that are multiplied at once."""


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
    one that is gone. What images do not reach needs none.
    """
    return [
        name
        for name in graph.layers()
        if len(graph.readers(name)) == 1
        and not depthwise(graph.layer(name))
        and batch_dim(graph.readers(name)[0]) is not None
    ]


def refit(
    pruned: Graph,
    targets: Targets,
    kept: Mapping[str, Tensor],
    *,
    ridge: float | None = None,
    reconstruct: Collection[str] = (),
    most_bytes: int,
    judge: Judge | None = None,
    tick: Callable[[int], None] | None = None,
) -> Refit:
    """Solve layers again so that they give the dense network's outputs from what is left.

    The pruned network advances through the images up to one layer after another. At each, in order
    of execution, with U its own (centred) inputs at the kept positions, Y the wanted (centred)
    outputs and W0 the dense weights for the kept inputs,

        (U'U / n + lambda I) W = U'Y / n + lambda W0,    lambda = ridge * mean(diag(U'U / n))

    and the bias makes the means agree. What an earlier layer lost is thus made up for later. The
    wanted output is the dense layer's; at the end of a residual branch, that plus what the stream
    has lost so far, so that the sum is the dense network's again. Behind an average over positions
    a change counts, beside I, by the covariance of what is averaged, and W0 has what is gone
    folded into it.

    Args:
        pruned: The network to change, in place.
        targets: Of the same graph on the network as it was; has the images.
        kept: Layer -> (k,) input positions that are left, ascending; of :func:`solvable` ones. A
            layer that lost nothing itself is worth solving too: its inputs have changed.
        ridge: Strength of the pull towards the dense weights; by each layer's rows unless given.
        reconstruct: Layers in ``kept`` whose producer is reconstructed too, where that can be done
            (:mod:`pruning.producers`). The layer is refitted before and after, in turn, as long as
            that helps.
        most_bytes: For values that are held between layers; without it images run again.
        judge: Says what each layer's step does to the prediction on other images: it is taken
            whole, in half or not at all. Without it all are taken whole.
        tick: Called with 1 after each layer.

    Source:
        Channel reconstruction by least squares: He et al. 2017, "Channel Pruning for Accelerating
        Very Deep Neural Networks" (arXiv:1707.06168), sections 3.1 and 3.3, here with a ridge
        towards W0. Own inputs against the dense network's outputs: Zhang et al. 2015,
        "Accelerating Very Deep Convolutional Networks" (arXiv:1505.06798), section 3.3.
    """
    work = _Refitting(pruned, targets, kept, ridge, Walk(pruned, targets.batches, most_bytes))
    place = pruned.position
    chains = {c.consumer_layer: c for c in find_chains(pruned, reconstruct)}
    solved: list[str] = []
    skipped: list[str] = []
    producers: list[str] = []
    effect: float | None = None
    with torch.no_grad():
        for layer in sorted(kept, key=lambda name: place[pruned.readers(name)[0]]):
            node = pruned.readers(layer)[0]
            # A producer that is going to change must still be ahead when it does.
            ahead = [c.producer for c in chains.values() if place[c.producer] < place[node]]
            hold = min([node, *ahead], key=place.__getitem__)
            chain = chains.pop(layer, None)
            step = None if judge is None else _Step(judge, pruned, layer, chain)
            done = work.solve(layer, hold, chain)
            rebuilt = done and chain is not None and work.reconstruct(chain, hold)
            if done and step is not None:
                effect, part = step.as_far_as_it_helps(effect)
                rebuilt &= part > 0
            if rebuilt and chain is not None:
                producers.append(chain.producer_layer)
            (solved if done else skipped).append(layer)
            if tick is not None:
                tick(1)
    return Refit(tuple(solved), tuple(skipped), tuple(producers))


class Judge(Protocol):
    """What the network as it stands does on images that no layer is solved on."""

    def effect(self, node: fx.Node) -> float:
        """Divergence from the dense network; nothing before ``node`` has changed since the last."""


class _Weights:
    """Weights and constants of a layer, and of its producer, as they are when it is made."""

    def __init__(self, graph: Graph, layer: str, chain: Chain | None) -> None:
        names = [layer] if chain is None else [layer, chain.producer_layer]
        self._tensors = [t for n in names for t in (graph.layer(n).weight, constant_of(graph, n))]
        self._values = self._now()

    def _now(self) -> list[Tensor]:
        return [tensor.detach().clone() for tensor in self._tensors]

    def restore(self) -> None:
        """Give them back."""
        for tensor, before in zip(self._tensors, self._values, strict=True):
            tensor.copy_(before)


class _Step(_Weights):
    """From there to what they become."""

    def __init__(self, judge: Judge, graph: Graph, layer: str, chain: Chain | None) -> None:
        super().__init__(graph, layer, chain)
        self._judge = judge
        self._first = graph.readers(layer)[0] if chain is None else chain.producer

    def as_far_as_it_helps(self, before: float | None) -> tuple[float, float]:
        """Keep what has become of them, or half of the change, or none.

        Args:
            before: The effect as the last step left it, where there was one.

        Returns:
            The effect, and the part of the change that is kept.
        """
        after = self._now()
        found = [] if before is None else [(before, 0.0)]
        for part in (1.0, 0.5) if found else (0.0, 1.0, 0.5):
            self._set(part, after)
            found.append((self._judge.effect(self._first), part))
            if part == 1.0 and found[-1] < found[0]:
                return found[-1]
        self._set(min(found)[1], after)
        return min(found)

    def _set(self, part: float, after: list[Tensor]) -> None:
        for tensor, before, end in zip(self._tensors, self._values, after, strict=True):
            tensor.copy_(torch.lerp(before, end, part))


@dataclass(slots=True)
class _Refitting:
    """One layer after another."""

    pruned: Graph
    targets: Targets
    kept: Mapping[str, Tensor]
    ridge: float | None
    walk: Walk
    wanted: Tensor | None = None
    """(R, O), of the last layer that was solved with its chain."""
    reads: Reads | None = None
    """What its producer reads; ``None`` where that is too much."""

    def solve(self, layer: str, hold: fx.Node, chain: Chain | None = None) -> bool:
        """Refit a layer; False where it is too wide. ``hold``: where the walk goes on next time.

        What the producer of a chain reads is noted, for :meth:`reconstruct`.
        """
        pruned, targets = self.pruned, self.targets
        system = _System(pruned, targets.dense, layer, self.kept[layer])
        if system.features > MAX_FEATURES:
            return False
        node, device = pruned.readers(layer)[0], targets.batches.device
        places, dense = targets.places(layer), targets.of(layer)
        found: list[Tensor] = []
        stops = [node]
        reads: Reads | None = None
        if chain is not None:
            size = targets.shape(chain.producer_layer)[1:]
            kept = self.kept[layer], self.kept.get(chain.producer_layer)
            self.reads = reads = Reads.of(pruned, chain, places, size, *kept)
            stops = [chain.producer, *chain.gates, node] if reads is not None else stops
        pool = pool_before(node, system.inputs, len(targets.batches))
        if pool is not None and chain is None:
            stops, hold = [pool.node, node], min(hold, pool.node, key=pruned.position.__getitem__)
        for stop, part, env in self.walk.reach(stops, hold=hold):
            where = places.within(part, device)
            if pool is not None and stop is pool.node:
                most = max(1, targets.rows // len(targets.batches))
                system.add_around(pool.rows(pruned.value(pool.source, env), most))
                continue
            if reads is not None and (gate := gate_of(stop)) is not None:
                reads.take_gate(stop, pruned.value(gate, env), part)
                continue
            x = pruned.value(input_of(stop), env)
            if stop is not node:
                assert reads is not None
                reads.take(x, part)
                continue
            wanted = dense[places.of(part)]
            stream = stream_part(pruned, targets.dense, layer, env)
            if stream is not None:
                wanted = wanted - rows_at(pruned, layer, stream, where)
            x = laid_out(x, system.layer, batch=batch_dim(input_of(node)) or 0)
            system.add(x, where, wanted)
            if reads is not None:
                found.append(wanted)
        if chain is not None:
            self.wanted = torch.cat(found) if found else None
        system.solve(self.ridge)
        return True

    def reconstruct(self, chain: Chain, hold: fx.Node) -> bool:
        """Solve the producer of the layer that was solved last, and the layer again, in turn.

        Each turn must be better on rows held out; one that is not is taken back, and the last.

        Returns:
            Whether anything was changed.
        """
        pruned, layer, helped = self.pruned, chain.consumer_layer, False
        if self.reads is None or self.wanted is None:
            return False
        error = held_out_error(pruned, chain, self.reads, self.wanted)
        for _ in range(SWEEPS):
            before = _Weights(pruned, layer, chain)
            if not reconstruct_producer(pruned, chain, self.reads, self.wanted):
                break
            self.solve(layer, hold, chain if chain.gates else None)  # gates have changed, too
            now = held_out_error(pruned, chain, self.reads, self.wanted)
            if not now < error:
                before.restore()
                break
            error, helped = now, True
        self.reads = self.wanted = None
        return helped


class _System:
    """The normal equations of one layer, of each group of its channels."""

    def __init__(self, pruned: Graph, dense: Graph, name: str, kept: Tensor) -> None:
        self.layer = pruned.layer(name)
        self._pruned, self._dense, self._name = pruned, dense, name
        self._window = window_of(pruned.readers(name)[0], self.layer)
        groups = self.layer.groups if isinstance(self.layer, nn.Conv2d) else 1
        in_group, out_group = self.layer.weight.shape[1], self.layer.weight.shape[0] // groups
        before = dense.layer(name).weight
        self._groups = []
        for g in range(groups):
            mine = kept[(kept >= g * in_group) & (kept < (g + 1) * in_group)]
            mine, local = (placed(i, before.device) for i in (mine, mine - g * in_group))
            rows = slice(g * out_group, (g + 1) * out_group)
            prior = before.detach()[rows][:, local].movedim(1, -1)
            self._groups.append(_Group(mine, local, rows, prior))
        self.features = max(g.prior[0].numel() for g in self._groups)
        """Unknowns of one output."""
        self.inputs = in_group * groups

    def add(self, x: Tensor, where: Positions, wanted: Tensor) -> None:
        """Count rows in: the input (N, H, W, C), R positions, (R, O) wanted outputs there."""
        step = max(1, _UNFOLDED_BYTES // (4 * self.features))
        for group in self._groups:
            own = x if len(group.mine) == x.shape[-1] else x[..., group.mine]
            for begin in range(0, len(where), step):
                part = slice(begin, begin + step)
                u = unfold(own, where[part], self._window).flatten(1)
                group.add(u, wanted[part, group.rows])

    def add_around(self, values: Tensor) -> None:
        """Count in (R, C) of what is averaged to make the input: they say what it may be."""
        (group,) = self._groups
        group.add_around(values[:, group.mine], self.layer.weight.detach())

    def solve(self, ridge: float | None) -> None:
        """Set the layer's weights and constant."""
        layer = self.layer
        bias = layer.weight.new_zeros(len(layer.weight))
        for group in self._groups:
            weight, constant = group.solve(ridge)
            layer.weight[group.rows] = 0.0
            layer.weight[group.rows, group.local] = weight.movedim(-1, 1).float()
            bias[group.rows] = constant.float()
        set_offset(self._pruned, self._dense, self._name, bias)


@dataclass(slots=True)
class _Group:
    """Sums for the outputs that share their inputs; f counts taps, then channels."""

    mine: Tensor
    """Inputs that are left."""
    local: Tensor
    """The same, counted from the group's first."""
    rows: slice
    """Outputs."""
    prior: Tensor
    """(o, taps..., k) their dense weights."""
    inputs: CentredMoments | None = None
    outputs: CentredMoments | None = None
    around: CentredMoments | None = None
    """Of what is averaged to make the inputs, where they are averages."""

    def add_around(self, rows: Tensor, weight: Tensor) -> None:
        """Count in (R, k) values; ``weight`` is the layer's, with what is gone folded into it."""
        if self.around is None:
            self.around = CentredMoments(rows.mean(0))
            self.prior = weight[:, self.local].movedim(1, -1).clone()
        rows = rows - self.around.centre
        self.around.add(rows, rows, dtype=torch.float32)

    def add(self, u: Tensor, y: Tensor) -> None:
        """Count in (R, f) inputs, which are changed, and (R, o) outputs."""
        if self.inputs is None or self.outputs is None:
            self.inputs, self.outputs = CentredMoments(u.mean(0)), CentredMoments(y.mean(0))
        u.sub_(self.inputs.centre)
        y = y - self.outputs.centre
        self.inputs.add(u, u, y, dtype=torch.float32)
        self.outputs.add(y)

    def solve(self, ridge: float | None) -> tuple[Tensor, Tensor]:
        """The weights, like ``prior``, and (o,) constants; float64."""
        assert self.inputs is not None
        assert self.outputs is not None
        mean_u, mean_y = self.inputs.mean, self.outputs.mean
        gram, cross = self.inputs.covariance(0, mean_u), self.inputs.covariance(1, mean_y)
        if ridge is None:
            ridge = min(MOST_RIDGE, RIDGE * len(gram) / self.inputs.count)
        strength = ridge * gram.diagonal().mean().clamp_min(1e-12)
        prior = self.prior.flatten(1).double().T
        pull = strength * prior
        if self.around is not None:
            # A change counts by what it does to values before the average, of which there are many.
            both = 2 * balanced(gram, self.around.covariance(0, self.around.mean))
            pull += (both - gram) @ prior
            gram = both
        gram.diagonal().add_(strength)
        weight = torch.cholesky_solve(cross + pull, torch.linalg.cholesky(gram)).T
        centres = mean_u + self.inputs.centre.double(), mean_y + self.outputs.centre.double()
        return weight.view(self.prior.shape), centres[1] - weight @ centres[0]
