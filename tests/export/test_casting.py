from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from cswap_deploy.errors import ExportError
from cswap_deploy.export.casting import cast_graph, round_graph
from cswap_deploy.export.ranges import too_large
from cswap_deploy.runtime.onnx_session import OnnxSession

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
make, value = onnx.helper.make_node, onnx.helper.make_tensor_value_info
FLOAT, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
RNG = np.random.default_rng(0)
WEIGHTS = {
    "w1": RNG.normal(size=(6, 5)).astype(np.float32),
    "w2": RNG.normal(size=(5, 3)).astype(np.float32),
    "g": np.ones(5, dtype=np.float32),
}
NODES = [
    make("MatMul", ["input", "w1"], ["a"], name="one/MatMul"),
    make("LayerNormalization", ["a", "g"], ["b"], name="norm/LayerNormalization", axis=-1),
    make("Shape", ["b"], ["s"], name="Shape"),
    make("ConstantOfShape", ["s"], ["zeros"], name="ConstantOfShape"),
    make("Add", ["b", "zeros"], ["c"], name="Add"),
    make("MatMul", ["c", "w2"], ["logits"], name="two/MatMul"),
]


def model(
    nodes: list[onnx.NodeProto] = NODES, weights: dict[str, np.ndarray] = WEIGHTS, opset: int = 18
) -> ir.Model:
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [value("input", FLOAT, ["batch", 6])],
        [value("logits", FLOAT, ["batch", 3])],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    made = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10
    )
    return ir.from_proto(onnx.shape_inference.infer_shapes(made, strict_mode=True))


def run(narrowed: ir.Model, images: np.ndarray) -> np.ndarray:
    proto = ir.to_proto(narrowed)
    onnx.checker.check_model(proto, full_check=True)
    return OnnxSession(proto.SerializeToString(), threads=1).run(images)


IMAGES = RNG.normal(size=(7, 6)).astype(np.float32)


def test_every_float_becomes_narrow_and_the_interface_stays() -> None:
    narrow = cast_graph(model(), to=ir.DataType.FLOAT16)
    graph = ir.to_proto(narrow).graph
    assert [v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)] == [FLOAT, FLOAT]
    assert [v.name for v in (*graph.input, *graph.output)] == ["input", "logits"]
    assert {t.data_type for t in graph.initializer} == {HALF}
    assert Counter(n.op_type for n in graph.node)["Cast"] == 2, "one at each end"
    exact, half = run(model(), IMAGES), run(narrow, IMAGES)
    assert 0 < abs(exact - half).max() < 0.02


def test_kept_nodes_compute_in_float32_between_casts() -> None:
    narrow = cast_graph(model(), to=ir.DataType.FLOAT16, keep={"norm/LayerNormalization"})
    types = {str(v.name): v.dtype for node in narrow.graph for v in node.outputs}
    assert types["a"] == ir.DataType.FLOAT16
    assert types["b"] == ir.DataType.FLOAT
    assert narrow.graph.initializers["g"].dtype == ir.DataType.FLOAT
    assert sum(node.op_type == "Cast" for node in narrow.graph) == 4
    run(narrow, IMAGES)


def test_keeping_everything_changes_nothing() -> None:
    kept = cast_graph(model(), to=ir.DataType.FLOAT16, keep={n.name for n in NODES})
    assert (run(kept, IMAGES) == run(model(), IMAGES)).all()


def test_a_weight_that_both_kinds_read_exists_twice() -> None:
    nodes = [
        make("MatMul", ["input", "w"], ["a"], name="a"),
        make("MatMul", ["input", "w"], ["b"], name="b"),
        make("Add", ["a", "b"], ["logits"], name="c"),
    ]
    both = model(nodes, {"w": RNG.normal(size=(6, 3)).astype(np.float32)})
    narrow = cast_graph(both, to=ir.DataType.FLOAT16, keep={"a"})
    assert {v.dtype for v in narrow.graph.initializers.values()} == {
        ir.DataType.FLOAT, ir.DataType.FLOAT16,
    }  # fmt: skip
    run(narrow, IMAGES)


def test_control_flow_is_refused() -> None:
    branch = onnx.helper.make_graph(
        [make("Neg", ["a"], ["n"])], "branch", [], [value("n", FLOAT, ["batch", 3])]
    )
    nodes = [
        make("MatMul", ["input", "w"], ["a"], name="a"),
        make("If", ["flag"], ["logits"], name="choice", then_branch=branch, else_branch=branch),
    ]
    weights = {"w": np.ones((6, 3), dtype=np.float32), "flag": np.array(True)}
    with pytest.raises(ExportError, match=r"choice \(If\) is control flow"):
        cast_graph(model(nodes, weights), to=ir.DataType.FLOAT16)


def test_rounding_stands_in_for_a_cast() -> None:
    """In float16 both can be run: each operator rounds once."""
    cast = run(cast_graph(model(), to=ir.DataType.FLOAT16), IMAGES)
    rounded = run(round_graph(model(), to=ir.DataType.FLOAT16), IMAGES)
    exact = run(model(), IMAGES)
    assert abs(rounded - exact).max() > 0
    assert abs(rounded - cast).max() < abs(exact).max() * 2**-9


def test_bfloat16_is_coarser_and_kept_nodes_are_exact() -> None:
    exact = run(model(), IMAGES)
    coarse = abs(run(round_graph(model(), to=ir.DataType.BFLOAT16), IMAGES) - exact).max()
    half = abs(run(round_graph(model(), to=ir.DataType.FLOAT16), IMAGES) - exact).max()
    assert coarse > 2 * half
    kept = round_graph(model(), to=ir.DataType.BFLOAT16, keep={n.name for n in NODES})
    assert (run(kept, IMAGES) == exact).all()


def test_ranges_name_what_overflows_and_what_touches_it() -> None:
    weights = WEIGHTS | {"w1": WEIGHTS["w1"] * 1e5}
    found = too_large(model(weights=weights), IMAGES, dtype=ir.DataType.FLOAT16)
    assert set(found) == {"one/MatMul", "norm/LayerNormalization"}
    peak = abs(IMAGES @ weights["w1"]).max()
    assert found["one/MatMul"] == pytest.approx(peak, rel=1e-5)
    assert found["norm/LayerNormalization"] == pytest.approx(peak**2, rel=1e-4)
    assert too_large(model(weights=weights), IMAGES, dtype=ir.DataType.BFLOAT16) == {}
    assert too_large(model(), IMAGES, dtype=ir.DataType.FLOAT16) == {}


def test_a_norm_whose_squares_overflow_is_named_though_its_input_does_not() -> None:
    weights = WEIGHTS | {"w1": WEIGHTS["w1"] * 200}
    found = too_large(model(weights=weights), IMAGES, dtype=ir.DataType.FLOAT16)
    assert set(found) == {"norm/LayerNormalization"}


@pytest.mark.parametrize("make_narrow", [cast_graph, round_graph])
def test_no_scale_becomes_zero(make_narrow: Callable[..., ir.Model]) -> None:
    """That of a channel whose weights are near 0; TensorRT refuses it."""
    scales = np.array([1e-9, 0.01, 3e-8], dtype=np.float32)
    weights = WEIGHTS | {"scales": scales, "zeros8": np.zeros(3, dtype=np.int8)}
    weights["w2"] = (RNG.normal(size=(5, 3)) * scales).astype(np.float32)
    pair = [
        make("QuantizeLinear", ["w2", "scales", "zeros8"], ["q"], name="q", axis=1),
        make("DequantizeLinear", ["q", "scales", "zeros8"], ["w"], name="dq", axis=1),
        make("MatMul", ["c", "w"], ["logits"], name="two/MatMul"),
    ]
    narrow = make_narrow(model([*NODES[:-1], *pair], weights, opset=21), to=ir.DataType.FLOAT16)
    assert np.isfinite(run(narrow, IMAGES)).all()
    kept = [v for node in narrow.graph if node.op_type[-6:] == "Linear" for v in [node.inputs[1]]]
    assert len(kept) == 2
    for value in kept:
        array = value.const_value.numpy()
        assert (array > 0).all()
        assert array[1] == np.float16(0.01)
