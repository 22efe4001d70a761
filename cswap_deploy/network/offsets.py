"""Batch norms as what they are at inference, and where a constant goes that a layer gains."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from cswap_deploy.network.graph import Graph
from cswap_deploy.network.units import give_bias


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


def constant_of(graph: Graph, layer: str) -> Tensor:
    """(O,) where :func:`set_offset` leaves a layer's constant."""
    module = graph.layer(layer)
    if module.bias is not None:
        return module.bias
    return norm_after(graph, layer).running_mean  # type: ignore[union-attr, return-value]


def needs_bias(graph: Graph, layer: str) -> bool:
    """Whether a layer has nowhere to put a constant: no bias, no batch norm behind it."""
    module = graph.module.get_submodule(layer)
    return getattr(module, "bias", None) is None and norm_after(graph, layer) is None


def with_biases(graph: Graph, layers: Sequence[str]) -> Graph:
    """The graph of the same module after these layers are given zero biases, which they are here.

    As if it were traced again, which takes seconds and costs memory.
    """
    program, specs = graph.program, []
    first = next(iter(program.graph.nodes))
    for name in layers:
        layer = graph.layer(name)
        give_bias(layer)
        target = f"{name}.bias"
        with program.graph.inserting_before(first):
            bias = program.graph.placeholder(f"p_{target.replace('.', '_')}")
        weight: Tensor = graph.readers(name)[0].args[1].meta["val"]  # type: ignore[union-attr]
        with weight.fake_mode:  # type: ignore[attr-defined]
            bias.meta["val"] = weight.new_empty(layer.weight.shape[0])
        for reader in graph.readers(name):
            reader.args = (*reader.args[:2], bias, *reader.args[3:])
        specs.append(InputSpec(InputKind.PARAMETER, TensorArgument(bias.name), target))
        program.state_dict[target] = layer.bias
    program.graph_signature.input_specs[:0] = specs
    program.graph_module.recompile()
    return graph.on(graph.module)


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
