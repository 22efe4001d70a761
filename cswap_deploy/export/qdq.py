"""Edits of a finished Q/DQ graph: nodes taken out of int8 again, weights folded."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

_Q, _DQ = "QuantizeLinear", "DequantizeLinear"


def quantised_nodes(model: Any) -> tuple[str, ...]:
    """Names of the nodes of a ``onnx.ModelProto`` that read a Q/DQ pair, in the graph's order."""
    before = _sources(model.graph)
    return tuple(
        node.name
        for node in model.graph.node
        if node.op_type not in (_Q, _DQ) and any(name in before for name in node.input)
    )


def without(model: Any, nodes: Collection[str]) -> Any:
    """A copy with nodes out of int8: they read the inputs of their Q/DQ pairs, not the outputs.

    The weights of the ``onnx.ModelProto`` must be float32 before their pairs; pairs that nothing
    reads any more go.
    """
    import onnx

    made = onnx.ModelProto()
    made.CopyFrom(model)
    before = _sources(made.graph)
    for node in made.graph.node:
        if node.name in nodes:
            for index, name in enumerate(node.input):
                node.input[index] = before.get(name, name)
    _drop_unread(made.graph)
    return made


def fold_weights(model: Any) -> Any:
    """Store the weights of a ``onnx.ModelProto``, in place, as the int8 that their Q nodes give."""
    from onnx import numpy_helper

    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    for node in [n for n in graph.node if n.op_type == _Q and n.input[0] in weights]:
        values, scale, zero = (numpy_helper.to_array(weights[name]) for name in node.input)
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        if scale.ndim:
            shape = [1] * values.ndim
            shape[axis] = -1
            scale, zero = scale.reshape(shape), zero.reshape(shape)
        kind = np.iinfo(zero.dtype)
        folded = np.rint(values / scale) + zero  # ties to even, as ONNX has it
        folded = np.clip(folded, kind.min, kind.max).astype(zero.dtype)
        graph.initializer.append(numpy_helper.from_array(folded, node.output[0]))
        graph.node.remove(node)
    _drop_unread(graph)
    return model


def _sources(graph: Any) -> dict[str, str]:
    """Output of each Q/DQ pair -> what the pair reads."""
    quantised = {n.output[0]: n.input[0] for n in graph.node if n.op_type == _Q}
    return {
        n.output[0]: quantised[n.input[0]]
        for n in graph.node
        if n.op_type == _DQ and n.input[0] in quantised
    }


def _drop_unread(graph: Any) -> None:
    """Pairs, and tensors, whose output is nobody's input."""
    for kind in (_DQ, _Q):
        read = _read(graph)
        for node in [n for n in graph.node if n.op_type == kind and n.output[0] not in read]:
            graph.node.remove(node)
    read = _read(graph)
    for tensor in [t for t in graph.initializer if t.name not in read]:
        graph.initializer.remove(tensor)


def _read(graph: Any) -> set[str]:
    return {name for n in graph.node for name in n.input} | {o.name for o in graph.output}
