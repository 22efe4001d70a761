"""A bundle is read whole or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from made_up_bundle import made_up_manifest, made_up_plan, reseal, write_made_up_bundle

from cswap_deploy.errors import ArtifactError
from cswap_deploy.records.bundle import describe, read_bundle, read_plan, tensor_text, verify_bundle
from cswap_deploy.records.engine import TensorSpec
from cswap_deploy.records.value import FileRef


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    write_made_up_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"


def test_a_sound_bundle_is_read(bundle: Path) -> None:
    check = verify_bundle(bundle)
    assert check.manifest == read_bundle(bundle)
    assert check.extra == ()
    assert {ref.path for ref in check.manifest.files} == {
        "engine/tensorrt-rtx/model.engine",
        "model.onnx",
        "plan.json",
        "pruned.safetensors",
    }
    assert read_plan(bundle) == made_up_plan()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda b: (b / "model.onnx").write_bytes(b"grapH"),
            "model.onnx has sha256 ",
        ),
        (
            lambda b: (b / "pruned.safetensors").write_bytes(b"weight"),
            "pruned.safetensors has 6 bytes instead of 7",
        ),
        (
            lambda b: (b / "engine/tensorrt-rtx/model.engine").unlink(),
            "engine/tensorrt-rtx/model.engine is missing",
        ),
    ],
    ids=["differs", "cut", "missing"],
)
def test_a_damaged_file_is_named(
    bundle: Path, damage: Callable[[Path], object], words: str
) -> None:
    damage(bundle)
    with pytest.raises(ArtifactError) as caught:
        verify_bundle(bundle)
    assert str(caught.value).startswith(f"{bundle} is damaged: {words}")
    assert str(caught.value).endswith("\n  fix: copy the bundle again, or build it again")
    assert caught.value.exit_code == 6


def test_every_damaged_file_is_named(bundle: Path) -> None:
    (bundle / "model.onnx").unlink()
    (bundle / "plan.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"model\.onnx is missing; plan\.json has 2 bytes"):
        verify_bundle(bundle)


def test_files_that_the_manifest_does_not_list_are_reported(bundle: Path) -> None:
    (bundle / "engine" / "notes.txt").write_text("mine")
    assert verify_bundle(bundle).extra == ("engine/notes.txt",)


def test_what_is_not_a_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nowhere does not exist; a bundle is the folder"):
        read_bundle(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match="file is not a folder; a bundle is the folder"):
        read_bundle(tmp_path / "file")
    with pytest.raises(ArtifactError, match=r"is not a bundle: it has no manifest\.json"):
        read_bundle(tmp_path)


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret", "engine/../../secret"])
def test_a_manifest_that_points_outside_is_refused(tmp_path: Path, name: str) -> None:
    outside = FileRef(path=name, sha256="0" * 64, size_bytes=1)
    write_made_up_bundle(tmp_path / "bundle", files=(outside,))
    with pytest.raises(ArtifactError, match=f"names files outside the bundle: {name}"):
        verify_bundle(tmp_path / "bundle")


def test_a_manifest_of_another_version_is_refused(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    reseal(bundle / "manifest.json", manifest | {"schema_version": 6})
    with pytest.raises(ArtifactError, match=r"is not a manifest of schema version 5: .*version 6"):
        read_bundle(bundle)


def test_a_description_is_plain_data_and_true() -> None:
    manifest = made_up_manifest()
    told = describe(manifest)
    assert json.loads(json.dumps(told)) == told
    assert told["ratio_effective"] == dict(manifest.ratio_effective)
    assert told["onnx"]["inputs"][0]["shape"] == ["batch", 1, 28, 28]
    ran, not_run = told["targets"]
    assert ran["p50_ms"] == manifest.targets[0].latency.p50_ms  # type: ignore[union-attr]
    assert ran["speedup"] == manifest.targets[0].speedup
    assert not_run["run_here"] is False
    assert not_run["reason"].startswith("no NVIDIA driver")
    assert not_run["top1"] is None
    assert not_run["p50_ms"] is None


def test_a_tensor_is_shown_with_its_shape() -> None:
    tensor = TensorSpec(name="input", dtype="float32", shape=("batch", 3, 8, 8))
    assert tensor_text(tensor) == "input: float32 (batch, 3, 8, 8)"
