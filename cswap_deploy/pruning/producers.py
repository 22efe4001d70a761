"""Producer reconstruction: new weights for the units that stay, all of one layer together.

A layer that reads fewer units can only mix what they carry. The units themselves can carry more:
let ``h_c = psi(w_c x)`` be a unit, psi what lies between its producer and its consumer (batch norm,
activation), W_c the consumer's weights for it, and E what the consumer's output still lacks. To
first order in changes d_c of the w_c

    E - sum_c W_c * (psi'(w_c x) . d_c x)

which is linear in all d_c: a damped least-squares problem (one step of Gauss-Newton). Its normal
matrix has as many rows as the layer has weights, so it is not formed: conjugate gradients solve it
from products with what the layer reads, preconditioned with the covariance of that. They stop where
what is lacking on held-out images grows, and a step is taken, whole or in part, only if it really
lessens it there. At last the consumer is refitted. Nothing is differentiated but psi, numerically,
at one point; nothing is trained.

A gate on the way (squeeze-and-excite) counts as what it is for each image: that it would change too
is of second order, and the next sweep reads it again.

Source: damped least squares: Levenberg, Q. Appl. Math. 2 (1944). Conjugate gradients for it, and
early stopping as regularisation: Hanke, "Conjugate Gradient Type Methods for Ill-Posed Problems"
(1995). The preconditioner treats slopes and inputs as independent: Martens & Grosse 2015,
"Optimizing Neural Networks with Kronecker-factored Approximate Curvature" (arXiv:1503.05671),
section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from cswap_deploy.network.graph import Graph
from cswap_deploy.network.nodes import input_of
from cswap_deploy.network.offsets import scale_and_shift, shift_output
from cswap_deploy.network.placing import placed
from cswap_deploy.network.unfolding import (
    Positions,
    Window,
    laid_out,
    read_at,
    some_of,
    unfold,
    window_of,
)
from cswap_deploy.network.units import depthwise
from cswap_deploy.pruning.chains import Chain, is_norm
from cswap_deploy.pruning.linear_maps import Linear, OwnInputs, SharedInputs, Through
from cswap_deploy.pruning.targets import BLOCK, Places

MAX_FEATURES = 1152
"""A producer whose units read more than this is left as it is: the covariance of what they read
would be known from too few rows."""
RIDGE = 0.3
"""Ridge of a unit's change, as a fraction of the mean variance of what it reads, times how far the
consumer's output moves with it. A third and three times as much are equal (benchmarks/LOG.md)."""
ITERATIONS = 10
"""Of conjugate gradients. Half as many cost quality, three times as many gain little."""
_ROWS = 16_384
"""Of the consumer's positions, and ``BLOCK`` times as many where they lie in squares: neighbours
tell less than others. ResNet-56 without ten branches: KL .127 and .115 (benchmarks/LOG.md)."""
_MOST_BYTES = 256 << 20
"""Memory for what the producer of one layer reads."""
_STEPS = 1.0, 0.5, 0.25
"""Parts of the change that are tried."""
_CONSTANT = 1e-6
"""Ridge of the constants, which only keeps the problem solvable."""
HELD_OUT = 0.2
"""Part of the images that no change is solved for on."""
_ROUNDING = 1e-10
"""Part of the wanted variance (1e-5 in size) below which what is lacking is float32's rounding, of
either sign on another processor: following it would change weights for nothing."""


def rows_for(features: int, through: Window) -> int:
    """How many of a consumer's positions a reconstruction uses.

    Args:
        features: Numbers that are held for each position of the producer.
        through: The consumer's window.
    """
    each = math.ceil(through.reads(BLOCK) * features)
    most = _ROWS if through.taps == 1 else BLOCK * _ROWS
    return max(1, min(most, _MOST_BYTES // (4 * each)))


@dataclass(slots=True)
class Reads:
    """What the units of a producer read, wherever what reads them looks, at r positions."""

    rows: Tensor
    """(r,) which of the consumer's positions, ascending."""
    places: Positions
    """U of the producer's output, each once, by item."""
    items: int
    """Of each image."""
    index: Tensor
    """(r, S) which of them each of the consumer's taps reads."""
    exists: Tensor
    """(r, S) 1 or 0."""
    units: Tensor
    """(k,) the outputs of the producer that are left."""
    columns: Tensor | slice
    """The inputs of the producer that are left."""
    own: bool
    """Whether each unit reads an input of its own."""
    layer: nn.Conv2d | nn.Linear
    window: Window
    solve_on: tuple[int, int]
    """How many of the rows, and of the places, are solved for; the others, of the last images, are
    held out."""
    values: Tensor
    """(U, F), or (F, U, k) where each unit reads its own."""
    gates: Mapping[fx.Node, Tensor]
    """(U, k) what each gate of the chain scales the units by."""

    @classmethod
    def of(
        cls, graph: Graph, chain: Chain, where: Places, size: Sequence[int],
        units: Tensor, inputs: Tensor | None,
    ) -> Reads | None:  # fmt: skip
        """Room for what a chain's producer reads; ``None`` where that is too much.

        Args:
            graph: Over the network to change.
            chain: From the layer to change to the layer that reads it.
            where: Positions of the latter.
            size: (height, width) of the former's output.
            units: (k,) the outputs of the producer that are left.
            inputs: Those of the producer that are left; all unless given.
        """
        layer, consumer = graph.layer(chain.producer_layer), graph.layer(chain.consumer_layer)
        own, device = depthwise(layer), graph.device
        units = placed(units, device)
        columns: Tensor | slice = slice(None) if inputs is None or own else placed(inputs, device)
        window, through = window_of(chain.producer, layer), window_of(chain.consumer, consumer)
        features = window.taps * (1 if own else layer.weight[:, columns].shape[1])
        if features > MAX_FEATURES:
            return None
        most = rows_for(features * (len(units) if own else 1), through)
        rows = some_of(len(where.where), most, run=1 if through.taps == 1 else BLOCK**2)
        places, index, exists = read_at(where.where[rows], through, size)
        count, new = len(places), layer.weight.new_empty
        image = where.where.image[rows]
        images = int(image[-1]) + 1
        begins = images - int(HELD_OUT * images)  # what is held out
        return cls(
            rows, places, where.items, placed(index, device),
            placed(exists, device).to(layer.weight.dtype), units, columns, own, layer, window,
            (_before(image, begins), _before(places.image, begins)),
            new(window.taps, count, len(units)) if own else new(count, features),
            {gate: new(count, len(units)) for gate in chain.gates},
        )  # fmt: skip

    def take(self, x: Tensor, images: slice) -> None:
        """Note what is read on some images, of which ``x`` is the producer's input."""
        at, where = self._within(images, x.device)
        x = laid_out(x, self.layer)[..., self.units if self.own else self.columns]
        values = unfold(x, where, self.window)
        if self.own:
            self.values[:, at] = values.movedim(1, 0)
        else:
            self.values[at] = values.flatten(1)

    def take_gate(self, gate: fx.Node, value: Tensor, images: slice) -> None:
        """Note what a gate of the chain (N, C, 1, 1) is on some images; see :meth:`take`."""
        at, where = self._within(images, value.device)
        self.gates[gate][at] = value.flatten(1)[where.image][:, self.units]

    def _within(self, images: slice, device: torch.device) -> tuple[slice, Positions]:
        """Which places lie on some images; and those, counted from the first of them."""
        begin, end = (
            _before(self.places.image, n * self.items) for n in (images.start, images.stop)
        )
        where = self.places[begin:end].on(device, first=images.start * self.items)
        return slice(begin, end), where

    @property
    def linear(self) -> Linear:
        """The same as a map of weights."""
        return OwnInputs(self.values) if self.own else SharedInputs(self.values)


def reconstruct_producer(graph: Graph, chain: Chain, reads: Reads, wanted: Tensor) -> bool:
    """Give each remaining unit new weights, in place; returns whether anything was changed.

    Args:
        graph: Over the network to change.
        chain: From the layer to change to the layer that reads it, which has been refitted.
        reads: What the former reads.
        wanted: (R, O), of the latter at all its positions; constants do not count.
    """
    producer = graph.layer(chain.producer_layer)
    units, columns = reads.units, reads.columns
    work, z = _set_up(graph, chain, reads)
    change = work.change(z, wanted[placed(reads.rows, wanted.device)])
    if change is None:
        return False
    now = producer.weight.detach()[units]
    part = now[:, columns].movedim(1, -1)
    now[:, columns] = (part.flatten(1) + change.weight).view(part.shape).movedim(-1, 1)
    producer.weight[units] = now
    by = producer.weight.new_zeros(len(producer.weight))
    by[units] = change.constant
    shift_output(graph, chain.producer_layer, by)
    return True


def held_out_error(graph: Graph, chain: Chain, reads: Reads, wanted: Tensor) -> float:
    """What the consumer's output lacks on the rows held out, squared and summed.

    Arguments as those of :func:`reconstruct_producer`.
    """
    work, z = _set_up(graph, chain, reads)
    return float(work.lacking(z, wanted[placed(reads.rows, wanted.device)])[1])


def _set_up(graph: Graph, chain: Chain, reads: Reads) -> tuple[_Reconstruction, Tensor]:
    """The units of a producer, and what they give, (U, k), with the weights as they are."""
    producer, consumer = graph.layer(chain.producer_layer), graph.layer(chain.consumer_layer)
    weight = producer.weight.detach()[reads.units][:, reads.columns].movedim(1, -1).flatten(1)
    read = _ungrouped(consumer)[:, reads.units]
    read = read.reshape(*read.shape[:2], -1)
    z = reads.linear(weight)
    if producer.bias is not None:
        z += producer.bias.detach()[reads.units]
    through = Through(reads.index, reads.exists, read.permute(2, 1, 0).contiguous())
    psi = _pointwise(graph, chain, reads)
    return _Reconstruction(reads.linear, through, psi, reads.solve_on), z


_Psi = Callable[[Tensor], Tensor]
"""(..., k) of all units to what their consumer reads."""


@dataclass(frozen=True, slots=True)
class Change:
    """Of k units."""

    weight: Tensor
    """(k, F)."""
    constant: Tensor
    """(k,)."""

    def times(self, factor: float | Tensor) -> Change:
        """All of it scaled."""
        return Change(factor * self.weight, factor * self.constant)

    def plus(self, other: Change) -> Change:
        """Both together."""
        return Change(self.weight + other.weight, self.constant + other.constant)

    def dot(self, other: Change) -> Tensor:
        """The product of all of their numbers, summed."""
        return (self.weight * other.weight).sum() + (self.constant * other.constant).sum()


@dataclass(frozen=True, slots=True)
class _Reconstruction:
    """The units of one producer, at U positions that its consumer looks at from r of its own."""

    reads: Linear
    through: Through
    psi: _Psi
    solve_on: tuple[int, int]
    """The first rows and places; the others are held out."""

    def change(self, z: Tensor, wanted: Tensor) -> Change | None:
        """What to add to the units' weights and constants; ``None`` where nothing helps.

        Args:
            z: (U, k), what the units give.
            wanted: (r, O), of the consumer.
        """
        lacking, least = self.lacking(z, wanted)
        if _power(lacking) <= _ROUNDING * _power(wanted):
            return None
        change = best_change(self.reads, self._slope(z), self.through, lacking, self.solve_on)
        if change is None:
            return None
        moved = self.reads(change.weight) + change.constant
        best = None
        for part in _STEPS:
            _, rest = self.lacking(z + part * moved, wanted)
            if rest < least:
                least, best = rest, part
        return None if best is None else change.times(best)

    def lacking(self, z: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """(r, O), of what the consumer makes of z, and how much of it is on rows held out."""
        found = wanted - self.through(self.psi(z))
        return found, _power(found[self.solve_on[0] :])

    def _slope(self, z: Tensor) -> Tensor:
        """(U, k), psi' at z, by a difference."""
        reach = (1e-3 * z.std(0)).clamp_min(1e-6)
        return (self.psi(z + reach) - self.psi(z - reach)) / (2 * reach)


def best_change(
    reads: Linear, slope: Tensor, through: Through, lacking: Tensor, solve_on: tuple[int, int]
) -> Change | None:
    """The change of all units' weights and constants that explains what is lacking.

    Args:
        reads: What the units read, at U positions.
        slope: (U, k), psi' there.
        through: What the consumer makes of them, at r positions.
        lacking: (r, O); its mean does not count, as the consumer's constant is refitted later.
        solve_on: How many of the r, and of the U, are solved for; on the others it must not grow.

    Returns:
        ``None`` where no change lessens what is lacking on the rows that are held out.
    """
    rows, places = solve_on

    def moves(change: Change) -> Tensor:
        """(r, O), less the mean over the rows that are solved for."""
        out = through((reads(change.weight) + change.constant) * slope)
        return out - out[:rows].mean(0)

    def adjoint(given: Tensor) -> Change:
        back = through.adjoint(given - given.mean(0), places) * slope[:places]
        return Change(reads.adjoint(back), back.sum(0))

    # How far the output moves with each unit, all rows together.
    weight = (slope[:places].square() * through.reach(places, rows)).sum(0)
    if not weight.any():
        return None
    weight = weight.clamp_min(1e-12 * weight.max())
    solve, variance = reads.preconditioner(places, RIDGE)
    ridge = Change((RIDGE * weight * variance)[:, None], _CONSTANT * weight)

    aim = lacking - lacking[:rows].mean(0)
    held = slice(rows, None)
    least = aim[held].square().sum()
    rest = adjoint(aim[:rows])
    best, found, step, product = None, rest.times(0.0), rest.times(0.0), weight.new_ones(())
    for _ in range(ITERATIONS):
        better = Change(solve(rest.weight) / weight[:, None], rest.constant / weight)
        before, product = product, rest.dot(better)
        if not product > 0:
            break
        step = better.plus(step.times(product / before))
        moved = moves(step)
        curved = adjoint(moved[:rows]).plus(
            Change(ridge.weight * step.weight, ridge.constant * step.constant)
        )
        size = product / step.dot(curved)
        found, rest = found.plus(step.times(size)), rest.plus(curved.times(-size))
        aim = aim - size * moved
        left = aim[held].square().sum()
        if not left < least:
            break
        least, best = left, found
    return best


def _pointwise(graph: Graph, chain: Chain, reads: Reads) -> _Psi:
    """What lies between a producer and its consumer, for some of the producer's outputs."""

    def psi(z: Tensor) -> Tensor:
        for step in chain.path:
            if step in reads.gates:
                z = z * reads.gates[step]
            elif is_norm(step):
                scale, shift = scale_and_shift(graph, step, torch.float32)
                z = z * scale[reads.units] + shift[reads.units]
            else:
                z = graph.execute(step, {input_of(step): z})
        return z

    return psi


def _ungrouped(layer: nn.Conv2d | nn.Linear) -> Tensor:
    """(O, I, ...) weights, zero for what an output's group does not read."""
    weight = layer.weight.detach()
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    if groups == 1:
        return weight
    found = weight.new_zeros(len(weight), groups * weight.shape[1], *weight.shape[2:])
    outputs, inputs = len(weight) // groups, weight.shape[1]
    for group, own in enumerate(weight.chunk(groups)):
        found[group * outputs :, group * inputs :][:outputs, :inputs] = own
    return found


def _power(lacking: Tensor) -> Tensor:
    return (lacking - lacking.mean(0)).square().sum()


def _before(image: Tensor, end: int) -> int:
    """How many of some positions, by image, lie on images before one."""
    return int(torch.searchsorted(image, end))
