from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cswap_deploy.errors import ArtifactError, BuildError, StageError, UsageError
from cswap_deploy.measure.parity import parity
from cswap_deploy.records.engine import OnnxArtifact
from cswap_deploy.runtime.host import usable_cores
from cswap_deploy.settings import BatchRange
from cswap_deploy.targets import TARGETS, BuildRequest, get_target
from cswap_deploy.targets.onnxruntime import OnnxRuntime

runtime = pytest.importorskip("onnxruntime")


def test_every_name_of_the_table_gives_a_target() -> None:
    assert {get_target(name).name for name in TARGETS} == set(TARGETS)


def test_unknown_target_names_the_known_ones() -> None:
    with pytest.raises(UsageError) as caught:
        get_target("tensorrtx")
    assert str(caught.value) == f"unknown target 'tensorrtx'; known: {', '.join(TARGETS)}"
    assert caught.value.exit_code == 2


def test_the_graph_is_the_engine(graph: OnnxArtifact, tmp_path: Path) -> None:
    engine = OnnxRuntime().build(BuildRequest(graph, batch=BatchRange(), out_dir=tmp_path))
    assert (engine.path, engine.sha256, engine.size_bytes) == (
        graph.path,
        graph.sha256,
        graph.size_bytes,
    )
    assert engine.runnable
    assert engine.reason == ""
    assert engine.device == "CPUExecutionProvider"
    assert engine.versions == {"onnxruntime": runtime.__version__}
    assert list(tmp_path.iterdir()) == []


def test_a_session_gives_the_networks_outputs(
    graph: OnnxArtifact, network: nn.Module, tmp_path: Path
) -> None:
    target = OnnxRuntime()
    engine = target.build(BuildRequest(graph, batch=BatchRange(), out_dir=tmp_path))
    session = target.load(engine, threads=1)
    assert (session.provider, session.threads) == ("CPUExecutionProvider", 1)
    assert target.load(engine, threads=None).threads == usable_cores()
    images = np.random.default_rng(0).normal(size=(9, 3, 16, 16)).astype(np.float32)

    def reference(batch: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return network(torch.from_numpy(batch)).numpy()

    result = parity(
        reference,
        session.run,
        images,
        reference_name="torch",
        candidate_name="onnxruntime",
        tolerance=1e-5,
    )
    assert result.ok, result


def test_an_unknown_operator_is_refused_in_the_runtimes_words(
    unknown_operator: OnnxArtifact, tmp_path: Path
) -> None:
    with pytest.raises(BuildError) as caught:
        OnnxRuntime().build(BuildRequest(unknown_operator, batch=BatchRange(), out_dir=tmp_path))
    text = str(caught.value)
    assert text.startswith(f"onnxruntime {runtime.__version__} refused unknown.onnx: ")
    assert "my.ops:Wobble(-1) is not a registered function/op" in text
    assert caught.value.log


def test_a_graph_with_a_fixed_batch_does_not_build_for_others(
    graph: OnnxArtifact, tmp_path: Path
) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(graph.path)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    path = tmp_path / "fixed.onnx"
    onnx.save(model, path)
    fixed = graph.model_copy(update={"path": path})
    with pytest.raises(BuildError, match=r"loads fixed\.onnx but does not run it at batch 16"):
        OnnxRuntime().build(
            BuildRequest(fixed, batch=BatchRange(min=1, opt=1, max=16), out_dir=tmp_path)
        )


def test_a_wrong_shape_is_named(graph: OnnxArtifact, tmp_path: Path) -> None:
    target = OnnxRuntime()
    session = target.load(
        target.build(BuildRequest(graph, batch=BatchRange(), out_dir=tmp_path)), threads=1
    )
    with pytest.raises(StageError, match=r"batch of shape \(1, 3, 15, 16\), float32.*Expected: 16"):
        session.run(np.zeros((1, 3, 15, 16), dtype=np.float32))
    with pytest.raises(StageError, match=r"batch of shape \(1, 3, 16, 16\), float64"):
        session.run(np.zeros((1, 3, 16, 16)))  # type: ignore[arg-type]


def test_altered_absent_and_damaged_engines(graph: OnnxArtifact, tmp_path: Path) -> None:
    target = OnnxRuntime()
    engine = target.build(BuildRequest(graph, batch=BatchRange(), out_dir=tmp_path))
    path = tmp_path / "copy.onnx"
    moved = engine.model_copy(update={"path": path})
    with pytest.raises(ArtifactError, match=r"cannot read .*copy\.onnx: No such file"):
        target.load(moved)
    path.write_bytes(graph.path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"copy\.onnx is not the file that was built") as caught:
        target.load(moved)
    assert caught.value.exit_code == 6
    assert str(caught.value).endswith("fix: build the bundle again")


def test_no_usage_database_is_written(
    graph: OnnxArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import subprocess
    import sys

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    code = (
        "import sys; from pathlib import Path; from cswap_deploy.runtime.onnx_session import *;"
        "OnnxSession(Path(sys.argv[1]), threads=1)"
    )
    subprocess.run([sys.executable, "-c", code, str(graph.path)], check=True)
    assert not (tmp_path / "home").exists()
