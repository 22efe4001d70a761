"""Where tensors live: the one way by which they reach the network's device, and leave it.

Everything else is made where its operands are. A test runs the whole prune stage on a device that
refuses to mix its tensors with others (tests/pruning/test_device_placement.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

HOST = torch.device("cpu")


def placed(value: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; itself where it is there already."""
    return value.to(device)


def device_of(module: nn.Module) -> torch.device:
    """Where a network's parameters are; the host for one without any."""
    first = next(module.parameters(), None)
    return HOST if first is None else first.device
