"""Masked forwards tried on a network before they are believed.

Running what follows a cut, for many variants in one batch, is right only while images do not touch
each other and no size was fixed when the network was traced. So one pair of units of every group
is measured both ways first: by what follows the cut, and by whole forwards with masked weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cswap_deploy.causal.masked_forward import MaskedForward
from cswap_deploy.network.graph import Graph
from cswap_deploy.network.units import Group, mask_weight

_TOLERANCE = 1e-3
"""Of the largest output; what is wrong is wrong by far more."""


@dataclass(slots=True)
class Trusted:
    """How the groups of a network can be measured."""

    together: bool = True
    """Whether variants may share a batch; else each runs by itself, which is slow."""
    excluded: dict[str, str] = field(default_factory=dict)
    """Group -> why it cannot be measured."""


def try_masking(graph: Graph, groups: Sequence[Group], images: Tensor) -> Trusted:
    """Measure two units of every group both ways.

    Args:
        graph: The network; its weights are masked for a moment.
        groups: All groups.
        images: (N, C, H, W), any; a few are used.
    """
    found = Trusted()
    for group in groups:
        units = [0, group.units - 1]
        fault = _fault(graph, group, units, images[:2], together=True)
        if fault is None:
            continue
        alone = _fault(graph, group, units, images[:2], together=False)
        if alone is None:
            found.together = False
        else:
            found.excluded[group.name] = f"its masked forwards are not whole ones: {alone}"
    return found


def _fault(
    graph: Graph, group: Group, units: list[int], images: Tensor, *, together: bool
) -> str | None:
    """What is wrong with what follows the cut; nothing where it is as a whole forward."""
    try:
        with torch.inference_mode():
            forward = MaskedForward(graph, group, units, {})
            _, kept = graph.run(images, keep=forward.keep)
            masked = forward.outputs(kept, len(images), together=together)
            whole = torch.stack([_whole(graph, group, unit, images) for unit in units])
    except (RuntimeError, IndexError, ValueError, TypeError) as err:
        return (str(err).strip().splitlines() or [type(err).__name__])[0]
    scale = max(1.0, float(whole.abs().max()))
    difference = float((masked - whole).abs().max())
    if difference <= _TOLERANCE * scale:
        return None
    return f"they differ by {difference:.1e}"


def _whole(graph: Graph, group: Group, unit: int, images: Tensor) -> Tensor:
    """(N, elements) of the whole network without a unit."""
    layers = {reader.layer: graph.layer(reader.layer) for reader in group.consumers}
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    try:
        for reader in group.consumers:
            mask_weight(layers[reader.layer], torch.tensor(reader.indices[unit]))
        return graph.run(images)[0]
    finally:
        with torch.no_grad():
            for name, layer in layers.items():
                layer.weight.copy_(before[name])
