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

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, fx, nn

from cswap_deploy.network.graph import Graph
from cswap_deploy.network.nodes import input_of
from cswap_deploy.network.offsets import scale_and_shift, shift_output
from cswap_deploy.network.placing import placed
from cswap_deploy.network.unfolding import Positions, Window, laid_out, some_of, unfold, window_of
from cswap_deploy.network.units import depthwise
from cswap_deploy.pruning.chains import Chain, is_norm

MAX_FEATURES = 1152
"""A producer whose units read more than this is left as it is: the covariance of what they read
would be known from too few rows."""
RIDGE = 0.3
"""Ridge of a unit's change, as a fraction of the mean variance of what it reads, times how far the
consumer's output moves with it. A third and three times as much are equal (benchmarks/LOG.md)."""
ITERATIONS = 10
"""Of conjugate gradients. Half as many cost quality, three times as many gain little."""
_ROWS = 16_384
_MOST_BYTES = 256 << 20
"""Memory for the unfolded rows of one layer."""
_STEPS = 1.0, 0.5, 0.25
"""Parts of the change that are tried."""
_CONSTANT = 1e-6
"""Ridge of the constants, which only keeps the problem solvable."""
HELD_OUT = 0.2
"""Part of the images that no change is solved for on."""
_ROUNDING = 1e-10
"""Part of the wanted variance (1e-5 in size) below which what is lacking is float32's rounding, of
either sign on another processor: following it would change weights for nothing."""


Solve = Callable[[Tensor], Tensor]
"""(k, F) -> (k, F)."""


class Linear(Protocol):
    """What the k units of a producer read at some rows, as a linear map of their weights."""

    def __call__(self, weight: Tensor) -> Tensor:
        """(k, F) weights -> (n, k) what they give at all rows."""

    def adjoint(self, given: Tensor) -> Tensor:
        """(n, k) -> (k, F), over the first n rows."""

    def preconditioner(self, rows: int, ridge: float) -> tuple[Solve, Tensor]:
        """What solves with the damped covariance of the first rows, and their mean variance.

        The damping is a part of that variance, which is () or (k,).
        """


@dataclass(frozen=True, slots=True)
class SharedInputs:
    """All units read the same: (n, F)."""

    values: Tensor

    def __call__(self, weight: Tensor) -> Tensor:
        """See :class:`Linear`."""
        return self.values @ weight.T

    def adjoint(self, given: Tensor) -> Tensor:
        """See :class:`Linear`."""
        return given.T @ self.values[: len(given)]

    def preconditioner(self, rows: int, ridge: float) -> tuple[Solve, Tensor]:
        """See :class:`Linear`."""
        factor, variance = _factored(self.values[: rows : max(1, rows // _ROWS)], ridge)
        return lambda g: torch.cholesky_solve(g.T.double(), factor).T.float(), variance


@dataclass(frozen=True, slots=True)
class OwnInputs:
    """Each unit reads an input of its own: (F, n, k)."""

    values: Tensor

    def __call__(self, weight: Tensor) -> Tensor:
        """See :class:`Linear`."""
        found = self.values[0] * weight[:, 0]
        for tap, values in enumerate(self.values[1:], 1):
            found.addcmul_(values, weight[:, tap])
        return found

    def adjoint(self, given: Tensor) -> Tensor:
        """See :class:`Linear`."""
        return torch.stack([(v[: len(given)] * given).sum(0) for v in self.values], 1)

    def preconditioner(self, rows: int, ridge: float) -> tuple[Solve, Tensor]:
        """See :class:`Linear`."""
        some = self.values[:, : rows : max(1, rows // _ROWS)].permute(2, 1, 0)
        factor, variance = _factored(some, ridge)
        return (
            lambda g: torch.cholesky_solve(g[..., None].double(), factor)[..., 0].float(),
            variance,
        )


def _factored(rows: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """(..., n, F) rows -> the Cholesky factor of their damped covariance, and its mean variance."""
    rows = rows - rows.mean(-2, keepdim=True)
    covariance = (rows.mT @ rows).double() / rows.shape[-2]
    diagonal = covariance.diagonal(dim1=-2, dim2=-1)
    variance = diagonal.mean(-1).clamp_min(1e-20)
    diagonal.add_(ridge * variance[..., None])
    return torch.linalg.cholesky(covariance), variance.float()


def rows_for(each: int) -> int:
    """How many rows of so many unfolded numbers a reconstruction uses."""
    return max(1, min(_ROWS, _MOST_BYTES // (4 * each)))


@dataclass(slots=True)
class Reads:
    """What the units of a producer read, at some rows and the S taps of what reads them."""

    rows: Tensor
    """(r,) which of the consumer's positions, ascending."""
    units: Tensor
    """(k,) the outputs of the producer that are left."""
    columns: Tensor | slice
    """The inputs of the producer that are left."""
    own: bool
    """Whether each unit reads an input of its own."""
    layer: nn.Conv2d | nn.Linear
    window: Window
    through: Window
    """Of the consumer."""
    solve_on: int
    """How many of the rows are solved for; the others, of the last images, are held out."""
    values: Tensor
    """(r * S, F), or (F, r * S, k) where each unit reads its own."""
    exists: Tensor
    """(r, S) 1 or 0: outside the picture the consumer reads its own padding."""
    gates: Mapping[fx.Node, Tensor]
    """(r, 1, k) what each gate of the chain scales the units by."""

    @classmethod
    def of(
        cls, graph: Graph, chain: Chain, where: Positions, units: Tensor, inputs: Tensor | None
    ) -> Reads | None:
        """Room for what a chain's producer reads; ``None`` where that is too much.

        Args:
            graph: Over the network to change.
            chain: From the layer to change to the layer that reads it.
            where: Positions of the latter, by item.
            units: (k,) the outputs of the producer that are left.
            inputs: Those of the producer that are left; all unless given.
        """
        layer, consumer = graph.layer(chain.producer_layer), graph.layer(chain.consumer_layer)
        own, device = depthwise(layer), graph.device
        units = placed(units, device)
        columns: Tensor | slice = slice(None) if inputs is None or own else placed(inputs, device)
        window, through = window_of(chain.producer, layer), window_of(chain.consumer, consumer)
        reads = 1 if own else layer.weight.shape[1] if inputs is None else len(inputs)
        features = window.taps * reads
        if features > MAX_FEATURES:
            return None
        each = through.taps * features * (len(units) if own else 1)
        rows = some_of(len(where), rows_for(each))
        count = len(rows) * through.taps
        shape = (window.taps, count, len(units)) if own else (count, features)
        return cls(
            rows, units, columns, own, layer, window, through,
            _to_solve_on(where.image[rows]),
            layer.weight.new_empty(shape), layer.weight.new_empty(len(rows), through.taps),
            {gate: layer.weight.new_empty(len(rows), 1, len(units)) for gate in chain.gates},
        )  # fmt: skip

    def take(self, x: Tensor, part: slice, where: Positions) -> None:
        """Note what is read on some images.

        Args:
            x: The producer's input there.
            part: Which of the consumer's positions lie there.
            where: Those positions, counted from the first of the images.
        """
        rows, mine = self._within(part, x)
        x = laid_out(x, self.layer)[..., self.units if self.own else self.columns]
        values, exists = unfold(x, where[mine], self.window, through=self.through)
        self.exists[rows] = exists.to(self.exists.dtype)
        taps = self.through.taps
        at = slice(rows.start * taps, rows.stop * taps)
        if self.own:
            self.values[:, at] = values.flatten(0, 1).movedim(1, 0)
        else:
            self.values[at] = values.flatten(2).flatten(0, 1)

    def take_gate(self, gate: fx.Node, value: Tensor, part: slice, where: Positions) -> None:
        """Note what a gate of the chain (N, C, 1, 1) is on some images; see :meth:`take`."""
        rows, mine = self._within(part, value)
        images = where.image[mine]
        self.gates[gate][rows, 0] = value.flatten(1)[images][:, self.units]

    def _within(self, part: slice, value: Tensor) -> tuple[slice, Tensor]:
        """Which rows lie at some of the positions; and where among those."""
        begin, end = torch.searchsorted(self.rows, torch.tensor([part.start, part.stop])).tolist()
        return slice(begin, end), placed(self.rows[begin:end] - part.start, value.device)

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
    """The units of a producer, and what they give, (r, S, k), with the weights as they are."""
    producer, consumer = graph.layer(chain.producer_layer), graph.layer(chain.consumer_layer)
    weight = producer.weight.detach()[reads.units][:, reads.columns].movedim(1, -1).flatten(1)
    read = _ungrouped(consumer)[:, reads.units]
    z = reads.linear(weight)
    if producer.bias is not None:
        z += producer.bias.detach()[reads.units]
    work = _Reconstruction(
        reads.linear, reads.exists, _pointwise(graph, chain, reads),
        read.reshape(*read.shape[:2], -1).permute(2, 1, 0), reads.solve_on,
    )  # fmt: skip
    return work, z.view(*reads.exists.shape, -1)


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
    """The units of one producer, at r rows and the S taps of what reads them."""

    reads: Linear
    exists: Tensor
    """(r, S)."""
    psi: _Psi
    read: Tensor
    """(S, k, O), the consumer's weights."""
    solve_on: int
    """The first rows; the others are held out."""

    def change(self, z: Tensor, wanted: Tensor) -> Change | None:
        """What to add to the units' weights and constants; ``None`` where nothing helps.

        Args:
            z: (r, S, k), what the units give.
            wanted: (r, O), of the consumer.
        """
        lacking, least = self.lacking(z, wanted)
        if _power(lacking) <= _ROUNDING * _power(wanted):
            return None
        change = best_change(self.reads, self._slope(z), self.read, lacking, self.solve_on)
        if change is None:
            return None
        moved = (self.reads(change.weight) + change.constant).view(z.shape)
        best = None
        for part in _STEPS:
            _, rest = self.lacking(z + part * moved, wanted)
            if rest < least:
                least, best = rest, part
        return None if best is None else change.times(best)

    def lacking(self, z: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """(r, O), of what the consumer makes of z, and how much of it is on rows held out."""
        found = wanted - self._out(z)
        return found, _power(found[self.solve_on :])

    def _out(self, z: Tensor) -> Tensor:
        """(r, O), what the consumer makes of it, without its constant."""
        h = self.psi(z) * self.exists[..., None]
        return h.flatten(1) @ self.read.flatten(0, 1)

    def _slope(self, z: Tensor) -> Tensor:
        """(r, S, k), psi' at z, by a difference; zero where the consumer reads its padding."""
        reach = (1e-3 * z.std((0, 1))).clamp_min(1e-6)
        rise = (self.psi(z + reach) - self.psi(z - reach)) / (2 * reach)
        return rise * self.exists[..., None]


def best_change(
    reads: Linear, slope: Tensor, read: Tensor, lacking: Tensor, solve_on: int
) -> Change | None:
    """The change of all units' weights and constants that explains what is lacking.

    Args:
        reads: What the units read, at r rows and S taps.
        slope: (r, S, k), psi' there.
        read: (S, k, O), the consumer's weights.
        lacking: (r, O); its mean does not count, as the consumer's constant is refitted later.
        solve_on: How many rows are solved for; on the others it must not grow.

    Returns:
        ``None`` where no change lessens what is lacking on the rows that are held out.
    """
    mixing = read.flatten(0, 1)

    def moves(change: Change) -> Tensor:
        """(r, O), less the mean over the rows that are solved for."""
        moved = (reads(change.weight) + change.constant).view(slope.shape) * slope
        out = moved.flatten(1) @ mixing
        return out - out[:solve_on].mean(0)

    def adjoint(given: Tensor) -> Change:
        back = (given - given.mean(0)) @ mixing.T
        back = (back.view(-1, *slope.shape[1:]) * slope[: len(given)]).flatten(0, 1)
        return Change(reads.adjoint(back), back.sum(0))

    # How far the output moves with each unit, all rows together.
    weight = (slope[:solve_on].square() * read.square().sum(2)).sum((0, 1))
    if not weight.any():
        return None
    weight = weight.clamp_min(1e-12 * weight.max())
    solve, variance = reads.preconditioner(solve_on * slope.shape[1], RIDGE)
    ridge = Change((RIDGE * weight * variance)[:, None], _CONSTANT * weight)

    aim = lacking - lacking[:solve_on].mean(0)
    held = slice(solve_on, None)
    least = aim[held].square().sum()
    rest = adjoint(aim[:solve_on])
    best, found, step, product = None, rest.times(0.0), rest.times(0.0), weight.new_ones(())
    for _ in range(ITERATIONS):
        better = Change(solve(rest.weight) / weight[:, None], rest.constant / weight)
        before, product = product, rest.dot(better)
        if not product > 0:
            break
        step = better.plus(step.times(product / before))
        moved = moves(step)
        curved = adjoint(moved[:solve_on]).plus(
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


def _to_solve_on(image: Tensor) -> int:
    """How many of the rows belong to the first images; the others are held out."""
    images = int(image[-1]) + 1
    return int(torch.searchsorted(image, images - int(HELD_OUT * images)))
