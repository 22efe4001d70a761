"""Networks of a user's own, small enough that a whole build takes seconds.

Factories for ``small_models:NAME``; subprocesses find this file through ``PYTHONPATH``.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 5
SIZE = 16
INPUT_SIZE = (3, SIZE, SIZE)
MEAN = (0.5, 0.5, 0.5)
STD = (0.25, 0.25, 0.25)
FLAGS = ("--input-size", "3,16,16", "--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25")


class SmallNet(nn.Module):
    """Two residual blocks on 16x16 images; about 16,000 parameters."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, 2 * width, 3, 1, 1)
        self.conv2 = nn.Conv2d(2 * width, width, 3, 1, 1)
        self.conv3 = nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.head = nn.Linear(2 * width, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 2 * width)."""
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.conv2(F.relu(self.conv1(x))))
        return F.relu(self.conv3(x)).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> logits (N, CLASSES)."""
        logits: Tensor = self.head(self.features(x))
        return logits


def pictures(count: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 16, 16, 3) uint8 of five noisy patterns, and their labels (N,), in turn."""
    patterns = np.random.default_rng(99).integers(60, 196, (CLASSES, 4, 4, 3))
    patterns = patterns.repeat(SIZE // 4, axis=1).repeat(SIZE // 4, axis=2)
    labels = np.arange(count) % CLASSES
    noise = np.random.default_rng(seed).normal(0, 55, (count, SIZE, SIZE, 3))
    return (patterns[labels] + noise).clip(0, 255).astype(np.uint8), labels


def small(width: int = 16) -> nn.Module:
    """A network that does classify ``pictures``: random features, a solved classifier."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        module = SmallNet(width).eval()
    images, labels = pictures(500, seed=1234)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.25)
    with torch.no_grad():
        features = module.features(x).double()
        centred = features - features.mean(0)
        targets = F.one_hot(torch.from_numpy(labels), CLASSES).double() - 1 / CLASSES
        gram = centred.T @ centred
        gram += 1e-3 * gram.diagonal().mean() * torch.eye(len(gram))
        weight = 4 * torch.linalg.solve(gram, centred.T @ targets).T
        module.head.weight.copy_(weight)
        module.head.bias.copy_(-weight @ features.mean(0))
    return module


def with_softmax() -> nn.Module:
    """The same network with the softmax inside."""
    return nn.Sequential(small(), nn.Softmax(dim=1))


def with_log_softmax() -> nn.Module:
    """The same with a log-softmax."""
    return nn.Sequential(small(), nn.LogSoftmax(dim=-1))


def tiny() -> nn.Module:
    """The same with a thousand parameters; ``bundles/schema-1`` was built from it."""
    return small(width=4)


def other() -> nn.Module:
    """The same architecture with other weights."""
    module = small()
    with torch.no_grad():
        module.head.bias.add_(0.01)
    return module


def not_finite() -> nn.Module:
    """One weight is not a number."""
    module = small()
    with torch.no_grad():
        module.conv2.weight[3, 0, 0, 0] = float("nan")
    return module


class Branching(SmallNet):
    """Its path depends on the values of its input, which no graph can hold."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return super().forward(x)
        return super().forward(-x)


def branching() -> nn.Module:
    """A network that cannot be exported."""
    return Branching().eval()


def rigid() -> nn.Module:
    """Nothing in it can be removed: one layer, from pixels to classes."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, CLASSES)).eval()


def no_module() -> str:
    """Not a network."""
    return "a string"
