"""Unfolding (im2col): a layer's inputs and outputs as rows of a matrix, at some positions.

A layer is a linear map that is repeated at every position of every image. To solve for it, some
positions are enough, and they are drawn for each image anew: the same ones in all images would
leave most of the picture out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from cswap_deploy.network.placing import placed
from cswap_deploy.network.units import Consumer

_DRAWN_AT_ONCE = 256
"""Images: numbers for all positions of all images would not fit."""


@dataclass(frozen=True, slots=True)
class Window:
    """How a layer moves over its input, (height, width) each; a linear layer's is the default."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    """Zeros, the same number on both sides."""
    dilation: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        for name in ("kernel", "stride", "padding", "dilation"):
            value, least = getattr(self, name), int(name != "padding")
            if len(value) != 2 or min(value) < least:
                raise ValueError(f"window: {name} must be two numbers >= {least}, not {value}")

    @property
    def taps(self) -> int:
        """Positions of the input that one position of the output reads."""
        return self.kernel[0] * self.kernel[1]

    def reads(self, side: int) -> float:
        """Positions of the input that a square of so many rows and columns of the output reads,
        for each of its own.
        """
        along = zip(self.kernel, self.stride, self.dilation, strict=True)
        high, wide = (min(side * k, (side - 1) * s + (k - 1) * d + 1) for k, s, d in along)
        return high * wide / side**2

    def output_size(self, size: Sequence[int]) -> tuple[int, int]:
        """(height, width) of the output, from those of the input."""
        along = zip(size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        height, width = ((h + 2 * p - d * (k - 1) - 1) // s + 1 for h, k, s, p, d in along)
        return height, width


@dataclass(frozen=True, slots=True)
class Positions:
    """R positions of a value that is laid out as (N, H, W, C)."""

    image: Tensor
    """(R,) int64, ascending."""
    row: Tensor
    column: Tensor

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, part: slice | Tensor) -> Positions:
        return Positions(self.image[part], self.row[part], self.column[part])

    def on(self, device: torch.device, *, first: int = 0) -> Positions:
        """On a device, with images counted from ``first`` on."""
        image = self.image - first
        return Positions(*(placed(v, device) for v in (image, self.row, self.column)))


def window_of(node: fx.Node, layer: Consumer) -> Window:
    """The window of a convolution or linear node; a linear layer reads one position."""
    if isinstance(layer, nn.Linear):
        return Window()
    # The node's own settings: what the layer does may differ from what its attributes say.
    given: list[Any] = list(node.args[3:6])
    settings = given + [(1, 1), (0, 0), (1, 1)][len(given) :]
    return Window(*((int(v[0]), int(v[-1])) for v in (layer.kernel_size, *settings)))


def laid_out(x: Tensor, layer: Consumer, *, batch: int = 0) -> Tensor:
    """A layer's input or output as (N, H, W, C), contiguous; a linear layer's has W = 1.

    ``batch`` is the dimension that grows with the images.
    """
    if isinstance(layer, nn.Linear):
        x = x.movedim(batch, 0)
        return x.reshape(len(x), -1, 1, x.shape[-1])
    return x.permute(0, 2, 3, 1).contiguous()


def draw(shape: Sequence[int], most: int, *, seed: int = 0, block: int = 1) -> Positions:
    """Positions of a value (N, H, W, ...): all, or as many in each image as come to ``most``.

    They are drawn in the host's memory: the same ones on every device. With ``block`` they lie in
    squares of so many rows and columns, whose windows share most of what they read.
    """
    images, height, width = shape[:3]
    each = min(height * width, max(1, most // images))
    if each == height * width:
        place = torch.arange(each).repeat(images, 1)
    else:
        side = min(block, height, width, math.isqrt(each))
        high, wide = height - side + 1, width - side + 1
        count = min(each // side**2, high * wide)
        generator = torch.Generator().manual_seed(seed)
        sizes = [_DRAWN_AT_ONCE] * (images // _DRAWN_AT_ONCE) + [images % _DRAWN_AT_ONCE]
        drawn = (torch.rand(size, high * wide, generator=generator) for size in sizes)
        corner = torch.cat([part.topk(count).indices for part in drawn])[..., None]
        inside = torch.arange(side).repeat(side), torch.arange(side).repeat_interleave(side)
        place = (corner // wide + inside[1]) * width + corner % wide + inside[0]
    place = place.flatten()
    image = torch.arange(images).repeat_interleave(len(place) // images)
    return Positions(image, place // width, place % width)


def some_of(count: int, most: int, *, run: int = 1) -> Tensor:
    """(min(count, most),) of the numbers below ``count``, ascending; always the same ones.

    With ``run`` so many that follow one another are taken together; what is left over is not.
    """
    if count <= most:
        return torch.arange(count)
    run = min(run, most)
    generator = torch.Generator().manual_seed(0)
    first = torch.randperm(count // run, generator=generator)[: most // run].sort().values
    return (first[:, None] * run + torch.arange(run)).flatten()


def rows_of(x: Tensor, most: int) -> Tensor:
    """(N, ..., C) -> (R, C): at most so many positions of each image, the same ones of all."""
    x = x.reshape(len(x), -1, x.shape[-1])
    if x.shape[1] > most:
        x = x[:, placed(some_of(x.shape[1], most), x.device)]
    return x.reshape(-1, x.shape[-1])


def at(x: Tensor, where: Positions) -> Tensor:
    """(N, H, W, C) -> (R, C)."""
    return x[where.image, where.row, where.column]


def unfold(x: Tensor, where: Positions, window: Window) -> Tensor:
    """What a layer reads at some positions of its output (im2col).

    Args:
        x: (N, H, W, C), its input.
        where: R positions of its output.
        window: The layer's.

    Returns:
        (R, T, C).
    """
    top, left = window.padding
    padded = F.pad(x, (0, 0, left, left, top, top)) if top or left else x
    high, wide = padded.shape[1:3]
    rows, columns = _taps(where.row, where.column, window)
    index = (where.image.view(-1, 1) * high + rows) * wide + columns
    found = padded.reshape(-1, x.shape[-1]).index_select(0, index.flatten())
    return found.view(*index.shape, x.shape[-1])


def read_at(
    where: Positions, window: Window, size: Sequence[int]
) -> tuple[Positions, Tensor, Tensor]:
    """Positions of its input that a layer reads at some positions of its output, each once.

    Args:
        where: R positions of its output.
        window: The layer's, with T taps.
        size: (height, width) of the input.

    Returns:
        U positions, ascending; (R, T) int64 which of them each tap reads; and (R, T) bool, which
        of those exist. The others lie in the padding, and something else stands in their place.
    """
    height, width = size
    rows, columns = _taps(where.row, where.column, window)
    rows, columns = rows - window.padding[0], columns - window.padding[1]
    exists = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    place = (where.image[:, None] * height + rows) * width + columns
    found, index = torch.unique(place, return_inverse=True)
    rows = found // width
    return Positions(rows // height, rows % height, found % width), index, exists


def _taps(row: Tensor, column: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """(...) -> (..., T) each: what every tap reads, counted from the start of the padding."""
    high, wide = (torch.arange(k, device=row.device) for k in window.kernel)
    a = high.repeat_interleave(len(wide)) * window.dilation[0]
    b = wide.repeat(len(high)) * window.dilation[1]
    return row[..., None] * window.stride[0] + a, column[..., None] * window.stride[1] + b
