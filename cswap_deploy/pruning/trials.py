"""Sets of units on trial: taken out of a copy, made up for, and judged on other images.

Effects of single units do not add up: what one unit carries another can take over, but not when
both go. And a set looks better than it is on the images that it was solved on. So the effect of a
set is that of the whole intervention, after the network has taken over what it can, on calibration
images that took no part in the solving, as they are and lightly mixed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from cswap_deploy.causal.effects import kl_divergence
from cswap_deploy.causal.interventions import Moments, fold, stand_ins
from cswap_deploy.causal.mixtures import lightly_mixed
from cswap_deploy.network.graph import Graph
from cswap_deploy.network.units import Consumer, Group
from cswap_deploy.progress import Phases, Silent
from cswap_deploy.pruning.refit import Refit, refit, solvable

FIRST_RIDGE = 1e-2
"""Where the search for the ridge begins; each round may move it tenfold."""
_ENOUGH = 512
"""Images that a set on trial is solved on, where there are more."""
_CHUNK = 64
"""Images of one forward while judging."""
_MIXTURES = 2
"""Of each image that judges, beside the image itself."""
_MOST_ELEMENTS = 1 << 29
"""The refit holds some activations of all its images at once: at most 2 GiB each."""


@dataclass(frozen=True)
class Trials:
    """What sets are tried on, in every round of a run."""

    graph: Graph
    """The network as it stands; no trial changes it."""
    dense: Graph
    groups: tuple[Group, ...]
    removed: Mapping[str, list[int]]
    """What is gone already; the loop's own record."""
    images: Tensor
    """(N, C, H, W), every prefix balanced by class."""

    @property
    def possible(self) -> bool:
        """Whether there are images enough to solve on some and judge on others."""
        return len(self.images) >= 4

    def effect(
        self,
        gone: Mapping[str, Sequence[int]],
        moments: Mapping[str, Moments],
        *,
        ridge: float | None,
    ) -> Tensor:
        """(images that judge,) KL divergence from the dense network, nats, once a set is gone.

        An image's own divergence and its mixtures' are averaged.

        Args:
            gone: Group -> units on trial.
            moments: Of the consumers' inputs, for what takes the units' place.
            ridge: Of the layers solved again; ``None`` solves nothing.
        """
        trial = self.graph.on(copy.deepcopy(self.graph.module))
        take_out(trial, self.groups, gone, moments)
        if ridge is not None:
            removed = {
                g.name: [*self.removed.get(g.name, ()), *gone.get(g.name, ())] for g in self.groups
            }
            solve_behind(
                trial, self.dense, self.groups, removed, self.images[: self._few],
                ridge=ridge, watcher=Silent(),
            )  # fmt: skip
        with torch.inference_mode():
            found = torch.cat(
                [
                    kl_divergence(trial.run(part)[0].double()[None], wanted)[0]
                    for part, wanted in self._judging
                ]
            )
        return found.view(1 + _MIXTURES, -1).mean(0)

    @property
    def _few(self) -> int:
        """Images to solve on; the others judge."""
        count = len(self.images)
        return max(count // 4, min(count // 2, _ENOUGH))

    @cached_property
    def _judging(self) -> list[tuple[Tensor, Tensor]]:
        """Images that judge, and the dense network's logits: every trial is held against them."""
        unseen = self.images[self._few :]
        mixed = [lightly_mixed(unseen, seed=seed) for seed in range(_MIXTURES)]
        with torch.inference_mode():
            return [
                (part, self.dense.run(part)[0].double())
                for part in torch.split(torch.cat([unseen, *mixed]), _CHUNK)
            ]


def clearly_less(one: Tensor, other: Tensor) -> bool:
    """Whether a set's effect is less than another's beyond what the images that judge decide.

    Args:
        one: (N,) of :meth:`Trials.effect`.
        other: (N,), of the same images.

    Returns:
        Whether the mean of the differences is below zero by more than twice its standard error.
    """
    less = other - one
    error = float(less.std()) / math.sqrt(len(less))
    return float(less.mean()) > 2 * error


def take_out(
    graph: Graph,
    groups: tuple[Group, ...],
    gone: Mapping[str, Sequence[int]],
    moments: Mapping[str, Moments],
) -> None:
    """Remove units, in place: their stand-ins become part of the weights that read them."""
    for layer, index in _inputs(groups, gone).items():
        (stand_in,) = stand_ins(moments.get(layer), [sorted(index)])
        fold(graph, layer, stand_in)


def solve_behind(
    graph: Graph,
    dense: Graph,
    groups: tuple[Group, ...],
    removed: Mapping[str, Sequence[int]],
    images: Tensor,
    *,
    ridge: float,
    producers: bool = False,
    watcher: Phases,
) -> Refit:
    """Solve every layer from the first that has lost an input on, in place, in order of execution.

    Args:
        graph: Over the network to change.
        dense: The same graph on the network as it was.
        groups: All of them.
        removed: Group -> every unit that is gone.
        images: (N, C, H, W); as many as fit are used.
        ridge: See :func:`compensate.refit`.
        producers: Whether the units that stay take over too; see :mod:`pruning.producers`.
        watcher: Progress.
    """
    lost = _inputs(groups, removed)
    kept = {}
    for name in _behind(graph, lost):
        layer: Consumer = graph.module.get_submodule(name)  # type: ignore[assignment]
        inputs = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features
        gone = lost.get(name, set())
        kept[name] = torch.tensor([i for i in range(inputs) if i not in gone])
    watcher.begin(f"solving {len(kept)} layer{'s' if len(kept) > 1 else ''} again", len(kept))
    images = images[: max(1, _MOST_ELEMENTS // graph.largest())]
    done = refit(
        graph, dense, kept, images,
        ridge=ridge, taken_over=lost.keys() & kept.keys() if producers else (),
        tick=watcher.advance,
    )  # fmt: skip
    watcher.end()
    return done


def _inputs(groups: tuple[Group, ...], units: Mapping[str, Sequence[int]]) -> dict[str, set[int]]:
    """Layer -> the inputs that some units are to it."""
    found: dict[str, set[int]] = {}
    for group in groups:
        for entry in group.consumers:
            index = {i for u in units.get(group.name, ()) for i in entry.indices[u]}
            if index:
                found.setdefault(entry.layer, set()).update(index)
    return found


def _behind(graph: Graph, lost: Iterable[str]) -> list[str]:
    """Layers that can be solved and whose inputs are not the dense network's any more."""
    changed = set(graph.suffix(n for layer in lost for n in graph.readers(layer)).nodes)
    return [name for name in solvable(graph) if graph.readers(name)[0] in changed]
