"""Averages over positions, and what lies before them.

A linear layer commutes with an average. What it reads behind one is known from as many rows as
there are images, what is averaged from as many as there are positions: for a classifier that is the
difference between starved and fed (benchmarks/LOG.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from cswap_deploy.network.nodes import batched, elements, input_of, opname, shape_in
from cswap_deploy.network.unfolding import rows_of

_SAME_VALUES = frozenset(
    {"flatten", "view", "reshape", "_unsafe_view", "squeeze", "dropout", "clone", "contiguous"}
)
FED = 2
"""Images for each input, from which on averages say enough by themselves."""


@dataclass(frozen=True, slots=True)
class Pool:
    """An average over all positions whose result a layer reads as it is."""

    node: fx.Node
    source: fx.Node
    """What is averaged, images first."""
    channels: int
    """Its dimension of channels; all others but the first are averaged over."""

    def rows(self, value: Tensor, most: int) -> Tensor:
        """(R, C) of the source's value at some positions, the same ones of every image."""
        return rows_of(value.movedim(self.channels, -1), most)


def pool_before(consumer: fx.Node, inputs: int, images: int) -> Pool | None:
    """The average whose C = ``inputs`` channels are all that a layer reads of each image.

    ``None`` where something else lies between, where parts are averaged by themselves, and where
    there are images enough without.
    """
    if images >= FED * inputs:
        return None
    node = input_of(consumer)
    while opname(node) in _SAME_VALUES and node.all_input_nodes:
        node = input_of(node)
    if opname(node) not in ("mean", "adaptive_avg_pool2d", "avg_pool2d"):
        return None
    source = input_of(node)
    value = source.meta.get("val")
    if not isinstance(value, Tensor) or not batched(source) or elements(node) != inputs:
        return None
    shape = shape_in(value)
    if opname(node) == "mean":
        dims = node.args[1] if len(node.args) > 1 else None
        if not isinstance(dims, list | tuple):
            return None
        left = {*range(1, len(shape))} - {int(d) % len(shape) for d in dims}
    else:
        left = {1} if len(shape) == 4 else set()
    if len(left) != 1 or len(shape) < 3 or shape[channels := left.pop()] != inputs:
        return None
    return Pool(node, source, channels)


def balanced(own: Tensor, around: Tensor) -> Tensor:
    """A covariance (F, F) of averages, with as much of what they are averages of.

    A channel's averages vary less than its values, by about as much for all; both parts get the
    same trace.
    """
    share = torch.trace(own) / torch.trace(around).clamp_min(1e-30)
    return (own + share * around) / 2
