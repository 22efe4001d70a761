"""Every unit's effect on every image: a part of the images at a time, one forward for all cuts.

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

from cswap_deploy.causal.bfloat16 import HalfGraph
from cswap_deploy.causal.effects import Effects
from cswap_deploy.causal.interventions import Moments
from cswap_deploy.causal.masked_forward import Cut
from cswap_deploy.causal.memory import Budget
from cswap_deploy.errors import StageError
from cswap_deploy.network.graph import Graph
from cswap_deploy.network.nodes import bytes_of
from cswap_deploy.network.units import Group

MOST_IMAGES = 64
"""Of one forward: more makes nothing faster."""
Tick = Callable[[int], None]


class Scorer(Protocol):
    """Measures effects on one network and one set of images; here or elsewhere."""

    def effects(
        self,
        wanted: Mapping[Group, Sequence[int]],
        rows: Tensor | None = None,
        *,
        half: bool = False,
        tick: Tick | None = None,
    ) -> list[Effects]:
        """What each unit does to the prediction on each image.

        Args:
            wanted: Group -> units by index; groups without units are left out.
            rows: (n,) which images; all unless said.
            half: Run what follows the cuts in bfloat16 instead of float32.
            tick: Called with the number of (unit, image) pairs finished, for progress.

        Returns:
            Of each group, in the order of ``wanted`` and of its units.

        Raises:
            StageError: A prediction is not finite, or memory runs out for a single image.
        """


class Local:
    """Measures in this process."""

    def __init__(
        self,
        graph: Graph,
        images: Tensor,
        labels: Tensor,
        moments: Mapping[str, Moments],
        budget: Budget | None = None,
        *,
        device: torch.device | None = None,
        fan: bool | None = None,
        together: bool = True,
    ) -> None:
        """Of one network and one set of images.

        Args:
            graph: The network as it stands.
            images: (N, C, H, W) float32.
            labels: (N,) int64, the true classes.
            moments: Of the consumers' inputs; empty for the zero intervention.
            budget: Of memory; a third of what is free unless said.
            device: Where to measure; the CPU unless said. The network is copied there.
            fan: See :class:`effects.Cut`; on a GPU unless said.
            together: Whether images do not see each other; see :func:`independent`.
        """
        self._together = together
        self._device = device if device is not None else torch.device("cpu")
        self._graph = graph if device is None else graph.to(device)
        self._fan = fan if fan is not None else self._device.type == "cuda"
        self._images, self._labels, self._moments = images, labels, moments
        self._budget = budget if budget is not None else Budget.of()

    def effects(
        self,
        wanted: Mapping[Group, Sequence[int]],
        rows: Tensor | None = None,
        *,
        half: bool = False,
        tick: Tick | None = None,
    ) -> list[Effects]:
        """See :class:`Scorer`."""
        cuts = [
            Cut(self._graph, group, units, self._moments, fan=self._fan and not half)
            for group, units in wanted.items()
            if len(units)
        ]
        images = self._images if rows is None else self._images[rows]
        labels = self._labels if rows is None else self._labels[rows]
        rounded = HalfGraph(self._graph) if half else None
        found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in cuts]
        for part, truth in _parts(cuts, images, labels, self._budget):
            measured = _measure_part(
                self._graph, cuts, part.to(self._device), truth.to(self._device),
                self._budget, rounded, tick, together=self._together,
            )  # fmt: skip
            for at, effects in measured:
                found[at].append(effects)
        return [
            Effects(
                group=cut.group.name,
                units=cut.units,
                true_class=torch.cat([xi for xi, _ in parts], 1).cpu().numpy(),
                kl=torch.cat([kl for _, kl in parts], 1).cpu().numpy(),
            )
            for cut, parts in zip(cuts, found, strict=True)
        ]


def measure(
    graph: Graph,
    wanted: Mapping[Group, Sequence[int]],
    *,
    images: Tensor,
    labels: Tensor,
    moments: Mapping[str, Moments],
    budget: Budget | None = None,
    half: bool = False,
    tick: Tick | None = None,
) -> list[Effects]:
    """Measure in this process; see :class:`Local` and :class:`Scorer`."""
    return Local(graph, images, labels, moments, budget).effects(wanted, half=half, tick=tick)


def _measure_part(
    graph: Graph,
    cuts: Sequence[Cut],
    images: Tensor,
    labels: Tensor,
    budget: Budget,
    half: HalfGraph | None,
    tick: Tick | None,
    *,
    together: bool = True,
) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    """(position of the cut, (true-class effect, KL divergence)), each (units, n) float64."""
    for pack in _packs(cuts, len(images), budget):
        keep = frozenset().union(*(cuts[at].keep for at in pack))
        with torch.inference_mode():
            logits, kept = graph.run(images, keep=keep)
            if not torch.isfinite(logits).all():
                raise not_finite(graph, images)
            for at in pack:
                work = partial(
                    cuts[at].measure, kept, logits, labels, together=together, half=half, tick=tick
                )
                yield at, budget.retrying(work)


def independent(graph: Graph, images: Tensor) -> bool:
    """Whether an image's prediction does not depend on the others of its batch.

    Networks that normalise over the batch, for example, cannot run many variants in one batch.

    Args:
        graph: The network.
        images: (N, C, H, W), some real ones, N >= 4.
    """
    few = images[:4]
    with torch.inference_mode():
        together = graph.run(few)[0]
        apart = torch.cat([graph.run(part)[0] for part in torch.split(few, 2)])
    return bool(torch.allclose(together, apart, rtol=1e-3, atol=1e-3 * float(apart.abs().max())))


def not_finite(graph: Graph, images: Tensor) -> StageError:
    """The error for predictions that are not finite; names the first layer whose output is not."""
    layer, found = graph.first_not_finite(images)
    return StageError(
        f"the network's output is not finite: the first to go wrong is {layer} ({found})",
        fix="check the weights and the preprocessing (--mean, --std) of this model",
    )


def _parts(
    cuts: Sequence[Cut], images: Tensor, labels: Tensor, budget: Budget
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images for one forward: as many as all cuts' values fit for, but at least some."""
    nodes = frozenset().union(*(cut.keep for cut in cuts))
    together = sum(map(bytes_of, nodes))
    largest = max((cut.kept_bytes for cut in cuts), default=1)
    fit = budget.kept_bytes // max(together, 1)
    if fit < MOST_IMAGES // 4:  # better compute the prefix again than run few images at a time
        fit = min(MOST_IMAGES // 4, budget.kept_bytes // max(largest, 1))
    count = max(1, min(MOST_IMAGES, fit))
    yield from zip(torch.split(images, count), torch.split(labels, count), strict=True)


def _packs(cuts: Sequence[Cut], images: int, budget: Budget) -> Iterator[list[int]]:
    """Positions of neighbouring cuts that one forward serves; at least one each."""
    pack: list[int] = []
    nodes: frozenset[fx.Node] = frozenset()
    for at, cut in enumerate(cuts):
        wider = nodes | cut.keep
        if pack and sum(map(bytes_of, wider)) * images > budget.kept_bytes:
            yield pack
            pack, wider = [], cut.keep
        pack.append(at)
        nodes = wider
    if pack:
        yield pack
