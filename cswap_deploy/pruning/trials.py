"""Trials of candidates: units taken out of a copy, the rest refitted, the effect measured.

Effects of single units do not add up: what one unit carries another can take over, but not when
both go. And a candidate looks better than it is on the images that it was refitted on. So its
effect is that of the whole intervention, after the refit, on calibration images that took no part
in the refit, as they are and lightly mixed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from cswap_deploy.causal.interventions import Moments, ablation_values, fold
from cswap_deploy.causal.mixtures import lightly_mixed
from cswap_deploy.causal.tasks import OutputEffect
from cswap_deploy.config import Task
from cswap_deploy.models.plain import copied
from cswap_deploy.network.graph import Graph
from cswap_deploy.network.nodes import elements
from cswap_deploy.network.units import Group
from cswap_deploy.progress import Phases, Silent
from cswap_deploy.pruning.prepare import Prepared
from cswap_deploy.pruning.refit import MAX_ROWS, Refit, refit, solvable

Units = Mapping[str, Sequence[int]]
"""Group -> units by index."""
FIRST_RIDGE = 1e-2
"""Where the search for the ridge begins; each round may move it tenfold."""
_ENOUGH = 256
"""Images that a candidate is refitted on, and as many that evaluate it, where there are more."""
_CHUNK = 32
"""Images of one forward pass of an evaluation, beside their mixtures."""
_ROWS = 16_384
"""Positions that the refit of a trial uses: every finalist gets one."""
_MIXTURES = 2
"""Mixed copies of each image that evaluates, beside the image itself."""
_MOST_BYTES = 2 << 30
"""The dense network's outputs on the images that evaluate: those of maps are large."""
_FEWEST = 8
"""Images that evaluate, however large their outputs."""
_MOST_ELEMENTS = 1 << 29
"""The refit holds some activations of all its images at once: at most 2 GiB each."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A candidate, removed from a copy of the network."""

    effect: Tensor
    """(images that evaluate,) float64: divergence from the dense network, in the task's measure."""
    module: nn.Module
    """The copy, refitted."""
    refit: Refit | None


@dataclass(frozen=True)
class Trials:
    """What the candidates of a run are tried on."""

    network: Prepared
    """As it stands; no trial changes it."""
    removed: Units
    """What is gone from it."""
    images: Tensor
    """(N, C, H, W), every prefix balanced by class."""
    task: Task = "classify"
    """What the network's outputs are."""

    @property
    def possible(self) -> bool:
        """Whether there are images enough to refit on some and evaluate on others."""
        return len(self.images) >= 4

    def screen(self, gone: Units, moments: Mapping[str, Moments]) -> float:
        """Mean effect of a candidate that is not refitted, on a few images.

        It costs a part of a :meth:`trial`, and tells the candidates that are far behind.
        """
        network = self._without(gone, moments)
        return float(self._judged(network.graph, self._evaluation[:1]).mean())

    def trial(self, gone: Units, moments: Mapping[str, Moments], *, ridge: float | None) -> Trial:
        """What becomes of the network once a candidate is removed.

        Args:
            gone: What the candidate removes.
            moments: Of the consumers' inputs, for the ablation values.
            ridge: Of the refit; ``None``: no refit.
        """
        network, done = self._without(gone, moments), None
        if ridge is not None:
            removed = {
                g.name: [*self.removed.get(g.name, ()), *gone.get(g.name, ())]
                for g in network.groups
            }
            done = refit_behind(
                network, removed, self.images[: self._few],
                ridge=ridge, rows=_ROWS, progress=Silent(),
            )  # fmt: skip
        return Trial(self._judged(network.graph, self._evaluation), network.module, done)

    def _without(self, gone: Units, moments: Mapping[str, Moments]) -> Prepared:
        network = self.network.on(copied(self.network.module))
        remove(network, gone, moments)
        return network

    def _judged(self, graph: Graph, parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """(images,) float64: means of an image's own divergence and its mixtures'."""
        effect = OutputEffect(self.task, self.network.dense.measured)
        with torch.inference_mode():
            found = [
                effect.divergence(graph.run(part)[0].double()[None], wanted)[0]
                for part, wanted in parts
            ]
        return torch.cat([each.view(1 + _MIXTURES, -1).mean(0) for each in found])

    @property
    def _few(self) -> int:
        """Images to refit on; the others evaluate."""
        count = len(self.images)
        return max(count // 4, min(count // 2, _ENOUGH))

    @cached_property
    def _evaluation(self) -> list[tuple[Tensor, Tensor]]:
        """Images that evaluate, with their mixtures, in parts, and the dense network's outputs."""
        row = 8 * sum(output.elements for output in self.network.dense.measured)
        affordable = max(_FEWEST, _MOST_BYTES // (row * (1 + _MIXTURES)))
        unseen = self.images[self._few :][: min(_ENOUGH, affordable)]
        copies = [unseen, *(lightly_mixed(unseen, seed=seed) for seed in range(_MIXTURES))]
        chunk = max(1, min(_CHUNK, _MOST_BYTES // (8 * row)))
        parts = [
            torch.cat(part) for part in zip(*(torch.split(c, chunk) for c in copies), strict=True)
        ]
        with torch.inference_mode():
            return [(part, self.network.dense.run(part)[0].double()) for part in parts]


def less_beyond_chance(one: Tensor, other: Tensor) -> bool:
    """Whether one trial's effect is less than another's on the same N images, beyond chance.

    That is by more than twice the standard error of the mean difference.
    """
    less = other - one
    error = float(less.std()) / math.sqrt(len(less))
    return float(less.mean()) > 2 * error


def remove(network: Prepared, gone: Units, moments: Mapping[str, Moments]) -> None:
    """Mask units in place: their ablation values become part of the layers that read them.

    ``moments`` are those of the consumers' inputs; empty for the ablation value zero.
    """
    for layer, index in _inputs(network.groups, gone).items():
        (value,) = ablation_values(moments.get(layer), [sorted(index)])
        fold(network.graph, layer, value)


def refit_behind(
    network: Prepared, removed: Units, images: Tensor,
    *, ridge: float, producers: bool = False, rows: int = MAX_ROWS,
    progress: Phases,
) -> Refit:  # fmt: skip
    """Refit in place every layer whose inputs have changed, in order of execution.

    Args:
        network: Its ``graph`` is changed.
        removed: Every unit that is gone.
        images: (N, C, H, W); as many as fit are used.
        ridge: Of :func:`refit.refit`.
        producers: Whether to reconstruct producers too.
        rows: Of :func:`refit.refit`.
        progress: Told of each layer.
    """
    graph = network.graph
    lost = _inputs(network.groups, removed)
    changed = set(graph.suffix(n for layer in lost for n in graph.readers(layer)).nodes)
    kept = {}
    for name in solvable(graph):
        if graph.readers(name)[0] not in changed:
            continue
        layer = graph.layer(name)
        inputs = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features
        gone = lost.get(name, set())
        kept[name] = torch.tensor([i for i in range(inputs) if i not in gone])
    progress.begin(f"refitting {len(kept)} layer{'s' if len(kept) > 1 else ''}", len(kept))
    images = images[: max(1, _MOST_ELEMENTS // max(map(elements, graph.nodes)))]
    done = refit(
        graph, network.dense, kept, images,
        ridge=ridge, reconstruct=lost.keys() & kept.keys() if producers else (),
        rows=rows, tick=progress.advance,
    )  # fmt: skip
    progress.end()
    return done


def _inputs(groups: tuple[Group, ...], units: Units) -> dict[str, set[int]]:
    """Layer -> the inputs that some units are to it."""
    found: dict[str, set[int]] = {}
    for group in groups:
        for entry in group.consumers:
            index = {i for u in units.get(group.name, ()) for i in entry.indices[u]}
            if index:
                found.setdefault(entry.layer, set()).update(index)
    return found
