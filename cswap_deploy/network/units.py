"""What can be removed: units, and the coupled groups they form.

A unit is taken out by cutting it at its *consumers*, the layers that read it: their input slices
are masked. What computes the unit (producers, batch norms, depthwise convolutions between them)
then has no effect, so it can be deleted without changing any output. That is the whole argument
for "masked network equals pruned network".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from cswap_deploy.network.placing import HOST, placed

Kind = Literal["channels", "heads", "neurons", "branch"]
Consumer = nn.Conv2d | nn.Linear
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
LAYERS = (*CONVOLUTIONS, nn.Linear)
"""Layers that produce units."""


@dataclass(frozen=True, slots=True)
class Reader:
    """A layer that reads a group's units, where they are masked."""

    layer: str
    """Dotted name of a convolution or linear layer."""
    indices: tuple[tuple[int, ...], ...]
    """For each unit the inputs it is, in the dense layer's numbering."""


@dataclass(frozen=True, slots=True)
class Member:
    """Where a group's units lie in one dimension of one parameter or buffer."""

    tensor: str
    """Its dotted name. The bias of a layer goes with the layer's outputs and is not listed."""
    dim: int
    indices: tuple[tuple[int, ...], ...]
    """For each unit the positions it occupies, in the dense numbering."""


@dataclass(frozen=True, slots=True)
class Attribute:
    """A number that a module's forward reads, and that counts units, such as ``num_heads``."""

    module: str
    name: str
    each: int
    """How much of it one unit is."""

    @property
    def path(self) -> str:
        """As a plan names it, ``blocks.0.attn.num_heads``."""
        return f"{self.module}.{self.name}"


class Emptied(NamedTuple):
    """A module that a removed residual branch leaves without work."""

    module: str
    """Dotted name."""
    nothing: bool
    """Whether it gives zero then; else what it is given."""


@dataclass(frozen=True, slots=True)
class Group:
    """The units of one coupled set of layers."""

    name: str
    """The root: the first layer (or bare parameter) that produces the units."""
    kind: Kind
    root_indices: tuple[tuple[int, ...], ...]
    """For each unit its output positions in the root layer."""
    consumers: tuple[Reader, ...]
    """Layers that read the units, in no particular order."""
    members: tuple[Member, ...]
    """Every tensor whose size changes."""
    product_macs: int = 0
    """Multiply-accumulates for one image of the products of activations, such as an attention's
    scores, that leave with each unit."""
    attributes: tuple[Attribute, ...] = ()
    """Numbers in the network's modules that change with the units."""
    emptied: tuple[Emptied, ...] = ()
    """Of a residual branch: what becomes of its modules when it is deleted."""
    silenced: tuple[str, ...] = ()
    """Of a residual branch: its last layer, and the norm behind it; zero where it is masked."""
    within: tuple[str, ...] = ()
    """Residual branches that take the whole group along."""
    stream: bool = False
    """Whether residual branches are added to its units, so that many layers share them."""

    def holds(self, layer: str) -> bool:
        """Whether a layer goes with this residual branch."""
        return any(f"{layer}.".startswith(f"{module}.") for module, _ in self.emptied)

    @property
    def units(self) -> int:
        """How many."""
        return len(self.root_indices)


def members_of(module: nn.Module, group: Group) -> Iterator[Member]:
    """A group's members in a network, with the biases that its layers have there."""
    listed = {member.tensor for member in group.members}
    for member in group.members:
        yield member
        owner, _, last = member.tensor.rpartition(".")
        layer, bias = module.get_submodule(owner), f"{owner}.bias".lstrip(".")
        if last != "weight" or not isinstance(layer, LAYERS) or layer.bias is None:
            continue
        if group.kind == "branch" and bias not in listed:
            yield Member(bias, member.dim, member.indices)
        elif member.dim == int(isinstance(layer, TRANSPOSED)):
            yield Member(bias, 0, member.indices)


def consumers(groups: Iterable[Group]) -> list[str]:
    """Every layer that reads a unit, by name."""
    return sorted({c.layer for g in groups for c in g.consumers})


def channel_dim(layer: nn.Module) -> int:
    """The dimension of a consumer's input that counts its channels or features."""
    return 1 if isinstance(layer, nn.Conv2d) else -1


def depthwise(layer: nn.Module) -> bool:
    """Whether a layer is a convolution that reads one input for each group of its own."""
    return isinstance(layer, CONVOLUTIONS) and 1 < layer.groups == layer.in_channels


def weight_columns(layer: Consumer, indices: Tensor) -> Tensor:
    """(k / groups,) positions in dimension 1 of a consumer's weight that read some inputs.

    Args:
        layer: Of weight (O, I / groups, ...).
        indices: (k,) input positions; for grouped convolutions one per convolution group, in
            ascending order, all at the same position within their group.
    """
    grouped = isinstance(layer, nn.Conv2d) and layer.groups > 1
    return torch.unique(indices % layer.weight.shape[1]) if grouped else indices


def input_sum(layer: Consumer, indices: Tensor, values: Tensor) -> Tensor:
    """(O,) what constant inputs add to a consumer's output, away from padded borders.

    Args:
        layer: The consumer.
        indices: (k,) input positions.
        values: (k,) the constant at each of them.
    """
    # Only the columns that count: whole layers here, once for each unit, would take minutes.
    weight = layer.weight.detach()
    if not isinstance(layer, nn.Conv2d) or layer.groups == 1:
        columns = weight[:, indices]
        return (columns.flatten(2).sum(2) if columns.ndim > 2 else columns) @ values
    per_group, rows = weight.shape[1], layer.out_channels // layer.groups
    total = weight.new_zeros(layer.out_channels)
    for index, value in zip(placed(indices, HOST).tolist(), values, strict=True):
        group, slot = divmod(index, per_group)
        mine = slice(group * rows, (group + 1) * rows)
        total[mine] += weight[mine, slot].flatten(1).sum(1) * value
    return total


def mask_weight(layer: Consumer, indices: Tensor) -> None:
    """Zero, in place, the part of a consumer's weight that reads some inputs."""
    with torch.no_grad():
        layer.weight[:, weight_columns(layer, indices)] = 0.0


def give_bias(layer: Consumer) -> bool:
    """Add a zero bias, to fold constants into, to a layer that has none; whether it had none."""
    if layer.bias is not None:
        return False
    layer.bias = nn.Parameter(layer.weight.new_zeros(layer.weight.shape[0]))
    return True
