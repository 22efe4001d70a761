"""Where a layer joins a residual stream, and what it makes up for there."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from small_networks import lively, pictures, small_cnn, traced
from small_networks import refitted as fit
from torch import Tensor, fx, nn

from cswap_deploy.network.branches import branch_of
from cswap_deploy.network.graph import Graph, trace
from cswap_deploy.pruning.targets import to_layer

IMAGES = pictures(40)[0]


class Block(nn.Module):
    """A stream of six channels and one branch; the output is the sum itself."""

    def __init__(self, kind: str, *, joined: bool = True) -> None:
        super().__init__()
        self.kind, self.joined = kind, joined
        self.stem = nn.Conv2d(3, 6, 3, padding=1, stride=2)
        if kind == "batch norm":
            self.first = nn.Conv2d(6, 16, 3, padding=1)
            self.end: nn.Module = nn.Conv2d(16, 6, 1, bias=False)
            self.norm = nn.BatchNorm2d(6)
        else:
            self.first = nn.Conv2d(6, 16, 1)
            self.end = nn.Linear(16, 6)
            self.gamma = nn.Parameter(torch.tensor([0.5, -2.0, 1.0, 0.1, 3.0, -0.3]))

    def tail(self, y: Tensor) -> Tensor:
        """From the branch's last layer to the addition."""
        if self.kind == "batch norm":
            return self.norm(y)
        if self.kind == "scale and permute":
            y = y * self.gamma
        return y.permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = torch.relu(self.first(x))
        y = self.end(y if self.kind == "batch norm" else y.permute(0, 2, 3, 1))
        y = self.tail(y)
        return (x + y if self.joined else y).flatten(1)


KINDS = ["batch norm", "permute", "scale and permute"]


@cache
def block(kind: str) -> tuple[Any, Graph]:
    """Shared; who changes it works on a copy."""
    torch.manual_seed(2)
    module = lively(Block(kind))
    return module, trace(module, IMAGES[:2])


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_layer_adds_arrives_as_asked(kind: str) -> None:
    module, graph = block(kind)
    (node,) = graph.readers("end")
    branch = branch_of(node)
    assert branch is not None
    assert branch.stream is graph.readers("stem")[0]
    g = torch.Generator().manual_seed(0)
    shape = (5, 6, 8, 8)
    difference = torch.randn(shape, generator=g)
    at_layer = to_layer(graph, branch, difference)
    y = torch.randn(shape if kind == "batch norm" else (5, 8, 8, 6), generator=g)
    assert at_layer.shape == y.shape
    with torch.no_grad():
        arrived = module.tail(y + at_layer) - module.tail(y)
    torch.testing.assert_close(arrived, difference, rtol=1e-4, atol=1e-4)


def test_channel_that_the_branch_scales_to_nothing_is_asked_for_nothing() -> None:
    module, graph = block("scale and permute")
    module = copy.deepcopy(module)
    module.gamma.data[3] = 0.0
    graph = graph.on(module)
    branch = branch_of(graph.readers("end")[0])
    assert branch is not None
    found = to_layer(graph, branch, torch.ones(2, 6, 8, 8))
    assert torch.isfinite(found).all()
    assert not found[..., 3].any()
    torch.testing.assert_close(found[..., 1], torch.full((2, 8, 8), -0.5))


@pytest.mark.parametrize("kind", KINDS)
def test_end_of_a_branch_makes_up_for_the_stream(kind: str) -> None:
    dense, joined_graph = block(kind)
    damaged = copy.deepcopy(dense)
    damaged.stem.weight.data *= 0.7
    damaged.stem.bias.data += 0.4

    def refitted(*, joined: bool) -> dict[str, Tensor]:
        """Weights after a refit that sees the stream, or sees the branch alone."""
        before, after = Block(kind, joined=joined).eval(), Block(kind, joined=joined).eval()
        before.load_state_dict(dense.state_dict())
        after.load_state_dict(damaged.state_dict())
        graph = joined_graph if joined else trace(before, IMAGES[:2])
        done = fit(graph.on(after), graph, {"end": torch.arange(16)}, IMAGES)
        assert done.layers == ("end",)
        return after.state_dict()

    def distance(state: dict[str, Tensor]) -> float:
        module = Block(kind).eval()
        module.load_state_dict(state)
        with torch.no_grad():
            return float((module(IMAGES) - dense(IMAGES)).square().mean())

    corrected, alone = distance(refitted(joined=True)), distance(refitted(joined=False))
    before = distance(damaged.state_dict())
    assert corrected < before / 2
    assert corrected < 0.7 * alone, (corrected, alone, before)


def test_stream_is_known_before_the_branch_that_joins_it() -> None:
    """The shortcut is written after the branch; without a new order its loss would be unseen."""
    graph, _ = traced(small_cnn)
    branch = branch_of(graph.readers("out.0")[0])
    assert branch is not None
    order = [node for node, _ in graph.step(IMAGES[:2])]
    assert order.index(branch.stream) < order.index(branch.path[0])
    position = {node: i for i, node in enumerate(order)}
    for node in order:
        for source in node.all_input_nodes:
            assert position.get(source, -1) < position[node], f"{node} runs before {source}"


def test_no_branch_where_something_else_reads_the_layer_or_bends_it() -> None:
    graph, _ = traced(small_cnn)

    def found(layer: str) -> fx.Node | None:
        branch = branch_of(graph.readers(layer)[0])
        return branch.add if branch is not None else None

    assert found("project.0") is not None
    assert found("out.0") is found("shortcut.0")
    assert found("expand.0") is None, "a ReLU follows"
    assert found("classifier") is None
