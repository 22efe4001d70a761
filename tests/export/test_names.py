from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from cswap_deploy.export.names import is_meant, module_of, name_nodes, node_names
from cswap_deploy.export.onnx import export_onnx
from cswap_deploy.export.simplify import simplify_onnx
from cswap_deploy.models.torchvision_shim import import_timm

pytest.importorskip("onnxsim")


def exported(network: nn.Module, size: tuple[int, int, int], folder: Path) -> list[str]:
    graph = export_onnx(network, input_size=size, path=folder / "exported.onnx")
    simple = simplify_onnx(graph, path=folder / "simple.onnx")
    return list(node_names(simple.path))


def test_a_folded_norm_leaves_the_convolutions_name(tmp_path: Path) -> None:
    network = nn.Sequential()
    network.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    network.pool = nn.AdaptiveAvgPool2d(1)
    network.flat = nn.Flatten()
    network.head = nn.Linear(4, 2)
    names = exported(network, (3, 8, 8), tmp_path)
    assert "stem.0/Conv" in names
    assert "stem.2/Relu" in names
    assert "head/Gemm" in names
    assert len(set(names)) == len(names)


def test_a_vits_nodes_carry_their_modules(tmp_path: Path) -> None:
    """Of onnxsim's fused nodes too, which it names anew."""
    vit = import_timm().create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5, pretrained=False
    )
    names = exported(vit, (3, 32, 32), tmp_path)
    for wanted in (
        "patch_embed.proj/Conv", "blocks.0.norm1/LayerNormalization", "blocks.1.attn/Softmax",
        "blocks.1.attn.qkv/MatMul", "blocks.1.mlp.fc2/MatMul", "blocks.0/Add", "head/Gemm",
    ):  # fmt: skip
        assert wanted in names
    modules = {name for name, _ in vit.named_modules()}
    assert {module_of(name) for name in names} <= modules


def test_nodes_without_a_record_are_named_after_their_readers() -> None:
    def node(kind: str, inputs: list[str], output: str) -> SimpleNamespace:
        return SimpleNamespace(op_type=kind, input=inputs, output=[output], name="")

    nodes = [
        node("Shape", ["x"], "a"),
        node("Reshape", ["x", "a"], "b"),
        node("Conv", ["b", "body.1.weight"], "c"),
        node("Conv", ["c", "body.1.weight"], "d"),
        node("Relu", ["d"], "e"),
    ]
    graph = SimpleNamespace(node=nodes, initializer=[SimpleNamespace(name="body.1.weight")])
    name_nodes(graph, modules={"e": ""})
    assert [n.name for n in nodes] == [
        "body.1/Shape", "body.1/Reshape", "body.1/Conv", "body.1/Conv_1", "Relu",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("by", "meant"),
    [
        ("blocks.1", {"blocks.1/Add", "blocks.1.attn/Softmax", "blocks.1.attn.qkv/MatMul"}),
        ("blocks.1.attn", {"blocks.1.attn/Softmax", "blocks.1.attn.qkv/MatMul"}),
        ("blocks.1.attn/*", {"blocks.1.attn/Softmax"}),
        ("*/Softmax", {"blocks.1.attn/Softmax"}),
        ("blocks.1/add", set()),
        ("block", set()),
    ],
)
def test_a_module_means_all_that_is_in_it(by: str, meant: set[str]) -> None:
    nodes = {"blocks.1/Add", "blocks.1.attn/Softmax", "blocks.1.attn.qkv/MatMul", "blocks.11/Add"}
    assert {node for node in nodes if is_meant(node, by)} == meant
