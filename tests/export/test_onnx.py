from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import small_tasks
import torch
import torch.nn.functional as F
from timm_graphs import Exported, randomise_norms
from torch import Tensor, nn

from cswap_deploy.errors import ArtifactError, ExportError
from cswap_deploy.export.onnx import batch_norm_notes, describe_onnx, export_onnx
from cswap_deploy.export.simplify import simplify_onnx
from cswap_deploy.measure.parity import Run, parity
from cswap_deploy.records.engine import TensorSpec
from cswap_deploy.records.value import sha256_file

onnx = pytest.importorskip("onnx")


class TinyCnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn(self.conv(x)))
        return self.head(y.mean(dim=(2, 3)))


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) if x.sum() > 0 else -x.flatten(1)


class NoOnnxOperator(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x.flatten(1))


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, -1)[:, :3]


class TwoOutputs(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.flatten(1), x


def torch_run(module: nn.Module) -> Run:
    def run(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return module(torch.from_numpy(images)).numpy()

    return run


def onnx_run(path: Path) -> Run:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"input": images})[0]


def test_tiny_cnn_has_the_promised_interface_and_the_same_outputs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    module = TinyCnn()
    randomise_norms(module)
    artifact = export_onnx(module, input_size=(3, 16, 16), path=tmp_path / "model.onnx")
    assert capfd.readouterr() == ("", "")
    assert logging.root.manager.disable == logging.NOTSET
    assert artifact.opset == 18
    assert artifact.precision == "fp32"
    assert artifact.inputs == (
        TensorSpec(name="input", dtype="float32", shape=("batch", 3, 16, 16)),
    )
    assert artifact.outputs == (TensorSpec(name="logits", dtype="float32", shape=("batch", 4)),)
    assert artifact.sha256 == sha256_file(artifact.path)
    assert artifact.size_bytes == artifact.path.stat().st_size
    assert artifact.notes == ()
    assert list(tmp_path.iterdir()) == [artifact.path], "weights stay inside the file"
    images = np.random.default_rng(0).normal(size=(9, 3, 16, 16)).astype(np.float32)
    result = parity(
        torch_run(module), onnx_run(artifact.path), images, reference_name="torch",
        candidate_name="onnx", tolerance=1e-5,
    )  # fmt: skip
    assert result.ok, result
    again = export_onnx(module, input_size=(3, 16, 16), path=tmp_path / "again.onnx")
    assert again.sha256 == artifact.sha256
    assert b"site-packages" not in artifact.path.read_bytes()
    assert b"stack_trace" not in artifact.path.read_bytes()


class Attention(nn.Module):
    """Over 64 places of 16 values, in parts of a shape."""

    def __init__(self, shape: tuple[int, ...], mask: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 48, 4, 4)
        self.head = nn.Linear(16, 4)
        self.shape = shape
        self.mask = nn.Parameter(torch.randn(mask)) if mask else None

    def forward(self, x: Tensor) -> Tensor:
        found = self.stem(x).flatten(2).mT
        q, k, v = (t.reshape(len(t), *self.shape) for t in found.chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, key=k, value=v, attn_mask=self.mask, scale=0.7)
        return self.head(y.transpose(1, -2).reshape(len(y), 64, 16).mean(1))


@pytest.mark.parametrize(
    ("shape", "mask"),
    [
        ((64, 16), ()),
        ((64, 16), (64, 64)),
        ((64, 16), (1, 64, 64)),
        ((4, 64, 4), (4, 64, 64)),
        ((4, 4, 16, 4), ()),
        ((4, 4, 16, 4), (4, 1, 16, 16)),
        ((2, 2, 4, 16, 4), (2, 4, 16, 16)),
    ],
    ids=str,
)
def test_attention_of_any_number_of_dimensions(
    shape: tuple[int, ...], mask: tuple[int, ...], tmp_path: Path
) -> None:
    module = Attention(shape, mask).eval()
    path = tmp_path / "model.onnx"
    export_onnx(module, input_size=(3, 32, 32), path=path)
    images = np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)
    np.testing.assert_allclose(
        onnx_run(path)(images), torch_run(module)(images), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("name", "opset"), [("test_efficientnet", 18), ("vit_tiny_patch16_224", 22)]
)
def test_timm_networks_keep_their_outputs_and_fold_their_norms(
    exported: Callable[[str], Exported], name: str, opset: int
) -> None:
    module, artifact = exported(name).module, exported(name).graph
    assert artifact.opset == opset
    graph = onnx.load(artifact.path).graph
    assert "BatchNormalization" not in {node.op_type for node in graph.node}
    images = np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)
    result = parity(
        torch_run(module), onnx_run(artifact.path), images, reference_name="torch",
        candidate_name="onnx", tolerance=1e-4, batches=(1, 3),
    )  # fmt: skip
    assert result.ok, result


def test_opset_that_is_not_honoured_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    with pytest.raises(ExportError, match=r"exported TinyCnn .* at opset 18, not at 9") as caught:
        export_onnx(TinyCnn(), input_size=(3, 8, 8), path=path, opset=9)
    assert str(caught.value).endswith("fix: --opset 18")
    assert not path.exists()


def test_errors_carry_torchs_words(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ExportError) as caught:
        export_onnx(NoOnnxOperator(), input_size=(3, 2, 2), path=tmp_path / "a.onnx")
    text = str(caught.value)
    assert text.startswith(
        f"torch {torch.__version__} does not export NoOnnxOperator on input 3x2x2"
    )
    assert "No ONNX function found for <OpOverload(op='prims.bessel_j0'" in text
    assert "\x1b" not in text
    assert any("Exception summary" in line for line in caught.value.log)

    with pytest.raises(ExportError, match="Could not guard on data-dependent expression"):
        export_onnx(Branches(), input_size=(3, 2, 2), path=tmp_path / "b.onnx")
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")
    assert logging.root.manager.disable == logging.NOTSET


def test_fixed_batch_and_second_output_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"FixedBatch .* fixes the batch size.*\(2, 3\)"
    ) as caught:
        export_onnx(FixedBatch(), input_size=(3, 2, 2), path=tmp_path / "a.onnx")
    assert "fix: take the batch from x.shape[0]" in str(caught.value)
    with pytest.raises(ExportError, match=r"TwoOutputs .* is not a classifier of one"):
        export_onnx(TwoOutputs(), input_size=(3, 2, 2), path=tmp_path / "b.onnx")


def test_weights_above_two_gib_are_refused_before_the_export(tmp_path: Path) -> None:
    with torch.device("meta"):
        module = nn.Linear(2**15, 2**15)
    with pytest.raises(ExportError, match=r"has 4\.0 GiB of weights; .* less than 2 GiB"):
        export_onnx(module, input_size=(1, 1, 1), path=tmp_path / "a.onnx")


def save_conv_and_norm(path: Path, *, extra_reader: bool) -> Path:
    make = onnx.helper.make_node
    nodes = [
        make("Conv", ["x", "w"], ["y"]),
        make("BatchNormalization", ["y", "s", "b", "m", "v"], ["z"]),
    ]
    if extra_reader:
        nodes.append(make("Relu", ["y"], ["r"]))
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [])), path)
    return path


def test_left_over_batch_norms_are_counted(tmp_path: Path) -> None:
    assert batch_norm_notes(save_conv_and_norm(tmp_path / "a.onnx", extra_reader=False)) == (
        "1 BatchNorm nodes directly after a convolution were not folded into it",
    )
    assert batch_norm_notes(save_conv_and_norm(tmp_path / "b.onnx", extra_reader=True)) == ()


def small_model() -> onnx.ModelProto:
    value = onnx.helper.make_tensor_value_info
    weight = onnx.numpy_helper.from_array(np.ones((2, 2), dtype=np.float32), "w")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [value("x", onnx.TensorProto.FLOAT, ["n", 2])],
        [value("y", onnx.TensorProto.FLOAT, [None, 2])],
        [weight],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])


def test_describe_reads_a_foreign_graph(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(small_model(), path)
    artifact = describe_onnx(path)
    assert (artifact.opset, artifact.nodes) == (18, 1)
    assert artifact.inputs[0].shape == ("n", 2)
    assert artifact.outputs[0].shape == ("?", 2)


def test_describe_tells_the_precision(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    model = small_model()
    half = onnx.numpy_helper.from_array(np.ones((2, 2), dtype=np.float16), "w")
    model.graph.initializer[0].CopyFrom(half)
    onnx.save(model, path)
    assert describe_onnx(path).precision == "fp16"


def test_describe_refuses_what_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    with pytest.raises(ArtifactError, match=r"cannot read .*m\.onnx: No such file or directory"):
        describe_onnx(path)

    onnx.save(small_model(), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ArtifactError, match=r"m\.onnx is not an ONNX file, or is damaged"):
        describe_onnx(path)

    path.write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"m\.onnx is not valid ONNX"):
        describe_onnx(path)

    model = small_model()
    model.graph.node[0].op_type = "Wobble"
    onnx.save(model, path)
    with pytest.raises(
        ArtifactError, match=r"m\.onnx is not valid ONNX: No Op registered for Wobble"
    ):
        describe_onnx(path)


def test_describe_refuses_weights_in_other_files(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(small_model(), path, save_as_external_data=True, size_threshold=0)
    with pytest.raises(ArtifactError, match=r"keeps 1 of its 1 weight tensors in other files"):
        describe_onnx(path)


def test_outputs_keep_their_names_whatever_else_is_called_so(tmp_path: Path) -> None:
    import onnxruntime

    module, path = small_tasks.twice(), tmp_path / "model.onnx"
    names = ("linear", "again", "stem.weight")
    artifact = export_onnx(module, input_size=(3, 16, 16), path=path, outputs=names)
    assert tuple(t.name for t in artifact.outputs) == names
    simple = simplify_onnx(artifact, path=tmp_path / "simple.onnx")
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        expected = module(x)
    for graph in (artifact.path, simple.path):
        session = onnxruntime.InferenceSession(graph)
        found = session.run(list(names), {"input": x.numpy()})
        for name, value in zip(names, found, strict=True):
            np.testing.assert_allclose(value, expected[name].numpy(), rtol=1e-4, atol=1e-5)
