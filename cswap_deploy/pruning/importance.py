"""Importance of units: what ranks them, and what proposes candidates, in one table.

The lowest value goes first. Values of weights alone are normalised by their group's mean, as is
usual where units of all groups are compared.

Source: Li et al. 2017, "Pruning Filters for Efficient ConvNets" (arXiv:1608.08710).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import nn

from cswap_deploy.data.calibration import Calibration
from cswap_deploy.errors import UsageError
from cswap_deploy.network.graph import Graph
from cswap_deploy.network.placing import HOST, placed
from cswap_deploy.network.units import Group
from cswap_deploy.pruning.allocation import Values


@dataclass(frozen=True, slots=True)
class View:
    """What an importance may look at."""

    graph: Graph
    """The network as it stands; removed units are masked at their consumers."""
    groups: tuple[Group, ...]
    calibration: Calibration
    rng: np.random.Generator
    measure: Callable[[], Values] | None = None
    """Measures the causal effects that the round needs; ``None`` outside of a round."""


@dataclass(frozen=True, slots=True)
class Importance:
    """How much a network needs each of its units."""

    of: Callable[[View], Values]
    """View -> group -> (units,) float64; the lowest goes first."""
    allocates: bool = False
    """Whether the values say by themselves how much each group gives up, as LAMP's do. Otherwise
    they are divided by what a unit saves."""
    needs_images: bool = False
    """Whether images decide, so that each round computes it again and compares candidates."""


def causal_effect(view: View) -> Values:
    """Effect on the prediction of removing each unit."""
    assert view.measure is not None, "effects are measured in a round"
    return view.measure()


def random(view: View) -> Values:
    """No information; the floor that any other importance must beat."""
    return {g.name: view.rng.random(g.units) for g in view.groups}


def magnitude(view: View, *, power: int = 2) -> Values:
    """Norm (L1 or L2) of the weights that produce or read a unit."""
    return {g.name: _norm(view.graph.module, g, power) for g in view.groups}


def lamp(view: View) -> Values:
    """Squared norm of a unit's weights, over the sum of all in its group that are not smaller.

    What is left of a group decides what its next unit is worth, so the values say how much each
    group gives up. A unit of many positions counts as one of them.

    Source:
        Lee et al. 2021, "Layer-Adaptive Sparsity for the Magnitude-based Pruning"
        (arXiv:2010.07611).
    """
    return {g.name: _lamp(view.graph.module, g) for g in view.groups}


IMPORTANCES: dict[str, Importance] = {
    "cswap": Importance(causal_effect, needs_images=True),
    "magnitude": Importance(magnitude),
    "magnitude-l1": Importance(partial(magnitude, power=1)),
    "lamp": Importance(lamp, allocates=True),
    "random": Importance(random),
}


def importance_of(criterion: str) -> Importance:
    """Look up a name in ``IMPORTANCES``; a :class:`UsageError` where there is none."""
    if criterion not in IMPORTANCES:
        raise UsageError(
            f"unknown criterion {criterion!r}", fix=f"one of: {', '.join(sorted(IMPORTANCES))}"
        )
    return IMPORTANCES[criterion]


def _lamp(module: nn.Module, group: Group) -> np.ndarray:
    if group.kind == "branch":
        return np.full(group.units, np.inf)
    squares = _norm(module, group, 2) ** 2
    squares[_norm(module, group, 1, sides=("in",)) == 0] = 0.0  # nothing reads it: it is gone
    order = np.argsort(squares, kind="stable")
    left = np.cumsum(squares[order][::-1])[::-1]
    values = np.empty(group.units)
    values[order] = squares[order] / np.maximum(left, 1e-30)
    return values / len(group.root_indices[0])


def _norm(
    module: nn.Module, group: Group, power: int, sides: tuple[str, ...] = ("in", "out")
) -> np.ndarray:
    if group.kind == "branch":  # its weights say nothing of what it does to the stream
        return np.full(group.units, np.inf)
    layers = dict(module.named_modules(remove_duplicate=False))
    total = np.zeros(group.units)
    for member in group.members:
        owner, _, last = member.tensor.rpartition(".")
        side = "in" if member.dim == 1 else "out"
        layer = layers.get(owner)
        if last != "weight" or not isinstance(layer, nn.Conv2d | nn.Linear) or side not in sides:
            continue
        weight = placed(layer.weight.detach(), HOST).double().movedim(member.dim, 0)
        at = weight.flatten(1).abs().pow(power).sum(1).numpy()
        total += [at[list(positions)].sum() for positions in member.indices]
    values: np.ndarray = total ** (1 / power)
    return values / max(float(values.mean()), 1e-30)
