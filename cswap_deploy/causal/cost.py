"""What measuring will cost, by operation count, before it starts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cswap_deploy.network.graph import Graph
from cswap_deploy.network.units import Group

BUDGET_MACS = 40_000_000_000_000
"""``--scoring-samples auto`` stays within this many multiply-accumulates: some minutes on two
CPU cores."""
_EXACT_PASSES = 3
"""Up to so many passes over the calibration images effects are measured exactly."""
_ADAPTIVE_PASSES = 16
"""What adaptive measuring may take in all rounds."""
_SECONDS_MACS = 500_000_000_000
"""Multiply-accumulates that take a few seconds on two cores: so many are never spared."""
MOST_IMAGES = 256
FEWEST_IMAGES = 8
LATER_ROUNDS = 0.3
"""Part of the units that a round after the first measures again, about."""


def measuring_macs(graph: Graph, groups: Iterable[Group]) -> int:
    """Multiply-accumulates of what follows the cut of every unit, on one image."""
    total = 0
    for group in groups:
        readers = [n for c in group.consumers for n in graph.readers(c.layer)]
        total += group.units * graph.macs(graph.suffix(readers).nodes)
    return total


def loop_macs(graph: Graph, groups: Iterable[Group], *, images: int, rounds: int) -> int:
    """Multiply-accumulates of measuring exactly in all rounds, about."""
    return round(measuring_macs(graph, groups) * images * (1 + LATER_ROUNDS * (rounds - 1)))


def budgets(graph: Graph, *, images: int) -> tuple[int, int]:
    """Multiply-accumulates up to which effects are measured exactly; those for adaptive measuring.

    In passes over the calibration images, of which there are so many.
    """
    one_pass = graph.macs(graph.nodes) * images
    exact, adaptive = _EXACT_PASSES * one_pass, _ADAPTIVE_PASSES * one_pass
    return max(_SECONDS_MACS, exact), min(BUDGET_MACS, max(_SECONDS_MACS, adaptive))


def affordable_forwards(graph: Graph, groups: Sequence[Group], *, rounds: int, macs: int) -> int:
    """How many (unit, image) pairs the first round may measure within a budget."""
    one = measuring_macs(graph, groups) / max(sum(g.units for g in groups), 1)
    return round(macs / (1 + LATER_ROUNDS * (rounds - 1)) / max(one, 1))


def affordable_images(graph: Graph, groups: Iterable[Group], *, rounds: int) -> int:
    """How many images a round may measure on; depends on the network only, not on the machine."""
    one = loop_macs(graph, list(groups), images=1, rounds=rounds)
    return max(FEWEST_IMAGES, min(MOST_IMAGES, BUDGET_MACS // max(one, 1)))
