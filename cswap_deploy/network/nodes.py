"""Questions to single nodes of an exported graph, and to their values."""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

CONSUMING = {torch.ops.aten.conv2d.default, torch.ops.aten.linear.default}
"""Operations that read units through a weight."""


def ancestors(node: fx.Node) -> set[fx.Node]:
    """A node and everything it depends on."""
    found, stack = {node}, [node]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                stack.append(source)
    return found


def batched(node: fx.Node) -> bool:
    """Whether a value's first dimension is the batch."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.ndim > 0 and isinstance(value.shape[0], torch.SymInt)


def input_of(node: fx.Node) -> fx.Node:
    """What a consumer's node reads."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def memory_format_of(value: Tensor) -> torch.memory_format:
    """Channels last where a tensor is dense that way."""
    last = value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def elements(node: fx.Node) -> int:
    """Elements of a node's value for one image; 1 where it is no tensor."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.ndim == 0:
        return 1
    return math.prod(s for s in value.shape[1:] if isinstance(s, int))


def bytes_of(node: fx.Node) -> int:
    """What a node's value for one image takes; 0 where it is no tensor."""
    value = node.meta.get("val")
    return elements(node) * value.element_size() if isinstance(value, Tensor) else 0
