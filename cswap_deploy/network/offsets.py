"""Batch norms as what they are at inference, and where a constant goes that a layer gains."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from cswap_deploy.network.graph import Graph


def shift_output(graph: Graph, layer: str, by: Tensor) -> None:
    """Add a constant to every output of a layer, in place.

    It goes into the layer's bias, or into the running mean of the batch norm that alone reads it.

    Args:
        graph: Over the module to change.
        layer: A convolution or linear layer for which :func:`needs_bias` is false.
        by: (O,).
    """
    module = graph.layer(layer)
    with torch.no_grad():
        if module.bias is not None:
            module.bias += by
        else:
            norm_after(graph, layer).running_mean -= by  # type: ignore[union-attr, operator]


def set_offset(graph: Graph, dense: Graph, layer: str, offset: Tensor) -> None:
    """Let a layer's output be its linear map plus a constant (O,), in place.

    As :func:`shift_output`; ``dense`` is the network as it was.
    """
    module = graph.layer(layer)
    with torch.no_grad():
        if module.bias is not None:
            module.bias.copy_(offset)
        else:
            now, before = norm_after(graph, layer), norm_after(dense, layer)
            now.running_mean.copy_(before.running_mean - offset)  # type: ignore[union-attr, operator]


def needs_bias(graph: Graph, layer: str) -> bool:
    """Whether a layer has nowhere to put a constant: no bias, no batch norm behind it."""
    module = graph.module.get_submodule(layer)
    return getattr(module, "bias", None) is None and norm_after(graph, layer) is None


def norm_after(graph: Graph, layer: str) -> nn.Module | None:
    """The batch norm that alone reads a layer's output, if there is one."""
    readers = graph.readers(layer)
    users = list(readers[0].users) if readers else []
    if len(users) != 1 or users[0].target is not torch.ops.aten.batch_norm.default:
        return None
    return graph.owner(users[0].args[3])  # type: ignore[arg-type]


def scale_and_shift(graph: Graph, norm: fx.Node, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(O,) each, in ``dtype``: what a batch norm's node multiplies each channel by, then adds."""
    gamma, beta, mean, var = (
        None if a is None else graph.value(a, {}).detach().to(dtype)  # type: ignore[arg-type]
        for a in norm.args[1:5]
    )
    assert mean is not None
    assert var is not None
    scale = (var + norm.args[7]).rsqrt()
    if gamma is not None:
        scale = scale * gamma
    return scale, -mean * scale if beta is None else beta - mean * scale
