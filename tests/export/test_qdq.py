"""Q/DQ graphs that somebody else made, on one written by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cswap_deploy.export.qdq import fold_weights, quantised_nodes, without

onnx = pytest.importorskip("onnx")
helper, numpy_helper = onnx.helper, onnx.numpy_helper
ReferenceEvaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator
X = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
W = {
    "a.weight": np.random.default_rng(1).normal(size=(4, 4)).astype(np.float32),
    "b.weight": np.random.default_rng(2).normal(size=(4, 4)).astype(np.float32),
}


def graph() -> Any:
    """Two products of a shared, quantised input, and their sum, which reads a pair for each."""
    nodes = []

    def pair(name: str, scale: str, zero: str, axis: int | None = None) -> str:
        more = {} if axis is None else {"axis": axis}
        for kind, read, made in (
            ("QuantizeLinear", name, f"{name}_q"), ("DequantizeLinear", f"{name}_q", f"{name}_dq"),
        ):  # fmt: skip
            nodes.append(helper.make_node(kind, [read, scale, zero], [made], name=made, **more))
        return f"{name}_dq"

    tensors = {"x_scale": np.float32(0.02), "zero": np.int8(0), "sum_scale": np.float32(0.1)}
    read = pair("input", "x_scale", "zero")
    for letter in "ab":
        weight = W[f"{letter}.weight"]
        tensors[f"{letter}.weight"] = weight
        columns = 0 if letter == "a" else None  # a: one scale for each column; b: one for all
        scale = np.asarray(np.abs(weight).max(columns) / 127, dtype=np.float32)
        tensors[f"{letter}_scale"] = scale
        tensors[f"{letter}_zero"] = np.zeros(scale.shape, dtype=np.int8)
        axis = 1 if letter == "a" else None
        w = pair(f"{letter}.weight", f"{letter}_scale", f"{letter}_zero", axis)
        nodes.append(helper.make_node("MatMul", [read, w], [letter], name=f"{letter}/MatMul"))
    terms = [pair(letter, "sum_scale", "zero") for letter in "ab"]
    nodes.append(helper.make_node("Add", terms, ["logits"], name="Add"))
    given, told = (
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 4])
        for name in ("input", "logits")
    )
    stored = [numpy_helper.from_array(np.asarray(v), k) for k, v in tensors.items()]
    made = helper.make_graph(nodes, "g", [given], [told], stored)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def answers(model: Any) -> np.ndarray:
    onnx.checker.check_model(model, full_check=True)
    (found,) = ReferenceEvaluator(model).run(None, {"input": X})
    return found


def kinds(model: Any) -> list[str]:
    return [node.op_type for node in model.graph.node]


def test_the_nodes_that_read_pairs() -> None:
    assert quantised_nodes(graph()) == ("a/MatMul", "b/MatMul", "Add")


def test_folded_weights_give_the_same_answers() -> None:
    folded = fold_weights(graph())
    np.testing.assert_array_equal(answers(folded), answers(graph()))
    stored = {t.name: numpy_helper.to_array(t) for t in folded.graph.initializer}
    assert "a.weight" not in stored
    assert {name: v.dtype for name, v in stored.items() if name.endswith("_q")} == {
        "a.weight_q": np.int8, "b.weight_q": np.int8,
    }  # fmt: skip
    assert kinds(folded).count("QuantizeLinear") == 3, "of activations"


def test_without_everything_it_is_the_float_graph() -> None:
    wide = without(graph(), quantised_nodes(graph()))
    np.testing.assert_allclose(answers(wide), X @ W["a.weight"] + X @ W["b.weight"], rtol=1e-5)
    assert kinds(wide) == ["MatMul", "MatMul", "Add"]
    assert {t.name for t in wide.graph.initializer} == set(W), "scales that nobody reads go too"


@pytest.mark.parametrize("left", ["a/MatMul", "Add"])
def test_without_one_node_the_others_stay_quantised(left: str) -> None:
    model = graph()
    part = without(model, [left])
    assert quantised_nodes(part) == tuple(n for n in quantised_nodes(graph()) if n != left)

    def rounded(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return np.clip(np.rint(values / scale), -128, 127) * scale

    x, a, b = (
        rounded(X, np.float32(0.02)),
        rounded(W["a.weight"], np.abs(W["a.weight"]).max(0) / 127),
        rounded(W["b.weight"], np.abs(W["b.weight"]).max() / 127),
    )
    if left == "Add":
        expected = x @ a + x @ b
    else:
        expected = rounded(X @ W["a.weight"], np.float32(0.1)) + rounded(x @ b, np.float32(0.1))
    np.testing.assert_allclose(answers(part), expected, atol=1e-4)
    assert kinds(model) == kinds(graph()), "the model given is left alone"
