"""What pruning costs, phase by phase, before it starts; and how long the rest of it will take.

Costs are multiply-accumulates, as far as operations decide, times what each kind of work takes
beside a plain forward pass of as many (measured on two CPU cores, benchmarks/LOG.md). One timed
forward pass makes seconds of them; later the phases that are over do.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cswap_deploy.causal.cost import LATER_ROUNDS, loop_macs, measuring_macs
from cswap_deploy.network.graph import Graph
from cswap_deploy.network.nodes import elements
from cswap_deploy.network.placing import placed
from cswap_deploy.network.unfolding import window_of
from cswap_deploy.network.units import depthwise
from cswap_deploy.progress import Phases
from cswap_deploy.pruning.candidates import CURVED, NEIGHBOURS
from cswap_deploy.pruning.chains import find_chains
from cswap_deploy.pruning.job import Job, Resolved
from cswap_deploy.pruning.prepare import Prepared
from cswap_deploy.pruning.producers import ITERATIONS, rows_for
from cswap_deploy.pruning.producers import MAX_FEATURES as MOST_READ
from cswap_deploy.pruning.refit import MAX_FEATURES, solvable
from cswap_deploy.pruning.rounds import LOOKED
from cswap_deploy.pruning.targets import BLOCK
from cswap_deploy.pruning.trials import (
    ENOUGH,
    MAX_ROWS,
    MIXTURES,
    ROWS,
    TOGETHER,
    images_apart,
    starved,
)

Costs = Mapping[str, list[float]]
"""Kind of phase, the first word of what it is called -> the cost of each of them, in order."""
_LOOKING, _ESTIMATING, _MEASURING = 1.8, 6.6, 0.8
"""Of one forward pass: moments of all layers' inputs; the Fisher estimate; masked forwards."""
_LOOKS = 24
"""Images that a unit is measured on at most, on average."""
_CANDIDATES, _FROM_DENSE, _TRIED = 7, 3, 2
_STREAMS_WHOLE = 3
"""More candidates, of either, where there are streams."""
_WAVES = 0.5, 0.3, 0.2
"""Parts of the groups whose curves get a second point, a third one ...; of a whole branch there is
one."""
_BEHIND = 0.5
"""Of a forward: what lies behind a group, on average."""
_STEPS = 1.6
"""Forwards from the start for each layer that is refitted on trial."""
_IN_TURN = 1
"""Times that each whole branch is screened as branches go in turn."""
_SWEPT = 2
"""Times that a producer is reconstructed, on average."""
_TIMED_IMAGES, _TIMED_SECONDS = 32, 0.5


def expected_costs(job: Job) -> Costs:
    """What each phase of a pruning will cost."""
    network, resolved, images = job.network, job.resolved, len(job.calibration.images)
    graph, rounds = network.graph, resolved.rounds
    one = graph.macs(graph.nodes)
    few_images = bool(starved(network.dense, images))
    images = max(images, ENOUGH) if few_images else images
    few, judges = images_apart(images)
    judged = (1 + MIXTURES) * judges
    trial = one * judged + (0 if few_images else one * few + _refit_macs(graph, few, ROWS))
    screen = one * (1 + MIXTURES) * min(TOGETHER, images - few)
    held = _STREAMS_WHOLE * any(group.stream for group in network.groups)
    trying, in_turn = [(_CANDIDATES + held) * screen + _TRIED * trial], 0.0
    whole = sum(g.kind == "branch" for g in network.groups)
    if job.device is not None and whole:
        trying.append(whole * screen + NEIGHBOURS * trial)  # a step of the search over them
        in_turn = _IN_TURN * whole * screen
    trying *= rounds
    if rounds > 1:
        producers = 0.0 if few_images else _producer_macs(network, ROWS)
        trying.append((_FROM_DENSE + held) * screen + _TRIED * (trial + producers))
        trying.append(0.0 if few_images else trial + producers)  # what the rounds came to
    last = 3 * one * images + _refit_macs(graph, images, MAX_ROWS)
    last += _producer_macs(network, MAX_ROWS) + few_images * _STEPS * len(solvable(graph)) * screen
    seen = images - judges if few_images else min(images, LOOKED)
    groups = len(network.groups)
    points = groups, *(part * (groups - whole) for part in _WAVES)
    curves = [count * _BEHIND * screen for count in points]
    found = {
        "looking": [_LOOKING * one * seen] * rounds,
        "comparing": curves * (len(CURVED) * rounds + 1) * few_images,
        "measuring": _measuring(network, resolved),
        "removing": [in_turn] * rounds,
        "trying": trying if job.compares else [],
        "refitting": [last] if job.compares else [last] * rounds,
    }
    if resolved.measuring == "adaptive":
        found["estimating"] = [_ESTIMATING * one * resolved.scoring_samples] * rounds
    return found


def _measuring(network: Prepared, resolved: Resolved) -> list[float]:
    graph, groups, count = network.graph, network.groups, resolved.scoring_samples
    if resolved.measuring != "adaptive":
        whole = loop_macs(graph, groups, images=count, rounds=1)
        return [whole, *[LATER_ROUNDS * whole] * (resolved.rounds - 1)]
    units = sum(g.units for g in groups)
    first = _LOOKS * units
    later = first if resolved.most_forwards is None else LATER_ROUNDS * resolved.most_forwards
    if resolved.most_forwards is not None:
        first = min(first, resolved.most_forwards)
    each = _MEASURING * measuring_macs(graph, groups) / max(units, 1)
    return [each * first, *[each * min(first, later)] * (resolved.rounds - 1)]


def _refit_macs(graph: Graph, images: int, rows: int) -> float:
    """The normal equations of all layers."""
    total = 0.0
    for name in solvable(graph):
        layer, node = graph.layer(name), graph.readers(name)[0]
        features, outputs = layer.weight[0].numel(), len(layer.weight)
        if features <= MAX_FEATURES:
            positions = min(rows, images * elements(node) // outputs)
            total += positions * features * (0.625 * features + outputs)
    return total


def _producer_macs(network: Prepared, most: int) -> float:
    """Two products with each of a chain's layers for each iteration, on so many rows at most."""
    graph, total = network.graph, 0.0
    for chain in find_chains(graph, solvable(graph)):
        layer, consumer = graph.layer(chain.producer_layer), graph.layer(chain.consumer_layer)
        window, features = window_of(chain.consumer, consumer), layer.weight[0].numel()
        if features <= MOST_READ and not depthwise(layer):
            each = window.reads(BLOCK) * features + window.taps * len(consumer.weight)
            rows = min(most, rows_for(features, window))
            total += 2 * _SWEPT * (ITERATIONS + 1) * rows * each * len(layer.weight)
    return total


def macs_per_second(graph: Graph, images: Tensor) -> float:
    """Speed of plain forward passes, on a few images (N, C, H, W) of the host's memory."""
    few = placed(images[:_TIMED_IMAGES], graph.device)
    done, seconds = 0, 0.0
    with torch.inference_mode():
        graph.run(few[:2])
        while seconds < _TIMED_SECONDS:
            begun = time.perf_counter()
            float(graph.run(few)[0].sum())  # waits for a GPU, too
            seconds += time.perf_counter() - begun
            done += len(few)
    return graph.macs(graph.nodes) * done / seconds


@dataclass(slots=True)
class Pace:
    """Tells of phases, and with each of how far the whole stage is; satisfies ``Phases``."""

    inner: Phases
    costs: Costs
    per_second: float
    """What is expected to be done in a second, before anything has been done."""
    _begun: float = field(init=False, default_factory=time.perf_counter)
    _done: float = field(init=False, default=0.0)
    _seen: dict[str, int] = field(init=False, default_factory=dict)
    _now: float = field(init=False, default=0.0)
    """Cost of the phase that is running."""
    _steps: int = field(init=False, default=0)
    _total: int = field(init=False, default=0)

    def begin(self, what: str, total: int) -> None:
        """A phase starts."""
        self._close()
        kind = what.split(maxsplit=1)[0].rstrip(",")
        at = self._seen.get(kind, 0)
        self._seen[kind] = at + 1
        costs = self.costs.get(kind, [])
        self._now = costs[at] if at < len(costs) else 0.0
        self._steps, self._total = 0, total
        self._tell()
        self.inner.begin(what, total)

    def advance(self, steps: int) -> None:
        """Some of its steps are done."""
        self._steps += steps
        self.inner.advance(steps)
        self._tell()

    def end(self) -> None:
        """It is over."""
        self._close()
        self.inner.end()

    def overall(self, part: float, left: float) -> None:
        """Of a stage around this one."""
        self.inner.overall(part, left)

    def _close(self) -> None:
        self._done, self._now = self._done + self._now, 0.0

    def _tell(self) -> None:
        total = sum(map(sum, self.costs.values()))
        part = min(1.0, self._steps / self._total) if self._total else 0.0
        done = min(self._done + part * self._now, total)
        share = done / total if total else 1.0
        expected = total / self.per_second
        seen = (time.perf_counter() - self._begun) / share if share else expected
        trust = min(1.0, 4 * share)  # the first phases say little about the others
        self.inner.overall(share, (1 - share) * (trust * seen + (1 - trust) * expected))
