from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
from timm_graphs import Exported

from cswap_deploy.export.names import is_meant, module_of, name_nodes


def test_a_folded_norm_leaves_the_convolutions_name(exported: Callable[[str], Exported]) -> None:
    names = exported("test_efficientnet").names()
    assert "conv_stem/Conv" in names
    assert "blocks.0.0.conv/Conv" in names
    assert "classifier/Gemm" in names
    assert len(set(names)) == len(names)


def test_a_vits_nodes_carry_their_modules(exported: Callable[[str], Exported]) -> None:
    """Of onnxsim's fused nodes too, which it names anew."""
    vit = exported("vit_tiny_patch16_224")
    names = vit.names()
    for wanted in (
        "patch_embed.proj/Conv", "blocks.0.norm1/LayerNormalization", "blocks.1.attn/Softmax",
        "blocks.1.attn.qkv/MatMul", "blocks.1.mlp.fc2/MatMul", "blocks.0/Add", "head/Gemm",
    ):  # fmt: skip
        assert wanted in names
    modules = {name for name, _ in vit.module.named_modules()}
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
