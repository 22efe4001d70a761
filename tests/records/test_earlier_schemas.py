"""Bundles of every earlier schema are read; a build of then left ``bundles/schema-1``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import small_models
import torch
from made_up_bundle import made_up_manifest, made_up_plan

import cswap_deploy
from cswap_deploy.errors import ArtifactError
from cswap_deploy.records.bundle import read_bundle, read_plan
from cswap_deploy.runtime.cli import main as cswap_run

if TYPE_CHECKING:
    from conftest import Made, Ran

FIRST = Path(__file__).parents[1] / "bundles" / "schema-1"


def test_the_committed_one_is_of_schema_1() -> None:
    for name in ("manifest.json", "plan.json", "build.json"):
        assert json.loads((FIRST / name).read_text())["schema_version"] == 1


def test_verify_and_inspect(command: Callable[..., Ran]) -> None:
    done = command("verify", FIRST)
    assert done.code == 0, done.err
    assert "without a seal: a change to it goes unnoticed" in done.out
    told = command("verify", FIRST, "--json").json()
    assert told["ok"] is True
    assert told["unlisted_files"] == []
    told = command("inspect", FIRST, "--json").json()
    assert (told["ratio_requested"], told["ratio_of"]) == (0.3, "params")
    assert told["pruned"]["params"] == 753


def test_load() -> None:
    bundle = cswap_deploy.load(FIRST)
    assert not bundle.manifest.is_sealed
    assert (bundle.plan.criterion, bundle.plan.alpha) == ("cswap", 0.05)
    assert [log.candidate for log in bundle.plan.rounds] == ["effect"]
    module = bundle.module(small_models.tiny())
    assert sum(p.numel() for p in module.parameters()) == 753
    pixels, _ = small_models.pictures(4, seed=3)
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.25)
    with torch.no_grad():
        given = torch.from_numpy(bundle.classifier().logits(pixels))
        torch.testing.assert_close(module(x), given, atol=1e-4, rtol=0)


def test_cswap_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    Image.fromarray(small_models.pictures(1)[0][0]).save(tmp_path / "a.png")
    assert cswap_run([str(FIRST), str(tmp_path / "a.png"), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["images"]
    assert len(found["top"]) == 5


def test_a_damaged_file_of_it_is_named(tmp_path: Path, command: Callable[..., Ran]) -> None:
    copy = shutil.copytree(FIRST, tmp_path / "copy")
    with (copy / "model.onnx").open("ab") as file:
        file.write(b"\0")
    done = command("verify", copy)
    assert done.code == 6
    assert "model.onnx has 5,483 bytes instead of 5,482" in done.err


@pytest.mark.parametrize("version", [2, 3, 4])
def test_a_manifest_between(made: Made, tmp_path: Path, version: int) -> None:
    told = json.loads((made.bundle / "manifest.json").read_text())
    del told["seal"]
    if version < 3:
        for name in ("task", "outputs", "output_kind"):
            del told["model"][name]
    if version < 4:
        for target in told["targets"]:
            for name in ("latency", "dense_latency"):
                if target[name] is not None:
                    target[name]["samples_ms"] = [1.0, 2.0]
    (tmp_path / "manifest.json").write_text(json.dumps(told | {"schema_version": version}))
    manifest = read_bundle(tmp_path)
    assert manifest.schema_version == 5
    assert manifest.targets[0].engine == read_bundle(made.bundle).targets[0].engine
    assert manifest.model.task == "classify"


@pytest.mark.parametrize("version", [2, 3, 4, 5, 6])
def test_a_plan_between(tmp_path: Path, version: int) -> None:
    told = json.loads(made_up_plan().canonical_json()) | {"schema_version": version}
    if version < 5:
        for log in told["rounds"]:
            log["ridge"] = 1.0
    (tmp_path / "plan.json").write_text(json.dumps(told))
    assert read_plan(tmp_path) == made_up_plan()


def test_a_later_one_is_refused(tmp_path: Path) -> None:
    told = json.loads(made_up_plan().canonical_json()) | {"schema_version": 8}
    (tmp_path / "plan.json").write_text(json.dumps(told))
    with pytest.raises(ArtifactError, match="is not a PrunePlan of schema version 7"):
        read_plan(tmp_path)
    told = json.loads(made_up_manifest().model_dump_json()) | {"schema_version": 0}
    del told["seal"]
    (tmp_path / "manifest.json").write_text(json.dumps(told))
    with pytest.raises(ArtifactError, match="is not a manifest of schema version 5"):
        read_bundle(tmp_path)
