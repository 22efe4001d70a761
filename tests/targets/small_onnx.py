"""A network of five nodes, made without torch."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from cswap_deploy.records.engine import OnnxArtifact, TensorSpec

SHAPE = (3, 16, 16)
CLASSES = 5


def small_onnx(
    seed: int = 0, *, shape: tuple[int, int, int] = SHAPE, width: int = 8, last: str = ""
) -> bytes:
    """A serialised model, ``input`` (batch, *shape) -> ``logits`` (batch, 5); random weights.

    Height and width are multiples of 8; ``last`` is an operator at the end, as ``Softmax``.
    """
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(seed)
    weights = {
        "stem.weight": rng.normal(size=(width, shape[0], 3, 3)),
        "blocks.0.attn.weight": rng.normal(size=(CLASSES, width * shape[1] * shape[2] // 64)) / 2,
        "blocks.0.attn.bias": rng.normal(size=(CLASSES,)),
    }
    node = helper.make_node
    graph = helper.make_graph(
        [
            node("Conv", ["input", "stem.weight"], ["a"], name="stem/Conv", pads=[1, 1, 1, 1]),
            node("Relu", ["a"], ["b"], name="stem/Relu"),
            node(
                "AveragePool", ["b"], ["c"], name="pool/AveragePool", kernel_shape=[8, 8],
                strides=[8, 8],
            ),
            node("Flatten", ["c"], ["d"], name="Flatten"),
            node(
                "Gemm", ["d", "blocks.0.attn.weight", "blocks.0.attn.bias"],
                ["scores" if last else "logits"],
                name="blocks.0.attn/Gemm", transB=1,
            ),
            *([node(last, ["scores"], ["logits"], name=last)] if last else []),
        ],
        "small",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", *shape])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])],
        [numpy_helper.from_array(value.astype(np.float32), k) for k, value in weights.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    content: bytes = model.SerializeToString()
    return content


def write_small_onnx(path: Path) -> OnnxArtifact:
    """The same as a file, described."""
    content = small_onnx()
    path.write_bytes(content)
    return OnnxArtifact(
        path=path, sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content),
        opset=18, nodes=5,
        inputs=(TensorSpec(name="input", dtype="float32", shape=("batch", *SHAPE)),),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=("batch", CLASSES)),),
    )  # fmt: skip
