"""How large the network is when some units are gone, without building it; and how far it can go.

Removing a channel shrinks its producer's outputs and its consumers' inputs, and the two savings
overlap where both sides of a layer shrink. So sizes are counted per layer from what is left of
each side, never by adding up units.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from cswap_deploy.config import RatioOf
from cswap_deploy.network.units import LAYERS, TRANSPOSED, Group, members_of
from cswap_deploy.records.plan import Size


@dataclass(slots=True)
class _Sizes:
    """A parameter whose size changes."""

    shape: list[int]
    """What is left along each dimension."""
    positions: int = 0
    """Output positions of one image, if it is a layer's weight; MACs = elements * positions."""

    @property
    def params(self) -> int:
        return math.prod(self.shape)

    @property
    def macs(self) -> int:
        return self.params * self.positions


class SizeModel:
    """Parameters, MACs and units left, kept current as units are removed."""

    def __init__(self, module: nn.Module, example: Tensor, groups: Iterable[Group]) -> None:
        """Count a network.

        Args:
            module: In eval mode, with the biases it will ship with.
            example: (1 or more, C, H, W).
            groups: Every group that may lose units.
        """
        self._groups = {g.name: g for g in groups}
        positions = _positions(module, example)
        parameters = dict(module.named_parameters(remove_duplicate=False))
        self._members = {
            name: [m for m in members_of(module, g) if m.tensor in parameters]
            for name, g in self._groups.items()
        }
        changing = {m.tensor for members in self._members.values() for m in members}
        self._sizes = {
            name: _Sizes(list(parameters[name].shape), positions.get(name, 0)) for name in changing
        }
        params = sum(p.numel() for p in module.parameters())
        macs = sum(parameters[name].numel() * count for name, count in positions.items())
        self._fixed_params = params - sum(s.params for s in self._sizes.values())
        self._fixed_macs = macs - sum(s.macs for s in self._sizes.values())
        self._product_macs = sum(g.product_macs * g.units for g in self._groups.values())
        self.units = sum(g.units for g in self._groups.values())

    def copy(self) -> SizeModel:
        """One more to count down; they share what no removal changes."""
        other = copy.copy(self)
        other._sizes = {n: _Sizes(list(s.shape), s.positions) for n, s in self._sizes.items()}
        return other

    def size(self) -> Size:
        """What is left now."""
        return Size(
            units=self.units,
            params=self._fixed_params + sum(s.params for s in self._sizes.values()),
            macs=self._fixed_macs + self._product_macs + sum(s.macs for s in self._sizes.values()),
        )

    def remove(self, group: str, units: Iterable[int]) -> None:
        """Count some units out."""
        self._change(group, units, -1)

    def restore(self, group: str, units: Iterable[int]) -> None:
        """Count them in again."""
        self._change(group, units, +1)

    def saving(self, group: str, units: Iterable[int], of: RatioOf) -> int:
        """What removing some units now would save of a quantity."""
        chosen = list(units)
        if of == "channels":
            return len(chosen)
        names = {m.tensor for m in self._members[group]}
        before = self._partial(names, of)
        self.remove(group, chosen)
        after = self._partial(names, of)
        self.restore(group, chosen)
        products = self._groups[group].product_macs * len(chosen) if of == "macs" else 0
        return before - after + products

    def _partial(self, names: Iterable[str], of: RatioOf) -> int:
        found = [self._sizes[n] for n in names]
        return sum(s.params if of == "params" else s.macs for s in found)

    def _change(self, name: str, units: Iterable[int], sign: int) -> None:
        group, chosen = self._groups[name], list(units)
        for member in self._members[name]:
            count = sum(len(member.indices[u]) for u in chosen)
            self._sizes[member.tensor].shape[member.dim] += sign * count
        self.units += sign * len(chosen)
        self._product_macs += sign * group.product_macs * len(chosen)


def smallest(model: SizeModel, groups: Iterable[Group], floors: Mapping[str, int]) -> Size:
    """The size when every group is down to its floor; the model is left as it was."""
    spare = {g.name: range(g.units - floors[g.name]) for g in groups}
    for name, units in spare.items():
        model.remove(name, units)
    size = model.size()
    for name, units in spare.items():
        model.restore(name, units)
    return size


def _positions(module: nn.Module, example: Tensor) -> dict[str, int]:
    """Output positions (pixels or tokens, one image) of the layer that each weight belongs to."""
    found: dict[str, int] = {}

    def record(name: str, layer: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        value = args[0] if isinstance(layer, TRANSPOSED) else output
        channels = value.shape[-1 if isinstance(layer, nn.Linear) else 1]
        weight = f"{name}.weight".lstrip(".")
        found[weight] = found.get(weight, 0) + value.numel() // len(example[:1]) // channels

    with ExitStack() as hooks, torch.no_grad():
        for name, layer in module.named_modules():
            if isinstance(layer, LAYERS):
                hooks.enter_context(layer.register_forward_hook(partial(record, name)))
        module(example[:1].contiguous())
    return found
