"""Baseline rankings, to compare with and to prune without measuring anything.

Every criterion scores all units of a group; the smallest scores go first. They are normalised by
the group's mean, as is usual for a global ranking.

Source: Li et al. 2017, "Pruning Filters for Efficient ConvNets" (arXiv:1608.08710).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from cswap_deploy.errors import UsageError
from cswap_deploy.network.units import Group

Criterion = Callable[[nn.Module, Group, np.random.Generator], np.ndarray]
"""(module, group, random numbers) -> (units,) scores."""


def random(module: nn.Module, group: Group, rng: np.random.Generator) -> np.ndarray:
    """No information; the floor that any criterion must beat."""
    return rng.random(group.units)


def magnitude_l1(module: nn.Module, group: Group, rng: np.random.Generator) -> np.ndarray:
    """Sum of |weights| that produce or read a unit."""
    return _norm(module, group, 1)


def magnitude_l2(module: nn.Module, group: Group, rng: np.random.Generator) -> np.ndarray:
    """Euclidean norm of the weights that produce or read a unit."""
    return _norm(module, group, 2)


def lamp(module: nn.Module, group: Group, rng: np.random.Generator) -> np.ndarray:
    """Squared norm, over the sum of all in the group that are not smaller.

    What is left of a group decides what its next unit is worth, so the scores say how much each
    group gives up: they are ranked as they are, not by what a unit saves. A unit of many positions
    counts as one of them.

    Source: Lee et al. 2021, "Layer-Adaptive Sparsity for the Magnitude-based Pruning"
    (arXiv:2010.07611).
    """
    squares = magnitude_l2(module, group, rng) ** 2
    squares[_norm(module, group, 1, sides=("in",)) == 0] = 0.0  # nothing reads it: it is gone
    order = np.argsort(squares, kind="stable")
    left = np.cumsum(squares[order][::-1])[::-1]
    scores = np.empty(group.units)
    scores[order] = squares[order] / np.maximum(left, 1e-30)
    return scores / len(group.root_indices[0])


CRITERIA: dict[str, Criterion] = {
    "random": random,
    "magnitude": magnitude_l2,
    "magnitude-l1": magnitude_l1,
}


def get_criterion(name: str) -> Criterion:
    """Look a baseline up.

    Raises:
        UsageError: Unknown name.
    """
    if name not in CRITERIA:
        raise UsageError(
            f"unknown criterion {name!r}", fix=f"one of: cswap, {', '.join(sorted(CRITERIA))}"
        )
    return CRITERIA[name]


def _norm(
    module: nn.Module, group: Group, power: int, sides: tuple[str, ...] = ("in", "out")
) -> np.ndarray:
    total = torch.zeros(group.units, dtype=torch.float64)
    for member in group.members:
        layer = module.get_submodule(member.layer) if _is_module(module, member.layer) else None
        if not isinstance(layer, nn.Conv2d | nn.Linear) or member.side not in sides:
            continue
        weight = layer.weight.detach().double()
        for unit, positions in enumerate(member.indices):
            index = torch.tensor(positions)
            if member.side == "in":
                part = weight[:, torch.unique(index % weight.shape[1])]
            else:
                part = weight[index]
            total[unit] += part.abs().pow(power).sum()
    scores: np.ndarray = total.pow(1 / power).numpy()
    return scores / max(float(scores.mean()), 1e-30)


def _is_module(module: nn.Module, name: str) -> bool:
    try:
        module.get_submodule(name)
    except AttributeError:
        return False
    return True
