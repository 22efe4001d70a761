"""What a convolution or linear layer sees and says, as rows of a matrix, at some positions.

A layer is a linear map that is repeated at every position of every image. To solve it, some
positions are enough, and they are drawn for each image anew: the same ones in all images would
leave most of the picture unseen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from cswap_deploy.network.units import Consumer


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where a layer looks, seen from a position of its output."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def taps(self) -> int:
        """Positions of the input that one position of the output reads."""
        return self.kernel[0] * self.kernel[1]


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


def geometry(node: fx.Node, layer: Consumer) -> Geometry:
    """Of a convolution or linear node; a linear layer reads one position."""
    if isinstance(layer, nn.Linear):
        return Geometry()
    # The node's own settings: what the layer does may differ from what its attributes say.
    given = list(node.args[3:6])
    stride, padding, dilation = (_pair(v) for v in given + [1, 0, 1][len(given) :])
    kernel: tuple[int, int] = layer.kernel_size  # type: ignore[assignment]
    return Geometry(kernel, stride, padding, dilation)


def laid_out(x: Tensor, layer: Consumer) -> Tensor:
    """A layer's input or output as (N, H, W, C), contiguous; a linear layer's has W = 1."""
    if isinstance(layer, nn.Linear):
        return x.reshape(len(x), -1, 1, x.shape[-1])
    return x.permute(0, 2, 3, 1).contiguous()


def draw(shape: torch.Size, most: int, *, seed: int = 0) -> Positions:
    """Positions of a value: all of them, or as many of each image as come to ``most`` in all.

    Args:
        shape: (N, H, W, C).
        most: Rows.
        seed: Same seed, same positions.
    """
    images, height, width = shape[:3]
    each = min(height * width, max(1, most // images))
    if each == height * width:
        place = torch.arange(each).repeat(images, 1)
    else:
        generator = torch.Generator().manual_seed(seed)
        place = torch.rand(images, height * width, generator=generator).topk(each).indices
    image = torch.arange(images).repeat_interleave(each)
    return Positions(image, place.flatten() // width, place.flatten() % width)


def at(x: Tensor, where: Positions) -> Tensor:
    """(N, H, W, C) -> (R, C)."""
    return x[where.image, where.row, where.column]


def seen(
    x: Tensor, where: Positions, look: Geometry, *, through: Geometry | None = None
) -> tuple[Tensor, Tensor]:
    """What a layer reads at some positions of its output.

    Args:
        x: (N, H, W, C), its input.
        where: R positions of its output; of the output of the layer behind it with ``through``.
        look: The layer's.
        through: Of a layer behind it, each of whose S taps asks for one output of the first.

    Returns:
        (R, S, T, C), S = 1 without ``through``; and (R, S) bool, which of those outputs exist. The
        others lie in the padding of the layer behind; what is said of them means nothing.
    """
    top, left = look.padding
    padded = F.pad(x, (0, 0, left, left, top, top)) if top or left else x
    high, wide = padded.shape[1:3]
    if through is None:
        rows, columns = where.row[:, None], where.column[:, None]
        exists = torch.ones_like(rows, dtype=torch.bool)
    else:
        rows, columns = _taps(where.row, where.column, through)
        rows, columns = rows - through.padding[0], columns - through.padding[1]
        out_height, out_width = (
            (size - d * (k - 1) - 1) // s + 1
            for size, d, k, s in zip(
                (high, wide), look.dilation, look.kernel, look.stride, strict=True
            )
        )
        exists = (rows >= 0) & (rows < out_height) & (columns >= 0) & (columns < out_width)
        rows, columns = rows.clamp(0, out_height - 1), columns.clamp(0, out_width - 1)
    rows, columns = _taps(rows, columns, look)
    index = (where.image.view(-1, 1, 1) * high + rows) * wide + columns
    found = padded.reshape(-1, x.shape[-1]).index_select(0, index.flatten())
    return found.view(*index.shape, x.shape[-1]), exists


def _taps(row: Tensor, column: Tensor, look: Geometry) -> tuple[Tensor, Tensor]:
    """(...) -> (..., T) each: what every tap reads, counted from the start of the padding."""
    a = torch.arange(look.kernel[0]).repeat_interleave(look.kernel[1]) * look.dilation[0]
    b = torch.arange(look.kernel[1]).repeat(look.kernel[0]) * look.dilation[1]
    return row[..., None] * look.stride[0] + a, column[..., None] * look.stride[1] + b


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return int(value[0]), int(value[-1])
