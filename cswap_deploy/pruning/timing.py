"""Latency as an aim: the device's model, from networks that are narrowed at random and timed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from torch import nn

from cswap_deploy.models.plain import copied
from cswap_deploy.network.deletion import remove_units
from cswap_deploy.network.latency import LatencyModel, Timed, fit_latency
from cswap_deploy.pruning.prepare import Prepared
from cswap_deploy.runtime.node_times import GraphTimes

NARROWED = 5
"""Networks that are timed beside the dense one."""


class TimedDevice(Protocol):
    """Where a network's latency counts: a runtime on a device, with its batch and threads."""

    def time(self, modules: Sequence[nn.Module]) -> list[GraphTimes]:
        """Each network and its nodes, all timed in turn.

        A node's name starts with the dotted name of the module that it belongs to, and is the same
        in all of them.
        """

    def fraction(self, module: nn.Module) -> float:
        """What a call of a network takes, of what one of the dense network does; both in turn."""


def latency_model(network: Prepared, device: TimedDevice, *, seed: int = 0) -> LatencyModel:
    """Time the dense network and some narrowed ones, and fit the model.

    Args:
        network: As prepared, nothing removed.
        device: Where.
        seed: Of the widths.
    """
    rng = np.random.default_rng(seed)
    removals: list[dict[str, list[int]]] = [{}, *(_narrowed(network, rng) for _ in range(NARROWED))]
    modules = []
    for removed in removals:
        modules.append(copied(network.module))
        remove_units(modules[-1], removed, network.groups)
    timed = [
        Timed({g.name: g.units - len(removed.get(g.name, ())) for g in network.groups}, *found)
        for removed, found in zip(removals, device.time(modules), strict=True)
    ]
    return fit_latency(timed, network.groups)


def _narrowed(network: Prepared, rng: np.random.Generator) -> dict[str, list[int]]:
    """Any number of units of each group, within its limits; no branches."""
    found = {}
    for group in network.groups:
        step, floor = network.limits.alignments[group.name], network.limits.floors[group.name]
        steps = (group.units - floor) // step
        if group.kind != "branch" and steps:
            found[group.name] = list(range(int(rng.integers(0, steps + 1)) * step))
    return found
