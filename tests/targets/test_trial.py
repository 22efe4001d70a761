"""A runtime that crashes, hangs or eats memory on a graph is one line and no dead process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cswap_deploy.errors import BuildError
from cswap_deploy.export.child import ChildLimits
from cswap_deploy.export.onnx import describe_onnx
from cswap_deploy.records.engine import OnnxArtifact
from cswap_deploy.settings import BatchRange
from cswap_deploy.targets import BuildRequest, get_target
from cswap_deploy.targets.trial import _LOADS

onnx = pytest.importorskip("onnx")


@pytest.fixture
def graph(tmp_path: Path) -> OnnxArtifact:
    """(N, 3, 4, 4) -> (N, 48)."""
    value = onnx.helper.make_tensor_value_info
    made = onnx.helper.make_graph(
        [onnx.helper.make_node("Flatten", ["input"], ["logits"])], "g",
        [value("input", onnx.TensorProto.FLOAT, ["batch", 3, 4, 4])],
        [value("logits", onnx.TensorProto.FLOAT, ["batch", 48])],
    )  # fmt: skip
    opsets = [onnx.helper.make_opsetid("", 18)]
    path = tmp_path / "model.onnx"
    onnx.save(onnx.helper.make_model(made, opset_imports=opsets, ir_version=10), path)
    return describe_onnx(path)


def request(graph: OnnxArtifact, out: Path, trial: ChildLimits | None) -> BuildRequest:
    out.mkdir(exist_ok=True)
    return BuildRequest(graph, BatchRange(min=1, opt=2, max=3), out, trial=trial)


@pytest.mark.parametrize("runtime", _LOADS)
def test_a_sound_graph_passes_its_trial(runtime: str, graph: OnnxArtifact, tmp_path: Path) -> None:
    pytest.importorskip(runtime)
    built = get_target(runtime).build(request(graph, tmp_path / "out", ChildLimits(100)))
    session = get_target(runtime).load(built, onnx=graph.path)
    assert session.run(np.ones((2, 3, 4, 4), np.float32)).shape == (2, 48)


@pytest.mark.parametrize("runtime", _LOADS)
@pytest.mark.parametrize(
    ("code", "limits", "words"),
    [
        ("import os; os.kill(os.getpid(), 11)", ChildLimits(100), "it crashed (SIGSEGV)"),
        ("import time; time.sleep(100)", ChildLimits(1), "it did not end within 1 s"),
        ("bytearray(2 << 30)", ChildLimits(100, 1 << 30), "more than 1,024 MiB of memory"),
    ],
)
def test_a_runtime_that_fails_on_a_graph(
    monkeypatch: pytest.MonkeyPatch, graph: OnnxArtifact, tmp_path: Path, runtime: str, code: str,
    limits: ChildLimits, words: str,
) -> None:  # fmt: skip
    """A planted package in the child; this process has the real one already."""
    pytest.importorskip(runtime)
    get_target(runtime).fingerprint()
    package = tmp_path / "site" / runtime
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    with pytest.raises(BuildError) as caught:
        get_target(runtime).build(request(graph, tmp_path / "out", limits))
    assert str(caught.value).startswith(
        f"{runtime} fails on model.onnx, tried in a process of its own: "
    )
    assert words in str(caught.value)
    assert "fix: another --target" in str(caught.value)
    assert get_target(runtime).build(request(graph, tmp_path / "out", None)).runnable


def test_a_refusal_is_left_to_the_build_itself(graph: OnnxArtifact, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    graph.path.write_bytes(b"no graph")
    with pytest.raises(BuildError, match=r"onnxruntime [\d.]+ refused model\.onnx"):
        get_target("onnxruntime").build(request(graph, tmp_path / "out", ChildLimits(100)))
