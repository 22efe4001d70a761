"""Every unit's effect on every image: a part of the images at a time, one forward for all cuts.

What lies before a cut is computed once for as many groups as the memory budget can hold the values
of, and computed again for those that did not fit. So memory does not grow with the images, nor
with the network's depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, fx

from cswap_deploy.causal.effects import Cut, Effects
from cswap_deploy.causal.half import HalfGraph
from cswap_deploy.causal.interventions import Moments
from cswap_deploy.causal.memory import Budget
from cswap_deploy.causal.partition import Graph, bytes_of
from cswap_deploy.causal.units import Group
from cswap_deploy.errors import StageError

_MOST_IMAGES = 64
"""Of one forward: more makes nothing faster."""
Tick = Callable[[int], None]


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
    """Measure what each unit does to the prediction on each image.

    Args:
        graph: The network as it stands.
        wanted: Group -> units by index; at least one.
        images: (N, C, H, W) float32.
        labels: (N,) int64, the true classes.
        moments: Of the consumers' inputs; empty for the zero intervention.
        budget: Of memory; a third of what is free unless said.
        half: Run what follows the cuts in bfloat16 instead of float32.
        tick: Called with the number of (unit, image) pairs finished, for progress.

    Returns:
        Of each group, in the order of ``wanted`` and of its units.

    Raises:
        StageError: A prediction is not finite, or memory runs out for a single image.
    """
    budget = budget if budget is not None else Budget.of()
    cuts = [Cut(graph, group, units, moments) for group, units in wanted.items() if len(units)]
    rounded = HalfGraph(graph) if half else None
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in cuts]
    for part, truth in _parts(cuts, images, labels, budget):
        whole = [(at, cut, range(len(cut.units))) for at, cut in enumerate(cuts)]
        for at, effects in measure_cuts(
            graph, whole, part, truth, budget=budget, half=rounded, tick=tick
        ):
            found[at].append(effects)
    return [
        Effects(
            group=cut.group.name,
            units=cut.units,
            true_class=torch.cat([xi for xi, _ in parts], 1).numpy(),
            kl=torch.cat([kl for _, kl in parts], 1).numpy(),
        )
        for cut, parts in zip(cuts, found, strict=True)
    ]


def measure_cuts(
    graph: Graph,
    cuts: Sequence[tuple[int, Cut, Sequence[int]]],
    images: Tensor,
    labels: Tensor,
    *,
    budget: Budget,
    half: HalfGraph | None = None,
    tick: Tick | None = None,
) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    """Measure some units on one part of the images.

    Args:
        graph: The network as it stands.
        cuts: (what to call it, cut, positions of units); front to back is fastest.
        images: (n, C, H, W).
        labels: (n,).
        budget: Of memory.
        half: What runs behind the cuts, if not ``graph``.
        tick: See :func:`measure`.

    Yields:
        (what it is called, (true-class effect, KL divergence), each (units, n) float64).
    """
    for pack in _packs(cuts, len(images), budget):
        keep = frozenset().union(*(cut.keep for _, cut, _ in pack))
        with torch.inference_mode():
            logits, kept = graph.run(images, keep=keep)
            if not torch.isfinite(logits).all():
                raise not_finite(graph, images)
            for name, cut, rows in pack:
                work = partial(cut.measure, kept, logits, labels, rows=rows, half=half, tick=tick)
                yield name, budget.retrying(work)


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
    if fit < _MOST_IMAGES // 4:  # better compute the prefix again than run few images at a time
        fit = min(_MOST_IMAGES // 4, budget.kept_bytes // max(largest, 1))
    count = max(1, min(_MOST_IMAGES, fit))
    yield from zip(torch.split(images, count), torch.split(labels, count), strict=True)


def _packs(
    cuts: Sequence[tuple[int, Cut, Sequence[int]]], images: int, budget: Budget
) -> Iterator[list[tuple[int, Cut, Sequence[int]]]]:
    """Neighbouring cuts that one forward serves; at least one each."""
    pack: list[tuple[int, Cut, Sequence[int]]] = []
    nodes: frozenset[fx.Node] = frozenset()
    for entry in cuts:
        wider = nodes | entry[1].keep
        if pack and sum(map(bytes_of, wider)) * images > budget.kept_bytes:
            yield pack
            pack, wider = [], entry[1].keep
        pack.append(entry)
        nodes = wider
    if pack:
        yield pack
