"""Random small networks, put together from what real ones have: built right, or refused by name.

``HYPOTHESIS_PROFILE=nightly`` tries 500 of them instead of 30.
"""

from __future__ import annotations

import itertools
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from apart import limited
from built_right import build, follow_the_fix, pictures
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import given as drawn
from hypothesis import strategies as st
from ordinary.base import cbr
from random_weights import lively
from torch import Tensor, nn

SIZE = (3, 16, 16)
REFUSALS = r"cannot be met|no structure that can be removed"

Spec = tuple["Block", ...]


@dataclass(frozen=True, slots=True)
class Block:
    """One step of a network: what it does, and how; ``inner`` is for what holds other steps."""

    kind: str
    number: int
    inner: Spec = ()


class Simple(nn.Module):
    """Layers, and what is done with them."""

    def __init__(self, run: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.run, self.layers = run, nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, *self.layers)


class Attention(nn.Module):
    """Attention over positions, heads of four channels; q, k and v from one layer or three."""

    def __init__(self, width: int, *, fused: bool) -> None:
        super().__init__()
        self.norm, self.fused = nn.LayerNorm(width), fused
        self.qkv = nn.ModuleList([nn.Linear(width, 3 * width)] if fused else
                                 [nn.Linear(width, width) for _ in range(3)])  # fmt: skip
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = self.norm(x.flatten(2).transpose(1, 2))
        parts = self.qkv[0](y).chunk(3, -1) if self.fused else [layer(y) for layer in self.qkv]
        q, k, v = (p.reshape(n, h * w, -1, 4).transpose(1, 2) for p in parts)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.project(y).transpose(1, 2).reshape(n, c, h, w)


class BuiltInAttention(nn.Module):
    """``nn.MultiheadAttention`` over positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, width // 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(2).transpose(1, 2)
        return x + self.attention(y, y, y)[0].transpose(1, 2).reshape(x.shape)


def shuffled(x: Tensor, groups: int) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def gated(x: Tensor, width: int) -> Tensor:
    return x[:, :width] * x[:, width:].sigmoid()


def made(block: Block, width: int) -> tuple[nn.Module, int]:
    """A step on ``width`` channels (a multiple of 4), and how many it gives."""
    kind, number, half = block.kind, block.number, width // 2
    odd = number % 2 == 1
    if kind == "conv":
        out = 8 + 4 * number
        return cbr(width, out, 1 if odd else 3, groups=2 if number == 2 else 1), out
    if kind == "depthwise":
        return cbr(width, width, groups=width), width
    if kind == "residual":
        body, out = chain(block.inner, width)
        back = nn.Conv2d(out, width, 1)
        return Simple(lambda x, f, g: x + g(f(x)), body, back), width
    if kind == "concat":
        body, out = chain(block.inner, width)
        return Simple(lambda x, f: torch.cat([x, f(x)], 1), body), width + out
    if kind == "split":
        cut = 4 if odd else half
        layer = nn.Conv2d(cut, cut, 3, padding=1)

        def split(x: Tensor, f: nn.Module) -> Tensor:
            a, b = x.chunk(2, 1) if cut == half else x.split([cut, width - cut], 1)
            return torch.cat([F.relu(f(a)), b], 1)

        return Simple(split, layer), width
    if kind == "slice":
        kept = width - 4 if width > 4 else width
        return Simple(lambda x: x[:, :kept] if odd else x[:, -kept:]), kept
    if kind == "shuffle":
        return Simple(lambda x: shuffled(x, 2 if odd else 4)), width
    if kind == "gate":
        both = nn.Conv2d(width, 2 * width, 3, padding=1)
        if odd:
            return Simple(lambda x, f: F.glu(f(x), 1), both), width
        return Simple(lambda x, f: gated(f(x), width), both), width
    if kind == "squeeze":
        down, up = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)
        pool: Callable[[Tensor], Tensor] = lambda x: F.adaptive_avg_pool2d(x, 1)  # noqa: E731
        return Simple(lambda x, f, g: x * g(F.relu(f(pool(x)))).sigmoid(), down, up), width
    if kind == "attention":
        layer = BuiltInAttention(width) if number == 2 else Attention(width, fused=odd)
        return layer, width
    if kind == "pool":
        return nn.AvgPool2d(3, 1, 1) if odd else nn.MaxPool2d(3, 1, 1), width
    if kind == "shared":
        layer = cbr(width, width)
        if odd:
            return Simple(lambda x, f: f(f(x)), layer), width
        return Simple(lambda x, f: f(x) - f(x.flip(3)), layer), width
    if kind == "transposed":
        up = nn.ConvTranspose2d(width, 12, 2, stride=2, groups=2 if odd else 1)
        return Simple(lambda x, f: F.max_pool2d(F.relu(f(x)), 2), up), 12
    if kind == "norm":
        norms = (
            nn.GroupNorm(4, width), nn.GroupNorm(1, width), nn.InstanceNorm2d(width, affine=True),
            nn.LocalResponseNorm(3),
        )  # fmt: skip
        return norms[number % 4], width
    assert kind == "pixels"
    return nn.Sequential(nn.Conv2d(width, 48, 1), nn.PixelShuffle(2), nn.MaxPool2d(2)), 12


KINDS = (
    "conv", "depthwise", "residual", "concat", "split", "slice", "shuffle", "gate", "squeeze",
    "attention", "pool", "shared", "transposed", "norm", "pixels",
)  # fmt: skip


def chain(blocks: Spec, width: int) -> tuple[nn.Sequential, int]:
    layers = []
    for block in blocks:
        layer, width = made(block, width)
        layers.append(layer)
    return nn.Sequential(*layers), width


class Network(nn.Module):
    """A stem to 8x8, the blocks, a tail and a classifier."""

    def __init__(self, blocks: Spec, head: str) -> None:
        super().__init__()
        self.stem = cbr(3, 12, stride=2)
        self.blocks, width = chain(blocks, 12)
        self.tail = cbr(width, 16, stride=2)
        self.ending = head
        self.head = nn.Linear(16 if head in ("mean", "max") else 256, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tail(self.blocks(self.stem(x)))
        if self.ending == "mean":
            return self.head(x.mean((2, 3)))
        if self.ending == "max":
            return self.head(F.adaptive_max_pool2d(x, 1).flatten(1))
        return self.head(x.view(x.size(0), -1) if self.ending == "view" else x.flatten(1))


def specs(first: str) -> st.SearchStrategy[Spec]:
    """Up to four blocks; what is drawn means other kinds behind another first one."""
    shift = KINDS.index(first)
    kinds = st.integers(0, len(KINDS) - 1).map(lambda k: KINDS[(k + shift) % len(KINDS)])

    def block(kind: st.SearchStrategy[str], depth: int) -> st.SearchStrategy[Block]:
        if not depth:
            return st.builds(Block, kind.filter(lambda k: k not in HOLDERS), st.integers(0, 3))
        inner = st.lists(block(kinds, depth - 1), min_size=1, max_size=2).map(tuple)
        return st.builds(
            lambda k, n, i: Block(k, n, i if k in HOLDERS else ()), kind, st.integers(0, 3), inner
        )

    rest = st.lists(block(kinds, 1), max_size=3)
    return st.tuples(block(st.just(first), 1), rest).map(lambda drawn: (drawn[0], *drawn[1]))


HOLDERS = ("residual", "concat")
settings.register_profile(
    "quick", max_examples=2, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate,),  # every step of shrinking is a build
)  # fmt: skip
settings.register_profile(
    "nightly", settings.get_profile("quick"), max_examples=34, derandomize=False, print_blob=True,
    phases=(Phase.generate, Phase.shrink),
)  # fmt: skip


@pytest.mark.parametrize("first", KINDS)
def test_a_random_network_is_built_right_or_refused_by_name(first: str) -> None:
    profile = os.environ.get("HYPOTHESIS_PROFILE", "quick")
    # Exporting takes most of the time: in every run one network of each kind.
    exported = itertools.cycle((True, False) if profile == "quick" else (True,))

    @settings(settings.get_profile(profile))
    @drawn(blocks=specs(first), head=st.sampled_from(("mean", "max", "view", "flatten")))
    def holds(blocks: Spec, head: str) -> None:
        def make() -> nn.Module:
            torch.manual_seed(0)
            return lively(Network(blocks, head).eval(), pictures(32, SIZE, seed=3)[0])

        note(str(make()))
        with tempfile.TemporaryDirectory() as folder, limited(60.0):
            how = {"size": SIZE, "export": next(exported)}
            built = build(make, Path(folder), **how)
            if not built.refused:
                assert built.params[1] < built.params[0]
                return
            assert re.search(REFUSALS, built.reason), built.reason
            follow_the_fix(built, make, Path(folder), **how)

    holds()
