from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cswap_deploy.errors import ArtifactError, BuildError, MissingDependencyError
from cswap_deploy.records.engine import OnnxArtifact
from cswap_deploy.records.value import sha256_file
from cswap_deploy.runtime.host import cuda_problem
from cswap_deploy.settings import BatchRange
from cswap_deploy.targets import BuildRequest
from cswap_deploy.targets.tensorrt import TensorRt
from cswap_deploy.targets.tensorrt_rtx import TensorRtRtx


@pytest.fixture
def rtx() -> TensorRtRtx:
    pytest.importorskip("tensorrt_rtx")
    return TensorRtRtx()


def test_an_engine_is_built_ahead_of_time(
    rtx: TensorRtRtx, graph: OnnxArtifact, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And without a driver it does not run, and altered it is noticed before anything else."""
    engine = rtx.build(BuildRequest(graph, batch=BatchRange(min=1, opt=4, max=8), out_dir=tmp_path))
    assert engine.path == tmp_path / "model.engine"
    assert engine.sha256 == sha256_file(engine.path)
    assert engine.size_bytes == engine.path.stat().st_size > 0
    assert engine.target == "tensorrt-rtx"
    assert set(engine.versions) == {"tensorrt-rtx"}
    assert "ahead of time" in engine.device
    assert not engine.runnable
    assert engine.reason
    assert capfd.readouterr() == ("", "")
    if problem := cuda_problem():
        assert engine.reason == problem
        with pytest.raises(MissingDependencyError) as caught:
            rtx.load(engine)
        words = f"tensorrt-rtx engines run on an NVIDIA GPU: {problem}"
        assert str(caught.value).startswith(words)
        assert caught.value.exit_code == 4
    engine.path.write_bytes(b"something else")
    with pytest.raises(ArtifactError, match=r"model\.engine is not the file that was built"):
        rtx.load(engine)


def test_the_parsers_words_and_the_node_are_told(
    rtx: TensorRtRtx, unknown_operator: OnnxArtifact, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(BuildError) as caught:
        rtx.build(BuildRequest(unknown_operator, batch=BatchRange(), out_dir=out))
    version = rtx.fingerprint()["tensorrt-rtx"]
    text = str(caught.value)
    assert text.startswith(
        f"the parser of tensorrt-rtx {version} refused unknown.onnx: node 'the_wobble' (Wobble): "
    )
    assert "Plugin not found" in text
    assert "INVALID_NODE" in caught.value.log[0]
    assert list(out.iterdir()) == []


def test_a_damaged_graph_is_refused(rtx: TensorRtRtx, graph: OnnxArtifact, tmp_path: Path) -> None:
    path = tmp_path / "half.onnx"
    path.write_bytes(graph.path.read_bytes()[: graph.size_bytes // 2])
    damaged = graph.model_copy(update={"path": path})
    with pytest.raises(BuildError, match=r"refused half\.onnx: .*Failed to parse the ONNX model"):
        rtx.build(BuildRequest(damaged, batch=BatchRange(), out_dir=tmp_path))


def test_a_builder_failure_carries_the_builders_words(
    rtx: TensorRtRtx, graph: OnnxArtifact, tmp_path: Path
) -> None:
    """A fixed batch of 3 and a range of 1 to 16 cannot both hold."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load(graph.path)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3
    path = tmp_path / "fixed.onnx"
    onnx.save(model, path)
    fixed = graph.model_copy(update={"path": path})
    with pytest.raises(BuildError) as caught:
        rtx.build(BuildRequest(fixed, batch=BatchRange(min=1, opt=1, max=16), out_dir=tmp_path))
    assert "built no engine from fixed.onnx (batch 1:1:16): " in str(caught.value)
    assert "no reason given" not in str(caught.value)
    assert caught.value.log


def test_an_absent_package_and_one_that_does_not_load(
    graph: OnnxArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependencyError) as caught:
        TensorRt().build(BuildRequest(graph, batch=BatchRange(), out_dir=tmp_path))
    assert str(caught.value) == "tensorrt is not installed\n  fix: pip install 'cswap-deploy[trt]'"

    package = tmp_path / "tensorrt"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import ctypes; ctypes.CDLL('libnvonnxparser-planted.so.11')"
    )
    monkeypatch.delitem(sys.modules, "tensorrt")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingDependencyError) as caught:
        TensorRt().fingerprint()
    text = "tensorrt is installed but does not load: libnvonnxparser-planted.so.11"
    assert text in str(caught.value)
