"""What TensorRT's parser and builder refuse, with a FAKE builder and a FAKE GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_bench import RTX, V11, Bench, every_package

from cswap_deploy.errors import BuildError, CswapError, MissingDependencyError
from cswap_deploy.records.engine import OnnxArtifact

OUT_OF_MEMORY = (
    "[virtualMemoryBuffer.cpp::resizePhysical::154] Error Code 2: OutOfMemory (Requested size was "
    "34359738368 bytes.)"
)
NO_TACTIC = (
    "[optimizer.cpp::computeCosts::4126] Error Code 10: Internal Error (Could not find any "
    "implementation for node {ForeignNode[stem/Conv + stem/Relu]}, insufficient workspace.)"
)


@pytest.mark.parametrize("words", [OUT_OF_MEMORY, NO_TACTIC], ids=["memory", "workspace"])
@every_package
def test_a_builder_without_memory(
    bench: Callable[[str], Bench], onnx: OnnxArtifact, package: str, words: str
) -> None:
    b = bench(package)
    b.script.build_errors = [words, "Error Code 4: something that follows"]
    b.script.warnings = ["tactics were skipped"]
    with pytest.raises(BuildError) as caught:
        b.build(onnx, workspace_mib=64)
    assert str(caught.value) == (
        f"{b.target.name} {b.version} built no engine from model.onnx (batch 2:4:8, workspace "
        f"64 MiB): {words}\n"
        "  fix: raise --workspace-mib, lower the largest batch of --batch, or free GPU memory"
    )
    assert caught.value.exit_code == 5
    assert caught.value.log == (
        words, "Error Code 4: something that follows", "tactics were skipped",
    )  # fmt: skip
    assert b.left == []


def test_another_refusal_has_no_made_up_fix(
    bench: Callable[[str], Bench], onnx: OnnxArtifact
) -> None:
    b = bench(V11)
    b.script.build_errors = ["Error Code 9: API Usage Error (Target GPU SM 61 is not supported)"]
    with pytest.raises(BuildError) as caught:
        b.build(onnx)
    assert caught.value.fix is None


def test_stripping_with_rtx_needs_a_gpu(bench: Callable[[str], Bench], onnx: OnnxArtifact) -> None:
    b = bench(RTX)
    b.gpu("")
    b.script.build_errors = ["Error Code 2: Assertion status == CUDA_SUCCESS failed."]
    with pytest.raises(BuildError) as caught:
        b.build(onnx, strip_weights=True)
    assert caught.value.fix == (
        "--strip-weights and --refit-engine need a GPU to build; leave them out, or build there"
    )


GEMM = {
    "node": 4, "name": "blocks.0.attn/Gemm", "operator": "Gemm", "code": "UNSUPPORTED_NODE",
    "desc": "Assertion failed: alpha must be a scalar",
}  # fmt: skip
WOBBLE = {
    "node": 1, "name": "stem/Wobble", "operator": "Wobble",
    "desc": "Plugin not found, are the plugin name, version, and namespace correct?",
}  # fmt: skip
NO_GRAPH = {"desc": "Failed to parse the ONNX model.", "code": "MODEL_DESERIALIZE_FAILED"}


@pytest.mark.parametrize(
    ("errors", "words", "fix"),
    [
        (
            [GEMM],
            "node 'blocks.0.attn/Gemm' (Gemm, of the PyTorch module 'blocks.0.attn'): Assertion "
            "failed: alpha must be a scalar",
            None,
        ),
        (
            [WOBBLE, GEMM],
            "node 'stem/Wobble' (Wobble, of the PyTorch module 'stem'): Plugin not found, are the "
            "plugin name, version, and namespace correct? (and 1 more)",
            "export the network without this operator, or load the plugin that brings it",
        ),
        ([GEMM | {"name": "Gemm"}], "node 'Gemm' (Gemm): Assertion failed: alpha must", None),
        ([NO_GRAPH], "Failed to parse the ONNX model.", None),
    ],
    ids=["node", "plugin", "network-itself", "damaged"],
)
@every_package
def test_the_parsers_words_name_the_node_and_the_module(
    bench: Callable[[str], Bench],
    onnx: OnnxArtifact,
    package: str,
    errors: list[dict[str, Any]],
    words: str,
    fix: str | None,
) -> None:
    b = bench(package)
    b.script.parser_errors = errors
    with pytest.raises(BuildError) as caught:
        b.build(onnx)
    start = f"the parser of {b.target.name} {b.version} refused model.onnx: {words}"
    assert str(caught.value).startswith(start)
    assert caught.value.fix == fix
    assert caught.value.exit_code == 5
    assert len(caught.value.log) == len(errors)
    assert b.left == []


@every_package
def test_what_is_not_supported_is_told_without_a_gpu(
    bench: Callable[[str], Bench], onnx: OnnxArtifact, package: str
) -> None:
    b = bench(package)
    b.gpu("")
    assert b.target.check_ops(onnx.path) == ()
    b.script.parser_errors = [WOBBLE, GEMM, WOBBLE]
    assert b.target.check_ops(onnx.path) == (
        "node 'stem/Wobble' (Wobble, of the PyTorch module 'stem'): Plugin not found, are the "
        "plugin name, version, and namespace correct?",
        "node 'blocks.0.attn/Gemm' (Gemm, of the PyTorch module 'blocks.0.attn'): Assertion "
        "failed: alpha must be a scalar",
    )


@every_package
def test_a_library_that_makes_no_builder(
    bench: Callable[[str], Bench], onnx: OnnxArtifact, package: str
) -> None:
    b = bench(package)
    b.script.makes_builder = False
    with pytest.raises(MissingDependencyError) as caught:
        b.build(onnx)
    assert str(caught.value) == (
        f"{b.target.name} {b.version} makes no builder: CUDA initialization failure: 35"
    )


def test_a_graph_that_is_gone(bench: Callable[[str], Bench], onnx: OnnxArtifact) -> None:
    gone = onnx.model_copy(update={"path": Path("/nowhere/model.onnx")})
    with pytest.raises(CswapError, match=r"cannot read /nowhere/model\.onnx: No such file") as told:
        bench(V11).build(gone)
    assert told.value.exit_code == 6
