"""Outputs that differ from run to run are found first, and what is random is named."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cswap_deploy
from cswap_deploy.errors import StageError
from cswap_deploy.network.steadiness import require_steady

IMAGES = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 4


class Frame(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Conv2d(3, 8, 3), Inner()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.inner(F.relu(self.first(x))).mean((2, 3)))


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5)  # training=True is its default


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 16 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear((x + 0.1 * torch.randn_like(x)).flatten(1))


@pytest.mark.parametrize("ratio", [0.0, 0.3])
def test_dropout_that_is_always_on_is_named_with_its_module(ratio: float) -> None:
    with pytest.raises(
        StageError,
        match=r"Frame gives other outputs each time it runs on the same images: dropout in inner "
        r"is random\n  fix: switch it off in evaluation mode",
    ):
        cswap_deploy.prune(Frame(), (IMAGES, LABELS), ratio=ratio)


def test_noise_is_named() -> None:
    with pytest.raises(StageError, match="randn_like is random"):
        require_steady(Noisy().eval(), IMAGES)


def test_a_network_that_answers_alike_passes() -> None:
    require_steady(nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(768, 4)).eval(), IMAGES)
