"""A float32 graph as a strongly typed one: the dtypes in the graph become those of the engine."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import onnx_ir as ir

from cswap_deploy.errors import ExportError

FLOAT = ir.DataType.FLOAT
_STAYS_FLOAT = {"Resize": (1, 2)}
"""Operator -> inputs that ONNX fixes to float32: the region of interest and the scales."""
_SCALE = {"QuantizeLinear": 1, "DequantizeLinear": 1}
"""Operator -> its scale, which TensorRT refuses if it is 0; in float16 the scale of a channel with
weights near 0 would be."""


def cast_graph(model: ir.Model, *, to: ir.DataType, keep: Collection[str] = ()) -> ir.Model:
    """Compute a graph in a narrower float type.

    Every node takes and gives ``to`` where it took and gave float32, except the nodes in ``keep``;
    ``Cast`` nodes stand where the two meet. The graph's inputs and outputs stay float32, so callers
    see no change. Integers, booleans and quantised tensors are left alone.

    Args:
        model: Float32, without control flow; changed in place.
        to: ``FLOAT16`` or ``BFLOAT16``. For the latter ONNX allows most operators, convolutions
            among them, from opset 22 on.
        keep: Names of nodes that stay in float32.

    Raises:
        ExportError: The graph has control flow.

    Source:
        TensorRT documentation, "Strongly Typed Networks".
    """
    graph, nodes = model.graph, list(model.graph)
    for node in nodes:
        kinds = {attribute.type for attribute in node.attributes.values()}
        if kinds & {ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS}:
            raise ExportError(
                f"{node.name} ({node.op_type}) is control flow, whose branches are not cast",
                fix="--precision fp32",
            )
    caster = _Caster(graph, to)
    for node in nodes:
        wanted = FLOAT if node.name in keep else to
        fixed = _STAYS_FLOAT.get(node.op_type, ())
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype == FLOAT:
                target = FLOAT if index in fixed else wanted
                scale = _SCALE.get(node.op_type) == index
                typed = caster.typed(value, target, before=node, scale=scale)
                node.replace_input_with(index, typed)
        if wanted != FLOAT:
            _retype(node, to)
            caster.lowered.update(v for v in node.outputs if v.dtype == FLOAT)
    for index, value in enumerate(graph.outputs):
        if value in caster.lowered:
            graph.outputs[index] = caster.output(value)
    for value in caster.lowered:
        value.dtype = to
    caster.drop_unused()
    return model


class _Caster:
    """Each value in each type, made once."""

    def __init__(self, graph: ir.Graph, to: ir.DataType) -> None:
        self.graph, self.to = graph, to
        self.lowered: set[ir.Value] = set()
        """Values that were float32 and are made in ``to`` now."""
        self._made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def typed(
        self, value: ir.Value, dtype: ir.DataType, *, before: ir.Node, scale: bool
    ) -> ir.Value:
        """The value in ``dtype``: itself, a cast of it, or another copy of a weight."""
        if (self.to if value in self.lowered else FLOAT) == dtype:
            return value
        key = (value, dtype)
        if key not in self._made:
            name = f"{value.name}_{dtype.name.lower()}"
            if value.is_initializer():
                self._made[key] = _weight(self.graph, value, name, dtype, dtype, scale=scale)
            else:
                cast = _cast(value, dtype, name)
                self.graph.insert_before(before, cast)
                self._made[key] = cast.outputs[0]
        return self._made[key]

    def output(self, value: ir.Value) -> ir.Value:
        """A float32 output of the graph, under the name that callers know."""
        name = value.name
        value.name = f"{name}_{self.to.name.lower()}"
        cast = _cast(value, FLOAT, str(name))
        self.graph.append(cast)
        return cast.outputs[0]

    def drop_unused(self) -> None:
        """Weights of which only the cast copy is read."""
        for value, _ in self._made:
            if value.is_initializer() and not value.uses():
                self.graph.initializers.pop(str(value.name), None)


def _weight(
    graph: ir.Graph,
    value: ir.Value,
    name: str,
    via: ir.DataType,
    dtype: ir.DataType,
    *,
    scale: bool,
) -> ir.Value:
    """A copy of a weight, rounded to one type and kept in another or the same."""
    assert value.const_value is not None
    with np.errstate(over="ignore"):  # the caller looks at ranges, see export.ranges
        array = value.const_value.numpy().astype(via.numpy())
    if scale and via == ir.DataType.FLOAT16:
        array = np.maximum(array, np.finfo(np.float16).smallest_subnormal)
    array = array.astype(dtype.numpy())
    made = ir.Value(
        name=name, type=ir.TensorType(dtype), shape=value.shape,
        const_value=ir.Tensor(array, dtype=dtype, name=name),
    )  # fmt: skip
    graph.register_initializer(made)
    return made


def _cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    node = ir.node("Cast", [value], attributes={"to": int(dtype)}, name=f"{name}/Cast")
    out = node.outputs[0]
    out.name, out.shape, out.dtype = name, value.shape, dtype
    return node


def _retype(node: ir.Node, to: ir.DataType) -> None:
    """Operators that name their output's type in an attribute."""
    if node.op_type == "Cast" and node.attributes["to"].as_int() == FLOAT:
        node.attributes["to"] = ir.AttrInt64("to", int(to))
    if node.op_type == "ConstantOfShape":
        value = node.attributes.get("value")
        if value is None or value.as_tensor().dtype == FLOAT:
            array: Any = [0.0] if value is None else value.as_tensor().numpy()
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(array, dtype=to))


def round_graph(model: ir.Model, *, to: ir.DataType, keep: Collection[str] = ()) -> ir.Model:
    """Emulate :func:`cast_graph` in float32, for runtimes that lack its operators.

    Wherever a value would be in ``to`` it is rounded to that type: each operator computes in
    float32 and rounds once. Arguments are those of :func:`cast_graph`.
    """
    graph, nodes = model.graph, list(model.graph)
    narrow = {value for node in nodes if node.name not in keep for value in node.outputs}
    rounded: dict[ir.Value, ir.Value] = {}
    for node in nodes:
        for index, value in enumerate(node.inputs):
            fixed = index in _STAYS_FLOAT.get(node.op_type, ())
            if value is None or value.dtype != FLOAT or fixed:
                continue
            if value in narrow or node.name not in keep:
                if value not in rounded:
                    scale = _SCALE.get(node.op_type) == index
                    rounded[value] = _rounded(graph, value, to, before=node, scale=scale)
                node.replace_input_with(index, rounded[value])
    for index, value in enumerate(graph.outputs):
        if value in narrow and value.dtype == FLOAT:
            name = str(value.name)
            value.name = f"{name}_exact"
            graph.outputs[index] = _rounded(graph, value, to, before=None, name=name)
    return model


def _rounded(
    graph: ir.Graph, value: ir.Value, to: ir.DataType, *, before: ir.Node | None, name: str = "",
    scale: bool = False,
) -> ir.Value:  # fmt: skip
    """A float32 value that went through ``to``; a weight is rounded here and now."""
    name = name or f"{value.name}_rounded"
    if value.const_value is not None:
        return _weight(graph, value, name, to, FLOAT, scale=scale)
    down = _cast(value, to, f"{value.name}_narrow")
    up = _cast(down.outputs[0], FLOAT, name)
    if before is None:
        graph.extend([down, up])
    else:
        graph.insert_before(before, [down, up])
    return up.outputs[0]
