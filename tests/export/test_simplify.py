from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cswap_deploy.config import load_config
from cswap_deploy.errors import ArtifactError, UsageError
from cswap_deploy.export.child import ChildLimits
from cswap_deploy.export.onnx import describe_onnx
from cswap_deploy.export.simplify import simplify_onnx
from cswap_deploy.measure.parity import parity
from cswap_deploy.records.engine import OnnxArtifact

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxsim")


def save_graph(path: Path, nodes: list[onnx.NodeProto], domain: str = "") -> OnnxArtifact:
    value = onnx.helper.make_tensor_value_info
    array = onnx.numpy_helper.from_array
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [value("input", onnx.TensorProto.FLOAT, ["batch", 3])],
        [value("logits", onnx.TensorProto.FLOAT, ["batch", 2])],
        [
            array(np.arange(6, dtype=np.float32).reshape(3, 2), "w"),
            array(np.array([1, -1], dtype=np.float32), "b"),
        ],
    )
    opsets = [onnx.helper.make_opsetid("", 18)]
    if domain:
        opsets.append(onnx.helper.make_opsetid(domain, 1))
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return describe_onnx(path)


make = onnx.helper.make_node
REDUNDANT = [
    make("Identity", ["input"], ["a"]),
    make("Neg", ["b"], ["c"]),
    make("Neg", ["c"], ["d"]),
    make("MatMul", ["a", "w"], ["e"]),
    make("Add", ["e", "d"], ["logits"]),
]


def test_redundant_nodes_go_and_the_outputs_stay(tmp_path: Path) -> None:
    before = save_graph(tmp_path / "a.onnx", REDUNDANT)
    after = simplify_onnx(before, path=tmp_path / "b.onnx")
    again = simplify_onnx(before, path=tmp_path / "c.onnx")
    assert again.sha256 == after.sha256, "the same graph gives the same bytes"
    assert before.nodes == 5
    assert after.nodes < 3
    assert after.notes == ()
    assert (after.inputs, after.outputs) == (before.inputs, before.outputs)
    assert after.path == tmp_path / "b.onnx"

    def run(path: Path):  # type: ignore[no-untyped-def]
        session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda x: session.run(None, {"input": x})[0]

    images = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
    result = parity(
        run(before.path),
        run(after.path),
        images,
        reference_name="a",
        candidate_name="b",
        tolerance=1e-6,
    )
    assert result.ok, result


def test_an_operator_that_onnxsim_does_not_know_is_left_alone(tmp_path: Path) -> None:
    unknown = [
        make("Wobble", ["input"], ["a"], domain="my.ops"),
        make("MatMul", ["a", "w"], ["logits"]),
    ]
    before = save_graph(tmp_path / "a.onnx", unknown, domain="my.ops")
    after = simplify_onnx(before, path=tmp_path / "b.onnx")
    assert (after.nodes, after.notes) == (2, ())


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os; os.abort()", "it crashed (SIGABRT)"),
        ("raise ImportError('libgone.so: cannot open')", "ImportError: libgone.so: cannot open"),
        ("simplify = lambda model: (model, False)", "its own check of the result failed"),
        (
            "def simplify(m): m.graph.input[0].name = 'x'; return m, True",
            "it wrote a damaged graph",
        ),
        (
            "def simplify(m): m.opset_import[0].version = 19; return m, True",
            "opset changed from 18 to 19",
        ),
    ],
)
def test_a_failing_onnxsim_keeps_the_graph_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, words: str
) -> None:
    """A planted package in place of onnxsim: the real one hardly ever fails."""
    package = tmp_path / "site" / "onnxsim"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    before = save_graph(tmp_path / "a.onnx", REDUNDANT)
    earlier = before.model_copy(update={"notes": ("an earlier note",)})
    after = simplify_onnx(earlier, path=tmp_path / "b.onnx")
    assert after.path == tmp_path / "b.onnx"
    assert after.path.read_bytes() == before.path.read_bytes()
    assert (after.sha256, after.nodes) == (before.sha256, before.nodes)
    assert after.notes[0] == "an earlier note"
    assert after.notes[1].startswith("graph not simplified, kept as exported: onnxsim failed: ")
    assert words in after.notes[1]


def test_an_onnxsim_that_takes_too_much_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "onnxsim"
    package.mkdir(parents=True)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    before = save_graph(tmp_path / "a.onnx", REDUNDANT)
    for code, limits, words in (
        ("import time; time.sleep(100)", ChildLimits(0.5), "it did not end within 0.5 s"),
        (
            "bytearray(2 << 30)", ChildLimits(100, 1 << 30),
            "it needs more than 1,024 MiB of memory",
        ),
        ("import os; os.abort()", ChildLimits(100), "it crashed (SIGABRT)"),
    ):  # fmt: skip
        (package / "__init__.py").write_text(code)
        after = simplify_onnx(before, path=tmp_path / "b.onnx", limits=limits)
        assert after.path.read_bytes() == before.path.read_bytes()
        assert after.notes == (f"graph not simplified, kept as exported: onnxsim failed: {words}",)


def test_the_limits_of_a_build_are_those_of_its_settings(tmp_path: Path) -> None:
    config = load_config(model="demo-resnet", child_seconds=7, child_memory="2GiB").export
    assert ChildLimits.of(config) == ChildLimits(7, 2 << 30)
    generous = load_config(model="demo-resnet").export
    assert ChildLimits.of(generous).memory >= 1 << 30
    assert config.export_key() != generous.export_key(), "more time is another try"
    with pytest.raises(UsageError, match=r"--child-memory: .* is no amount of memory"):
        load_config(model="demo-resnet", child_memory="plenty")


def test_a_child_ends_with_the_process_that_wanted_it(tmp_path: Path) -> None:
    """Killed, so that it can do nothing about it."""
    started = tmp_path / "started"
    child = f"import os, time; open({str(started)!r}, 'w').write(str(os.getpid())); time.sleep(99)"
    code = (
        "from cswap_deploy.export.child import UNLIMITED, run_child\n"
        f"run_child({child!r}, [], UNLIMITED)"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        until(lambda: started.exists() and started.read_text() != "")
        parent.kill()
    status = Path("/proc", started.read_text(), "status")
    until(lambda: not status.exists() or "State:\tZ" in status.read_text())


def until(holds: Callable[[], bool]) -> None:
    for _ in range(600):
        if holds():
            return
        time.sleep(0.1)
    raise AssertionError("it did not come to that within a minute")


def test_damaged_input_is_an_error_and_no_fallback(tmp_path: Path) -> None:
    before = save_graph(tmp_path / "a.onnx", REDUNDANT)
    before.path.write_bytes(before.path.read_bytes()[:50])
    with pytest.raises(ArtifactError, match=r"a\.onnx is not an ONNX file, or is damaged"):
        simplify_onnx(before, path=tmp_path / "b.onnx")
