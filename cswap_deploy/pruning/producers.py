"""Producer reconstruction: new weights for the units that stay, one unit at a time.

A layer that reads fewer units can only mix what they carry. The units themselves can carry more:
let ``h_c = psi(w_c x)`` be a unit, psi what lies between its producer and its consumer (batch norm,
activation), W_c the consumer's weights for it, and E what the consumer's output still lacks. To
first order in a change d of w_c

    E - W_c * (psi'(w_c x) . d x)

which is linear in d, so the best d is a ridge solution. W_c maps the taps of a kernel to outputs;
only its strongest directions are kept. Then the next unit is solved for on what is left, and at
last the consumer is refitted. A step is taken only if it also lessens what is lacking on images
that were held out. Nothing is differentiated but psi, numerically, at one point; no step follows a
gradient.

Source: least squares for one unit of a hidden layer at a time is backfitting, as in projection
pursuit regression: Friedman & Stuetzle, J. Am. Stat. Assoc. 76 (1981).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from cswap_deploy.network.graph import Graph
from cswap_deploy.network.nodes import input_of
from cswap_deploy.network.offsets import needs_bias, scale_and_shift, shift_output
from cswap_deploy.network.unfolding import Positions, laid_out, some_of, unfold, window_of
from cswap_deploy.network.units import depthwise

MAX_FEATURES = 1152
"""A producer whose units read more than this is left as it is: one unit would take seconds."""
RIDGE = 0.3
"""Ridge of a unit's change, as a fraction of the mean variance of what it reads. A tenth of it
follows the calibration images too closely, three times as much gains little (benchmarks/LOG.md)."""
_ROWS = 16_384
_MOST_BYTES = 256 << 20
"""Memory for the unfolded rows of one layer."""
DIRECTIONS = 2
"""Singular vectors of a kernel's taps; more cost time and gain nothing."""
HELD_OUT = 0.2
"""Part of the images that no change is solved for on."""
_ROUNDING = 1e-10
"""Part of the wanted variance (1e-5 in size) below which what is lacking is float32's rounding, of
either sign on another processor: following it would change weights for nothing."""
_POINTWISE = frozenset(
    {"relu", "relu6", "hardtanh", "hardswish", "hardsigmoid", "gelu", "silu", "mish", "sigmoid"}
    | {"tanh", "elu", "leaky_relu", "dropout", "clone", "contiguous"}
)


@dataclass(frozen=True, slots=True)
class Chain:
    """A layer, what happens to each of its outputs by itself, and the one layer that reads them."""

    producer: fx.Node
    producer_layer: str
    path: tuple[fx.Node, ...]
    """Between the two, in order."""
    consumer: fx.Node
    consumer_layer: str

    def run(self, graph: Graph, x: Tensor) -> Tensor:
        """The consumer's input, from the producer's."""
        env: dict[fx.Node, Any] = {input_of(self.producer): x}
        for node in (self.producer, *self.path):
            env[node] = graph.execute(node, env)
        found: Tensor = env[input_of(self.consumer)]
        return found


def _one_for_one(layer: nn.Module) -> bool:
    return depthwise(layer) and layer.in_channels == getattr(layer, "out_channels", None)


def find_chains(graph: Graph, consumers: Iterable[str]) -> list[Chain]:
    """The chains that end in some layers; layers that other things feed have none."""
    layers = {node: name for name in graph.layers() for node in graph.readers(name)}
    found = []
    for name in consumers:
        consumer = graph.readers(name)[0]
        path: list[fx.Node] = []
        node = input_of(consumer)
        while node not in layers and _by_itself(node):
            path.insert(0, node)
            node = input_of(node)
        if node not in layers or any(len(n.users) != 1 for n in (node, *path)):
            continue
        producer, layer = layers[node], graph.layer(layers[node])
        if (
            len(graph.readers(producer)) == 1
            and getattr(graph.layer(name), "groups", 1) == 1
            and (getattr(layer, "groups", 1) == 1 or _one_for_one(layer))
            and not needs_bias(graph, producer)
        ):
            found.append(Chain(node, producer, tuple(path), consumer, name))
    return found


@dataclass(frozen=True, slots=True)
class Target:
    """What a layer should give at some positions of its output."""

    where: Positions
    """R positions, images ascending."""
    values: Tensor
    """(R, O)."""


def reconstruct_producer(
    graph: Graph, chain: Chain, x: Tensor, target: Target, *, units: Tensor,
    inputs: Tensor | None = None,
) -> bool:  # fmt: skip
    """Give each remaining unit new weights, in place; returns whether anything was changed.

    Args:
        graph: Over the network to change.
        chain: From the layer to change to the layer that reads it, which has been refitted.
        x: The producer's input, for all images.
        target: Of the consumer; constants do not count.
        units: (k,) the outputs of the producer that are left.
        inputs: Those of the producer that are left; all unless given.
    """
    producer, consumer = graph.layer(chain.producer_layer), graph.layer(chain.consumer_layer)
    own = depthwise(producer)  # each unit reads an input of its own
    columns = slice(None) if inputs is None or own else inputs
    x = laid_out(x, producer)[..., columns]
    window, through = window_of(chain.producer, producer), window_of(chain.consumer, consumer)
    features = window.taps * (1 if own else x.shape[-1])
    if features > MAX_FEATURES:
        return False
    rows = some_of(len(target.where), min(_ROWS, _MOST_BYTES // (4 * through.taps * features)))
    where = target.where[rows]

    def unfolded(x: Tensor) -> tuple[Tensor, Tensor]:
        values, exists = unfold(x, where, window, through=through)
        return values.flatten(2), exists

    same, exists = unfolded(x[..., :1] if own else x)
    places = units.tolist()
    weight = producer.weight.detach()[units][:, columns].movedim(1, -1)
    shape, weight = weight.shape, weight.flatten(1)
    read = consumer.weight.detach()[:, units]
    work = _Reconstruction(
        (lambda k: unfolded(x[..., places[k], None])[0]) if own else (lambda _: same),
        exists.float(), _pointwise(graph, chain, units),
        read.reshape(*read.shape[:2], -1).permute(1, 2, 0),
    )  # fmt: skip
    if own:
        z = torch.stack([work.reads(k) @ w for k, w in enumerate(weight)], -1)
    else:
        z = same @ weight.T
    z = z + (0.0 if producer.bias is None else producer.bias.detach()[units])
    shift = work.solve(weight, z, target.values[rows], _to_solve_on(where.image))
    if shift is None:
        return False
    now = producer.weight.detach()[units]
    now[:, columns] = weight.view(shape).movedim(-1, 1)
    producer.weight[units] = now
    by = torch.zeros(producer.weight.shape[0])
    by[units] = shift
    shift_output(graph, chain.producer_layer, by)
    return True


_Psi = Callable[[Tensor, int | slice], Tensor]
"""(..., k) of some units, or (...) of one, to what their consumer reads."""


@dataclass(frozen=True, slots=True)
class _Reconstruction:
    """The units of one producer, at R rows and the S taps of what reads them."""

    reads: Callable[[int], Tensor]
    """Unit -> (R, S, F)."""
    exists: Tensor
    """(R, S) 1 or 0: outside the picture the consumer reads its own padding."""
    psi: _Psi
    read: Tensor
    """(k, S, O), the consumer's weights."""

    def solve(self, weight: Tensor, z: Tensor, wanted: Tensor, solve_on: int) -> Tensor | None:
        """Change the weights where that helps, in place.

        Args:
            weight: (k, F), of the units.
            z: (R, S, k), what they give; changed too.
            wanted: (R, O), of the consumer.
            solve_on: How many of the rows are solved for; the others are held out.

        Returns:
            (k,) what is added to each unit's constant; ``None`` where nothing was changed.
        """
        h = self.psi(z, slice(None)) * self.exists[..., None]
        lacking = wanted - torch.einsum("rsk,ksO->rO", h, self.read)
        if _power(lacking) <= _ROUNDING * _power(wanted):
            return None
        shift = torch.zeros(len(weight))
        changed = False
        for k in range(len(weight)):
            reads = self.reads(k)
            slope = _slope(self.psi, z[:solve_on, :, k], k) * self.exists[:solve_on]
            change = best_change(reads[:solve_on], slope, self.read[k], lacking[:solve_on])
            if change is None:
                continue
            new = z[..., k] + reads @ change[:-1] + change[-1]
            out = self.psi(new, k) * self.exists
            rest = lacking - (out - h[..., k]) @ self.read[k]
            if _power(rest[solve_on:]) < _power(lacking[solve_on:]):
                lacking, z[..., k], h[..., k] = rest, new, out
                weight[k] += change[:-1]
                shift[k] = change[-1]
                changed = True
        return shift if changed else None


def best_change(reads: Tensor, slope: Tensor, read: Tensor, lacking: Tensor) -> Tensor | None:
    """What to add to a unit's weights and constant.

    Args:
        reads: (R, S, F), what the unit reads for each of the S taps that read it.
        slope: (R, S), psi' there.
        read: (S, O), the consumer's weights.
        lacking: (R, O).

    Returns:
        (F + 1,), or ``None`` where the unit can do nothing.
    """
    left, sizes, right = torch.linalg.svd(read, full_matrices=False)
    few = min(DIRECTIONS, len(sizes))
    if sizes[0] == 0 or not slope.any():
        return None
    mixed = slope[:, None] * (left[:, :few] * sizes[:few]).T
    # The consumer's constant is refitted later: only what varies has to be explained.
    moves = _centred(torch.bmm(mixed, reads))
    constant = _centred(mixed.sum(2))[:, None]
    aims = _centred(lacking @ right[:few].T)[:, None]
    features = moves.shape[1]
    gram = torch.empty(features + 1, features + 1, dtype=torch.float64)
    gram[:-1, :-1] = moves.T @ moves
    gram[:-1, -1:] = moves.T @ constant
    gram[-1, :-1] = gram[:-1, -1]
    gram[-1, -1] = constant.square().sum()
    cross = torch.cat([moves.T @ aims, constant.T @ aims]).double()
    gram.diagonal().add_(RIDGE * gram.diagonal().mean().clamp_min(1e-20))
    solved, failed = torch.linalg.solve_ex(gram, cross)
    return None if failed else solved[:, 0].float()


def _centred(values: Tensor) -> Tensor:
    """(R, r, ...) -> (R * r, ...), without the mean over the rows."""
    return values.sub_(values.mean(0)).flatten(0, 1)


def _pointwise(graph: Graph, chain: Chain, units: Tensor) -> _Psi:
    """What lies between a producer and its consumer, for some of the producer's outputs."""
    steps = [
        [v[units] for v in scale_and_shift(graph, n, torch.float32)] if _is_norm(n) else n
        for n in chain.path
    ]

    def psi(z: Tensor, at: int | slice) -> Tensor:
        for step in steps:
            if isinstance(step, fx.Node):
                z = graph.execute(step, {input_of(step): z})
            else:
                z = z * step[0][at] + step[1][at]
        return z

    return psi


def _slope(psi: _Psi, z: Tensor, unit: int) -> Tensor:
    """psi' at z, by a difference."""
    reach = (1e-3 * z.std()).clamp_min(1e-6)
    return (psi(z + reach, unit) - psi(z - reach, unit)) / (2 * reach)


def _power(lacking: Tensor) -> Tensor:
    return (lacking - lacking.mean(0)).square().sum()


def _to_solve_on(image: Tensor) -> int:
    """How many of the rows belong to the first images; the others are held out."""
    images = int(image[-1]) + 1
    return int(torch.searchsorted(image, images - int(HELD_OUT * images)))


def _by_itself(node: fx.Node) -> bool:
    """Whether each output depends on the input at its own place only."""
    return _is_norm(node) or (
        node.op == "call_function"
        and len(node.all_input_nodes) == 1
        and str(node.target).split(".")[1].removesuffix("_") in _POINTWISE
    )


def _is_norm(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.batch_norm.default
