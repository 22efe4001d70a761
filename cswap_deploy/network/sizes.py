"""How large the network is when some units are gone, without building it; and how far it can go.

Removing a channel shrinks its producer's outputs and its consumers' inputs, and the two savings
overlap where both sides of a layer shrink. So sizes are counted per layer from what is left of
each side, never by adding up units.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from cswap_deploy.config import RatioOf
from cswap_deploy.network.units import Group
from cswap_deploy.records.plan import Size


@dataclass(slots=True)
class _Layer:
    """A layer whose size changes."""

    inputs: int
    outputs: int
    per_pair: float
    """Parameters for each (input, output) pair: kernel positions over convolution groups."""
    per_output: int
    """Parameters for each output: bias, batch norm's two."""
    positions: int
    """Output positions of one image; MACs = pairs * kernel * positions."""

    @property
    def params(self) -> int:
        return round(self.inputs * self.outputs * self.per_pair) + self.outputs * self.per_output

    @property
    def macs(self) -> int:
        return round(self.inputs * self.outputs * self.per_pair) * self.positions


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
        self._positions = positions = _positions(module, example)
        parameters = dict(module.named_parameters())
        layers = dict(module.named_modules())
        self._layers = {
            name: _describe(
                parameters[name] if name in parameters else layers[name], positions.get(name, 0)
            )
            for name in {m.layer for g in self._groups.values() for m in g.members}
        }
        params = sum(p.numel() for p in module.parameters())
        macs = sum(
            layer.weight.numel() * positions.get(name, 0)
            for name, layer in layers.items()
            if isinstance(layer, nn.Conv2d | nn.Linear)
        )
        self._fixed_params = params - sum(e.params for e in self._layers.values())
        self._fixed_macs = macs - sum(e.macs for e in self._layers.values())
        self._head_total = sum(self._head_macs(g) * g.units for g in self._groups.values())
        self.units = sum(g.units for g in self._groups.values())

    def size(self) -> Size:
        """What is left now."""
        return Size(
            units=self.units,
            params=self._fixed_params + sum(e.params for e in self._layers.values()),
            macs=self._fixed_macs + sum(e.macs for e in self._layers.values()) + self._head_total,
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
        names = {m.layer for m in self._groups[group].members}
        before = self._partial(names, of)
        self.remove(group, chosen)
        after = self._partial(names, of)
        self.restore(group, chosen)
        heads = self._head_macs(self._groups[group]) * len(chosen) if of == "macs" else 0
        return before - after + heads

    def _partial(self, names: Iterable[str], of: RatioOf) -> int:
        layers = [self._layers[n] for n in names]
        return sum(layer.params if of == "params" else layer.macs for layer in layers)

    def _change(self, name: str, units: Iterable[int], sign: int) -> None:
        group = self._groups[name]
        chosen = list(units)
        for member in group.members:
            count = sign * sum(len(member.indices[u]) for u in chosen)
            entry = self._layers[member.layer]
            if member.side == "in":
                entry.inputs += count
            else:
                entry.outputs += count
        self.units += sign * len(chosen)
        self._head_total += sign * self._head_macs(group) * len(chosen)

    def _head_macs(self, group: Group) -> int:
        """Query times key, and attention times value."""
        if group.kind != "heads":
            return 0
        return 2 * self._positions.get(group.name, 0) ** 2 * group.head_dim


def smallest(model: SizeModel, groups: Iterable[Group], floors: Mapping[str, int]) -> Size:
    """The size when every group is down to its floor; the model is left as it was."""
    spare = {g.name: range(g.units - floors[g.name]) for g in groups}
    for name, units in spare.items():
        model.remove(name, units)
    size = model.size()
    for name, units in spare.items():
        model.restore(name, units)
    return size


def _describe(layer: nn.Module | nn.Parameter, positions: int) -> _Layer:
    if isinstance(layer, nn.Parameter):
        return _Layer(1, layer.shape[-1], layer.numel() / layer.shape[-1], 0, 0)
    if isinstance(layer, nn.Conv2d):
        kernel = layer.weight[0, 0].numel()
        bias = int(layer.bias is not None)
        if layer.groups == layer.out_channels and layer.groups > 1:
            depth = layer.weight.shape[1] * kernel
            return _Layer(1, layer.out_channels, depth, bias, positions)
        return _Layer(layer.in_channels, layer.out_channels, kernel / layer.groups, bias, positions)
    if isinstance(layer, nn.Linear):
        bias = int(layer.bias is not None)
        return _Layer(layer.in_features, layer.out_features, 1.0, bias, positions)
    own = list(layer.parameters(recurse=False))
    outputs = own[0].shape[-1] if own else getattr(layer, "num_features", 0)
    return _Layer(0, outputs, 0.0, len(own), 0)


def _positions(module: nn.Module, example: Tensor) -> dict[str, int]:
    """Output positions (pixels or tokens) of every convolution and linear layer, one image."""
    found: dict[str, int] = {}

    def record(name: str, layer: nn.Module, _: object, output: Tensor) -> None:
        channels = output.shape[1] if isinstance(layer, nn.Conv2d) else output.shape[-1]
        found[name] = found.get(name, 0) + output.numel() // len(output) // channels

    with ExitStack() as hooks, torch.no_grad():
        for name, layer in module.named_modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                hooks.enter_context(layer.register_forward_hook(partial(record, name)))
        module(example[:1])
    return found
