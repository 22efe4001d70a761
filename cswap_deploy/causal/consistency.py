"""Masked forwards tried on a network before they are believed.

Running what follows a cut, for many variants in one batch, is right only while images do not touch
each other and no size was fixed when the network was traced. So a pair of units is
measured both ways first: by what follows the cut, and by whole forwards with masked weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from cswap_deploy.causal.masked_forward import MaskedForward
from cswap_deploy.errors import first_line
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
    """Measure units both ways: of every group behind whose cut lies something not yet tried.

    Args:
        graph: The network; its weights are masked for a moment.
        groups: All groups.
        images: (N, C, H, W), any; a few are used.
    """
    found = Trusted()
    right: set[fx.Node] = set()
    for group in groups:
        behind = set(graph.suffix(n for r in group.consumers for n in graph.readers(r.layer)).nodes)
        if behind <= right:
            continue
        if _fault(graph, group, images[:2], together=True) is not None:
            alone = _fault(graph, group, images[:2], together=False)
            if alone is not None:
                found.excluded[group.name] = f"its masked forwards are not whole ones: {alone}"
                continue
            found.together = False
        right |= behind
    return found


def _fault(graph: Graph, group: Group, images: Tensor, *, together: bool) -> str | None:
    """What is wrong with what follows the cut; nothing where it is as a whole forward."""
    units = [0, group.units - 1]
    try:
        with torch.inference_mode():
            forward = MaskedForward(graph, group, units, {})
            _, kept = graph.run(images, keep=forward.keep)
            masked = forward.outputs(kept, len(images), together=together)
            whole = torch.stack([_whole(graph, group, unit, images) for unit in units])
    except (RuntimeError, IndexError, ValueError, TypeError) as err:
        return first_line(err)
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
