"""What the dense network's layers give, at positions that are drawn once.

The dense network never changes, so what it gives is computed once for all refits on the same
images, as far as memory allows; else again for the next layers, as many as fit at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from cswap_deploy.network.branches import LAYOUT, Branch, branch_of, shape_of
from cswap_deploy.network.graph import Env, Graph
from cswap_deploy.network.nodes import ancestors, batch_dim, shape_in
from cswap_deploy.network.unfolding import Positions, at, draw, laid_out, window_of
from cswap_deploy.network.units import channel_dim
from cswap_deploy.network.walk import Batches

BLOCK = 4
"""Positions of layers with larger windows are drawn in squares of so many rows and columns: what
lies before such a layer is then computed for few more positions than are drawn."""


@dataclass(frozen=True, slots=True)
class Places:
    """Positions of a layer's output: the same number on each of its items.

    A layer may run on several items of one image, such as the windows of an attention.
    """

    where: Positions
    """R positions in the host's memory, by item."""
    items: int
    """Of each image."""
    each: int
    """Positions of each item."""

    def of(self, images: slice) -> slice:
        """Which of the R positions are of some images."""
        every = self.items * self.each
        return slice(images.start * every, images.stop * every)

    def within(self, images: slice, device: torch.device) -> Positions:
        """Those of some images, counted from the first of them."""
        return self.where[self.of(images)].on(device, first=images.start * self.items)


@dataclass(slots=True)
class Targets:
    """What the dense network gives at the outputs of some layers, computed when asked for.

    At the end of a residual branch that is the layer's output and what the stream has there, as
    the layer would have to give it: what the pruned network's stream has is taken off later
    (:func:`stream_part`).
    """

    dense: Graph
    layers: Sequence[str]
    """In order of execution."""
    batches: Batches
    rows: int
    """Positions of each layer, at most."""
    most_bytes: int
    """For what is kept."""
    _found: dict[str, Tensor] = field(init=False, default_factory=dict)
    _places: dict[tuple[int, ...], Places] = field(init=False, default_factory=dict)

    def of(self, layer: str) -> Tensor:
        """(R, O) float32, at ``places(layer)``."""
        if layer not in self._found:
            self._look_ahead(layer)
        return self._found[layer]

    def places(self, layer: str) -> Places:
        """Where the layer's output is looked at."""
        items, height, width = self.shape(layer)
        node, module = self.dense.readers(layer)[0], self.dense.layer(layer)
        block = 1 if window_of(node, module).taps == 1 else BLOCK
        key = items, height, width, block
        if key not in self._places:
            count = items * len(self.batches)
            where = draw((count, height, width), self.rows, block=block)
            self._places[key] = Places(where, items, len(where) // count)
        return self._places[key]

    def shape(self, layer: str) -> tuple[int, int, int]:
        """(items of one image, H, W) of its output."""
        node, module = self.dense.readers(layer)[0], self.dense.layer(layer)
        sizes = list(shape_in(node.meta["val"], 1))
        del sizes[channel_dim(module)]
        items = sizes.pop(batch_dim(node) or 0)
        if isinstance(module, nn.Linear):
            return items, math.prod(sizes), 1
        return items, sizes[0], sizes[1]

    def _look_ahead(self, layer: str) -> None:
        """Compute the target of a layer, and of as many behind it as fit."""
        self._found.clear()
        wanted: dict[fx.Node, str] = {}
        room = self.most_bytes
        for name in self.layers[self.layers.index(layer) :]:
            size = (len(self.places(name).where), self.dense.layer(name).weight.shape[0])
            room -= 4 * size[0] * size[1]
            if wanted and room < 0:
                break
            wanted[self.dense.readers(name)[0]] = name
            self._found[name] = self.dense.layer(name).weight.new_empty(size)
        last = next(reversed(wanted))
        with torch.no_grad():
            for part, images in self.batches:
                for node, env in self.dense.step(images):
                    if node in wanted:
                        output = self.dense.execute(node, env, batch=len(images))
                        env[node] = output
                        self._take(wanted[node], part, output, env)
                    if node is last:
                        break

    def _take(self, layer: str, part: slice, output: Tensor, env: Env) -> None:
        stream = stream_part(self.dense, self.dense, layer, env)
        values = output if stream is None else output + stream
        places, there = self.places(layer), self.batches.device
        self._found[layer][places.of(part)] = rows_at(
            self.dense, layer, values, places.within(part, there)
        )


def stream_part(graph: Graph, dense: Graph, layer: str, env: Env) -> Tensor | None:
    """What the residual stream has, as a layer's output that adds as much where its branch joins.

    Args:
        graph: The network that ``env`` is of.
        dense: The network as it was; scales are read from it.
        layer: Its values are wanted just before it runs.
        env: The values there.

    Returns:
        Like the layer's output; ``None`` where it ends no branch.
    """
    branch = branch_of(graph.readers(layer)[0])
    if branch is None or branch.stream not in env:
        return None
    return to_layer(dense, branch, graph.value(branch.stream, env))


def rows_at(graph: Graph, layer: str, output: Tensor, where: Positions) -> Tensor:
    """(R, O) of a layer's output."""
    batch = batch_dim(graph.readers(layer)[0]) or 0
    return at(laid_out(output, graph.layer(layer), batch=batch), where)


def to_layer(graph: Graph, branch: Branch, stream: Tensor) -> Tensor:
    """What must be added to a layer's output to add ``stream`` where its branch joins.

    Zero for channels that the branch scales to nothing.
    """
    node = branch.path[0]
    shape = [1, *shape_of(node)]
    zero, one = stream.new_zeros(shape), stream.new_ones(shape)
    scale = _through(graph, branch, one) - _through(graph, branch, zero)
    floor = 1e-3 * scale.abs().max()
    back = torch.where(scale.abs() > floor, stream / scale, stream.new_zeros(()))
    for step in reversed(branch.path[1:]):
        if step.target in LAYOUT:
            order: list[int] = step.args[1]  # type: ignore[assignment]
            back = back.permute([order.index(d) for d in range(len(order))])
    return back


def _through(graph: Graph, branch: Branch, value: Tensor) -> Tensor:
    env: Env = {branch.path[0]: value}
    for node in branch.path[1:]:
        for source in {*node.all_input_nodes} - {*env, *graph.bound}:
            # A scale that is a parameter in another shape.
            for step in sorted(ancestors(source) - {*graph.bound}, key=graph.position.__getitem__):
                env[step] = graph.execute(step, env)
        env[node] = graph.execute(node, env)
    found: Tensor = env[branch.path[-1]]
    return found
