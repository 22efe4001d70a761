"""Rows are what ``torch.nn.functional.unfold`` and the layers themselves say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cswap_deploy.network.graph import trace
from cswap_deploy.network.unfolding import (
    Positions,
    Window,
    at,
    draw,
    laid_out,
    read_at,
    unfold,
    window_of,
)

LOOKS = {
    "1x1": Window(),
    "3x3": Window((3, 3), padding=(1, 1)),
    "strided": Window((3, 2), (2, 1), (1, 0)),
    "dilated": Window((3, 3), dilation=(2, 1), padding=(2, 1)),
}
X = torch.randn(4, 5, 9, 8, generator=torch.Generator().manual_seed(0))


def every_position(look: Window, x: Tensor = X) -> Positions:
    weight = torch.zeros(1, x.shape[1], *look.kernel)
    shape = F.conv2d(x, weight, None, look.stride, look.padding, look.dilation).shape
    return draw(torch.Size([len(x), *shape[2:], 1]), 10**6)


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_rows_are_unfolded_patches(look: Window) -> None:
    found = unfold(X.permute(0, 2, 3, 1), every_position(look), look)
    patches = F.unfold(X, look.kernel, look.dilation, look.padding, look.stride)
    wanted = patches.view(4, 5, look.taps, -1).permute(0, 3, 2, 1).flatten(0, 1)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("first", LOOKS.values(), ids=LOOKS)
@pytest.mark.parametrize("second", LOOKS.values(), ids=LOOKS)
def test_rows_seen_through_a_second_layer_give_both_layers(first: Window, second: Window) -> None:
    g = torch.Generator().manual_seed(1)
    w1 = torch.randn(6, 5, *first.kernel, generator=g)
    w2 = torch.randn(3, 6, *second.kernel, generator=g)
    middle = F.conv2d(X, w1, None, first.stride, first.padding, first.dilation)
    output = F.conv2d(middle.cos(), w2, None, second.stride, second.padding, second.dilation)
    output = output.permute(0, 2, 3, 1)
    where = draw(output.shape, 40)
    places, index, exists = read_at(where, second, middle.shape[2:])
    each = torch.stack([places.image, places.row, places.column], 1)
    assert torch.equal(each, each.unique(dim=0)), "each once, in order"
    z = unfold(X.permute(0, 2, 3, 1), places, first).flatten(1) @ w1.movedim(1, -1).flatten(1).T
    h = z.cos()[index] * exists[..., None]
    said = torch.einsum("rsc,osc->ro", h, w2.movedim(1, -1).flatten(1, 2))
    torch.testing.assert_close(said, at(output, where), rtol=1e-4, atol=1e-4)


def test_positions_are_some_of_every_image_and_differ_between_images() -> None:
    where = draw(torch.Size([6, 8, 8, 3]), 60)
    assert len(where) == 60
    assert torch.equal(where.image, torch.arange(6).repeat_interleave(10))
    places = (where.row * 8 + where.column).view(6, 10)
    assert all(len(set(p.tolist())) == 10 for p in places), "no position twice"
    assert len({tuple(sorted(p.tolist())) for p in places}) == 6
    assert where.row.max() < 8
    assert where.column.max() < 8
    assert len(draw(torch.Size([6, 2, 2, 3]), 10**6)) == 24, "all, where there are few"
    assert len(draw(torch.Size([6, 2, 2, 3]), 1)) == 6, "one of each image at least"


def test_positions_in_squares_read_little_beside_themselves() -> None:
    look = Window((3, 3), padding=(1, 1))
    where = draw(torch.Size([6, 16, 12, 3]), 6 * 32, block=4)
    assert len(where) == 6 * 32
    squares = torch.stack([where.row, where.column], 1).view(-1, 16, 2)
    size = squares.amax(1) - squares.amin(1)
    assert (size == 3).all(), "4 x 4 each"
    assert all(len({tuple(p) for p in square}) == 16 for square in squares.tolist())
    places, _, _ = read_at(where, look, (16, 12))
    scattered, _, _ = read_at(draw(torch.Size([6, 16, 12, 3]), 6 * 32), look, (16, 12))
    assert len(places) <= look.reads(4) * len(where) < len(scattered)
    assert look.reads(4) == 36 / 16
    assert Window((1, 1), (2, 2)).reads(4) == 1, "what lies between is not read"
    assert len(draw(torch.Size([6, 16, 12, 3]), 6 * 10, block=4)) == 6 * 9, "squares that fit"
    assert len(draw(torch.Size([6, 2, 9, 3]), 6 * 10, block=4)) == 6 * 8
    assert len(draw(torch.Size([6, 3, 3, 3]), 10**6, block=4)) == 54, "all, where there are few"


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(3, 4, (1, 3), padding=(0, 2))]
)
def test_geometry_is_the_nodes(layer: Any) -> None:
    module = nn.Sequential(layer, nn.Flatten()).eval()
    graph = trace(module, torch.randn(2, 3, 8, 8))
    look = window_of(graph.readers("0")[0], layer)
    assert (look.kernel, look.stride, look.padding, look.dilation) == (
        layer.kernel_size, layer.stride, layer.padding, layer.dilation,
    )  # fmt: skip


def test_linear_layers_read_one_position() -> None:
    x = torch.randn(3, 7, 5)
    assert laid_out(x, nn.Linear(5, 2)).shape == (3, 7, 1, 5)
    assert laid_out(x[:, 0], nn.Linear(5, 2)).shape == (3, 1, 1, 5)
