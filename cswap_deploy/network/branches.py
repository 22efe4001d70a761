"""Where a layer's output goes: through a batch norm or a scale, into a residual stream.

A layer at the end of a residual branch can make up for what the stream itself has lost on the way.
What lies between the layer and the addition are fixed scales and shifts of each channel, and
changes of layout.

Source: He et al. 2017, "Channel Pruning for Accelerating Very Deep Neural Networks"
(arXiv:1707.06168), section 3.3, "last layer of residual branch".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from cswap_deploy.network.nodes import CONSUMING, ancestors, batch_dim, batched, opname

_aten = torch.ops.aten

LAYOUT = {_aten.permute.default}

_SAME = {"dropout", "clone", "contiguous"}


@dataclass(frozen=True, slots=True)
class Branch:
    """The end of a residual branch: a layer, what scales its output, the addition."""

    path: tuple[fx.Node, ...]
    """From the layer to the last node before the addition, in order."""
    add: fx.Node
    stream: fx.Node
    """What the branch is added to."""


def branch_of(node: fx.Node) -> Branch | None:
    """The branch that a convolution or linear node ends; only single readers are followed."""
    path = [node]
    while True:
        users = list(path[-1].users)
        if len(users) != 1:
            return None
        (user,) = users
        if opname(user) == "add" and not user.kwargs:  # in place, too
            others = [a for a in user.all_input_nodes if a is not path[-1]]
            if len(others) == 1 and shape_of(user) and shape_of(others[0]) == shape_of(path[-1]):
                return Branch(tuple(path), user, others[0])
            return None
        if not (
            user.target in LAYOUT
            or opname(user) in _SAME
            or (user.target is _aten.batch_norm.default and user.args[0] is path[-1])
            or (opname(user) == "mul" and _scales(user, path[-1]))
        ):
            return None
        path.append(user)


def streams_first(nodes: list[fx.Node]) -> list[fx.Node]:
    """The same order, but the end of each branch waits until the stream it joins is known."""
    position = {node: i for i, node in enumerate(nodes)}
    waiting: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for node in nodes:
        if (
            node.target in CONSUMING
            and (branch := branch_of(node)) is not None
            and position.get(branch.stream, -1) > position[node]
            and branch.add not in waiting
            and not set(branch.path) & ancestors(branch.stream)
        ):
            waiting[branch.add] = branch.path
    held = {node for path in waiting.values() for node in path}
    return [n for node in nodes if node not in held for n in (*waiting.get(node, ()), node)]


def _scales(node: fx.Node, value: fx.Node) -> bool:
    """Whether a product is with something that does not depend on the images."""
    others = [a for a in node.all_input_nodes if a is not value]
    return (
        len(others) == 1 and len(node.all_input_nodes) == 2 and not shape_of(others[0])
        and batch_dim(others[0]) is None
    )  # fmt: skip


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Without the batch; empty where the value is no batch of tensors."""
    value = node.meta.get("val")
    return tuple(value.shape[1:]) if isinstance(value, Tensor) and batched(node) else ()
