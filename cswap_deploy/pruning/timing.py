"""Latency as an aim: the device's model, from networks that are narrowed at random and timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import numpy as np
from torch import nn

from cswap_deploy.models.plain import copied
from cswap_deploy.network.deletion import remove_units
from cswap_deploy.network.latency import LatencyModel, fit_latency
from cswap_deploy.pruning.prepare import Prepared
from cswap_deploy.records.latency import TimedGraph

NARROWED = 5
"""Networks that are timed beside the dense one."""
Removed = dict[str, list[int]]
"""Group -> units."""
Widths = dict[str, int]
Variant = tuple[Widths, Callable[[], nn.Module]]
"""A network's units by group, and what makes it."""


class TimedDevice(Protocol):
    """Where a network's latency counts: a runtime on a device, with its batch and threads."""

    def timed(self, variants: Sequence[Variant]) -> Sequence[TimedGraph]:
        """Networks and their nodes, the dense one first, all timed in turn.

        These variants, or others of the same network where they are known already. A node's name
        starts with the dotted name of the module that it belongs to, and is the same in all.
        """

    def fraction(self, module: nn.Module) -> float | None:
        """What a call takes, of what one of the dense network does; ``None``: not known here."""


def variants(network: Prepared, *, seed: int = 0) -> list[Variant]:
    """The dense network and some that are narrowed in ways that tell the groups apart.

    Args:
        network: As prepared, nothing removed.
        seed: Of the widths.
    """
    rng = np.random.default_rng(seed)
    removals: list[Removed] = [{}, *(narrowed(network, rng) for _ in range(NARROWED))]
    return [variant(network, removed) for removed in removals]


def variant(network: Prepared, removed: Removed) -> Variant:
    """The network without some units of its groups."""
    widths = {g.name: g.units - len(removed.get(g.name, ())) for g in network.groups}
    return widths, partial(_without, network, removed)


def latency_model(network: Prepared, device: TimedDevice) -> LatencyModel:
    """Time variants of a network and fit the model."""
    return fit_latency(device.timed(variants(network)), network.groups)


def _without(network: Prepared, removed: Removed) -> nn.Module:
    module = copied(network.module)
    remove_units(module, removed, network.groups)
    return module


def narrowed(network: Prepared, rng: np.random.Generator) -> Removed:
    """Any number of units of each group, within its limits; no branches."""
    found = {}
    for group in network.groups:
        step, floor = network.limits.alignments[group.name], network.limits.floors[group.name]
        steps = (group.units - floor) // step
        if group.kind != "branch" and steps:
            found[group.name] = list(range(int(rng.integers(0, steps + 1)) * step))
    return found
