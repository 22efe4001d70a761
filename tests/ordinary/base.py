"""How a network gets into the table, and the frame that most of them share."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from built_right import pictures
from random_weights import lively
from torch import Tensor, nn

Expected = Literal["pruned", "whole", "refused", "any"]
SIZE = (3, 32, 32)
CLASSES = 10


@dataclass(frozen=True, slots=True)
class Case:
    """A network, and what must come of it."""

    make: Callable[[], nn.Module]
    """The same weights each time."""
    brings: str
    expected: Expected
    """``pruned``: built, with units removed. ``whole``: so much may have to stay that the ratio is
    out of reach, which is said. ``refused``: by name. ``any``: built right, or refused."""
    words: str
    """Regular expression of what a refusal says."""
    size: tuple[int, int, int]
    images: int
    """On which it is pruned."""
    apart: bool
    """What runs in it has ended whole processes: it gets one of its own."""


NETWORKS: dict[str, Case] = {}
_REACH = r"cannot be met|no structure that can be removed|nothing .* removed"


def network(
    expected: Expected = "pruned",
    *,
    words: str = _REACH,
    size: tuple[int, int, int] = SIZE,
    images: int = 20,
    apart: bool = False,
    raw: bool = False,
    finish: Callable[[nn.Module], nn.Module] = lambda module: module,
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Put a class of networks into the table; its docstring says what it brings.

    Args:
        expected: See :class:`Case`; ``words``, ``size``, ``images`` and ``apart`` too.
        raw: Its weights are left as PyTorch draws them.
        finish: What is done to it at the end.
    """

    def add(made: type[nn.Module]) -> type[nn.Module]:
        def make() -> nn.Module:
            torch.manual_seed(0)
            module = made().eval()
            return finish(module if raw else lively(module, pictures(32, size, seed=3)[0]))

        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", made.__name__).lower()
        assert name not in NETWORKS, f"{name} stands in the table twice"
        brings = (made.__doc__ or "").strip()
        NETWORKS[name] = Case(make, brings, expected, words, size, images, apart)
        return made

    return add


def cbr(inputs: int, outputs: int, kernel: int = 3, **settings: int) -> nn.Sequential:
    """Convolution, batch norm, ReLU; the size stays unless there is a stride."""
    settings = {"padding": kernel // 2} | settings
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, bias=False, **settings), nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )  # fmt: skip


class Around(nn.Module):
    """A stem to 24 channels of 16x16, what ``middle`` makes of them, a tail and a classifier."""

    width = 24
    out = 24
    """Channels that ``middle`` gives."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = cbr(3, self.width, stride=2)
        self.tail = cbr(self.out, 32)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tail(self.middle(self.stem(x))).mean((2, 3)))

    def middle(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Tokens(nn.Module):
    """16 patches of 8x8 as tokens of width 32, ``mix`` beside a residual stream, a classifier."""

    width = 32
    heads = 4

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, self.width, 8, 8)
        self.position = nn.Parameter(torch.zeros(1, 16, self.width))
        self.norm1, self.norm2, self.norm = (nn.LayerNorm(self.width) for _ in range(3))
        self.mlp = nn.Sequential(nn.Linear(self.width, 96), nn.GELU(), nn.Linear(96, self.width))
        self.head = nn.Linear(self.width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        x = x + self.mix(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.head(self.norm(x).mean(1))

    def mix(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def split_heads(self, x: Tensor, heads: int = 0) -> Tensor:
        """(N, T, C) -> (N, heads, T, C / heads)."""
        return x.unflatten(2, (heads or self.heads, -1)).transpose(1, 2)
