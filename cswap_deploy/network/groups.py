"""Coupled groups, found by torch-pruning's dependency graph; the only importer of torch_pruning.

Of torch-pruning only the dependency graph is used: which layers must lose which indices together.
What to remove, how much and in what order is decided elsewhere.

Source: Fang et al. 2023, "DepGraph: Towards Any Structural Pruning" (arXiv:2301.12900).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cswap_deploy.errors import PruneError
from cswap_deploy.models.adapters import Adapter, Heads, find_heads
from cswap_deploy.models.outputs import tensors_alone
from cswap_deploy.network.units import Group, Kind, Member, depthwise
from cswap_deploy.progress import captured

_MIXING = (nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d)


@dataclass(frozen=True, slots=True)
class Removable:
    """What can be removed from a network, and what cannot."""

    groups: tuple[Group, ...]
    """In order of first use."""
    excluded: dict[str, str]
    """Root layer -> why its units stay."""


def find_groups(module: nn.Module, example: Tensor) -> Removable:
    """Find every coupled group whose units can be deleted without touching other outputs.

    Args:
        module: In eval mode; not changed.
        example: (N, C, H, W), any values.
    """
    names = {m: n for n, m in module.named_modules()}
    attention = _attention(module)
    dependencies = _dependency_graph(module, example)
    groups: list[Group] = []
    excluded: dict[str, str] = {}
    seen: set[str] = set()
    for root, name in names.items():
        if not (root in dependencies.module2node and isinstance(root, nn.Conv2d | nn.Linear)):
            continue
        if name in seen or depthwise(root):
            continue
        items = _items(dependencies, root)
        seen |= {names[i.layer] for i in items if i.layer in names and not i.reads}
        heads = attention[name].heads if name in attention else None
        reason = _refusal(items, root, heads)
        if reason is None:
            groups.append(_group(name, root, items, names, heads))
        elif reason:
            excluded[name] = reason
    return Removable(tuple(groups), excluded)


def remove_units(
    module: nn.Module,
    example: Tensor,
    removed: Mapping[str, Iterable[int]],
    groups: Iterable[Group],
) -> None:
    """Delete units physically, in place.

    Args:
        module: Of the architecture the groups were found in.
        example: (N, C, H, W), any values.
        removed: Group name -> units to delete, in the dense numbering.
        groups: All groups.

    Raises:
        PruneError: A group would lose all its units.
    """
    dependencies = _dependency_graph(module, example)
    attention = _attention(module)
    for group in groups:
        gone = sorted(set(removed.get(group.name, ())))
        if not gone:
            continue
        if len(gone) == group.units:
            raise PruneError(f"all {group.units} units of {group.name} would go")
        root = module.get_submodule(group.name)
        positions = [i for u in gone for i in group.root_indices[u]]
        with captured():
            pruner = dependencies.get_pruner_of_module(root)
            dependencies.get_pruning_group(root, pruner.prune_out_channels, positions).prune()
        if group.name in attention:
            found = attention[group.name]
            found.adapter.shrink(found.owner, group.units - len(gone))


@dataclass(frozen=True, slots=True)
class _Attention:
    owner: nn.Module
    adapter: Adapter
    heads: Heads


@dataclass(frozen=True, slots=True)
class _Item:
    """One entry of torch-pruning's group, freed of its classes."""

    layer: Any
    """A module, or a parameter."""
    parameter: str | None
    operation: str
    """Class name of torch-pruning's placeholder where this is no layer of the model."""
    reads: bool
    """Whether the layer loses inputs."""
    positions: tuple[int, ...]
    roots: tuple[int, ...]
    """For each position the root's output it came from."""


def _dependency_graph(module: nn.Module, example: Tensor) -> Any:
    import torch_pruning

    with captured(), torch.enable_grad(), tensors_alone(module):
        frozen = [p for p in module.parameters() if not p.requires_grad]
        for p in frozen:
            p.requires_grad_(True)  # the trace follows gradients
        graph = torch_pruning.DependencyGraph()
        # Fresh containers: the library's mutable defaults leak from one graph to the next.
        graph.build_dependency(
            module, example, unwrapped_parameters=[], ignored_layers=[], ignored_params=[],
            customized_pruners={}, verbose=False,
        )  # fmt: skip
        for p in frozen:
            p.requires_grad_(False)
    return graph


def _items(graph: Any, root: nn.Module) -> list[_Item]:
    with captured():
        pruner = graph.get_pruner_of_module(root)
        found = graph.get_pruning_group(
            root, pruner.prune_out_channels, list(range(_outputs(root)))
        )
    items = []
    for entry in found.items:
        layer = entry.dep.target.module
        parameter = graph._param_to_name.get(layer) if isinstance(layer, nn.Parameter) else None
        reads = (
            isinstance(layer, nn.Conv2d | nn.Linear)
            and not depthwise(layer)
            and (entry.dep.handler == graph.get_pruner_of_module(layer).prune_in_channels)
        )
        operation = type(layer).__name__ + entry.dep.target.name
        positions, roots = tuple(entry.idxs), tuple(entry.root_idxs)
        items.append(_Item(layer, parameter, operation, reads, positions, roots))
    return items


def _refusal(items: list[_Item], root: nn.Module, heads: Heads | None) -> str | None:
    """Why a group cannot be pruned exactly; empty for the classifier, ``None`` if it can."""
    if not any(i.reads for i in items):
        return ""
    if _outputs(root) < 2:
        return "has a single output"
    for item in items:
        if isinstance(item.layer, _MIXING):
            return f"feeds {type(item.layer).__name__}, which normalises across channels"
        if isinstance(item.layer, nn.MultiheadAttention):
            return "feeds nn.MultiheadAttention, for which there is no adapter"
    operations = " ".join(i.operation for i in items)
    mixes = any(w in operations for w in ("Unbind", "Softmax", "Attention", "Bmm"))
    if mixes and heads is None:
        return "feeds an attention layer for which there is no adapter"
    if len({i.layer.groups for i in items if _grouped(i.layer)}) > 1:
        return "couples grouped convolutions with different numbers of groups"
    return None


def _group(
    name: str,
    root: nn.Module,
    items: list[_Item],
    names: Mapping[nn.Module, str],
    heads: Heads | None,
) -> Group:
    kind: Kind = "heads" if heads else "channels" if isinstance(root, nn.Conv2d) else "neurons"
    root_indices = _root_indices(root, items, heads)
    unit_of = {position: u for u, where in enumerate(root_indices) for position in where}
    members: list[Member] = []
    for item in items:
        layer = item.parameter or names.get(item.layer)
        if layer is None:
            continue
        where: list[list[int]] = [[] for _ in root_indices]
        for position, source in zip(item.positions, item.roots, strict=True):
            where[unit_of[source]].append(position)
        indices = tuple(tuple(sorted(w)) for w in where)
        members.append(Member(layer, "in" if item.reads else "out", indices))
    consumers = tuple(member for member in members if member.side == "in")
    head_dim = heads.head_dim if heads else 1
    return Group(name, kind, root_indices, consumers, tuple(members), head_dim=head_dim)


def _root_indices(
    root: nn.Module, items: list[_Item], heads: Heads | None
) -> tuple[tuple[int, ...], ...]:
    """Units as positions in the root's output: heads, slots of convolution groups, or channels."""
    if heads is not None:
        width = heads.count * heads.head_dim
        parts = torch.arange(3 * width).view(3, heads.count, heads.head_dim)
        return tuple(map(tuple, parts.movedim(1, 0).flatten(1).tolist()))
    # A grouped convolution keeps equal groups: the same slot leaves each of them.
    groups = next((i.layer.groups for i in items if _grouped(i.layer)), 1)
    return tuple(map(tuple, torch.arange(_outputs(root)).view(groups, -1).T.tolist()))


def _attention(module: nn.Module) -> dict[str, _Attention]:
    """Name of each qkv layer -> the attention module around it."""
    found = {}
    for name, layer in module.named_modules():
        adapted = find_heads(layer)
        if adapted is not None:
            adapter, heads = adapted
            found[f"{name}.{heads.qkv}".lstrip(".")] = _Attention(layer, adapter, heads)
    return found


def _outputs(layer: Any) -> int:
    return int(layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features)


def _grouped(layer: Any) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.groups > 1 and not depthwise(layer)
