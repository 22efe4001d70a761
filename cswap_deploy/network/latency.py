"""Latency of a network from its widths: a model of one device, fitted to what its nodes take.

The dense network and a few narrowed in known ways are run on the device, with every node timed.
Each dimension of a node's values is then known as a function of one group's width: the only one
that changes as it does, rounded up where the runtime pads. A node takes

    a + b * multiply-accumulates + c * elements + d * inputs read
      + e * (multiply-accumulates, where what it reads is no multiple of eight)
      + f * (elements, where what it makes is padded),    all >= 0

with the same coefficients for all nodes of its kind (operator, kernel, size of the picture). So
what is bound by its launch, by arithmetic, by memory or by odd widths is each told for what it is.
What the whole call takes for each millisecond of its nodes is fitted too.

Source: latency of a network as a sum over what its layers take by themselves, measured: Cai et al.
2019, "ProxylessNAS" (arXiv:1812.00332), section 3.3.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import numpy as np

from cswap_deploy.network.units import Group
from cswap_deploy.records.latency import TimedGraph
from cswap_deploy.runtime.node_times import NodeTime

_FEATURES = 6
_DENSE_COUNTS = 5
_EVEN = 8
"""Kernels for inputs that are no multiple of this are slower."""
Widths = Mapping[str, int]
"""Group -> units that are left."""


@dataclass(frozen=True)
class LatencyModel:
    """Milliseconds of a call, for any widths. N nodes with at most D dimensions."""

    names: tuple[str, ...]
    groups: tuple[str, ...]
    which: np.ndarray
    """(N, D) which group's width each dimension follows."""
    slope: np.ndarray
    """(N, D): a dimension is its slope times the width, and a constant, rounded up."""
    constant: np.ndarray
    """(N, D)."""
    padded: np.ndarray
    """(N, D) to what multiple it is rounded up."""
    outer: np.ndarray
    """(N,) so many of the dimensions are the output's; the others are summed over."""
    coefficients: np.ndarray
    """(N, F) of :func:`_features`."""
    branch: np.ndarray
    """(N,) which group, a residual branch, takes the node along; -1 for none."""
    whole: tuple[float, float] = (1.0, 1.0)
    """What a call without the profiler takes for each millisecond of a node's constant part, most
    of which is the profiler's own, and of the rest."""

    def ms(self, widths: Widths) -> float:
        """Of a network with so many units left in each group."""
        return float(self.each(widths).sum())

    def each(self, widths: Widths) -> np.ndarray:
        """(N,) what the nodes take, ms."""
        left = np.array([widths.get(name, 1) for name in self.groups], dtype=float)
        there = np.where(self.branch < 0, 1.0, left[self.branch] > 0)
        parts = self.features(left) * self.coefficients * there[:, None]
        found: np.ndarray = self.whole[0] * parts[:, 0] + self.whole[1] * parts[:, 1:].sum(1)
        return found

    def by_layer(self, widths: Widths) -> dict[str, float]:
        """Module -> what its nodes take, ms, in the order in which they run."""
        found: dict[str, float] = defaultdict(float)
        for name, ms in zip(self.names, self.each(widths), strict=True):
            found[name.partition("/")[0].partition(">")[0]] += float(ms)
        return found

    def branch_ms(self, widths: Widths, gone: Collection[str]) -> float:
        """What the nodes of some residual branches take."""
        held = [self.groups[at] in gone if at >= 0 else False for at in self.branch]
        return float(self.each(widths)[held].sum())

    def features(self, left: np.ndarray) -> np.ndarray:
        """(N, F) of the nodes, for the units that are left in each group, (groups,)."""
        asked = self.slope * left[self.which] + self.constant
        return _features(asked, _rounded_up(asked, self.padded), self.outer)


def fit_latency(timed: Sequence[TimedGraph], groups: Sequence[Group]) -> LatencyModel:
    """A model of some networks of one architecture, the dense one first.

    Nodes that a narrowed network does not have are taken as they are in the others.

    Args:
        timed: Networks.
        groups: All groups of the architecture.
    """
    names = [node.name for node in timed[0].nodes]
    series = np.array([[t.widths.get(g.name, g.units) for t in timed] for g in groups], dtype=float)
    lookup = [_known(t.nodes, names) for t in timed]
    rows = [[each[name] for each in lookup if name in each] for name in names]
    dims = [[_dims(node) for node in nodes] for nodes in rows]
    most = max(len(d) for each in dims for d in each)
    shape = (len(names), most)
    which, slope = np.zeros(shape, dtype=np.int64), np.zeros(shape)
    constant, padded = np.ones(shape), np.ones(shape)
    outer = np.array([len(nodes[0].outputs[0]) if nodes[0].outputs else 0 for nodes in rows])
    kinds: dict[object, list[int]] = defaultdict(list)
    for at, name in enumerate(names):
        seen = [k for k, each in enumerate(lookup) if name in each]
        near = _near(name, groups)
        for d in range(min(map(len, dims[at]))):
            values = np.array([sizes[d] for sizes in dims[at]], dtype=float)
            which[at, d], slope[at, d], constant[at, d], padded[at, d] = _follows(
                values, series[:, seen], near
            )
        kinds[_kind(rows[at][0], slope[at])].append(at)
    model = LatencyModel(
        tuple(names), tuple(g.name for g in groups), which, slope, constant, padded, outer,
        np.zeros((len(names), _FEATURES)), np.array([_branch(name, groups) for name in names]),
    )  # fmt: skip
    features = [model.features(left) for left in series.T]
    for alike in kinds.values():
        met = [
            (own[at], each[names[at]].ms)
            for at in alike
            for own, each in zip(features, lookup, strict=True)
            if names[at] in each
        ]
        known, times = map(np.array, zip(*met, strict=True))
        model.coefficients[alike] = _nonnegative(known, times)
    alone = [replace(model, whole=part) for part in ((1.0, 0.0), (0.0, 1.0))]
    # Speed-ups are fractions of the dense network's call, so that one counts more.
    calls = [*[timed[0]] * (_DENSE_COUNTS - 1), *timed]
    parts = np.array([[m.ms(t.widths) for m in alone] for t in calls])
    first, second = _nonnegative(parts, np.array([t.ms for t in calls]))
    return replace(model, whole=(float(first), float(second)))


def _known(nodes: Sequence[NodeTime], names: Sequence[str]) -> dict[str, NodeTime]:
    """Name -> node; what the dense network does not have counts as the node that it follows.

    With odd widths a runtime puts in changes of layout, for one.
    """
    found: dict[str, NodeTime] = {}
    own = set(names)
    for node in nodes:
        name = node.name if node.name in own else node.name.partition(">")[0]
        if name in found:
            found[name] = found[name]._replace(ms=found[name].ms + node.ms)
        elif name in own:
            found[name] = node
    return found


def _features(asked: np.ndarray, sizes: np.ndarray, outer: np.ndarray) -> np.ndarray:
    """(N, F) of nodes whose dimensions are ``asked``, rounded up to ``sizes``, both (N, D)."""
    rows, place = np.arange(len(sizes)), np.arange(sizes.shape[1])
    elements = np.where(place < outer[:, None], sizes, 1.0).prod(1)
    macs = sizes.prod(1)
    product = macs > elements
    made = np.where(outer == 4, 1, np.maximum(outer - 1, 0))
    odd = product & (sizes[rows, np.minimum(outer, sizes.shape[1] - 1)] % _EVEN > 0)
    padded = sizes[rows, made] > asked[rows, made] + 1e-6
    read = np.where(product, macs / np.maximum(sizes[rows, made], 1), 0.0)
    return np.stack([np.ones(len(sizes)), macs, elements, read, macs * odd, elements * padded], 1)


def _kind(node: NodeTime, slope: np.ndarray) -> object:
    """Nodes whose times follow the same law."""
    fixed = tuple(d for d, s in zip(_dims(node), slope, strict=False) if s == 0 and d > 1)
    return node.op, len(node.inputs), fixed if "Conv" in node.op else (fixed, node.name)


def _dims(node: NodeTime) -> list[int]:
    """Of the first output; then of a filter all but its outputs, or what a product sums over."""
    out = list(node.outputs[0]) if node.outputs else []
    if len(node.inputs) < 2:
        return out
    x, other = node.inputs[:2]
    if "Conv" in node.op and len(other) > 2:
        return [*out, *other[1:]]
    if any(kind in node.op for kind in ("MatMul", "Gemm", "Attention")) and len(x) > 1:
        return [*out, x[-1]]
    return out


def _follows(
    values: np.ndarray, series: np.ndarray, near: Sequence[int]
) -> tuple[int, float, float, float]:
    """The group whose width a dimension follows: (which, slope, constant, padded to)."""
    if np.ptp(values) == 0:
        return 0, 0.0, float(values[0]), 1.0
    best, found = np.inf, (0, 0.0, float(values[0]), 1.0)
    for at in sorted(range(len(series)), key=near.__getitem__):
        if np.ptp(series[at]) == 0:
            continue
        slope, constant = np.polyfit(series[at], values, 1)
        # What is padded is a whole multiple of the width before.
        whole = max(1.0, np.round(values.max() / series[at].max()))
        for a, c, pad in ((slope, constant, 1.0), (whole, 0.0, 8.0), (whole, 0.0, 16.0)):
            expected = a * series[at] + c
            expected = expected if pad == 1 else _rounded_up(expected, pad)
            off = float(np.abs(expected - values).max())
            if off < best - 1e-6 and a > 0:
                best, found = off, (at, float(a), float(c), pad)
        if best < 1e-6:
            break
    which, slope, constant, pad = found
    return which, round(slope, 9), round(constant, 6), pad


def _near(name: str, groups: Sequence[Group]) -> list[int]:
    """For each group how little its name shares with a node's: of two that fit, the nearer."""
    own = name.partition("/")[0].split(".")

    def shared(layer: str) -> int:
        pairs = zip(own, layer.split("."), strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    layers = [(group.name, *(reader.layer for reader in group.consumers)) for group in groups]
    return [-max(map(shared, names)) for names in layers]


def _branch(name: str, groups: Sequence[Group]) -> int:
    """Which group, a residual branch, takes a node along; -1 for none."""
    scope = name.partition("/")[0]
    held = (at for at, g in enumerate(groups) if g.kind == "branch" and g.holds(scope))
    return max(held, default=-1)


def _rounded_up(sizes: np.ndarray, to: np.ndarray | float) -> np.ndarray:
    found: np.ndarray = np.ceil(sizes / to - 1e-6) * to
    return found


def _nonnegative(features: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Coefficients that are no less than zero; errors count as noise that grows with time."""
    from scipy.optimize import nnls

    scale = features.max(0)
    scale[scale == 0] = 1.0
    weight = np.maximum(times, 1e-6) ** -0.5
    found, _ = nnls(features / scale * weight[:, None], times * weight)
    result: np.ndarray = found / scale
    return result
