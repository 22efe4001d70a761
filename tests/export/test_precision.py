"""Number formats of a real network on real images: the embedded demo ViT on Fashion-MNIST."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cswap_deploy.config import ExportConfig, ModelConfig
from cswap_deploy.errors import ExportError, GateError, MissingDependencyError, UsageError
from cswap_deploy.export.comparison import Comparison, compare, same_predictions
from cswap_deploy.export.onnx import describe_onnx, export_onnx
from cswap_deploy.export.precision import ROUNDED, make_quantiser, narrow
from cswap_deploy.export.qdq import quantised_nodes
from cswap_deploy.export.quantize import quantisable
from cswap_deploy.export.simplify import simplify_onnx
from cswap_deploy.models.demos import IMAGES
from cswap_deploy.models.load import load_model
from cswap_deploy.records.engine import OnnxArtifact
from cswap_deploy.records.measurements import PrecisionResult
from cswap_deploy.runtime.onnx_session import OnnxSession
from cswap_deploy.runtime.preprocess import normalise

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxsim")
array, tensor = onnx.numpy_helper.to_array, onnx.numpy_helper.from_array


@dataclass(frozen=True)
class Demo:
    graph: OnnxArtifact
    images: np.ndarray
    labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray

    def narrow(
        self, path: Path, graph: OnnxArtifact | None = None, **settings: Any
    ) -> tuple[OnnxArtifact, PrecisionResult]:
        config = ExportConfig(**settings)
        if config.int8 and config.int8_calibration == "auto":
            config = config.model_copy(update={"int8_calibration": "minmax"})
        record = narrow(
            graph or self.graph, config=config, images=self.images, labels=self.labels, path=path
        )
        assert record.model.path == Path(path.name)
        return record.model.model_copy(update={"path": path}), record.result

    def top1(self, graph: Path | bytes) -> float:
        return float((run(graph, self.test_images).argmax(1) == self.test_labels).mean())


def run(graph: Path | bytes, images: np.ndarray) -> np.ndarray:
    return OnnxSession(graph, threads=1).run(images)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    folder = tmp_path_factory.mktemp("vit")
    loaded = load_model(ModelConfig(model="demo-vit"))
    size = loaded.spec.preprocessing.input_size
    exported = export_onnx(loaded.module, input_size=size, path=folder / "e.onnx")
    graph = simplify_onnx(exported, path=folder / "model.onnx")
    arrays = []
    for name, count in (("calibration", 64), ("validation", 500)):
        kept = np.load(IMAGES[name])
        arrays += [normalise(kept["images"][:count], loaded.spec.preprocessing)]
        arrays += [kept["labels"][:count].astype(np.int64)]
    return Demo(graph, *arrays)


def planted(demo: Demo, path: Path, change: Callable[[onnx.GraphProto], None]) -> OnnxArtifact:
    """The demo's graph with something in it that a narrow type cannot do, equal in float32."""
    model = onnx.load(demo.graph.path)
    change(model.graph)
    onnx.save(model, path)
    before, after = (run(p, demo.test_images[:50]) for p in (demo.graph.path, path))
    assert abs(before - after).max() < 0.02, "the plant must not change the float32 network"
    return describe_onnx(path)


def scale(graph: onnx.GraphProto, name: str, factor: np.ndarray | float) -> None:
    for initializer in graph.initializer:
        if initializer.name == name:
            initializer.CopyFrom(tensor((array(initializer) * factor).astype(np.float32), name))
            return
    raise KeyError(name)


def node(graph: onnx.GraphProto, name: str) -> onnx.NodeProto:
    return next(n for n in graph.node if n.name == name)


def one_layer(path: Path) -> OnnxArtifact:
    """Seven of eight inputs, as they are."""
    value, node = onnx.helper.make_tensor_value_info, onnx.helper.make_node
    graph = onnx.helper.make_graph(
        [
            node("Flatten", ["input"], ["x"], name="Flatten"),
            node("MatMul", ["x", "w"], ["logits"], name="head/MatMul"),
        ],
        "one layer",
        [value("input", onnx.TensorProto.FLOAT, ["batch", 8, 1, 1])],
        [value("logits", onnx.TensorProto.FLOAT, ["batch", 7])],
        [tensor(np.eye(8, dtype=np.float32)[:, 1:], "w")],
    )
    opsets = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return describe_onnx(path)


# --- 16 bits -------------------------------------------------------------------------------------


def test_fp16_predicts_as_float32_with_nothing_kept(demo: Demo, tmp_path: Path) -> None:
    made, result = demo.narrow(tmp_path / "half.onnx", precision="fp16")
    assert (made.precision, result.precision, result.kept) == ("fp16", "fp16", ())
    assert made.path == tmp_path / "half.onnx"
    assert made.size_bytes < 0.55 * demo.graph.size_bytes
    assert (made.inputs, made.outputs) == (demo.graph.inputs, demo.graph.outputs)
    assert result.agreement > 0.98
    assert abs(demo.top1(made.path) - demo.top1(demo.graph.path)) <= 0.001
    again, _ = demo.narrow(tmp_path / "again.onnx", precision="fp16")
    assert again.sha256 == made.sha256
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.onnx", "half.onnx", ROUNDED]


def test_a_planted_overflow_is_found_and_kept_in_float32(demo: Demo, tmp_path: Path) -> None:
    """Values of one block's attention are a million times larger, its projection a millionth."""

    def overflow(graph: onnx.GraphProto) -> None:
        qkv, proj = (node(graph, f"blocks.2.attn.{n}/Gemm") for n in ("qkv", "proj"))
        width = array(next(i for i in graph.initializer if i.name == qkv.input[1])).shape[1]
        factor = np.ones(width, dtype=np.float32)
        factor[2 * width // 3 :] = 1e6
        scale(graph, qkv.input[1], factor)
        scale(graph, qkv.input[2], factor)
        scale(graph, proj.input[1], 1e-6)

    graph = planted(demo, tmp_path / "planted.onnx", overflow)
    made, result = demo.narrow(
        tmp_path / "half.onnx", graph, precision="fp16"
    )  # fmt: skip
    kept = {layer.node for layer in result.kept}
    assert {"blocks.2.attn.qkv/Gemm", "blocks.2.attn/MatMul_1", "blocks.2.attn.proj/Gemm"} <= kept
    assert all(name.startswith("blocks.2.attn") for name in kept)
    assert len(kept) < 20 < result.layers
    assert {layer.reason for layer in result.kept} == {"range"}
    assert all(layer.value > 65504 / 2 for layer in result.kept if layer.value is not None)
    assert result.agreement > 0.98
    logits = run(made.path, demo.test_images)
    assert np.isfinite(logits).all()
    assert abs(demo.top1(made.path) - demo.top1(graph.path)) <= 0.001


def test_what_loses_accuracy_without_overflow_is_found_by_search(
    demo: Demo, tmp_path: Path
) -> None:
    """A large number is added and taken away again: all in range, but float16 forgets the rest."""

    def cancel(graph: onnx.GraphProto) -> None:
        norm = node(graph, "blocks.0.norm1/LayerNormalization")
        graph.initializer.append(tensor(np.array(3e4, dtype=np.float32), "large"))
        after = norm.output[0]
        norm.output[0] = "plain"
        index = list(graph.node).index(norm)
        for k, (kind, read, made) in enumerate((("Add", "plain", "high"), ("Sub", "high", after))):
            inserted = onnx.helper.make_node(kind, [read, "large"], [made], name=f"planted/{kind}")
            graph.node.insert(index + 1 + k, inserted)

    graph = planted(demo, tmp_path / "planted.onnx", cancel)
    made, result = demo.narrow(
        tmp_path / "half.onnx", graph, precision="fp16"
    )  # fmt: skip
    assert {layer.node for layer in result.kept} == {"planted/Add", "planted/Sub"}
    assert {layer.reason for layer in result.kept} == {"accuracy"}
    assert all(layer.value is not None for layer in result.kept)
    assert not result.tried[0].passes
    assert result.tried[-1].passes
    assert abs(demo.top1(made.path) - demo.top1(graph.path)) <= 0.002


def test_layers_that_the_user_names_stay(demo: Demo, tmp_path: Path) -> None:
    made, result = demo.narrow(
        tmp_path / "half.onnx", precision="fp16", keep_fp32=("*/LayerNormalization", "head")
    )  # fmt: skip
    assert {layer.operator for layer in result.kept} == {"LayerNormalization", "Gemm"}
    assert {layer.reason for layer in result.kept} == {"asked"}
    graph = onnx.load(made.path).graph
    types = {i.name: i.data_type for i in graph.initializer}
    norm = node(graph, "blocks.0.norm1/LayerNormalization")
    assert types[norm.input[1]] == onnx.TensorProto.FLOAT
    with pytest.raises(UsageError, match=r"--keep-fp32 'block/\*' matches none of the graph's"):
        demo.narrow(tmp_path / "x.onnx", precision="fp16", keep_fp32=("block/*",))


def test_bf16_is_judged_by_rounding(demo: Demo, tmp_path: Path) -> None:
    model = onnx.version_converter.convert_version(onnx.load(demo.graph.path), 22)
    onnx.save(model, tmp_path / "opset22.onnx")
    graph = describe_onnx(tmp_path / "opset22.onnx")
    made, result = demo.narrow(
        tmp_path / "bf16.onnx", graph, precision="bf16"
    )  # fmt: skip
    assert (made.precision, made.opset, result.emulated) == ("bf16", 22, True)
    types = {i.data_type for i in onnx.load(made.path).graph.initializer}
    assert onnx.TensorProto.BFLOAT16 in types
    assert onnx.TensorProto.FLOAT not in types
    assert result.agreement > 0.97
    assert abs(demo.top1(tmp_path / ROUNDED) - demo.top1(graph.path)) <= 0.005


# --- int8 ----------------------------------------------------------------------------------------


needs_modelopt = pytest.mark.skipif(
    not os.environ.get("CSWAP_MODELOPT"), reason="CSWAP_MODELOPT is not set"
)
every_quantizer = pytest.mark.parametrize(
    "quantizer", ["onnxruntime", pytest.param("modelopt", marks=needs_modelopt)]
)


@every_quantizer
def test_int8_is_as_tensorrt_wants_it_and_within_a_point(
    demo: Demo, tmp_path: Path, quantizer: str
) -> None:
    made, result = demo.narrow(
        tmp_path / "int8.onnx", precision="int8", int8_quantizer=quantizer
    )  # fmt: skip
    graph = onnx.load(made.path).graph
    kinds = [n.op_type for n in graph.node]
    assert kinds.count("QuantizeLinear") > 10
    assert len(quantisable(demo.graph.path)) == 26
    assert result.layers == 26 if quantizer == "onnxruntime" else result.layers > 26
    assert f", {quantizer}" in result.calibration
    initial = {i.name: array(i) for i in graph.initializer}
    for one in graph.node:
        if one.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = initial[one.input[2]]
            assert zero.dtype == np.int8, "int32 biases are refused by TensorRT's parser"
            assert (zero == 0).all(), "TensorRT wants symmetric ranges"
    quantised = [v for v in initial.values() if v.dtype == np.int8 and v.ndim == 2]
    assert quantised
    scales = [initial[n.input[1]] for n in graph.node if n.op_type == "DequantizeLinear"]
    assert any(s.ndim == 1 and len(s) > 1 for s in scales), "weights have a scale a channel"
    assert abs(demo.top1(made.path) - demo.top1(demo.graph.path)) <= 0.01
    assert made.size_bytes < 0.35 * demo.graph.size_bytes


@pytest.mark.parametrize("method", ["entropy", "percentile"])
def test_each_way_of_finding_ranges(tmp_path: Path, method: str) -> None:
    images = np.random.default_rng(0).normal(size=(200, 8, 1, 1)).astype(np.float32)
    graph = one_layer(tmp_path / "model.onnx")
    quantiser = make_quantiser("onnxruntime", graph.path, images[:100], (), tmp_path)
    quantiser.calibrate(method)
    quantised = quantiser.quantised(method, ())
    names = {f"{method}.json", "model.onnx", "quantised.onnx"}
    assert {p.name for p in tmp_path.iterdir()} == names
    kinds = [n.op_type for n in onnx.load_from_string(quantised).graph.node]
    assert "QuantizeLinear" in kinds
    before, after = (run(g, images).argmax(1) for g in (graph.path, quantised))
    assert (before == after).mean() > 0.95


def test_the_layer_that_int8_ruins_is_left_out(demo: Demo, tmp_path: Path) -> None:
    """One channel a thousand times larger takes the whole range of its layer's input."""

    def outlier(graph: onnx.GraphProto) -> None:
        norm, head = node(graph, "fc_norm/LayerNormalization"), node(graph, "head/Gemm")
        turned = next((a.i for a in head.attribute if a.name == "transB"), 0)
        factor = np.ones(128, dtype=np.float32)
        factor[:4] = 1000
        for name in norm.input[1:]:
            scale(graph, name, factor)
        scale(graph, head.input[1], 1 / (factor if turned else factor[:, None]))

    graph = planted(demo, tmp_path / "planted.onnx", outlier)
    rest = tuple(f"blocks.{k}" for k in range(5))  # a search among fewer takes less time
    made, result = demo.narrow(tmp_path / "int8.onnx", graph, precision="int8", keep_fp32=rest)
    kept = [layer for layer in result.kept if layer.reason != "asked"]
    assert [layer.node for layer in kept] == ["head/Gemm"]
    assert kept[0].reason == "accuracy"
    assert abs(demo.top1(made.path) - demo.top1(graph.path)) <= 0.01


@every_quantizer
def test_mixed_is_int8_within_float16(demo: Demo, tmp_path: Path, quantizer: str) -> None:
    model = onnx.version_converter.convert_version(onnx.load(demo.graph.path), 21)
    onnx.save(model, tmp_path / "opset21.onnx")
    made, result = demo.narrow(
        tmp_path / "mixed.onnx", describe_onnx(tmp_path / "opset21.onnx"), precision="mixed",
        int8_quantizer=quantizer,
    )  # fmt: skip
    assert (made.precision, result.kept) == ("mixed", ())
    types = {i.data_type for i in onnx.load(made.path).graph.initializer}
    assert {onnx.TensorProto.INT8, onnx.TensorProto.FLOAT16} <= types
    assert onnx.TensorProto.FLOAT not in types
    assert abs(demo.top1(made.path) - demo.top1(demo.graph.path)) <= 0.01


@needs_modelopt
def test_layers_are_taken_out_of_modelopts_graph(demo: Demo, tmp_path: Path) -> None:
    quantiser = make_quantiser(
        "modelopt", demo.graph.path, demo.images[:32], {"blocks.0.mlp.fc1/Gemm"}, tmp_path
    )
    quantiser.calibrate("minmax")
    assert "blocks.0.mlp.fc1/Gemm" not in quantiser.layers
    assert "blocks.2.mlp.fc1/Gemm" in quantiser.layers
    all_but_two = onnx.load_from_string(quantiser.quantised("minmax", {"blocks.2.mlp.fc1/Gemm"}))
    out = {"blocks.0.mlp.fc1/Gemm", "blocks.2.mlp.fc1/Gemm"}
    assert set(quantised_nodes(all_but_two)) == set(quantiser.layers) - out
    nothing = quantiser.quantised("minmax", quantiser.layers)
    wide = run(demo.graph.path, demo.test_images[:50])
    np.testing.assert_allclose(run(nothing, demo.test_images[:50]), wide, atol=1e-4)


def test_modelopt_that_is_not_there_or_fails(
    demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(**more: Any) -> None:
        demo.narrow(tmp_path / "x.onnx", precision="int8", int8_quantizer="modelopt", **more)

    monkeypatch.setenv("CSWAP_MODELOPT", sys.executable)
    with pytest.raises(MissingDependencyError) as caught:
        ask()
    told, fix = str(caught.value).splitlines()
    assert told == f"nvidia-modelopt is not installed, for {sys.executable}"
    assert fix.startswith("  fix: python -m venv modelopt && ")
    assert caught.value.exit_code == 4
    monkeypatch.setenv("CSWAP_MODELOPT", str(tmp_path / "gone"))
    with pytest.raises(MissingDependencyError, match=r"gone, which does not run: No such file"):
        ask()
    stand_in = tmp_path / "python"
    stand_in.write_text(
        "#!/bin/sh\n[ $1 = -c ] && echo 0.47.0 || { echo out of luck >&2; exit 1; }\n"
    )
    stand_in.chmod(0o755)
    monkeypatch.setenv("CSWAP_MODELOPT", str(stand_in))
    with pytest.raises(ExportError, match=r"modelopt 0\.47\.0 does not quantise .*: out of luck"):
        ask(int8_calibration="minmax")
    assert not (tmp_path / "x.onnx").exists()


def test_nothing_left_to_quantise_is_refused(demo: Demo, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"no layer of model\.onnx is left to quantise"):
        demo.narrow(tmp_path / "int8.onnx", precision="int8", keep_fp32=("*",))


@pytest.mark.parametrize(
    ("lost", "flips", "finite", "good"),
    [(1, 3, True, True), (2, 3, True, False), (-9, 3, True, True), (1, 4, True, False),
     (0, 0, False, False)],
)  # fmt: skip
def test_what_counts_as_the_same_predictions(
    lost: int, flips: int, finite: bool, good: bool
) -> None:
    """Of 100 images at .01: one may be lost, three may change."""
    found = Comparison(finite=finite, kl=0.0, agreement=1 - flips / 100, lost=lost)
    assert same_predictions(found, images=100, drop_limit=0.01) == good


def test_a_constant_node_is_cast_like_a_weight(demo: Demo, tmp_path: Path) -> None:
    def constant(graph: onnx.GraphProto) -> None:
        head = node(graph, "head/Gemm")
        head.output[0] = "plain"
        nothing = tensor(np.zeros(10, dtype=np.float32), "nothing")
        for kind, read, made, more in (
            ("Constant", [], "nothing", {"value": nothing}),
            ("Add", ["plain", "nothing"], "logits", {}),
        ):
            name = f"planted/{kind}"
            graph.node.append(onnx.helper.make_node(kind, read, [made], name=name, **more))

    graph = planted(demo, tmp_path / "planted.onnx", constant)
    made, result = demo.narrow(tmp_path / "half.onnx", graph, precision="fp16")
    assert result.kept == ()
    onnx.checker.check_model(onnx.load(made.path), full_check=True)


def test_when_nothing_helps_the_gate_fails(tmp_path: Path) -> None:
    """The only layer cannot be left out, and one large input takes its whole int8 range."""
    graph = one_layer(tmp_path / "model.onnx")
    images = np.random.default_rng(0).normal(size=(64, 8, 1, 1)).astype(np.float32)
    images[:, 0] *= 1e4
    labels = images[:, 1:, 0, 0].argmax(1)
    with pytest.raises(GateError, match="int8: even with every layer kept") as caught:
        narrow(
            graph, images=images, labels=labels,
            config=ExportConfig(precision="int8", int8_calibration="minmax"),
            path=tmp_path / "int8.onnx",
        )  # fmt: skip
    assert caught.value.exit_code == 3
    assert not (tmp_path / "int8.onnx").exists()


# --- the comparison, by hand ---------------------------------------------------------------------


def test_a_judgement_worked_by_hand() -> None:
    labels = np.array([0, 1, 1])
    before = np.log(np.array([[0.5, 0.5 - 1e-9], [0.25, 0.75], [0.75, 0.25]], dtype=np.float64))
    after = np.log(np.array([[0.25, 0.75], [0.25, 0.75], [0.25, 0.75]], dtype=np.float64))
    found = compare(before, after, labels)
    expected = (
        0.5 * np.log(2) + 0.5 * np.log(0.5 / 0.75)
        + 0.75 * np.log(3) + 0.25 * np.log(1 / 3)
    ) / 3  # fmt: skip
    assert found.kl == pytest.approx(expected, abs=1e-6)
    assert found.agreement == pytest.approx(1 / 3)
    assert found.lost == 0, "the first was right and is wrong now, the third the other way round"
    broken = compare(before, np.full_like(after, np.nan), labels)
    assert (broken.finite, broken.agreement) == (False, 0.0)
