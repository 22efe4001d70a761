"""The outputs of a graph that effects are measured on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from cswap_deploy.errors import ExportError

_aten = torch.ops.aten
_RESHAPES = {
    _aten.squeeze.default, _aten.squeeze.dim, _aten.unsqueeze.default, _aten.view.default,
    _aten.reshape.default, _aten.flatten.using_ints, _aten.select.int, _aten.slice.Tensor,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Output:
    """A floating-point output with one row an image."""

    name: str
    node: fx.Node
    shape: tuple[int, ...]
    """Of one image's."""

    @property
    def elements(self) -> int:
        """Numbers for one image."""
        return math.prod(self.shape)

    @property
    def probabilities(self) -> bool:
        """Whether a sigmoid makes it, whatever changes its shape after that."""
        node = self.node
        while node.target in _RESHAPES and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        return node.target in (_aten.sigmoid.default, _aten.sigmoid_.default)


def measured_outputs(
    returned: Sequence[Any], names: Sequence[str], images: fx.Node, module: nn.Module
) -> tuple[Output, ...]:
    """Of what a graph returns, what depends on the images one by one.

    Integers (classes, indices) and what is the same for any batch (anchors) are left out: a change
    of theirs has no size.

    Args:
        returned: Nodes.
        names: Of them.
        images: The input's node.
        module: The network, for the messages.

    Raises:
        ExportError: Nothing is left, or an output's size depends on what is in the images.
    """
    batch = images.meta["val"].shape[0]
    found: list[Output] = []
    for name, node in zip(names, returned, strict=True):
        value = node.meta.get("val") if isinstance(node, fx.Node) else None
        if not isinstance(value, Tensor) or not value.is_floating_point() or not value.ndim:
            continue
        first: Any = value.shape[0]
        rest = value.shape[1:]
        if isinstance(first, int):
            continue
        if str(first) != str(batch) or not all(isinstance(size, int) for size in rest):
            raise ExportError(
                f"output {name} of {type(module).__name__} has shape {tuple(value.shape)}: one row "
                "an image, of a fixed size, is wanted",
                fix="return what the network computes before it selects or flattens over images, "
                "for example boxes and scores before non-maximum suppression",
            )
        found.append(Output(name, node, tuple(rest)))
    if not found:
        raise ExportError(
            f"torch.export {torch.__version__}: {type(module).__name__} returns nothing with one "
            f"row of floating-point numbers an image (it returns {', '.join(names) or 'nothing'})",
            fix="return its scores, maps, boxes or features, the batch first",
        )
    return tuple(found)
