"""What the units that stay can take over: their own weights solved again, one unit at a time.

A layer that reads fewer units can only mix what they carry. The units themselves can carry more:
let ``h_c = psi(w_c x)`` be a unit, psi what lies between its producer and its consumer (batch norm,
activation), W_c the consumer's weights for it, and E what the consumer's output still lacks. To
first order in a change d of w_c

    E - W_c * (psi'(w_c x) . d x)

which is linear in d, so the best d is a ridge solution. W_c maps the taps of a kernel to outputs;
only its strongest directions are kept. Then the next unit is solved on what is left, and at last
the consumer again. A step is taken only if it also lessens what is lacking on images it was not
solved on. Nothing is differentiated but psi, numerically, at one point; no step follows a gradient.

Source: least squares for one unit of a hidden layer at a time is backfitting, as in projection
pursuit regression: Friedman & Stuetzle, J. Am. Stat. Assoc. 76 (1981).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from cswap_deploy.network.graph import Graph
from cswap_deploy.network.offsets import needs_bias, shift_output
from cswap_deploy.network.unfolding import Geometry, Positions, geometry, laid_out, seen
from cswap_deploy.network.units import Consumer, depthwise

MAX_FEATURES = 1152
"""A producer whose units read more than this is left as it is: one solution would take seconds."""
_RIDGE = 0.3
"""Of a unit's change, as a fraction of the mean variance of what it reads. A tenth of it follows
the calibration images too closely, three times as much gives away little (benchmarks/LOG.md)."""
_ROWS = 16_384
_MOST_BYTES = 256 << 20
"""What the rows of one layer may take."""
_DIRECTIONS = 2
"""Of a kernel's taps; more cost time and gain nothing."""
_JUDGES = 0.2
"""Part of the images that only judge."""
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

    @property
    def source(self) -> fx.Node:
        """What the producer reads."""
        return _input_of(self.producer)

    @property
    def end(self) -> fx.Node:
        """What the consumer reads."""
        return _input_of(self.consumer)

    def run(self, graph: Graph, x: Tensor) -> Tensor:
        """The consumer's input, from the producer's."""
        env: dict[fx.Node, Any] = {self.source: x}
        for node in (self.producer, *self.path):
            env[node] = graph.execute(node, env)
        found: Tensor = env[self.end]
        return found


def find_chains(graph: Graph, consumers: Iterable[str]) -> list[Chain]:
    """The chains that end in some layers; layers that other things feed have none."""
    layers = {node: name for name in graph.layers() for node in graph.readers(name)}
    found = []
    for name in consumers:
        consumer = graph.readers(name)[0]
        path: list[fx.Node] = []
        node = _input_of(consumer)
        while node not in layers and _by_itself(node):
            path.insert(0, node)
            node = _input_of(node)
        if (
            node in layers
            and all(len(n.users) == 1 for n in (node, *path))
            and len(graph.readers(layers[node])) == 1
            and _groups(graph, name) == 1
            and (_groups(graph, layers[node]) == 1 or depthwise(_layer(graph, layers[node])))
            and not needs_bias(graph, layers[node])
        ):
            found.append(Chain(node, layers[node], tuple(path), consumer, name))
    return found


def take_over(
    graph: Graph,
    chain: Chain,
    x: Tensor,
    units: Tensor,
    where: Positions,
    wanted: Tensor,
    *,
    inputs: Tensor | None = None,
) -> bool:
    """Solve each remaining unit's weights again, in place.

    Args:
        graph: Over the network to change.
        chain: From the layer to change to the layer that reads it, which has been solved.
        x: The producer's input, for all images.
        units: (k,) the outputs of the producer that are left.
        where: R positions of the consumer's output, images ascending.
        wanted: (R, O), what it should be there; constants do not count.
        inputs: Those of the producer that are left; all unless said.

    Returns:
        Whether anything was changed.
    """
    producer, consumer = _layer(graph, chain.producer_layer), _layer(graph, chain.consumer_layer)
    look = geometry(chain.producer, producer)
    through = geometry(chain.consumer, consumer)
    own = depthwise(producer)
    x = laid_out(x, producer)
    columns = slice(None) if inputs is None or own else inputs
    x = x if inputs is None or own else x[..., inputs]
    features = look.taps * (1 if own else x.shape[-1])
    if features > MAX_FEATURES:
        return False
    rows = _some(len(where), min(_ROWS, _MOST_BYTES // (4 * through.taps * features)))
    sight = _Sight(x, where[rows], look, through, own)
    weight = producer.weight.detach()[units][:, columns].movedim(1, -1)
    shape, weight = weight.shape, weight.flatten(1)
    bias = 0.0 if producer.bias is None else producer.bias.detach()[units]
    if own:
        z = torch.stack([sight(c) @ w for c, w in zip(units.tolist(), weight, strict=True)], -1)
    else:
        z = sight(0) @ weight.T
    z = z + bias
    psi = _Pointwise(graph, chain, units)
    # Outside the picture the consumer reads its own padding, whatever the unit would say there.
    exists = sight.exists.float()
    h = psi(z) * exists[..., None]
    read = _as_columns(consumer, units)
    lacking = wanted[rows] - torch.einsum("rsk,ksO->rO", h, read)
    if _power(lacking) <= _ROUNDING * _power(wanted[rows]):
        return False
    solve_on = _to_solve_on(where.image[rows])
    shift = torch.zeros(len(units))
    changed = False
    for k, c in enumerate(units.tolist()):
        change = _best_change(
            sight(c)[:solve_on],
            (psi.slope(z[:solve_on, :, k], k) * exists[:solve_on]),
            read[k],
            lacking[:solve_on],
        )
        if change is None:
            continue
        new = z[..., k] + sight(c) @ change[:-1] + change[-1]
        out = psi(new, k) * exists
        rest = lacking - (out - h[..., k]) @ read[k]
        if _power(rest[solve_on:]) < _power(lacking[solve_on:]):
            lacking, z[..., k], h[..., k] = rest, new, out
            weight[k] += change[:-1]
            shift[k] = change[-1]
            changed = True
    now = producer.weight.detach()[units]
    now[:, columns] = weight.view(shape).movedim(-1, 1)
    producer.weight[units] = now
    by = torch.zeros(producer.weight.shape[0])
    by[units] = shift
    shift_output(graph, chain.producer_layer, by)
    return changed


def _best_change(sees: Tensor, slope: Tensor, read: Tensor, lacking: Tensor) -> Tensor | None:
    """What to add to a unit's weights and constant.

    Args:
        sees: (R, S, F), what the unit reads for each of the S taps that read it.
        slope: (R, S), psi' there.
        read: (S, O), the consumer's weights.
        lacking: (R, O).

    Returns:
        (F + 1,), or ``None`` where the unit can do nothing.
    """
    left, sizes, right = torch.linalg.svd(read, full_matrices=False)
    few = min(_DIRECTIONS, len(sizes))
    if sizes[0] == 0 or not slope.any():
        return None
    mixed = slope[:, None] * (left[:, :few] * sizes[:few]).T
    # The consumer's constant is solved later: only what varies has to be explained.
    moves = _centred(torch.bmm(mixed, sees))
    constant = _centred(mixed.sum(2))[:, None]
    aims = _centred(lacking @ right[:few].T)[:, None]
    features = moves.shape[1]
    gram = torch.empty(features + 1, features + 1, dtype=torch.float64)
    gram[:-1, :-1] = moves.T @ moves
    gram[:-1, -1:] = moves.T @ constant
    gram[-1, :-1] = gram[:-1, -1]
    gram[-1, -1] = constant.square().sum()
    cross = torch.cat([moves.T @ aims, constant.T @ aims]).double()
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean().clamp_min(1e-20))
    solved, failed = torch.linalg.solve_ex(gram, cross)
    return None if failed else solved[:, 0].float()


def _centred(values: Tensor) -> Tensor:
    """(R, r, ...) -> (R * r, ...), without the mean over the rows."""
    return values.sub_(values.mean(0)).flatten(0, 1)


class _Sight:
    """What each unit reads, at the positions that its reader asks for."""

    def __init__(
        self, x: Tensor, where: Positions, look: Geometry, through: Geometry, own: bool
    ) -> None:
        self._x, self._where, self._look, self._through = x, where, look, through
        found, self.exists = self._look_at(0) if own else self._look_at(None)
        self._same = None if own else found

    def __call__(self, unit: int) -> Tensor:
        """(R, S, F)."""
        return self._look_at(unit)[0] if self._same is None else self._same

    def _look_at(self, channel: int | None) -> tuple[Tensor, Tensor]:
        x = self._x if channel is None else self._x[..., channel : channel + 1]
        values, exists = seen(x, self._where, self._look, through=self._through)
        return values.reshape(len(exists), exists.shape[1], -1), exists


class _Pointwise:
    """What lies between a producer and its consumer, for some of the producer's outputs."""

    def __init__(self, graph: Graph, chain: Chain, units: Tensor) -> None:
        self._graph = graph
        self._steps: list[fx.Node | tuple[Tensor, Tensor]] = []
        for node in chain.path:
            if not _is_norm(node):
                self._steps.append(node)
                continue
            weight, bias, mean, var = (
                None if a is None else graph.value(a, {}).detach()[units]  # type: ignore[arg-type]
                for a in node.args[1:5]
            )
            assert mean is not None
            assert var is not None
            scale = (var + node.args[7]).rsqrt()
            scale = scale if weight is None else scale * weight
            shift = -mean * scale
            self._steps.append((scale, shift if bias is None else shift + bias))

    def __call__(self, z: Tensor, unit: int | None = None) -> Tensor:
        """Of (..., k), or of (...) for one unit."""
        at = slice(None) if unit is None else unit
        for step in self._steps:
            if isinstance(step, fx.Node):
                z = self._graph.execute(step, {_input_of(step): z})
            else:
                z = z * step[0][at] + step[1][at]
        return z

    def slope(self, z: Tensor, unit: int) -> Tensor:
        """psi' at z, by a difference."""
        reach = (1e-3 * z.std()).clamp_min(1e-6)
        return (self(z + reach, unit) - self(z - reach, unit)) / (2 * reach)


def _power(lacking: Tensor) -> Tensor:
    return (lacking - lacking.mean(0)).square().sum()


def _some(count: int, most: int) -> Tensor:
    if count <= most:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:most].sort().values


def _to_solve_on(image: Tensor) -> int:
    """How many of the rows belong to the first images, which are solved on; the others judge."""
    images = int(image[-1]) + 1
    return int(torch.searchsorted(image, images - int(_JUDGES * images)))


def _as_columns(consumer: Consumer, units: Tensor) -> Tensor:
    """(k, S, O)."""
    weight = consumer.weight.detach()[:, units]
    return weight.reshape(*weight.shape[:2], -1).permute(1, 2, 0)


def _by_itself(node: fx.Node) -> bool:
    """Whether each output depends on the input at its own place only."""
    return _is_norm(node) or (
        node.op == "call_function"
        and len(node.all_input_nodes) == 1
        and str(node.target).split(".")[1].removesuffix("_") in _POINTWISE
    )


def _is_norm(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.batch_norm.default


def _layer(graph: Graph, name: str) -> Consumer:
    layer = graph.module.get_submodule(name)
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    return layer


def _groups(graph: Graph, name: str) -> int:
    return getattr(_layer(graph, name), "groups", 1)


def _input_of(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source
