"""Where tensors live: the one way by which they reach the network's device, and leave it.

Everything else is made where its operands are. A test runs the whole prune stage on a device that
refuses to mix its tensors with others (tests/pruning/test_device_placement.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cswap_deploy.config import PruneConfig
from cswap_deploy.errors import MissingDependencyError
from cswap_deploy.models.plain import copied

HOST = torch.device("cpu")


def device_for(config: PruneConfig) -> torch.device:
    """Where to prune; workers measure on CPUs, so all else is done there too.

    Raises:
        MissingDependencyError: There is no such GPU.
    """
    return HOST if config.workers is not None else device_named(config.device)


def device_named(name: str) -> torch.device:
    """The device that ``--device`` names; ``auto`` is the GPU where PyTorch has one.

    Raises:
        MissingDependencyError: There is no such GPU.
    """
    there = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if there else "cpu"
    device = torch.device(name)
    if device.type == "cpu":
        return HOST
    count = torch.cuda.device_count() if there else 0
    if (device.index or 0) >= count:
        found = f"finds {count} GPU{'s' * (count > 1)}" if count else "finds no GPU it can use"
        raise MissingDependencyError(
            f"--device {name}: PyTorch {torch.__version__} {found}",
            fix=f"pass cuda:0 to cuda:{count - 1}, or leave the flag out" if count else
            "install a CUDA build of PyTorch and the driver, or leave the flag out",
        )  # fmt: skip
    return device


def placed(value: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; itself where it is there already."""
    return value.to(device)


def moved(module: nn.Module, device: torch.device) -> nn.Module:
    """A copy of a network on a device."""
    found = copied(module)
    found._apply(lambda value: placed(value, device))  # type: ignore[no-untyped-call]
    return found


def device_of(module: nn.Module) -> torch.device:
    """Where a network's parameters are; the host for one without any."""
    first = next(module.parameters(), None)
    return HOST if first is None else first.device
