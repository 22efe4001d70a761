"""Trials of candidates: units taken out of a copy, the rest refitted, the effect measured.

Effects of single units do not add up: what one unit carries another can take over, but not when
both go. And a candidate looks better than it is on the images that it was refitted on. So its
effect is that of the whole intervention, after the refit, on calibration images that took no part
in the refit, as they are and lightly mixed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, fx, nn

from cswap_deploy.causal.interventions import Moments, ablation_values, fold
from cswap_deploy.causal.mixtures import lightly_mixed, mosaics
from cswap_deploy.causal.tasks import OutputEffect
from cswap_deploy.config import Task
from cswap_deploy.network.graph import Env, Graph
from cswap_deploy.network.nodes import elements, memory_format_of
from cswap_deploy.network.placing import HOST, placed
from cswap_deploy.network.residual import removed_branches, silence
from cswap_deploy.network.units import Group
from cswap_deploy.network.walk import Batches
from cswap_deploy.progress import Phases, Silent
from cswap_deploy.pruning.prepare import Prepared
from cswap_deploy.pruning.refit import Judge, Refit, refit, solvable
from cswap_deploy.pruning.targets import Targets

Units = Mapping[str, Sequence[int]]
"""Group -> units by index."""
MAX_ROWS = 65_536
"""Positions that the last refit uses at most."""
ROWS = 16_384
"""Positions that the refit of a trial uses: every finalist gets one."""
_REFITTED = 256
"""Images that a candidate is refitted on, where there are more."""
_JUDGES = 256
"""Images that evaluate a candidate, where there are more."""
TOGETHER = 32
"""Images that are mixed with one another, and compared at once."""
MIXTURES = 2
"""Mixed copies of each image that evaluates, beside the image itself."""
_JUDGED = 2
"""Parts of the images that evaluate, ``TOGETHER`` each, for a step of one layer."""
_FEWEST = 8
"""Images that evaluate, however large their outputs."""
ENOUGH = 1024
"""Images; where there are fewer, mosaics of them make up for it. EfficientNet-Lite0 without 30 %,
300 photos: divergence on others 1.06 without, .81 with 900 (benchmarks/LOG.md)."""
_SHARE = 4
"""One part in so many of the memory budget is for what is kept of the dense network, and as much
for what a refit holds between layers."""


def images_apart(count: int) -> tuple[int, int]:
    """Of so many images: how many a candidate is refitted on, and how many others evaluate it."""
    few = max(count // 4, min(count // 2, _REFITTED))
    return few, min(_JUDGES, count - few)


def starved(dense: Graph, images: int) -> dict[str, tuple[int, int]]:
    """Layers that have fewer rows than unknowns on so many images: both numbers of each.

    Where there are any, images are few for this network, and what is done differs: mosaics are
    added, parts of groups are measured together (:mod:`pruning.curves`), and layers are refitted
    once, at the end, and only as far as the prediction on other images gains.
    """
    found = {}
    for name in solvable(dense):
        weight = dense.layer(name).weight
        rows = images * elements(dense.readers(name)[0]) // len(weight)
        if rows < (unknowns := weight[0].numel()):
            found[name] = rows, unknowns
    return found


def widened(images: Tensor, order: Tensor, most_bytes: int) -> tuple[Tensor, Tensor]:
    """Few images with mosaics of them, as many together as are enough.

    Those that a candidate is refitted on and those that evaluate it (:func:`images_apart`) have no
    image in common, in mosaics neither.

    Args:
        images: (N, C, H, W).
        order: (N,) their order; any part is balanced by class.
        most_bytes: For all of them.

    Returns:
        All images, and their order: as given where N is enough, or nothing else fits.
    """
    total = min(ENOUGH, most_bytes // max(1, images[0].nbytes))
    few, judges = images_apart(total)
    sizes = few, judges, total - few - judges
    if not _FEWEST <= len(images) < total:
        return images, order
    found, end = [], 0
    for part, size in enumerate(sizes):
        begin, end = end, end + size
        own = images[order[begin * len(images) // total : end * len(images) // total]]
        both = torch.cat([own, mosaics(own, size - len(own), seed=part)]) if size else own
        found.append(both[torch.randperm(size, generator=torch.Generator().manual_seed(part))])
    everything = torch.cat(found).contiguous(memory_format=memory_format_of(images))
    return everything, torch.arange(total)


@dataclass(frozen=True, slots=True)
class Trial:
    """A candidate, removed from a copy of the network."""

    effect: Tensor
    """(images that evaluate,) float64: divergence from the dense network, in the task's measure."""
    module: nn.Module
    """The copy, refitted."""
    refit: Refit | None


@dataclass(frozen=True)
class Ground:
    """The images that candidates are refitted and evaluated on, and what the dense network says."""

    dense: Graph
    batches: Batches
    """Every prefix balanced by class."""
    memory: int
    """Bytes, for what is kept of the dense network and for what a refit holds."""
    task: Task = "classify"
    """What the network's outputs are."""
    few: bool = False
    """Whether images are few for this network (:func:`starved`)."""

    @property
    def possible(self) -> bool:
        """Whether there are images enough to refit on some and evaluate on others."""
        return len(self.batches) >= 4

    @cached_property
    def solved_on(self) -> Batches:
        """Images for ablation values and for the last refit: all, or where they are few, those
        that do not evaluate.
        """
        few, judges = images_apart(len(self.batches))
        rows = self.batches.rows
        return replace(
            self.batches, rows=torch.cat([rows[:few], rows[few + judges :]]) if self.few else rows
        )

    @property
    def share(self) -> int:
        """Bytes for what is kept of the dense network, and as many for what a refit holds."""
        return self.memory // _SHARE

    def targets(self, batches: Batches, rows: int) -> Targets:
        """Of all layers that can be refitted."""
        return Targets(self.dense, solvable(self.dense), batches, rows, self.share)

    @cached_property
    def trial_targets(self) -> Targets:
        """Of a trial's refit; shared by all trials of a run."""
        few, _ = images_apart(len(self.batches))
        return self.targets(self.batches.first(few), ROWS)

    @cached_property
    def first_parts(self) -> list[Tensor]:
        """The first images that evaluate, with their mixtures: steps of layers are judged on them.

        EfficientNet-Lite0, two splits: KL .318 and .413 with half as many, now .316 and .407; the
        agreement is no better (benchmarks/LOG.md).
        """
        return list(self._parts(_JUDGED))

    @cached_property
    def said(self) -> list[Tensor]:
        """What the dense network says to each part of the images that evaluate; float64 rows."""
        return [self._say(self.dense, part) for part in self._parts()]

    def divergence(self, graph: Graph, *, parts: int | None = None) -> Tensor:
        """(images,) float64: means of an image's own divergence and its mixtures'."""
        effect = OutputEffect(self.task, self.dense.measured)
        found = [
            effect.divergence(self._say(graph, part)[None], wanted)[0]
            for part, wanted in zip(self._parts(parts), self.said, strict=False)
        ]
        means = torch.cat([each.view(1 + MIXTURES, -1).mean(0) for each in found])
        return placed(means, HOST)

    def _say(self, graph: Graph, images: Tensor) -> Tensor:
        with torch.inference_mode():
            said = [graph.run(part)[0] for part in torch.split(images, self.batches.size)]
        return torch.cat(said).double()

    def _parts(self, most: int | None = None) -> Iterator[Tensor]:
        """Images that evaluate, with their mixtures, some at a time."""
        row = 8 * (1 + MIXTURES) * sum(output.elements for output in self.dense.measured)
        few, judges = images_apart(len(self.batches))
        count = min(judges, max(_FEWEST, self.share // row))
        together = max(1, min(TOGETHER, self.share // row))
        for begin in range(0, count, together)[:most]:
            part = slice(few + begin, few + min(begin + together, count))
            images = self.batches.take(part)
            mixed = (lightly_mixed(images, seed=begin + seed) for seed in range(MIXTURES))
            yield torch.cat([images, *mixed])


@dataclass(slots=True)
class Judging:
    """Judges a network while its layers change one after the other; satisfies ``refit.Judge``."""

    graph: Graph
    ground: Ground
    parts: int = _JUDGED
    """Of the images that evaluate, at most ``_JUDGED``."""
    _at: int = field(init=False, default=0)
    """Position of the node that the held values stand before."""
    _held: list[Env] = field(init=False, default_factory=list)
    """One of each part of the images, where they fit."""

    def effect(self, node: fx.Node) -> float:
        """See :class:`refit.Judge`."""
        graph, ground, place = self.graph, self.ground, self.graph.position[node]
        few, size = ground.first_parts[: self.parts], ground.batches.size
        parts = [part for images in few for part in torch.split(images, size)]
        said = [part for rows in ground.said[: len(few)] for part in torch.split(rows, size)]
        holds = graph.alive[place] * sum(map(len, parts)) <= ground.share
        effect = OutputEffect(ground.task, graph.measured)
        found, held = [], []
        if place < self._at:
            self._at, self._held = 0, []
        with torch.inference_mode():
            for number, (images, wanted) in enumerate(zip(parts, said, strict=True)):
                env = dict(self._held[number]) if self._held else {graph.input: images}
                for at, now in graph.resume(env, self._at, len(images)):
                    if at is node and holds:
                        held.append(dict(now))
                found.append(effect.divergence(graph.rows(env).double()[None], wanted)[0])
        if holds:
            self._at, self._held = place, held
        return float(torch.cat(found).mean())


@dataclass(frozen=True)
class Trials:
    """What the candidates of a round are tried on."""

    network: Prepared
    """As it stands; no trial changes it."""
    removed: Units
    """What is gone from it."""
    ground: Ground
    refits: bool = True
    """Whether the rest of a candidate's network is refitted."""
    producers: bool = False
    """Whether producers are reconstructed too: four times as long, and near what comes of it."""
    holds: Judging | None = None
    """Keeps what the network computes before the first layer that a screening changes."""

    def front_to_back(self) -> Trials:
        """The same, for many screenings by :meth:`first_changed`, while the network stays."""
        return replace(self, holds=Judging(self.network.graph, self.ground, parts=1))

    def screen(self, gone: Units, moments: Mapping[str, Moments]) -> float:
        """Mean effect of a candidate that is not refitted, on a few images.

        It costs a part of a :meth:`trial`, and tells the candidates that are far behind.
        """
        _ = self.ground.said  # it may be this network that the candidates are compared with
        graph = self.network.graph
        with _given_back(self.network.module):
            self._remove(self.network, gone, moments)
            if self.holds is None or not gone:
                return float(self.ground.divergence(graph, parts=1).mean())
            return self.holds.effect(self.first_changed(gone))

    def first_changed(self, gone: Units) -> fx.Node:
        """The first node that gives something else once these units are removed."""
        graph = self.network.graph
        nodes = (n for layer in _inputs(self.network.groups, gone) for n in graph.readers(layer))
        return min(nodes, key=graph.position.__getitem__)

    def trial(self, gone: Units, moments: Mapping[str, Moments]) -> Trial:
        """What becomes of the network once a candidate is removed.

        Args:
            gone: What the candidate removes.
            moments: Of the consumers' inputs, for the ablation values.
        """
        network, done = self.network.copy(), None
        self._remove(network, gone, moments)
        if self.refits:
            removed = {
                g.name: [*self.removed.get(g.name, ()), *gone.get(g.name, ())]
                for g in network.groups
            }
            targets, most = self.ground.trial_targets, self.ground.share
            done = refit_behind(
                network, removed, targets,
                producers=self.producers, most_bytes=most, progress=Silent(),
            )  # fmt: skip
        return Trial(self.ground.divergence(network.graph), network.module, done)

    def _remove(self, network: Prepared, gone: Units, moments: Mapping[str, Moments]) -> None:
        """Mask units in place; a branch gives its mean only where a refit is to make up for it.

        Deleted it gives nothing, and that is another network: of EfficientNet-Lite0's second block
        the mean disturbs the prediction by .364, nothing by .056.
        """
        remove(network, gone, moments)
        if not self.refits:
            for branch in removed_branches(gone, network.groups):
                silence(network.module, branch)


@contextmanager
def _given_back(module: nn.Module) -> Iterator[None]:
    """Its parameters and buffers are afterwards what they were; much quicker than a copy."""
    before = [(each, each.detach().clone()) for each in (*module.parameters(), *module.buffers())]
    try:
        yield
    finally:
        with torch.no_grad():
            for each, was in before:
                each.copy_(was)


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
    there = network.graph.device
    for layer, index in _inputs(network.groups, gone).items():
        (value,) = ablation_values(moments.get(layer), [sorted(index)], device=there)
        fold(network.graph, layer, value)


def refit_behind(
    network: Prepared, removed: Units, targets: Targets,
    *, producers: bool = False, judge: Judge | None = None, most_bytes: int, progress: Phases,
) -> Refit:  # fmt: skip
    """Refit in place every layer whose inputs have changed, in order of execution.

    Args:
        network: Its ``graph`` is changed.
        removed: Every unit that is gone.
        targets: Of the dense network; has the images.
        producers: Whether to reconstruct producers too.
        judge: Of :func:`refit.refit`.
        most_bytes: Of :func:`refit.refit`.
        progress: Told of each layer.
    """
    graph = network.graph
    branches = removed_branches(removed, network.groups)
    for branch in branches:
        silence(graph.module, branch)
    lost = _inputs(network.groups, removed)
    changed = set(graph.suffix(n for layer in lost for n in graph.readers(layer)).nodes)
    kept = {}
    for name in solvable(graph):
        if graph.readers(name)[0] not in changed or any(b.holds(name) for b in branches):
            continue
        layer = graph.layer(name)
        inputs = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features
        gone = lost.get(name, set())
        kept[name] = torch.tensor([i for i in range(inputs) if i not in gone])
    progress.begin(f"refitting {len(kept)} layer{'s' if len(kept) > 1 else ''}", len(kept))
    done = refit(
        graph, targets, kept,
        reconstruct=kept if producers else (),
        most_bytes=most_bytes, judge=judge, tick=progress.advance,
    )  # fmt: skip
    progress.end()
    return done


def _inputs(groups: Iterable[Group], units: Units) -> dict[str, set[int]]:
    """Layer -> the inputs that some units are to it."""
    found: dict[str, set[int]] = {}
    for group in groups:
        for entry in group.consumers:
            index = {i for u in units.get(group.name, ()) for i in entry.indices[u]}
            if index:
                found.setdefault(entry.layer, set()).update(index)
    return found
