"""Questions to single nodes of an exported graph, and to their values."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

FEW = 2
"""Images of the batch that labels and sizes are looked at with."""
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


def descendants(nodes: Iterable[fx.Node], first: Iterable[fx.Node]) -> set[fx.Node]:
    """Some nodes and everything that depends on them; ``nodes`` are in order of execution."""
    found = set(first)
    for node in nodes:
        if node not in found and any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def opname(node: fx.Node) -> str:
    """An operation's name without its namespace, overload and the mark of in-place ones."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.rpartition("::")[2].rstrip("_")
    return str(getattr(node.target, "__name__", node.target))


def batch_dim(node: fx.Node) -> int | None:
    """The dimension of a value that grows with the batch; the first one, if there are several."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    sizes: list[Any] = list(value.shape)
    return next((d for d, s in enumerate(sizes) if isinstance(s, torch.SymInt)), None)


def batched(node: fx.Node) -> bool:
    """Whether a value's first dimension grows with the batch."""
    return batch_dim(node) == 0


def size_at(size: Any, batch: int) -> int:
    """A size of the graph for a batch of so many images."""
    if isinstance(size, torch.SymInt):
        expression = size.node.expr
        size = expression.xreplace(dict.fromkeys(expression.free_symbols, batch))
    return int(size)


def shape_in(sizes: Tensor | Iterable[Any], batch: int = FEW) -> tuple[int, ...]:
    """The shape of a value of the graph for a batch of two images, unless said."""
    found = sizes.shape if isinstance(sizes, Tensor) else sizes
    return tuple(size_at(size, batch) for size in found)


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
    return math.prod(size_at(s, 1) for s in value.shape)


def bytes_of(node: fx.Node) -> int:
    """What a node's value for one image takes; 0 where it is no tensor."""
    value = node.meta.get("val")
    return elements(node) * value.element_size() if isinstance(value, Tensor) else 0
