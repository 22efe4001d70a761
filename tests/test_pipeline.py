"""Whole builds: what a bundle says is true, and what was done is not done again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import small_models
import torch
from safetensors.torch import load_file, save_file

import cswap_deploy
from cswap_deploy import pipeline, stages
from cswap_deploy.config import load_config
from cswap_deploy.network.deletion import apply_plan
from cswap_deploy.records.bundle import read_bundle, read_plan, verify_bundle
from cswap_deploy.records.manifest import Manifest
from cswap_deploy.records.plan import PrunePlan
from cswap_deploy.records.value import sha256_file

if TYPE_CHECKING:
    from conftest import Made, Ran

Command = Callable[..., "Ran"]


def build(
    made: Made, store: Path, output: Path, *, until: pipeline.Stage = "validate", **changes: Any
) -> pipeline.Built:
    """The build of ``made`` with some settings changed."""
    wanted = made.settings | {"store": store, "output": output} | changes
    return pipeline.build(load_config(**wanted), until=until)


def without_times(plan: PrunePlan) -> PrunePlan:
    """Two runs of the same pruning differ in nothing but these."""
    rounds = tuple(r.model_copy(update={"seconds": 0.0}) for r in plan.rounds)
    return plan.model_copy(update={"rounds": rounds})


def inputs(images: np.ndarray) -> np.ndarray:
    """(N, 16, 16, 3) uint8 -> what the network takes, written out once more."""
    x = (images.astype(np.float32) / 255 - 0.5) / 0.25
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2))


@pytest.fixture(scope="module")
def manifest(made: Made) -> Manifest:
    return verify_bundle(made.bundle).manifest


# --- what the manifest says ----------------------------------------------------------------------


def test_every_file_is_listed_with_its_digest_and_size(made: Made, manifest: Manifest) -> None:
    present = {
        p.relative_to(made.bundle).as_posix() for p in made.bundle.rglob("*") if p.is_file()
    } - {"manifest.json"}
    assert {f.path for f in manifest.files} == present
    assert {"plan.json", "pruned.safetensors", "model.onnx", "report.md", "report.html"} <= present
    for ref in manifest.files:
        path = made.bundle / ref.path
        assert (sha256_file(path), path.stat().st_size) == (ref.sha256, ref.size_bytes), ref.path
    assert manifest.onnx.sha256 == sha256_file(made.bundle / manifest.onnx.path)
    assert made.bundle.joinpath("model.onnx").stat().st_size == manifest.onnx.size_bytes
    assert not list(made.bundle.parent.glob(".*")), "something half-made was left beside it"


def test_the_ratio_is_that_of_the_saved_weights(made: Made, manifest: Manifest) -> None:
    state = load_file(made.bundle / "pruned.safetensors")
    buffers = dict(small_models.small().named_buffers())
    left = sum(t.numel() for name, t in state.items() if name not in buffers)
    dense = sum(p.numel() for p in small_models.small().parameters())
    assert (manifest.dense.params, manifest.pruned.params) == (dense, left)
    assert manifest.ratio_effective["params"] == pytest.approx(1 - left / dense, abs=1e-9)
    assert manifest.ratio_requested == 0.4
    assert read_plan(made.bundle).effective("params") == manifest.ratio_effective["params"]


def test_the_ratio_is_within_one_unit_of_the_requested_one(made: Made, manifest: Manifest) -> None:
    # The most that one unit holds here: a channel of the residual stream, 16 wide.
    conv1, conv2, conv3 = 9 * 32, 9 * 32 + 1, 9 * 32
    largest = (3 * 9 + 2 + conv1 + conv2 + conv3) / manifest.dense.params
    assert abs(manifest.ratio_effective["params"] - 0.4) <= largest


def test_accuracy_is_what_onnxruntime_says_of_the_same_images(
    made: Made, manifest: Manifest
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    # 200 of 300 images are drawn; which ones is asked of the package, scoring is not.
    from cswap_deploy.config import DataConfig
    from cswap_deploy.data import load_samples
    from cswap_deploy.progress import Silent

    data = DataConfig(
        data=made.settings["data"], validation_data=made.settings["validation_data"],
        calibration_samples=100, validation_samples=200,
    )  # fmt: skip
    drawn = load_samples(data, model=manifest.model, seed=0, progress=Silent()).validation
    everything = np.load(made.settings["validation_data"])
    known = {i.tobytes(): int(c) for i, c in zip(*everything.values(), strict=True)}
    assert [known[i.tobytes()] for i in drawn.images] == drawn.labels.tolist()
    assert manifest.validation is not None
    assert (manifest.validation.count, manifest.validation.classes) == (200, 5)
    assert manifest.validation.sha256 == drawn.spec.sha256

    x, y = inputs(drawn.images), drawn.labels
    session = onnxruntime.InferenceSession(
        made.bundle / "model.onnx", providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name
    pruned = np.concatenate([session.run(None, {name: part})[0] for part in np.split(x, 10)])
    with torch.no_grad():
        dense = small_models.small()(torch.from_numpy(x)).numpy()
    result = manifest.targets[0]
    assert result.engine.target == "onnxruntime"
    assert result.accuracy is not None
    assert result.accuracy.pruned.top1 == pytest.approx((pruned.argmax(1) == y).mean())
    assert result.accuracy.dense.top1 == pytest.approx((dense.argmax(1) == y).mean())
    assert result.accuracy.agreement == pytest.approx((pruned.argmax(1) == dense.argmax(1)).mean())
    assert result.accuracy.dense.top1 > 0.6, "the network of this test should see something"


def test_plan_and_weights_give_the_logits_of_the_graph(made: Made) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    x = inputs(small_models.pictures(16, seed=5)[0])
    fresh = small_models.SmallNet().eval()
    pruned = apply_plan(read_plan(made.bundle), fresh, torch.from_numpy(x[:2]))
    pruned.load_state_dict(load_file(made.bundle / "pruned.safetensors"), strict=True)
    session = onnxruntime.InferenceSession(
        made.bundle / "model.onnx", providers=["CPUExecutionProvider"]
    )
    [logits] = session.run(None, {session.get_inputs()[0].name: x})
    with torch.no_grad():
        np.testing.assert_allclose(pruned.eval()(torch.from_numpy(x)).numpy(), logits, atol=1e-4)


def test_parity_and_latency_are_recorded(manifest: Manifest) -> None:
    assert len(manifest.export_parity) == 3
    assert all(p.ok and p.tolerance == 1e-3 for p in manifest.export_parity)
    result = manifest.targets[0]
    assert result.parity is not None
    assert result.parity.ok
    assert result.latency is not None
    assert result.dense_latency is not None
    assert len(result.latency.samples_ms) == len(result.dense_latency.samples_ms) == 10
    assert result.latency.provider == "CPUExecutionProvider"
    assert result.latency.p50_ms == pytest.approx(np.median(result.latency.samples_ms))
    assert {"torch", "onnx", "timm"} <= manifest.versions.keys()


def test_a_speed_up_has_its_interval(manifest: Manifest) -> None:
    timed = [r for r in manifest.targets if r.latency is not None]
    assert timed
    for result in timed:
        assert result.speedup_low is not None
        assert result.speedup_high is not None
        assert 0 < result.speedup_low <= result.speedup_high


def test_an_engine_that_cannot_run_here_says_so(made: Made, manifest: Manifest) -> None:
    pytest.importorskip("tensorrt_rtx")
    result = next(r for r in manifest.targets if r.engine.target == "tensorrt-rtx")
    file = made.bundle / result.engine.path
    assert file.parent == made.bundle / "engine" / "tensorrt-rtx"
    assert sha256_file(file) == result.engine.sha256
    if result.engine.runnable:
        pytest.skip("this machine runs TensorRT-RTX engines")
    assert "no NVIDIA driver" in result.engine.reason
    assert (result.accuracy, result.latency, result.parity) == (None, None, None)
    report = made.bundle.joinpath("report.md").read_text()
    assert "no NVIDIA driver" in report
    assert manifest.targets[0].accuracy is not None, "the other target was measured all the same"


# --- one stage at a time -------------------------------------------------------------------------


def test_stages_one_at_a_time_give_what_build_gives(
    command: Command, made: Made, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the way to another machine, whose store knows nothing but the export of ``made``."""
    folder, elsewhere = tmp_path / "steps", tmp_path / "another-machine"
    done = command("prune", *made.flags, "-o", folder, "--store", tmp_path / "own", "--json")
    assert done.code == 0, done.err
    assert sorted(p.name for p in folder.iterdir()) == [
        "build.json", "plan.json", "pruned.safetensors",
    ]  # fmt: skip
    assert done.json()["stages"] == {"prune": "run"}

    shutil.copytree(folder, elsewhere)
    shutil.rmtree(folder)
    for entry in store.iterdir():
        if not (entry / "files" / "export.json").exists():
            shutil.rmtree(entry)
    with monkeypatch.context() as patch:  # another version of a tool exports again
        another_version_of("onnxscript", patch)
        done = command("export", elsewhere, *made.own, "--store", store, "--json")
    assert done.code == 0, done.err
    assert done.json()["stages"] == {"prune": "reused", "export": "run", "export/dense": "run"}
    assert "measuring" not in done.err
    assert without_times(read_plan(elsewhere)) == without_times(read_plan(made.bundle))
    for name in ("model.onnx", "pruned.safetensors"):
        assert (elsewhere / name).read_bytes() == (made.bundle / name).read_bytes(), name

    done = command("engine", elsewhere, *made.own, "--store", store, "--json")
    assert done.code == 0, done.err
    states = done.json()["stages"]
    assert (states["export"], states["engine/onnxruntime"]) == ("reused", "run")
    done = command("validate", elsewhere, *made.own, "--store", store, "--json")
    assert done.code == 0, done.err
    ours, theirs = verify_bundle(elsewhere).manifest, read_bundle(made.bundle)
    assert ours.targets[0].accuracy == theirs.targets[0].accuracy
    assert ours.ratio_effective == theirs.ratio_effective


def test_a_folder_that_was_changed_on_the_way_is_refused(
    command: Command, made: Made, tmp_path: Path
) -> None:
    copy = shutil.copytree(made.bundle, tmp_path / "copy")
    flip_a_byte(copy / "pruned.safetensors")
    refused = command("export", copy)
    assert refused.code == 2
    assert "is a finished bundle: export would leave it without" in refused.err
    done = command("export", copy, "-o", tmp_path / "other")
    assert done.code == 6
    assert "is damaged: pruned.safetensors has sha256" in done.err
    assert "fix: copy the bundle again, or build it again" in done.err
    done = command("export", tmp_path)
    assert done.code == 6
    assert "holds no build: it has no build.json" in done.err


# --- what is done again --------------------------------------------------------------------------


def test_a_second_run_reuses_every_stage(made: Made, store: Path, tmp_path: Path) -> None:
    again = build(made, store, tmp_path / "again")
    assert set(again.stages.values()) == {"reused"}
    first, second = read_bundle(made.bundle), verify_bundle(again.path).manifest
    assert second.targets == first.targets
    assert set(first.stages.values()) == {"run"}
    assert again.stages.keys() == first.stages.keys()
    for name in ("plan.json", "model.onnx", "pruned.safetensors"):
        assert (again.path / name).read_bytes() == (made.bundle / name).read_bytes()


def test_what_shapes_a_plan_prunes_again(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of weights what they are, and not where they come from."""
    same, other = tmp_path / "same.safetensors", tmp_path / "other.safetensors"
    save_file(small_models.small().state_dict(), same)
    save_file(small_models.other().state_dict(), other)
    pixel = one_pixel_changed(made.settings["data"], tmp_path / "other.npz")

    def state(**changes: Any) -> str:
        cheap = {"criterion": "magnitude", "refit": False} | changes
        return build(made, tmp_path / "store", tmp_path / "a", until="prune", **cheap).stages[
            "prune"
        ]

    assert state() == "run"
    for change in (
        {"ratio": 0.3}, {"rounds": 1}, {"seed": 1}, {"criterion": "lamp"}, {"refit": True},
        {"std": (0.25, 0.25, 0.3)}, {"scoring_samples": 20}, {"data": pixel}, {"checkpoint": other},
    ):  # fmt: skip
        assert state(**change) == "run", change
    assert state(model="small_models:other") == "reused"
    assert state(checkpoint=same) == state() == "reused"
    with monkeypatch.context() as elsewhere:
        orin = {"device": "NVIDIA Orin", "arithmetic": "IEEE float32"}
        elsewhere.setattr(stages, "measured_on", lambda device: orin)
        assert state() == "run", "another device measures other last digits"
    another_version_of("torch", monkeypatch)
    assert state() == "run"


def test_another_number_of_threads_prunes_and_scores_again(
    made: Made, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums that are split in another way differ in their last digits, and weights with them."""
    assert build(made, store, tmp_path / "a").stages["prune"] == "reused"
    more = torch.get_num_threads() + 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: more)
    states = build(made, store, tmp_path / "b").stages
    assert (states["prune"], states["score"], states["export/dense"]) == ("run", "run", "reused")


def test_recovery_has_the_number_of_threads_in_its_key(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def state() -> str:
        quick = {"criterion": "magnitude", "refit": False, "recover": 0.01}
        output, store = tmp_path / "a", tmp_path / "store"
        return build(made, store, output, until="prune", **quick).stages["recover"]

    assert (state(), state()) == ("run", "reused")
    more = torch.get_num_threads() + 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: more)
    assert state() == "run"


def test_a_changed_pixel_of_the_validation_set_scores_again_and_no_more(
    made: Made, store: Path, tmp_path: Path
) -> None:
    other = one_pixel_changed(made.settings["validation_data"], tmp_path / "other.npz")
    states = build(made, store, tmp_path / "a", validation_data=other).stages
    again = {"score", *(name for name in states if name.startswith("validate/"))}
    assert {name for name, state in states.items() if state == "run"} == again


def test_more_timed_calls_validate_again_and_no_more(
    made: Made, store: Path, tmp_path: Path
) -> None:
    states = build(made, store, tmp_path / "a", latency_runs=12).stages
    again = {name for name in states if name.startswith("validate/")}
    assert {name for name, state in states.items() if state == "run"} == again


def test_another_opset_exports_again_and_no_more(made: Made, store: Path, tmp_path: Path) -> None:
    built = build(made, store, tmp_path / "a", until="export", opset=20)
    assert built.stages == {"prune": "reused", "export": "run", "export/dense": "run"}
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(built.path / "model.onnx")
    assert [o.version for o in graph.opset_import if o.domain == ""] == [20]


def test_another_ratio_does_not_export_the_dense_network_again(
    made: Made, store: Path, tmp_path: Path
) -> None:
    built = build(made, store, tmp_path / "a", until="export", ratio=0.2)
    assert built.stages == {"prune": "run", "export": "run", "export/dense": "reused"}


def test_a_damaged_store_entry_is_made_again_and_said(
    made: Made, store: Path, tmp_path: Path
) -> None:
    [weights] = list(store.glob("*/files/pruned.safetensors"))
    flip_a_byte(weights)
    key = weights.parts[-3]
    again = build(made, store, tmp_path / "again")
    assert {name for name, state in again.stages.items() if state == "run"} == {"prune"}
    assert again.manifest is not None
    [said] = again.manifest.fallbacks[-1:]
    assert said.startswith(f"store entry {key[:12]} was damaged and is made again: ")
    assert "pruned.safetensors has sha256" in said
    assert weights.read_bytes() == (made.bundle / "pruned.safetensors").read_bytes()
    assert without_times(again.plan) == without_times(read_plan(made.bundle))


# --- Python --------------------------------------------------------------------------------------


def test_a_network_in_memory_is_built_afresh_to_the_same_result(
    made: Made, store: Path, tmp_path: Path
) -> None:
    """The store holds every stage of it: it is the network of ``made``."""
    module = small_models.small()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    kept = {k: v for k, v in made.settings.items() if k not in ("model", "target")}
    kept |= {"store": store, "ratio": 0.4}
    known = load_config(model="SmallNet", output=tmp_path / "known", **kept)
    stages = pipeline.build(known, module=module, until="export").stages
    assert stages == {"prune": "reused", "export": "reused", "export/dense": "reused"}

    kept |= {name: Path(kept[name]) for name in ("data", "validation_data")}
    bundle = cswap_deploy.build(module, resume=False, output=tmp_path / "own", **kept)
    assert isinstance(bundle, cswap_deploy.Bundle)
    assert bundle.path == tmp_path / "own"
    checked = verify_bundle(bundle.path).manifest
    assert checked == bundle.manifest
    assert set(checked.stages.values()) == {"run"}
    assert checked.model.weights == "as passed by the caller"
    assert checked.model.name == "SmallNet"
    assert [r.engine.target for r in checked.targets] == ["onnxruntime"]
    assert without_times(bundle.plan) == without_times(read_plan(made.bundle))
    for name in ("model.onnx", "pruned.safetensors"):
        assert (bundle.path / name).read_bytes() == (made.bundle / name).read_bytes(), name
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())


def test_ratio_zero_exports_the_dense_network(made: Made, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    built = build(made, tmp_path / "store", tmp_path / "dense", until="export", ratio=0)
    assert built.plan.effective("params") == 0
    assert built.plan.groups == ()
    x = inputs(small_models.pictures(8, seed=6)[0])
    session = onnxruntime.InferenceSession(
        built.path / "model.onnx", providers=["CPUExecutionProvider"]
    )
    [logits] = session.run(None, {session.get_inputs()[0].name: x})
    with torch.no_grad():
        dense = small_models.small()(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(logits, dense, atol=1e-4)


def test_a_bundle_is_replaced_by_the_next(made: Made, store: Path, tmp_path: Path) -> None:
    output = shutil.copytree(made.bundle, tmp_path / "bundle")
    (output / "left-over").write_text("by the build before")
    build(made, store, output, target=("onnxruntime",))
    assert not (output / "left-over").exists()
    assert not (output / "engine").exists()
    assert verify_bundle(output).extra == ()


# --- helpers -------------------------------------------------------------------------------------


def another_version_of(package: str, patch: pytest.MonkeyPatch) -> None:
    real = metadata.version
    patch.setattr(metadata, "version", lambda name: "99.0" if name == package else real(name))


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def one_pixel_changed(source: str, target: Path) -> str:
    """Of every image, since not all of them are drawn."""
    arrays = dict(np.load(source))
    arrays["images"][:, 8, 8, 1] ^= 1
    np.savez(target, **arrays)
    return str(target)
