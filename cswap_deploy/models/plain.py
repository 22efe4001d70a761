"""A network as the stages take it: a copy that can be copied again, of plain modules."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from cswap_deploy.errors import UsageError, first_line
from cswap_deploy.models.adapters import ADAPTERS

_OWN = {"_parameters", "_modules"}


def plain(module: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """A copy in float32, on the CPU, in evaluation mode, of modules whose units can be removed.

    Returns:
        The copy, and notes on what is not as it was; its outputs are.

    Raises:
        UsageError: A lazy module was never run, or the network cannot be copied.
    """
    lazy = [n for n, p in module.named_parameters() if isinstance(p, UninitializedParameter)]
    if lazy:
        raise UsageError(
            f"{type(module).__name__} has lazy modules that were never run: {', '.join(lazy[:5])}",
            fix="run it once on an image before it is passed, or in its factory",
        )
    try:
        found = copied(module)
    except (RuntimeError, TypeError, NotImplementedError) as err:
        raise UsageError(
            f"{type(module).__name__} cannot be copied: {first_line(err)}",
            fix="keep tensors with gradients, locks and open files out of its attributes",
        ) from err
    notes = []
    for adapter in ADAPTERS.values():
        fitting = [(n, m) for n, m in found.named_modules() if adapter.matches(m)]
        with torch.no_grad():
            for _, layer in fitting:
                adapter.make_plain(layer)
        if fitting:
            names = ", ".join(name or "the network itself" for name, _ in fitting[:3])
            more = f" and {len(fitting) - 3} more" if len(fitting) > 3 else ""
            notes.append(f"{adapter.words}: {names}{more}")
    return found.float().cpu().eval(), tuple(notes)


def copied(module: nn.Module) -> nn.Module:
    """A deep copy in evaluation mode, without what a forward left behind.

    A module may keep its last activation, or what it computed from its weights, in an attribute.
    Such a tensor may hang on a graph of gradients, which cannot be copied; it is copied detached.
    What timm's modules cache for evaluation they forget in training mode.
    """
    memo: dict[int, Any] = {
        id(value): value.detach().clone() for value in _kept(module) if not value.is_leaf
    }
    found = copy.deepcopy(module, memo)
    return found.train().eval()


def _kept(module: nn.Module) -> Iterator[Tensor]:
    """Tensors in plain attributes, and in lists and dictionaries there."""
    for part in module.modules():
        waiting = [value for name, value in vars(part).items() if name not in _OWN]
        while waiting:
            value = waiting.pop()
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, dict):
                waiting += value.values()
            elif isinstance(value, list | tuple | set):
                waiting += value
