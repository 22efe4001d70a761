"""Whole builds in reduced precision: what the manifest says, and the gate that closes them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from cswap_deploy.errors import GateError
from cswap_deploy.measure.accuracy import Predicted, accuracy_change
from cswap_deploy.measure.engine import require_precision
from cswap_deploy.measure.evaluate import EVALUATION_BATCH
from cswap_deploy.records.bundle import verify_bundle
from cswap_deploy.records.manifest import Manifest
from cswap_deploy.records.value import read_value

if TYPE_CHECKING:
    from conftest import Made, Ran

Command = Callable[..., "Ran"]
RTX = find_spec("tensorrt_rtx") is not None
onnx = pytest.importorskip("onnx")


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_build_says_what_its_format_cost(
    made: Made, store: Path, tmp_path: Path, command: Command, precision: str
) -> None:
    out = tmp_path / "bundle"
    minmax = ("--int8-calibration", "minmax") if precision == "int8" else ()
    ran = command(
        "build", *made.flags, "--precision", precision, *minmax,
        "--batch", "1:2:4", "-o", out, "--store", store, "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    manifest = verify_bundle(out).manifest
    assert manifest.onnx.precision == precision
    assert manifest.precision is not None
    assert manifest.precision.precision == precision
    assert manifest.stages["prune"] == manifest.stages["export"] == "reused"
    types = {i.data_type for i in onnx.load(out / "model.onnx").graph.initializer}
    assert {"fp16": onnx.TensorProto.FLOAT16, "int8": onnx.TensorProto.INT8}[precision] in types
    own = manifest.targets[0]
    assert own.reduced is not None
    assert own.accuracy is not None
    assert own.judged_by == "this engine"
    assert own.reduced.pruned == own.accuracy.pruned
    assert manifest.torch_accuracy is not None
    assert own.reduced.dense == manifest.torch_accuracy.pruned
    assert own.parity is not None
    assert own.parity.tolerance is None
    assert "## Precision" in (out / "report.md").read_text()
    if RTX:
        rtx = manifest.targets[1]
        assert rtx.engine.precision == precision
        assert str(rtx.engine.batch) == "1:2:4"
        layers = json.loads((out / "engine" / "tensorrt-rtx" / "layers.json").read_text())
        assert [shape[0] for shape in layers["profile"]] == [1, 2, 4]
        assert rtx.reduced is not None
        assert "ONNX Runtime" in rtx.judged_by, "it does not run here, and that is said"
        assert rtx.accuracy is None


def test_engines_of_large_batches_only_are_judged_on_every_image(
    made: Made, store: Path, tmp_path: Path, command: Command
) -> None:
    """OpenVINO refuses what is outside the profile, as TensorRT does."""
    targets = [t for t in ("onnxruntime", "openvino") if find_spec(t) is not None]
    flags = [part for target in targets for part in ("--target", target)]
    out = tmp_path / "bundle"
    ran = command("build", *made.flags, *flags, "--batch", "3:6:7", "-o", out, "--store", store)
    assert ran.code == 0, ran.err
    manifest = verify_bundle(out).manifest
    assert manifest.torch_accuracy is not None
    assert EVALUATION_BATCH % 7 in (1, 2), "else no batch was filled up"
    by_name = {t.engine.target: t for t in manifest.targets}
    for found in (by_name[target] for target in targets):
        assert found.parity is not None
        assert found.parity.ok
        assert found.accuracy is not None
        assert found.accuracy.pruned == manifest.torch_accuracy.pruned
        assert found.latency is not None
        assert found.latency.settings["batch"] == 6


def test_the_gate_fails_the_build_and_leaves_nothing(
    made: Made, store: Path, tmp_path: Path, command: Command
) -> None:
    """Int8 ranges found on nearly grey pictures are far too narrow for those of the validation."""
    from small_models import pictures

    images, labels = pictures(150)
    grey = (128 + (images.astype(int) - 128) // 20).astype(np.uint8)
    np.savez(tmp_path / "grey.npz", images=grey, labels=labels)
    out = tmp_path / "bundle"
    ran = command(
        "build", *made.flags, "--data", tmp_path / "grey.npz", "--ratio", "0", "--precision",
        "int8", "--int8-calibration", "minmax", "--target", "onnxruntime", "-o", out, "--store",
        store, "--allow-chance",
    )  # fmt: skip
    assert ran.code == 3, ran.err
    assert "error: onnxruntime in int8 loses" in ran.err
    assert "points of top-1 against the pruned float32 network" in ran.err
    assert "fix: a wider --precision" in ran.err
    assert not out.exists()


def test_one_image_never_fails_the_gate_and_two_may() -> None:
    labels = np.zeros(500, dtype=np.int64)
    right, wrong = labels.copy(), labels.copy()
    wrong[0] = 1

    def ask(precision: str, limit: float) -> None:
        sure = np.ones(len(labels), dtype=np.float32)
        change = accuracy_change(Predicted(right, sure), Predicted(wrong, sure), labels)
        require_precision(change, "t", precision=precision, limit=limit, measured_on="it")

    ask("fp16", 0.001)
    wrong[1] = 1
    with pytest.raises(GateError, match=r"loses 0\.40 points .* allowed are 0\.10") as caught:
        ask("fp16", 0.001)
    assert caught.value.exit_code == 3
    ask("int8", 0.01)


INT8 = ("--precision", "int8")


@pytest.mark.parametrize(
    ("asked", "code", "words"),
    [
        (("--batch", "1:1:2", "--latency-batch", "4"), 2, "is outside the profile --batch 1:1:2"),
        (("--precision", "bf16", "--target", "onnxruntime"), 2, "bf16 runs on the tensorrt targ"),
        (("--keep-fp32", "head"), 2, "keep_fp32: does nothing with precision fp32"),
        ((*INT8, "--precision-drop", "0.5"), 2, "--precision-drop: Input should be less than"),
        (("--precision-drop", "0.02"), 2, "precision_drop: does nothing with precision fp32"),
        (("--precision", "fp16", "--int8-calibration", "entropy"), 2, "int8_calibration: does not"),
        ((*INT8, "--int8-quantizer", "modelopt", "--int8-calibration", "percentile"), 2,
         "modelopt has no int8_calibration percentile"),
        ((*INT8, "--int8-quantizer", "modelopt"), 4, "nvidia-modelopt is not installed"),
        (("--target", "onnxruntime-cuda"), 4, "has no CUDAExecutionProvider"),
        (("--target", "tensorrt"), 4, "tensorrt"),
        (("--target", "tensorrt-rtx", "--compute-capability", "9.9"), 2, "9.9; known: "),
        (("--target", "tensorrt-rtx", "--hardware-compat", "ampere+"), 2, "no --hardware-compat"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_before_any_work(
    made: Made, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch,
    asked: tuple[str, ...], code: int, words: str,
) -> None:  # fmt: skip
    if "tensorrt-rtx" in asked and not RTX:
        pytest.skip("tensorrt-rtx is not installed")
    if find_spec("tensorrt") is not None and "tensorrt" in asked:
        pytest.skip("tensorrt is installed")
    monkeypatch.setenv("CSWAP_MODELOPT", sys.executable)
    store = tmp_path / "store"
    ran = command("build", *made.flags, *asked, "-o", tmp_path / "b", "--store", store)
    assert ran.code == code, ran.err
    assert words in ran.err
    assert not store.exists()
    assert not (tmp_path / "b").exists()


def test_a_name_that_no_node_has(made: Made, store: Path, tmp_path: Path, command: Command) -> None:
    flags = ("--precision", "fp16", "--keep-fp32", "nothing/*", "-o", tmp_path / "b")
    ran = command("build", *made.flags, *flags, "--store", store)
    assert ran.code == 2
    assert "matches none of the graph's" in ran.err
    assert not (tmp_path / "b").exists()


def test_other_preprocessing_is_other_ranges(
    made: Made, store: Path, tmp_path: Path, command: Command
) -> None:
    """Of one float32 graph: nothing of the preprocessing is in it."""

    def graph(mean: str) -> tuple[str, str]:
        out = tmp_path / mean
        ran = command(
            "build", *made.flags, "--ratio", "0", "--mean", mean, *INT8, "--int8-calibration",
            "minmax", "--target", "onnxruntime", "-o", out, "--store", store, "--allow-chance",
        )  # fmt: skip
        assert ran.code == 0, ran.err
        manifest = verify_bundle(out).manifest
        return manifest.stages["precision"], manifest.onnx.sha256

    first, before = graph("0.5,0.5,0.5")
    again, after = graph("0.1,0.1,0.1")
    assert (first, again) == ("run", "run")
    assert before != after


@pytest.mark.skipif(not RTX, reason="tensorrt-rtx is not installed")
def test_an_engine_is_built_again_where_there_is_another_gpu(
    made: Made, store: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(name: str) -> str:
        flags = ("--target", "tensorrt-rtx", "-o", tmp_path / name, "--store", store)
        assert command("build", *made.flags, *flags).code == 0
        return verify_bundle(tmp_path / name).manifest.stages["engine/tensorrt-rtx"]

    assert build("a") == "reused"
    tool = tmp_path / "bin" / "nvidia-smi"  # a stand-in that lists a GPU
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho 'NVIDIA L4, 570.1, 23034 MiB'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    assert build("b") == "run"


@pytest.mark.skipif(not RTX, reason="tensorrt-rtx is not installed")
def test_the_parser_is_asked_without_a_build(made: Made, tmp_path: Path, command: Command) -> None:
    ran = command("engine", made.bundle, "--check-ops", "--json")
    assert (ran.code, ran.json()["supported_by"]) == (0, ["tensorrt-rtx"])
    model = onnx.load(made.bundle / "model.onnx")
    culprit = next(n for n in model.graph.node if n.op_type == "Conv")
    culprit.op_type, culprit.domain = "Wobble", "made.up"
    model.opset_import.append(onnx.helper.make_opsetid("made.up", 1))
    onnx.save(model, tmp_path / "wobble.onnx")
    ran = command("engine", tmp_path / "wobble.onnx", "--check-ops")
    assert ran.code == 5
    module = culprit.name.rpartition("/")[0]
    assert f"node {culprit.name!r} (Wobble, of the PyTorch module {module!r})" in ran.err
    ran = command("engine", made.bundle, "--check-ops", "--target", "onnxruntime")
    assert ran.code == 2
    assert "onnxruntime has no parser to ask" in ran.err


def test_a_stage_at_a_time_in_another_precision(
    made: Made, store: Path, tmp_path: Path, command: Command
) -> None:
    work = tmp_path / "work"
    assert command("prune", *made.flags, "-o", work, "--store", store).code == 0
    own = (work, *made.own, "--store", store)
    ran = command("export", *own, "--precision", "fp16", "--keep-fp32", "*/Conv")
    assert ran.code == 0, ran.err
    types = {i.data_type for i in onnx.load(work / "model.onnx").graph.initializer}
    assert onnx.TensorProto.FLOAT16 in types
    ran = command("validate", *own, "--precision", "fp16", "--json")
    assert ran.code == 0, ran.err
    manifest = read_value(work / "manifest.json", Manifest)
    assert manifest.onnx.precision == "fp16"
    assert manifest.settings["keep_fp32"] == ["*/Conv"], "of the same precision, so it stays"
    ran = command("export", *own, "--precision", "fp32", "-o", tmp_path / "o")
    assert ran.code == 0, "of another one, so it goes: " + ran.err
