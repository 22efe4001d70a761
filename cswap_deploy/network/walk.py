"""Running a network over many images, up to one layer after another, in bounded memory.

A refit changes one layer after another, and each must see what the layers before it have become.
So all images advance together: a batch at a time up to the next layer, where the values that the
rest of the network needs are held, if they fit. Where they do not, the images run again from the
last layer where they did.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from cswap_deploy.network.graph import Env, Graph
from cswap_deploy.network.nodes import bytes_of, memory_format_of
from cswap_deploy.network.placing import placed

_MOST_IMAGES = 64
"""Images of one forward; more makes nothing faster."""


def images_at_once(graph: Graph, most_bytes: int) -> int:
    """How many images one forward may have: their values, at the widest place, fit."""
    widest = max(
        (alive + bytes_of(n) for n, alive in zip(graph.nodes, graph.alive, strict=True)), default=1
    )
    return max(1, min(_MOST_IMAGES, most_bytes // max(widest, 1)))


@dataclass(frozen=True, slots=True)
class Batches:
    """Images of which a batch at a time is where the network is."""

    images: Tensor
    """(N, C, H, W), in the host's memory."""
    rows: Tensor
    """(M,) which of them, in this order."""
    size: int
    device: torch.device

    def __len__(self) -> int:
        return len(self.rows)

    def first(self, count: int) -> Batches:
        """The first so many of them."""
        return replace(self, rows=self.rows[:count])

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """(which of the M, the images) of each batch."""
        for part in self.parts():
            yield part, self.take(part)

    def parts(self) -> Iterator[slice]:
        """Which of the M each batch has."""
        for begin in range(0, len(self), self.size):
            yield slice(begin, min(begin + self.size, len(self)))

    def take(self, part: slice) -> Tensor:
        """Some of the M images, on the device."""
        found = self.images[self.rows[part]]
        return placed(found.contiguous(memory_format=memory_format_of(self.images)), self.device)


@dataclass(slots=True)
class Walk:
    """The values of a network on all images, before one node and then before a later one."""

    graph: Graph
    batches: Batches
    most_bytes: int
    """For what is held between two places."""
    _at: int = field(init=False, default=0)
    """Position of the node that the held values stand before."""
    _held: list[Env] = field(init=False, default_factory=list)
    """One of each batch; empty at the images themselves."""

    def reach(
        self, stops: Sequence[fx.Node], *, hold: fx.Node | None = None
    ) -> Iterator[tuple[fx.Node, slice, Env]]:
        """Yield for each batch, at each stop, which images they are and the values before it.

        What is held moves on to ``hold``, the first stop unless given, where it fits there:
        weights that are read from there on may change before the walk goes on.

        Args:
            stops: In order of execution; none before what is held.
            hold: A node that is no later than the first stop.
        """
        position = self.graph.position
        goal = position[hold or stops[0]]
        if self.graph.alive[goal] * len(self.batches) > self.most_bytes:
            goal = self._at
        held: list[Env] = []
        for part, env in self._here():
            count = part.stop - part.start
            for node, now in self.graph.resume(env, self._at, count):
                if position[node] == goal > 0:
                    held.append(dict(now))
                if node in stops:
                    yield node, part, now
                if node is stops[-1]:
                    break
        self._at, self._held = goal, held

    def _here(self) -> Iterator[tuple[slice, Env]]:
        if not self._held:
            for part, images in self.batches:
                yield part, {self.graph.input: images}
            return
        waiting, self._held = self._held[::-1], []
        for part in self.batches.parts():
            yield part, waiting.pop()
