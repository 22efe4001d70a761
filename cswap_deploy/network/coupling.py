"""Labels for what can leave a network, and which of them must leave together.

Every index along a weight's dimension has a label, and so has every element of another parameter.
A value is a box of labels: removing a unit must take whole hyperplanes out of every value that it
reaches, or the network would not run any more. Labels that meet in one element leave together
(a union-find over links); a label that meets what cannot shrink is blocked, with a reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

FIXED = 0
"""The label of elements that stay."""
_MEETS = "meets values whose size is fixed"
_BROADCAST = "is spread over the channels of another layer"


@dataclass(frozen=True, slots=True)
class Value:
    """The labels of one value of the graph."""

    labels: Tensor
    """int64, as many dimensions as the value; 1 along those where labels do not differ."""
    shape: tuple[int, ...]
    """Of the value."""

    @classmethod
    def of(cls, labels: Tensor) -> Value:
        """From one label for each element."""
        return cls(compressed(labels), tuple(labels.shape))

    @classmethod
    def fixed(cls, shape: Sequence[int]) -> Value:
        """Of a value in which nothing can be removed."""
        return cls(torch.zeros([1] * len(shape), dtype=torch.int64), tuple(shape))

    @property
    def full(self) -> Tensor:
        """One label for each element; no memory is taken for repeated ones."""
        return self.labels.expand(self.shape)

    def varies(self, dims: Sequence[int]) -> bool:
        """Whether labels differ along any of some dimensions."""
        return any(self.labels.shape[d] > 1 for d in dims)


def compressed(labels: Tensor) -> Tensor:
    """The same labels, with size 1 along dimensions where they do not differ."""
    for dim, size in enumerate(labels.shape):
        if size > 1:
            first = labels.narrow(dim, 0, 1)
            if labels.stride(dim) == 0 or bool((labels == first).all()):
                labels = first
    return labels


@dataclass(frozen=True, slots=True)
class Read:
    """A layer that reads labels through a weight, where they can be cut."""

    layer: str
    labels: Tensor
    """(I,) of its inputs."""


@dataclass(frozen=True, slots=True)
class Product:
    """A product of two activations, such as an attention's scores."""

    labels: Tensor
    macs: int
    """Multiply-accumulates for one image."""


@dataclass(frozen=True, slots=True)
class Spelled:
    """A value whose shape is written in the forward of a module, or computed there."""

    module: str
    value: Value


@dataclass(slots=True)
class Coupling:
    """What was found while a graph was followed; see :mod:`network.follow`."""

    axes: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    """(tensor, dimension) -> (size,) labels of a weight's outputs or inputs."""
    cells: dict[str, Tensor] = field(default_factory=dict)
    """Other parameter or buffer -> a label for each element."""
    reads: list[Read] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    boxes: list[Tensor] = field(default_factory=list)
    """Labels of values that may differ along more than one dimension."""
    spelled: list[Spelled] = field(default_factory=list)
    _count: int = 1
    _links: list[Tensor] = field(default_factory=list)
    _blocked: list[tuple[Tensor, str]] = field(default_factory=list)
    _tied: list[tuple[Tensor, str]] = field(default_factory=list)
    _open: list[tuple[Value, Value]] = field(default_factory=list)
    """Pairs of which one is repeated along a dimension that the other differs along: whether they
    are coupled shows when all else is known."""

    def axis(self, tensor: str, dim: int, size: int) -> Tensor:
        """(size,) labels along a dimension of a weight."""
        key = (tensor, dim)
        if key not in self.axes:
            self.axes[key] = self._new(size)
        return self.axes[key]

    def cell(self, tensor: str, shape: Sequence[int]) -> Value:
        """A label for each element of a parameter or buffer."""
        if tensor not in self.cells:
            size = int(np.prod(shape))
            self.cells[tensor] = self._new(size).view(*shape)
        return Value.of(self.cells[tensor])

    def _new(self, size: int) -> Tensor:
        found = torch.arange(self._count, self._count + size)
        self._count += size
        return found

    def block(self, labels: Tensor, reason: str) -> None:
        """These cannot be removed; no reason for what only makes the output."""
        labels = torch.unique(labels)
        labels = labels[labels != FIXED]
        if len(labels):
            self._blocked.append((labels, reason))

    def tie(self, value: Value, dims: Iterable[int], reason: str) -> Value:
        """What lies along some dimensions leaves together, as where it is added up or normalised.

        Returns:
            The value, with labels that do not differ along them.
        """
        labels = value.labels
        for dim in dims:
            if labels.shape[dim] > 1:
                self.link(labels, labels.narrow(dim, 0, 1))
                self._tied.append((labels.reshape(-1), reason))
                labels = labels.narrow(dim, 0, 1)
        return Value(labels, value.shape)

    def link(self, a: Tensor, b: Tensor) -> None:
        """Labels in the same places leave together; shapes are broadcast."""
        a, b = compressed(a), compressed(b)
        shape = np.broadcast_shapes(a.shape, b.shape)
        a, b = a.expand(shape), b.expand(shape)
        pairs = torch.stack([a.reshape(-1), b.reshape(-1)])
        pairs = pairs[:, pairs[0] != pairs[1]]
        pinned = (pairs == FIXED).any(0)
        self.block(pairs[:, pinned].reshape(-1), _MEETS)
        if not pinned.all():
            self._links.append(pairs[:, ~pinned])

    def meet(self, values: Sequence[Value]) -> Value:
        """The value of an operation that joins others element by element, with broadcasting."""
        found, *others = values
        for other in others:
            found = self._meet(found, other)
        return found

    def _meet(self, a: Value, b: Value, *, last: bool = False, whole_rows: bool = False) -> Value:
        """Two values; with ``whole_rows`` what is repeated along a row leaves with the row."""
        ndim = max(len(a.shape), len(b.shape))
        a, b = _padded(a, ndim), _padded(b, ndim)
        shape = tuple(
            max(i, j) if 1 in (i, j) else i for i, j in zip(a.shape, b.shape, strict=True)
        )
        differ_a = [d for d in range(ndim) if a.labels.shape[d] > 1]
        differ_b = [d for d in range(ndim) if b.labels.shape[d] > 1]
        if len(differ_a) < len(differ_b):
            a, b, differ_a, differ_b = b, a, differ_b, differ_a
        # Along which dimensions of its partner each has values of its own.
        reach_a = [d for d in differ_b if a.shape[d] == shape[d]]
        reach_b = [d for d in differ_a if b.shape[d] == shape[d]]
        whole = len(reach_a) == len(differ_b) and len(reach_b) == len(differ_a)
        whole |= whole_rows and bool(reach_a and reach_b)
        if whole and (set(differ_a) & set(differ_b) or not differ_a):
            self.link(a.labels, b.labels)
            if differ_b and set(differ_b) <= set(differ_a):
                return Value(b.labels, shape)  # the same units, in fewer labels
        elif differ_b and set(differ_a) & set(differ_b) and not last:
            self._open.append((a, b))
        else:
            if reach_a or not reach_b:
                self.block(b.labels, _BROADCAST)
            if reach_b:
                self.block(a.labels, _MEETS)
                return Value(b.labels, shape) if not reach_a else Value.fixed(shape)
        return Value(a.labels if a.labels.any() else b.labels, shape)

    def contract(self, values: Sequence[Value], letters: Sequence[str], out: str) -> Value:
        """The value of a product that sums over some dimensions, written as an einsum."""
        every = list(dict.fromkeys("".join(letters)))
        lined_up = []
        for value, own in zip(values, letters, strict=True):
            order = [own.index(c) for c in every if c in own]
            labels, shape = value.labels.permute(order), [value.shape[i] for i in order]
            for at, c in enumerate(every):
                if c not in own:
                    labels, shape = labels.unsqueeze(at), [*shape[:at], 1, *shape[at:]]
            lined_up.append(Value(labels, tuple(shape)))
        met, *others = lined_up
        for other in others:
            met = self._meet(met, other, whole_rows=True)
        labels = met.labels
        for part in lined_up:
            for at, c in enumerate(every):
                if c not in out and part.labels.shape[at] > 1:
                    self.link(part.labels, part.labels.narrow(at, 0, 1))
        keep = [every.index(c) for c in out]
        for at in range(len(every)):
            labels = labels if at in keep else labels.narrow(at, 0, 1)
        labels = labels.permute([*keep, *(i for i in range(len(every)) if i not in keep)])
        labels = labels.reshape(labels.shape[: len(keep)])
        return Value(labels, tuple(met.shape[i] for i in keep))

    def resolve(self) -> Resolved:
        """Which labels leave together, once everything was followed."""
        while True:
            together = self._together()
            known = self._without_blocked(together)
            before = len(self._links), len(self._blocked)
            if not self._decide_open(known, last=False):
                self._close_boxes(known)
            if (len(self._links), len(self._blocked)) == before:
                if not self._open:
                    break
                self._decide_open(known, last=True)
        reasons: dict[int, str] = {}
        for labels, reason in self._blocked:
            for unit in torch.unique(together[labels]).tolist():
                reasons[unit] = reasons.get(unit) or reason
        tied = {int(together[labels[0]]): reason for labels, reason in reversed(self._tied)}
        return Resolved(together, reasons, tied)

    def _together(self) -> Tensor:
        """Label -> the least label that it leaves with."""
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import connected_components

        pairs = torch.cat([torch.zeros(2, 0, dtype=torch.int64), *self._links], 1)
        self._links[:] = [pairs]
        a, b = pairs.numpy()
        graph = coo_matrix((np.ones(len(a), bool), (a, b)), shape=(self._count, self._count))
        _, found = connected_components(graph, directed=False)
        _, first, number = np.unique(found, return_index=True, return_inverse=True)
        return torch.from_numpy(first[number])

    def _without_blocked(self, together: Tensor) -> Tensor:
        """The same, with what is blocked as fixed as what never had a label."""
        blocked = torch.zeros(self._count, dtype=torch.bool)
        for labels, _ in self._blocked:
            blocked[together[labels]] = True
        return torch.where(blocked[together], FIXED, together)

    def _decide_open(self, together: Tensor, *, last: bool) -> bool:
        """Couple the pairs that are aligned now; whether there were any."""
        waiting, self._open = self._open, []
        before = len(self._links), len(self._blocked)
        for a, b in waiting:
            now = [Value(compressed(together[v.labels]), v.shape) for v in (a, b)]
            self._meet(*now, last=last)
        return (len(self._links), len(self._blocked)) != before

    def _close_boxes(self, together: Tensor) -> None:
        """Let what is left of a value be a box: whole hyperplanes along one dimension leave."""
        for box in self.boxes:
            labels = compressed(together[box])
            dims = [d for d in range(labels.ndim) if labels.shape[d] > 1]
            if len(dims) < 2:
                continue
            counts = {d: _units_along(labels, d) for d in dims}
            # Where as many are left, a dimension that has no other's pattern repeated along it.
            best = max(dims, key=lambda d: (counts[d], counts[d] == labels.shape[d], d))
            rows = labels.movedim(best, 0).reshape(labels.shape[best], -1)
            self.link(rows, rows[:, :1])


@dataclass(frozen=True, slots=True)
class Resolved:
    """Which labels leave together, and which cannot."""

    unit: Tensor
    """Label -> the unit it belongs to, named by its least label."""
    reasons: dict[int, str]
    """Unit that cannot be removed -> why; empty for what makes the output."""
    tied: dict[int, str]
    """Unit -> why it is as large as it is, where that is known."""


def _units_along(labels: Tensor, dim: int) -> int:
    """How many units are left when whole hyperplanes along a dimension leave together."""
    _, few = torch.unique(labels, return_inverse=True)
    rows = 1 + few.movedim(dim, 0).reshape(labels.shape[dim], -1)
    coupling = Coupling(_count=int(rows.max()) + 1)
    coupling.link(rows, rows[:, :1])
    return len(torch.unique(coupling._together()[rows[:, 0]]))


def _padded(value: Value, ndim: int) -> Value:
    missing = ndim - len(value.shape)
    labels = value.labels.reshape([1] * missing + list(value.labels.shape))
    return Value(labels, (1,) * missing + value.shape)
