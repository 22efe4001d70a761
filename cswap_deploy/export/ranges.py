"""Values of a graph that are too large for a number format."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from cswap_deploy.export.casting import FLOAT
from cswap_deploy.runtime.onnx_session import OnnxSession
from cswap_deploy.runtime.session import Floats

HEADROOM = 2.0
"""Images that were not measured may go beyond the measured maximum by this factor."""
_SQUARES = {"LayerNormalization", "InstanceNormalization", "GroupNormalization", "LpNormalization"}
"""Operators that square their input on the way; some runtimes do so in the input's type."""
_LARGEST = {
    ir.DataType.FLOAT16: float(np.finfo(np.float16).max),
    ir.DataType.BFLOAT16: (2 - 2.0**-7) * 2.0**127,
}
"""Largest finite value of a type."""
_BATCH = 8


def too_large(model: ir.Model, images: Floats, *, dtype: ir.DataType) -> dict[str, float]:
    """Nodes that take, make or pass through a value beyond the range of a type.

    Args:
        model: Float32; not changed.
        images: (N, C, H, W) float32, normalised.
        dtype: ``FLOAT16`` or ``BFLOAT16``.

    Returns:
        Name of the node -> the largest absolute value met (of a weight, an activation, or a square
        inside the operator), for those where twice that exceeds the type's maximum.
    """
    limit = _LARGEST[dtype] / HEADROOM
    largest = _largest(model, images)
    found = {}
    for node in model.graph:
        seen = [
            largest.get(str(v.name), 0.0) for v in (*node.inputs, *node.outputs) if v is not None
        ]
        if node.op_type in _SQUARES and node.inputs[0] is not None:
            seen.append(largest.get(str(node.inputs[0].name), 0.0) ** 2)
        if max(seen, default=0.0) > limit:
            found[str(node.name)] = max(seen)
    return found


def _largest(model: ir.Model, images: Floats) -> dict[str, float]:
    """Name of a float32 value -> its largest absolute value over all images."""
    largest: dict[str, float] = {}
    for name, value in model.graph.initializers.items():
        if value.dtype == FLOAT and value.const_value is not None:
            array = value.const_value.numpy()
            largest[name] = float(np.abs(array[np.isfinite(array)]).max(initial=0.0))
    watched, names = _watched(model)
    session = OnnxSession(watched, threads=None)
    for start in range(0, len(images), _BATCH):
        for name, value in zip(names, session.outputs(images[start : start + _BATCH]), strict=True):
            largest[name] = max(largest.get(name, 0.0), float(value))
    return largest


def _watched(model: ir.Model) -> tuple[bytes, list[str]]:
    """The graph with one output for each float32 value: its largest absolute value."""
    copy = ir.from_proto(ir.to_proto(model))
    graph = copy.graph
    values = [*graph.inputs, *(v for node in graph for v in node.outputs)]
    values = [v for v in values if v.dtype == FLOAT]
    tops = []
    for index, value in enumerate(values):
        absolute = ir.node("Abs", [value])
        top = ir.node("ReduceMax", absolute.outputs, attributes={"keepdims": 0})
        for suffix, node in (("abs", absolute), ("max", top)):
            node.outputs[0].name, node.outputs[0].dtype = f"watched_{index}_{suffix}", FLOAT
            graph.append(node)
        top.outputs[0].shape = ir.Shape([])
        tops.append(top.outputs[0])
    graph.outputs[:] = tops
    return ir.to_proto(copy).SerializeToString(), [str(v.name) for v in values]
