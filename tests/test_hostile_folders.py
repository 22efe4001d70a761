"""A folder is data: what it names of code and files is used only when this user names it too."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import small_models
from made_up_bundle import agreeing, reseal

import cswap_deploy
from cswap_deploy.errors import ArtifactError, UsageError
from cswap_deploy.records.bundle import read_bundle
from cswap_deploy.records.files import list_files
from cswap_deploy.records.value import write_sealed

if TYPE_CHECKING:
    from conftest import Made, Ran

Command = Callable[..., "Ran"]
STAGES = ("export", "engine", "validate")


@pytest.fixture
def work(made: Made, tmp_path: Path) -> Path:
    """What ``prune`` leaves of the small network."""
    folder = tmp_path / "work"
    folder.mkdir()
    for name in ("build.json", "plan.json", "pruned.safetensors"):
        shutil.copy(made.bundle / name, folder)
    return folder


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that lies where the command runs; the file that it leaves when it is imported."""
    mark = tmp_path / "it-ran"
    (tmp_path / "evil_module.py").write_text(
        f"open({str(mark)!r}, 'w').close()\n"
        "from small_models import small\n"
        "def f(*_):\n    return small()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "evil_module", raising=False)
    return mark


def set_in(folder: Path, **settings: Any) -> None:
    """Change what a folder says of its build, and seal it again, as its author would."""
    told = json.loads((folder / "build.json").read_text())
    told["settings"] |= settings
    reseal(folder / "build.json", told)


@pytest.mark.parametrize("stage", STAGES)
def test_a_factory_that_a_folder_names_is_not_called(
    command: Command, work: Path, evil: Path, stage: str
) -> None:
    set_in(work, model="evil_module:f", data=None, validation_data=None)
    done = command(stage, work)
    assert done.code == 2, done.err
    assert "code or files that it only names" in done.err
    assert "fix: if these are yours, add --model evil_module:f\n" in done.err
    assert not evil.exists()
    assert "evil_module" not in sys.modules


@pytest.mark.parametrize("stage", STAGES)
def test_a_metric_that_a_folder_names_is_not_called(
    command: Command, made: Made, work: Path, evil: Path, stage: str
) -> None:
    set_in(work, metric="evil_module:f")
    done = command(stage, work, *made.own)
    assert done.code == 2, done.err
    assert "add --metric evil_module:f\n" in done.err
    assert not evil.exists()


@pytest.mark.parametrize(
    "name",
    ["checkpoint", "data", "calibration_data", "validation_data", "class_map", "budget"],
)
def test_a_path_that_a_folder_names_is_not_opened(
    command: Command, made: Made, work: Path, tmp_path: Path, name: str
) -> None:
    """A pipe would be waited for by whoever opens it."""
    import os

    pipe = tmp_path / "a pipe"
    os.mkfifo(pipe)
    given = {"model": "small_models:small", "data": None, "validation_data": None, name: str(pipe)}
    set_in(work, **given)
    done = command("validate", work, "--model", "small_models:small")
    assert done.code == 2, done.err
    assert f"add --{name.replace('_', '-')} '{pipe}'\n" in done.err


def test_the_fix_works_when_it_is_followed(
    command: Command, work: Path, made: Made, store: Path
) -> None:
    done = command("export", work, "--store", store)
    assert done.code == 2
    flags = shlex.split(done.err.rpartition("add ")[2])
    done = command("export", work, "--store", store, *flags)
    assert done.code == 0, done.err
    assert (work / "model.onnx").read_bytes() == (made.bundle / "model.onnx").read_bytes()


def test_a_store_and_an_output_that_a_folder_names_are_not_used(
    command: Command, made: Made, work: Path, tmp_path: Path
) -> None:
    set_in(work, store=str(tmp_path / "theirs"), output=str(tmp_path / "elsewhere"))
    done = command("export", work, *made.own)
    assert done.code == 0, done.err
    assert (work / "model.onnx").is_file()
    assert not (tmp_path / "theirs").exists()
    assert not (tmp_path / "elsewhere").exists()


def test_names_of_demos_are_taken_from_a_folder(command: Command, tmp_path: Path) -> None:
    few = ("--calibration-samples", 64, "--validation-samples", 64, "--ratio", 0)
    done = command("prune", "demo-resnet", *few, "-o", tmp_path / "work")
    assert done.code == 0, done.err
    done = command("export", tmp_path / "work")
    assert done.code == 0, done.err


def test_a_record_that_is_not_of_the_plan_is_refused(
    command: Command, made: Made, work: Path
) -> None:
    set_in(work, ratio=0.1)
    done = command("export", work, *made.own)
    assert done.code == 6
    assert "build.json is damaged: the setting ratio is 0.1, in the plan 0.4" in done.err


def test_a_record_that_is_not_of_the_manifest_is_refused(
    command: Command, made: Made, tmp_path: Path
) -> None:
    copy = shutil.copytree(made.bundle, tmp_path / "copy")
    set_in(copy, latency_runs=12)
    manifest = read_bundle(copy)
    files = tuple(ref for ref in list_files(copy) if ref.path != "manifest.json")
    write_sealed(copy / "manifest.json", agreeing(manifest.model_copy(update={"files": files})))
    done = command("validate", copy, *made.own)
    assert done.code == 6, done.err
    assert "build.json has other settings than the manifest: latency_runs" in done.err


def test_settings_that_are_none_are_damage(command: Command, made: Made, work: Path) -> None:
    set_in(work, latency_runs="many")
    done = command("validate", work, *made.own)
    assert done.code == 6
    assert "build.json has no settings of this version" in done.err


# --- Python --------------------------------------------------------------------------------------


def test_a_factory_that_a_manifest_names_is_not_called(
    made: Made, evil: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(made.bundle, tmp_path / "copy")
    told = json.loads((copy / "manifest.json").read_text())
    told["model"]["name"] = "evil_module:f"
    reseal(copy / "manifest.json", told)
    bundle = cswap_deploy.load(copy)
    with pytest.raises(UsageError, match="code that it only names"):
        bundle.module()
    assert not evil.exists()
    assert bundle.module(small_models.SmallNet()) is not None


def test_what_this_process_named_is_made_again(made: Made, tmp_path: Path) -> None:
    settings = made.settings | {"target": ("onnxruntime",)}
    bundle = cswap_deploy.build(**settings, output=tmp_path / "own", store=made.store)
    assert bundle.module() is not None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"source": "timm", "name": "local-dir:/tmp/net"},
            "there is no model 'local-dir:/tmp/net'",
        ),
        ({"source": "timm", "name": "hf-hub:some/net"}, "there is no model 'hf-hub:some/net'"),
        ({"source": "demo", "name": "demo-none"}, "there is no model 'demo-none'"),
    ],
)
def test_a_name_that_is_none_of_timm_s_is_not_made(
    made: Made, tmp_path: Path, change: dict[str, str], words: str
) -> None:
    copy = shutil.copytree(made.bundle, tmp_path / "copy")
    told = json.loads((copy / "manifest.json").read_text())
    told["model"] |= change
    reseal(copy / "manifest.json", told)
    with pytest.raises(UsageError, match=words):
        cswap_deploy.load(copy).module()


@pytest.mark.parametrize("argument", ["checkpoint_path", "pretrained", "pretrained_cfg_overlay"])
def test_arguments_that_make_timm_open_files_are_refused(
    made: Made, tmp_path: Path, argument: str
) -> None:
    copy = shutil.copytree(made.bundle, tmp_path / "copy")
    told = json.loads((copy / "manifest.json").read_text())
    told["model"] |= {"source": "timm", "name": "resnet18", "arguments": {argument: 1}}
    reseal(copy / "manifest.json", told)
    with pytest.raises(ArtifactError, match=f"arguments.{argument}: '{argument}' is none of"):
        cswap_deploy.load(copy)


# --- a finished bundle ---------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["export", "engine"])
@pytest.mark.parametrize("same", [False, True])
def test_a_finished_bundle_is_not_undone(
    command: Command, made: Made, tmp_path: Path, stage: str, same: bool
) -> None:
    copy = shutil.copytree(made.bundle, tmp_path / "copy")
    output = ("-o", tmp_path / "." / "copy") if same else ()
    done = command(stage, copy, *made.own, *output)
    assert done.code == 2
    assert f"is a finished bundle: {stage} would leave it without manifest" in done.err
    assert list_files(copy) == list_files(made.bundle)
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
