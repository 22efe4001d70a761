"""The same graph in bfloat16, where the hardware multiplies it faster than float32.

What is small runs in float32 all the same, on the unrounded weights: pooled features, gates, the
classifier. Rounding the logits themselves, to eight bits, would drown the effects; rounding what
leads to them changes the masked and the unmasked network almost alike, and the difference is taken
between the two in the same arithmetic.

Source: PyTorch documentation, "Automatic Mixed Precision" (which operations keep float32).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from cswap_deploy.models.plain import copied
from cswap_deploy.network.graph import Env, Graph

_NORMS = {torch.ops.aten.batch_norm.default, torch.ops.aten.layer_norm.default}


class Bfloat16Graph(Graph):
    """A graph whose large values are bfloat16; later changes of the weights are not seen."""

    def __init__(self, graph: Graph) -> None:
        module = copied(graph.module).to(torch.bfloat16)
        super().__init__(graph.program, module, graph.output_names)
        self._whole = graph
        self._large = {node for node in self.nodes if _has_positions(node)}

    def argument(self, source: fx.Node, env: Env, reader: fx.Node) -> Any:
        """Rounded where the reader's own value is large, else in float32."""
        large = reader in self._large
        if source.op == "placeholder" and source not in env:
            # a norm keeps its float32 statistics beside rounded values
            rounded = large and reader.target not in _NORMS
            return (self if rounded else self._whole).value(source, env)
        value = self.value(source, env)
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.to(torch.bfloat16 if large else torch.float32)
        return value


def _has_positions(node: fx.Node) -> bool:
    """Whether a value is a map or a sequence: (N, C, H, W) with H * W > 1, (N, T, C)."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.ndim < 3:
        return False
    return value.ndim == 3 or any(isinstance(s, int) and s > 1 for s in value.shape[2:])
