"""Delete what a plan says, and prove that deleting changed nothing.

A pruned network is saved as its plan and a state dict, never as a pickled module:
``apply_plan(plan, fresh_module)`` gives the architecture, and the weights load with
``strict=True``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from cswap_deploy.errors import ArtifactError, PruneError
from cswap_deploy.models.outputs import named_outputs
from cswap_deploy.network.groups import find_groups, remove_units
from cswap_deploy.network.units import Group, give_bias, mask_weight
from cswap_deploy.records.plan import PrunePlan

TOLERANCE = 1e-4
"""Largest |difference of outputs| between the masked and the deleted network, relative to the
output's largest value where that is above one (float32)."""
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
    found = {g.name: g for g in find_groups(module, example).groups}
    removed = {}
    for entry in plan.groups:
        group = found.get(entry.name)
        if group is None or group.units != entry.units:
            has = "no such group" if group is None else f"{group.units} units"
            said = f"{entry.name} should have {entry.units} units, the module has {has}"
            raise ArtifactError(f"the plan does not fit this architecture: {said}", fix=_FIX)
        removed[entry.name] = sorted(set(range(entry.units)) - set(entry.kept))
    for name in plan.biased:
        give_bias(module.get_submodule(name))  # type: ignore[arg-type]
    remove_units(module, example, removed, found.values())
    return module.eval()


def delete_removed(
    masked: nn.Module,
    example: Tensor,
    removed: dict[str, list[int]],
    groups: Sequence[Group],
    images: Tensor,
) -> nn.Module:
    """A copy without the units that a network no longer reads; its outputs are checked to stay.

    Args:
        masked: The network with its removed units masked.
        example: (N, C, H, W), any values.
        removed: Group name -> units.
        groups: All groups.
        images: (N, C, H, W), real ones, for the check.

    Raises:
        PruneError: The outputs differ by more than ``TOLERANCE``.
    """
    smaller = copy.deepcopy(masked)
    remove_units(smaller, example, removed, groups)
    difference, scale = _difference(masked, smaller, images)
    if not difference <= TOLERANCE * max(1.0, scale):
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
        dense: The dense architecture, any weights; shrunk in place.
        example: (N, C, H, W), any values.

    Raises:
        ArtifactError: The plan or the weights do not fit the architecture.
    """
    from safetensors.torch import load_file

    module = apply_plan(plan, dense, example) if plan.groups else dense
    try:
        module.load_state_dict(load_file(weights), strict=True)
    except RuntimeError as err:
        words = str(err).splitlines()[-1].strip()
        said = f"{weights} does not fit {type(dense).__name__}: {words}"
        raise ArtifactError(said, fix=_FIX) from err
    return module.eval()


def contiguous_state(module: nn.Module) -> dict[str, Tensor]:
    """A state dict as safetensors takes it: detached, each tensor dense in memory."""
    return {name: value.detach().contiguous() for name, value in module.state_dict().items()}


def exact_groups(
    module: nn.Module, example: Tensor, groups: Sequence[Group]
) -> tuple[list[Group], dict[str, str]]:
    """Keep the groups for which masking a unit and deleting it really are the same.

    The dependency graph may be wrong about operations it does not know (padding in a shortcut,
    channel shuffles). So one unit of every group is masked and deleted, all groups together; only
    if the outputs differ is the culprit searched by halves.

    Args:
        module: In eval mode; not changed.
        example: (N, C, H, W), random values.
        groups: Candidates.

    Returns:
        The groups that can be trusted, and the reason against each other one.
    """
    reason = _fault(module, example, groups)
    if reason is None:
        return list(groups), {}
    if len(groups) == 1:
        return [], {groups[0].name: reason}
    half = len(groups) // 2
    left, out = exact_groups(module, example, groups[:half])
    right, right_out = exact_groups(module, example, groups[half:])
    return left + right, out | right_out


def _fault(module: nn.Module, example: Tensor, groups: Sequence[Group]) -> str | None:
    if not groups:
        return None
    masked = copy.deepcopy(module)
    removed = {g.name: [g.units // 2] for g in groups}
    for group in groups:
        for entry in group.consumers:
            index = torch.tensor(entry.indices[group.units // 2])
            mask_weight(masked.get_submodule(entry.layer), index)  # type: ignore[arg-type]
    smaller = copy.deepcopy(masked)
    try:
        remove_units(smaller, example, removed, groups)
        difference, scale = _difference(masked, smaller, example)
    except (RuntimeError, IndexError, AssertionError, ValueError) as err:
        words = str(err).strip().splitlines() or [type(err).__name__]
        return f"deleting a unit breaks the network: {words[0]}"
    if not difference <= TOLERANCE * max(1.0, scale):
        return f"deleting a unit is not the same as masking it (outputs differ by {difference:.1e})"
    return None


def _difference(a: nn.Module, b: nn.Module, images: Tensor) -> tuple[float, float]:
    """Largest difference and largest value, of the output where they are furthest apart."""
    with torch.no_grad():
        pairs = zip(
            named_outputs(a(images)).values(), named_outputs(b(images)).values(), strict=True
        )
    found = []
    for left, right in pairs:
        if left.shape != right.shape:
            raise ValueError(f"an output of shape {tuple(left.shape)} becomes {tuple(right.shape)}")
        if left.is_floating_point():
            found.append((float((left - right).abs().max()), float(left.abs().max())))
    return max(found, key=lambda pair: pair[0] / max(1.0, pair[1]))
