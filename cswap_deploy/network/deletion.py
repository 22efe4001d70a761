"""Delete what a plan says, and prove that deleting changed nothing.

A pruned network is saved as its plan and a state dict, never as a pickled module:
``apply_plan(plan, fresh_module)`` gives the architecture, and the weights load with
``strict=True``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cswap_deploy.errors import ArtifactError, PruneError, first_line
from cswap_deploy.models.outputs import named_outputs
from cswap_deploy.models.plain import copied, plain
from cswap_deploy.network.graph import trace
from cswap_deploy.network.residual import (
    delete_branch,
    find_structure,
    removed_branches,
    silence,
)
from cswap_deploy.network.units import (
    CONVOLUTIONS,
    Attribute,
    Group,
    depthwise,
    give_bias,
    mask_weight,
    members_of,
)
from cswap_deploy.records.plan import PrunePlan

TOLERANCE = 1e-4
"""Largest |difference of outputs| between the masked and the deleted network, relative to the
output's largest value where that is above one (float32)."""
_ROUNDING = 1e-5
"""Relative change of the pixels that does to the outputs what rounding in every layer may do."""
_TRIES = 3
"""Sets of units that masking and deleting must agree on."""
_BREAKS = (
    RuntimeError, IndexError, AssertionError, ValueError, TypeError, KeyError, AttributeError,
)  # fmt: skip
"""What a forward raises that does not fit what was deleted."""
_FIX = "use the model the plan was made for, with the same timm version"


def apply_plan(plan: PrunePlan, module: nn.Module, example: Tensor) -> nn.Module:
    """Shrink a fresh dense module to a plan's architecture, in place.

    Args:
        plan: What to keep.
        module: The dense architecture, any weights; returned.
        example: (N, C, H, W), any values.

    Raises:
        ArtifactError: The plan does not fit this architecture.
    """
    found = {g.name: g for g in find_structure(trace(copied(module), example)).groups}
    removed, groups = {}, []
    for entry in plan.groups:
        group = found.get(entry.name)
        if group is None or group.units != entry.units:
            has = "no such group" if group is None else f"{group.units} units"
            said = f"{entry.name} should have {entry.units} units, the module has {has}"
            raise ArtifactError(f"the plan does not fit this architecture: {said}", fix=_FIX)
        removed[entry.name] = sorted(set(range(entry.units)) - set(entry.kept))
        wanted = tuple(a for a in group.attributes if a.path in entry.attributes)
        groups.append(replace(group, attributes=wanted))
    try:
        for name in plan.biased:
            give_bias(module.get_submodule(name))  # type: ignore[arg-type]
        remove_units(module, removed, groups)
    except (AttributeError, PruneError) as err:
        raise ArtifactError(
            f"the plan does not fit this architecture: {first_line(err)}", fix=_FIX
        ) from err
    return module.eval()


def remove_units(
    module: nn.Module, removed: Mapping[str, Iterable[int]], groups: Iterable[Group]
) -> None:
    """Delete units physically, in place.

    Args:
        module: Of the architecture the groups were found in.
        removed: Group name -> units to delete, in the dense numbering.
        groups: All groups.

    Raises:
        PruneError: A group would lose all its units.
    """
    lost: dict[str, dict[int, set[int]]] = {}
    groups = list(groups)
    branches = removed_branches(removed, groups)
    names = {branch.name for branch in branches}
    for group in groups:
        gone = set(removed.get(group.name, ()))
        if not gone or group.kind == "branch" or names & {*group.within}:
            continue
        if len(gone) == group.units:
            raise PruneError(f"all {group.units} units of {group.name} would go")
        for member in members_of(module, group):
            positions = {i for u in gone for i in member.indices[u]}
            lost.setdefault(member.tensor, {}).setdefault(member.dim, set()).update(positions)
        for attribute in group.attributes:
            _count_down(module.get_submodule(attribute.module), attribute, len(gone))
    aliases: dict[int, list[str]] = {}
    for name, tensor in _tensors(module):
        aliases.setdefault(id(tensor), []).append(name)
    every = {name: names for names in aliases.values() for name in names}
    for name, dims in lost.items():
        shrunk = _without(_get(module, name), dims)
        for alias in every[name]:
            _set(module, alias, shrunk)
            _resize(module.get_submodule(alias.rpartition(".")[0]))
    for branch in branches:
        delete_branch(module, branch)


def _count_down(owner: nn.Module, attribute: Attribute, units: int) -> None:
    """Take units out of a number, ``num_heads``, or of one in a tuple, ``bias_shape[2]``."""
    name, _, at = attribute.name.rstrip("]").partition("[")
    now = getattr(owner, name)
    less = attribute.each * units
    if at:
        setattr(owner, name, type(now)(v - less * (i == int(at)) for i, v in enumerate(now)))
    else:
        setattr(owner, name, now - less)


def _tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _get(module: nn.Module, name: str) -> Tensor:
    owner, _, last = name.rpartition(".")
    found: Tensor = getattr(module.get_submodule(owner), last)
    return found


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    owner, _, last = name.rpartition(".")
    setattr(module.get_submodule(owner), last, value)


def _without(tensor: Tensor, dims: Mapping[int, set[int]]) -> Tensor:
    """A tensor without some positions; a parameter stays one."""
    found = tensor.detach()
    for dim, positions in dims.items():
        kept = [i for i in range(found.shape[dim]) if i not in positions]
        found = found.index_select(dim, torch.tensor(kept))
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(found, requires_grad=tensor.requires_grad)
    return found


def _resize(layer: Any) -> None:
    """Let a layer say the sizes that its tensors have."""
    if isinstance(layer, CONVOLUTIONS):
        first, second = layer.weight.shape[:2]
        if layer.transposed:
            layer.in_channels, layer.out_channels = first, second * layer.groups
            return
        if depthwise(layer):
            layer.groups = first // (layer.out_channels // layer.in_channels)
        layer.in_channels, layer.out_channels = second * layer.groups, first
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, nn.modules.batchnorm._NormBase):
        sized = layer.weight if layer.weight is not None else layer.running_mean
        if sized is not None:
            layer.num_features = len(sized)
    elif isinstance(layer, nn.GroupNorm):
        each = layer.num_channels // layer.num_groups
        layer.num_channels = len(layer.weight)
        layer.num_groups = layer.num_channels // each
    elif isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = tuple(layer.weight.shape)
    elif isinstance(layer, nn.PReLU):
        layer.num_parameters = len(layer.weight)


def delete_removed(
    masked: nn.Module,
    removed: dict[str, list[int]],
    groups: Sequence[Group],
    images: Tensor,
) -> nn.Module:
    """A copy without the units that a network no longer reads; its outputs are checked to stay.

    Args:
        masked: The network with its removed units masked.
        removed: Group name -> units.
        groups: All groups.
        images: (N, C, H, W), real ones, for the check.

    Raises:
        PruneError: The outputs differ by more than ``TOLERANCE``.
    """
    smaller = copied(masked)
    remove_units(smaller, removed, groups)
    before = _outputs(masked, images)
    difference, scale = _difference(before, _outputs(smaller, images))
    allowed = TOLERANCE * max(1.0, scale)
    if not difference <= allowed:  # some networks make much of rounding: then so may deleting
        allowed, _ = _difference(before, _outputs(masked, images * (1 + _ROUNDING)))
    if not difference <= allowed:
        raise PruneError(
            f"deleting the masked units changed the outputs by {difference:.2e} "
            f"(largest value {scale:.2e}, allowed {TOLERANCE:.0e})"
        )
    return smaller.eval()


def load_pruned(weights: Path, plan: PrunePlan, dense: nn.Module, example: Tensor) -> nn.Module:
    """Make a pruned network, in evaluation mode, from its architecture, its plan and its weights.

    Args:
        weights: A safetensors file that :func:`contiguous_state` filled.
        plan: What the network keeps.
        dense: The dense architecture, any weights; not changed.
        example: (N, C, H, W), any values.

    Raises:
        ArtifactError: The plan or the weights do not fit the architecture.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    module, _ = plain(dense)
    if plan.groups:
        apply_plan(plan, module, example)
    try:
        module.load_state_dict(load_file(weights), strict=True)
    except (RuntimeError, SafetensorError) as err:
        words = str(err).splitlines()[-1].strip()
        said = f"{weights} does not fit {type(dense).__name__}: {words}"
        raise ArtifactError(said, fix=_FIX) from err
    return module.eval()


def contiguous_state(module: nn.Module) -> dict[str, Tensor]:
    """A state dict as safetensors takes it: detached, each tensor dense in memory."""
    state, seen = {}, set()
    for name, value in module.state_dict().items():
        dense = value.detach().contiguous()
        # Two names of one tensor are two tensors in a file.
        state[name] = dense.clone() if dense.data_ptr() in seen else dense
        seen.add(dense.data_ptr())
    return state


def exact_groups(
    module: nn.Module, example: Tensor, groups: Sequence[Group]
) -> tuple[list[Group], dict[str, str]]:
    """Keep the groups for which masking units and deleting them really are the same.

    A graph shows what a forward did, not what it would do with other sizes. So some units of every
    group, of each another number, are masked and deleted, all groups together; only if the outputs
    differ is the culprit searched by halves. A number that a module's forward reads, such as
    ``num_heads``, is changed with the units where that makes the outputs agree.

    Args:
        module: In eval mode; not changed.
        example: (N, C, H, W), random values.
        groups: Candidates.

    Returns:
        The groups that can be trusted, and the reason against each other one.
    """
    counted: list[Group] = []
    kept: list[Group] = []
    excluded: dict[str, str] = {}
    learned: dict[tuple[object, ...], tuple[str, ...] | str] = {}
    for group in groups:
        kind = tuple((type(module.get_submodule(a.module)), a.name) for a in group.attributes)
        if kind and kind not in learned:
            learned[kind] = _numbers(module, example, group)
        found = learned.get(kind, ())
        if isinstance(found, str):  # as of the first of this kind
            excluded[group.name] = found
        else:
            chosen = tuple(a for a in group.attributes if a.name in found)
            counted.append(replace(group, attributes=chosen))
    branches = [g for g in counted if g.kind == "branch"]
    for some in ([g for g in counted if g.kind != "branch"], branches):
        exact, inexact = _exact(module, example, some)
        kept += exact
        excluded |= inexact
    return kept, excluded


def _exact(
    module: nn.Module, example: Tensor, groups: Sequence[Group]
) -> tuple[list[Group], dict[str, str]]:
    reason = _fault(module, example, groups)
    if reason is None:
        return list(groups), {}
    if len(groups) == 1:
        return [], {groups[0].name: reason}
    half = len(groups) // 2
    left, out = _exact(module, example, groups[:half])
    right, right_out = _exact(module, example, groups[half:])
    return left + right, out | right_out


def _numbers(module: nn.Module, example: Tensor, group: Group) -> tuple[str, ...] | str:
    """The names of those numbers that really count a group's units, or what is wrong with all.

    The fewest that make the outputs agree: none, those of heads, all, or one.
    """
    every = tuple(a.name for a in group.attributes)
    choices = [(), tuple(n for n in every if "head" in n), every, *((n,) for n in every)]
    reason = ""
    for names in dict.fromkeys(choices):
        chosen = tuple(a for a in group.attributes if a.name in names)
        fault = _fault(module, example, [replace(group, attributes=chosen)])
        if fault is None:
            return names
        reason = reason or fault
    return reason


def _fault(module: nn.Module, example: Tensor, groups: Sequence[Group]) -> str | None:
    if not groups:
        return None
    for seed in range(_TRIES):
        if (found := _fault_of(module, example, groups, seed)) is not None:
            return found
    return None


def _fault_of(module: nn.Module, example: Tensor, groups: Sequence[Group], seed: int) -> str | None:
    masked = copied(module)
    # Not the same number of each: two widths that must be equal would stay so by chance.
    rng = np.random.default_rng(seed)
    removed = {
        g.name: rng.permutation(g.units)[: rng.integers(1, max(2, 3 * g.units // 4))].tolist()
        for g in groups
    }
    for group in groups:
        if group.kind == "branch":
            silence(masked, group)
            continue
        for reader in group.consumers:
            index = torch.tensor([i for u in removed[group.name] for i in reader.indices[u]])
            mask_weight(masked.get_submodule(reader.layer), index)  # type: ignore[arg-type]
    want = _outputs(masked, example)
    try:
        remove_units(masked, removed, groups)
        difference, scale = _difference(want, _outputs(masked, example))
    except _BREAKS as err:
        return f"deleting units breaks the network: {first_line(err)}"
    if not difference <= TOLERANCE * max(1.0, scale):
        return (
            f"deleting units is not the same as masking them (outputs differ by {difference:.1e})"
        )
    return None


def _outputs(module: nn.Module, images: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return list(named_outputs(module(images.contiguous())).values())


def _difference(left: Sequence[Tensor], right: Sequence[Tensor]) -> tuple[float, float]:
    """Largest difference and largest value, of the output where they are furthest apart."""
    found = [(0.0, 0.0)]
    for one, other in zip(left, right, strict=True):
        if one.shape != other.shape:
            raise ValueError(f"an output of shape {tuple(one.shape)} becomes {tuple(other.shape)}")
        if one.is_floating_point() and one.numel():
            found.append((float((one - other).abs().max()), float(one.abs().max())))
    return max(found, key=lambda pair: _ratio(*pair))


def _ratio(difference: float, scale: float) -> float:
    """Larger where outputs are further apart; what is no number is the furthest."""
    found = difference / max(1.0, scale)
    return math.inf if math.isnan(found) else found
