"""Coupled groups: the units of a network, from what its graph couples.

Source: the idea that coupled layers must be pruned together, and that a graph shows which they are:
Fang et al. 2023, "DepGraph: Towards Any Structural Pruning" (arXiv:2301.12900).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cswap_deploy.network.coupling import FIXED, Coupling, compressed
from cswap_deploy.network.follow import follow
from cswap_deploy.network.graph import Graph
from cswap_deploy.network.units import (
    LAYERS,
    TRANSPOSED,
    Attribute,
    Group,
    Kind,
    Member,
    Reader,
    depthwise,
)

_SIZED = (*LAYERS, nn.modules.batchnorm._NormBase)
"""Modules whose sizes follow their weights."""


@dataclass(frozen=True, slots=True)
class Removable:
    """What can be removed from a network, and what cannot."""

    groups: tuple[Group, ...]
    """In order of first use."""
    excluded: dict[str, str]
    """Root layer -> why its units stay."""


def find_groups(graph: Graph) -> Removable:
    """Find every coupled group whose units can be deleted without touching other outputs.

    What was found is checked by :func:`network.deletion.exact_groups`: a forward may spell out a
    width that the graph cannot tell from one that it computes.
    """
    return _Finder(graph, follow(graph)).find()


_Key = tuple[str, int]
"""(tensor, dimension); of a layer's inputs (layer, _INPUTS)."""
_INPUTS = -1


class _Finder:
    def __init__(self, graph: Graph, coupling: Coupling) -> None:
        self.graph, self.coupling = graph, coupling
        found = coupling.resolve()
        self._unit, self._blocked, self._tied = found.unit, dict(found.reasons), found.tied
        self._layers = {
            f"{name}.weight".lstrip("."): layer
            for name, layer in graph.module.named_modules(remove_duplicate=False)
            if isinstance(layer, LAYERS)
        }
        self._outputs: dict[str, Tensor] = {}
        """Weight of a layer, or bare weight -> the unit of each output."""
        self._places: dict[int, dict[_Key, list[int]]] = defaultdict(dict)
        """Unit -> its positions in everything that has some."""
        for (tensor, dim), labels in coupling.axes.items():
            self._place((tensor, dim), self._unit[labels])
            if dim == self._out_dim(tensor):
                self._outputs[tensor] = self._unit[labels]
        for name, labels in coupling.cells.items():
            units = compressed(self._unit[labels])
            self._place_cells(name, units)
            if units.ndim > 1 and units.shape[0] > 1 == units[0].numel():
                self._outputs[name] = units.reshape(-1)
        for read in coupling.reads:
            if self._place((read.layer, _INPUTS), self._unit[read.labels]):
                self._differ(read.layer, self._unit[read.labels])
        self._spelled = [(s, compressed(self._unit[s.value.labels])) for s in coupling.spelled]

    def _place(self, key: _Key, units: Tensor) -> bool:
        """Note where units are; whether some were there already, at other positions."""
        found: dict[int, list[int]] = defaultdict(list)
        for position, unit in enumerate(units.tolist()):
            if unit != FIXED:
                found[unit].append(position)
        again = False
        for unit, positions in found.items():
            again |= self._places[unit].setdefault(key, positions) != positions
        return again

    def _differ(self, layer: str, units: Tensor) -> None:
        for unit in torch.unique(units).tolist():
            self._blocked.setdefault(unit, f"is read by {layer} in more than one way")

    def _place_cells(self, name: str, units: Tensor) -> None:
        """Other parameters and buffers can be cut along one dimension."""
        dims = [d for d, size in enumerate(units.shape) if size > 1]
        if len(dims) == 1:
            self._place((name, dims[0]), units.reshape(-1))
            return
        values, counts = torch.unique(units, return_counts=True)
        for unit in values[counts > 1].tolist():
            self._blocked.setdefault(unit, f"does not go through {name} evenly")

    def find(self) -> Removable:
        groups: list[Group] = []
        excluded: dict[str, str] = {}
        seen: set[int] = set()
        for weight in self._roots():
            every = list(dict.fromkeys(self._outputs[weight].tolist()))
            new = [unit for unit in every if unit not in seen]
            seen |= {*new}
            if not new:
                continue
            name = weight.removesuffix(".weight") if weight in self._layers else weight
            group, left, why = self._group(name, weight, new)
            if group is not None:
                groups.append(group)
            if left == len(every) and why:
                excluded[name] = why
            elif left and (why or group is not None):
                why = why or "they go elsewhere"
                excluded[name] = f"{left} of its {len(every)} units stay: {why}"
        return Removable(tuple(groups), excluded)

    def _roots(self) -> list[str]:
        """Weights whose outputs begin something new, in the order of the module tree."""
        new = [
            w for w, layer in self._layers.items() if w in self._outputs and not depthwise(layer)
        ]
        return [*new, *(w for w in self._outputs if w not in self._layers)]

    def _group(self, name: str, weight: str, own: Sequence[int]) -> tuple[Group | None, int, str]:
        """A root's units that lie alike in all layers; how many others stay, and why."""
        alike: dict[Any, list[int]] = defaultdict(list)
        for unit in own:
            places = self._places[unit]
            if unit not in self._blocked and any(dim == _INPUTS for _, dim in places):
                alike[tuple((k, len(p)) for k, p in places.items())].append(unit)
        units = max(alike.values(), key=len, default=[])
        chosen = set(units)
        rest = [u for u in own if u not in chosen]
        why = next((self._blocked[u] for u in rest if self._blocked.get(u)), "")
        if not units:
            return None, len(rest), why
        if len(units) < 2:
            single = self._tied.get(units[0]) or "has a single unit: all of it would go"
            return None, len(own), why or single
        at = {key: self._indices(units, key) for key in self._places[units[0]]}
        group = Group(
            name, self._kind(weight, units),
            root_indices=self._indices(units, (weight, self._out_dim(weight))),
            consumers=tuple(Reader(t, of) for (t, dim), of in at.items() if dim == _INPUTS),
            members=tuple(Member(t, dim, of) for (t, dim), of in at.items() if dim != _INPUTS),
            product_macs=self._product_macs(units[0]),
            attributes=self._attributes(units[0]),
        )  # fmt: skip
        return group, len(rest), why

    def _out_dim(self, weight: str) -> int:
        return int(isinstance(self._layers.get(weight), TRANSPOSED))

    def _indices(self, units: Sequence[int], key: _Key) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(self._places[u][key]) for u in units)

    def _kind(self, weight: str, units: Sequence[int]) -> Kind:
        if self._product_macs(units[0]):
            return "heads"
        layer = self._layers.get(weight)
        return "neurons" if layer is None or isinstance(layer, nn.Linear) else "channels"

    def _attributes(self, unit: int) -> tuple[Attribute, ...]:
        """Numbers that may count such units: those with the size of a value that loses some."""
        found: dict[tuple[str, str], Attribute] = {}
        for spelled, units in self._spelled:
            where = units == unit
            module = self.graph.module.get_submodule(spelled.module)
            if isinstance(module, _SIZED) or not where.any():
                continue
            for dim in range(units.ndim):
                each = int(where.movedim(dim, 0).reshape(units.shape[dim], -1).any(1).sum())
                for name in _numbers(module, spelled.value.shape, dim) * (units.shape[dim] > 1):
                    found[spelled.module, name] = Attribute(spelled.module, name, each)
        return tuple(found.values())

    def _product_macs(self, unit: int) -> int:
        """What the products of activations in which a unit takes part cost, its share."""
        total = 0
        for product in self.coupling.products:
            labels = self._unit[product.labels]
            total += round(product.macs * int((labels == unit).sum()) / labels.numel())
        return total


def _numbers(module: nn.Module, shape: Sequence[int], dim: int) -> list[str]:
    """Attributes with the size of a dimension: numbers, and places in shapes that are kept."""
    found = []
    for name, value in vars(module).items():
        if type(value) is int and value == shape[dim]:
            found.append(name)
        elif type(value) in (tuple, list) and tuple(value) == tuple(shape):
            found.append(f"{name}[{dim}]")
    return found
