"""Every unit's effect on every image: a part of the images at a time, one forward for all units.

What lies before a cut is computed once for as many groups as the memory budget can hold the values
of, and computed again for those that did not fit. So memory does not grow with the images, nor
with the network's depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, fx

from cswap_deploy.causal.arithmetic import ieee_float32
from cswap_deploy.causal.bfloat16 import Bfloat16Graph
from cswap_deploy.causal.effects import Effects
from cswap_deploy.causal.experiment import Experiment, not_finite
from cswap_deploy.causal.masked_forward import MaskedForward
from cswap_deploy.causal.memory import Budget
from cswap_deploy.network.graph import Graph
from cswap_deploy.network.nodes import bytes_of
from cswap_deploy.network.placing import HOST, placed
from cswap_deploy.network.units import Group

MOST_IMAGES = 64
"""Images of one forward; more makes nothing faster."""
Tick = Callable[[int], None]


class EffectMeasurement(Protocol):
    """Measures effects of units in one experiment; in this process or elsewhere."""

    def effects(
        self,
        wanted: Mapping[Group, Sequence[int]],
        rows: Tensor | None = None,
        *,
        bfloat16: bool = False,
        tick: Tick | None = None,
    ) -> list[Effects]:
        """What each unit does to the prediction on each image, in the order of ``wanted``.

        Args:
            wanted: Group -> units by index; groups without units are left out.
            rows: (n,) which images; all unless given.
            bfloat16: Run what follows the cuts in bfloat16 instead of IEEE float32.
            tick: Called with the number of (unit, image) pairs finished, for progress.

        Raises:
            StageError: A prediction is not finite, or memory runs out for a single image.
        """


MeasurementFactory = Callable[[Experiment], EffectMeasurement]
"""Where effects are measured: this process, a GPU, worker processes, a cluster."""


class LocalMeasurement:
    """Measures in this process."""

    def __init__(
        self,
        experiment: Experiment,
        *,
        fused: bool | None = None,
        together: bool = True,
    ) -> None:
        """Measure where the network is.

        Args:
            experiment: What to measure on.
            fused: Use :mod:`causal.fanout`; on GPUs unless given.
            together: Whether images may share a batch; see :func:`experiment.independent`.
        """
        self._experiment, self._together = experiment, together
        self._graph, self._device = experiment.graph, experiment.graph.device
        self._fused = fused if fused is not None else self._device.type == "cuda"

    @ieee_float32()
    def effects(
        self,
        wanted: Mapping[Group, Sequence[int]],
        rows: Tensor | None = None,
        *,
        bfloat16: bool = False,
        tick: Tick | None = None,
    ) -> list[Effects]:
        """See :class:`EffectMeasurement`."""
        moments, fused = self._experiment.moments, self._fused and not bfloat16
        forwards = [
            MaskedForward(
                self._graph, group, units, moments, fused=fused, task=self._experiment.task
            )
            for group, units in wanted.items()
            if len(units)
        ]
        images, labels = self._experiment.images, self._experiment.labels
        if rows is not None:
            images, labels = images[rows], labels[rows]
        rounded = Bfloat16Graph(self._graph) if bfloat16 else None
        found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in forwards]
        for part, truth in _parts(forwards, images, labels, self._experiment.budget):
            there = placed(part, self._device), placed(truth, self._device)
            for at, effects in self._measure_part(forwards, *there, rounded, tick):
                found[at].append(effects)
        return [
            Effects(
                group=forward.group.name,
                units=forward.units,
                true_class=placed(torch.cat([xi for xi, _ in parts], 1), HOST).numpy(),
                kl=placed(torch.cat([kl for _, kl in parts], 1), HOST).numpy(),
            )
            for forward, parts in zip(forwards, found, strict=True)
        ]

    def _measure_part(
        self,
        forwards: Sequence[MaskedForward],
        images: Tensor,
        labels: Tensor,
        rounded: Graph | None,
        tick: Tick | None,
    ) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """(position in ``forwards``, (true-class effect, KL divergence) (units, n) float64)."""
        budget = self._experiment.budget
        for pack in _packs(forwards, len(images), budget):
            keep = frozenset().union(*(forwards[at].keep for at in pack))
            with torch.inference_mode():
                logits, kept = self._graph.run(images, keep=keep)
                if not torch.isfinite(logits).all():
                    raise not_finite(self._graph, images)
                for at in pack:
                    work = partial(
                        forwards[at].measure, kept, logits, labels,
                        together=self._together, rounded=rounded, tick=tick,
                    )  # fmt: skip
                    yield at, budget.retrying(work)


def _parts(
    forwards: Sequence[MaskedForward], images: Tensor, labels: Tensor, budget: Budget
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images for one forward: as many as all kept values fit for, but at least some."""
    nodes = frozenset().union(*(forward.keep for forward in forwards))
    fit = budget.kept_bytes // max(sum(map(bytes_of, nodes)), 1)
    if fit < MOST_IMAGES // 4:  # better compute the prefix again than run few images at a time
        largest = max(forward.kept_bytes for forward in forwards)
        fit = min(MOST_IMAGES // 4, budget.kept_bytes // max(largest, 1))
    count = max(1, min(MOST_IMAGES, fit))
    yield from zip(torch.split(images, count), torch.split(labels, count), strict=True)


def _packs(forwards: Sequence[MaskedForward], images: int, budget: Budget) -> Iterator[list[int]]:
    """Positions of neighbouring groups that one unmasked forward serves; at least one each."""
    pack: list[int] = []
    nodes: frozenset[fx.Node] = frozenset()
    for at, forward in enumerate(forwards):
        wider = nodes | forward.keep
        if pack and sum(map(bytes_of, wider)) * images > budget.kept_bytes:
            yield pack
            pack, wider = [], forward.keep
        pack.append(at)
        nodes = wider
    if pack:
        yield pack
