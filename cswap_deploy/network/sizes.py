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
from cswap_deploy.network.latency import LatencyModel
from cswap_deploy.network.units import LAYERS, TRANSPOSED, Group, members_of
from cswap_deploy.records.plan import Size


@dataclass(slots=True)
class _Sizes:
    """A parameter whose size changes."""

    shape: list[int]
    """What is left along each dimension, and last the residual branches that it needs (1 or 0)."""
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
            name: _Sizes([*parameters[name].shape, 1], positions.get(name, 0)) for name in changing
        }
        params = sum(p.numel() for p in module.parameters())
        macs = sum(parameters[name].numel() * count for name, count in positions.items())
        self._fixed_params = params - sum(s.params for s in self._sizes.values())
        self._fixed_macs = macs - sum(s.macs for s in self._sizes.values())
        self._left = {g.name: g.units for g in self._groups.values()}
        self._inside = {
            name: [g for g in self._groups.values() if name in g.within] for name in self._groups
        }
        """Residual branch -> the groups that go with it."""
        self.latency: LatencyModel | None = None
        """Of the device that is aimed at, where there is one."""

    def copy(self) -> SizeModel:
        """One more to count down; they share what no removal changes."""
        other = copy.copy(self)
        other._sizes = {n: _Sizes(list(s.shape), s.positions) for n, s in self._sizes.items()}
        other._left = dict(self._left)
        return other

    def size(self) -> Size:
        """What is left now."""
        there = [g for g in self._groups.values() if self._there(g)]
        products = sum(self._left[g.name] * g.product_macs for g in there)
        return Size(
            units=sum(self._left[g.name] for g in there),
            params=self._fixed_params + sum(s.params for s in self._sizes.values()),
            macs=self._fixed_macs + products + sum(s.macs for s in self._sizes.values()),
            latency_ms=None if self.latency is None else self.latency.ms(self._left),
        )

    @property
    def widths(self) -> Mapping[str, int]:
        """Group -> units that are left."""
        return self._left

    def left(self, group: str) -> int:
        """Units of a group that were not counted out by themselves."""
        return self._left[group]

    def remove(self, group: str, units: Iterable[int]) -> None:
        """Count some units out."""
        self._change(group, units, -1)

    def restore(self, group: str, units: Iterable[int]) -> None:
        """Count them in again."""
        self._change(group, units, +1)

    def saving(self, group: str, units: Iterable[int], of: RatioOf) -> float:
        """What removing some units now would save of a quantity; of latency it may be nothing."""
        chosen, own = list(units), self._groups[group]
        if of == "latency":
            assert self.latency is not None
            left = self._left | {group: self._left[group] - len(chosen)}
            return self.latency.ms(self._left) - self.latency.ms(left)
        lost = {g.name: self._left[g.name] for g in self._inside[group] if self._there(g)}
        if self._there(own):
            lost[group] = len(chosen)
        if of == "channels":
            return sum(lost.values())
        names = {m.tensor for m in self._members[group]}
        before = self._partial(names, of)
        self.remove(group, chosen)
        after = self._partial(names, of)
        self.restore(group, chosen)
        products = sum(self._groups[name].product_macs * count for name, count in lost.items())
        return before - after + products * (of == "macs")

    def _partial(self, names: Iterable[str], of: RatioOf) -> int:
        found = [self._sizes[n] for n in names]
        return sum(s.params if of == "params" else s.macs for s in found)

    def _change(self, name: str, units: Iterable[int], sign: int) -> None:
        chosen = list(units)
        for member in self._members[name]:
            count = sum(len(member.indices[u]) for u in chosen)
            self._sizes[member.tensor].shape[member.dim] += sign * count
        self._left[name] += sign * len(chosen)

    def _there(self, group: Group) -> bool:
        """Whether no residual branch took the group along."""
        return all(self._left.get(branch, 1) for branch in group.within)


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
