"""``cswap-deploy verify``: one table, and exit 6 for what is not as it was built."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from made_up_bundle import reseal

from cswap_deploy.records.bundle import read_bundle
from cswap_deploy.records.files import list_files

if TYPE_CHECKING:
    from conftest import Made, Ran

    Command = Callable[..., Ran]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a network that its name makes again."""
    import cswap_deploy

    folder = tmp_path_factory.mktemp("demo")
    few = {"calibration_samples": 64, "validation_samples": 64, "latency_runs": 10}
    cswap_deploy.build(
        "demo-resnet", ratio=0.2, criterion="magnitude", refit=False, output=folder / "bundle",
        store=folder / "store", **few,
    )  # fmt: skip
    return folder / "bundle"


def described_anew(folder: Path) -> None:
    """List the files as they are now and seal that, as whoever forges a bundle would."""
    for name in ("build.json", "manifest.json"):
        told = json.loads((folder / name).read_text())
        refs = {ref.path: ref.model_dump(mode="json") for ref in list_files(folder)}
        told["files"] = [refs[ref["path"]] for ref in told["files"]]
        reseal(folder / name, told)


def changed_plan(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    plan = json.loads((folder / "plan.json").read_text())
    change(plan)
    (folder / "plan.json").write_text(json.dumps(plan))
    described_anew(folder)


def test_a_sound_bundle(command: Command, demo: Path) -> None:
    done = command("verify", demo)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert all(line.startswith("ok") for line in lines[1:])
    assert "manifest.json" in lines[1]
    assert "sealed; lists " in lines[1]
    count = f"{read_bundle(demo).pruned.params:,}"
    assert f"{count} parameters load into what plan.json makes of demo-resnet" in done.out
    told = command("verify", demo, "--json").json()
    assert (told["ok"], told["unlisted_files"]) == (True, [])
    assert {f["what"] for f in told["findings"]} >= {"manifest.json", "model.onnx", "plan.json"}


def test_code_that_a_bundle_names_is_not_run(command: Command, made: Made) -> None:
    done = command("verify", made.bundle)
    assert done.code == 0
    assert "not loaded: small_models:small is code, which is not run here" in done.out


def test_damage_is_in_the_table_and_in_the_error(
    command: Command, made: Made, tmp_path: Path
) -> None:
    copy = shutil.copytree(made.bundle, tmp_path / "copy")
    (copy / "report.md").unlink()
    (copy / "notes.txt").write_text("mine")
    with (copy / "model.onnx").open("ab") as file:
        file.write(b"\0")
    done = command("verify", copy)
    assert done.code == 6
    wrong = [line for line in done.out.splitlines() if line.startswith("wrong")]
    assert [line.split()[1] for line in wrong] == ["model.onnx", "report.md"]
    assert "notes.txt" in done.out
    assert "model.onnx has " in done.err
    assert "report.md is missing" in done.err
    told = command("verify", copy, "--json").json()
    assert told["exit_code"] == 6


def test_a_plan_that_the_weights_are_not_of(command: Command, demo: Path, tmp_path: Path) -> None:
    """Every digest is right: only loading tells."""
    copy = shutil.copytree(demo, tmp_path / "copy")

    def keep_one_more(plan: dict[str, Any]) -> None:
        group = next(g for g in plan["groups"] if len(g["kept"]) < g["units"])
        absent = min(set(range(group["units"])) - set(group["kept"]))
        group["kept"] = sorted([*group["kept"], absent])

    changed_plan(copy, keep_one_more)
    done = command("verify", copy)
    assert done.code == 6, done.out
    assert "pruned.safetensors" in done.err
    assert "does not fit" in done.err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda plan: plan["groups"][0].update(kept=[5, 3]), "what is kept is not among its"),
        (lambda plan: plan["groups"][0].update(kept=[0, 10**6]), "what is kept is not among its"),
        (lambda plan: plan.update(biased=["no.such"]), "the plan does not fit this architecture"),
        (lambda plan: plan["groups"][0].update(name="no.such"), "has no such group"),
        (lambda plan: plan["pruned"].update(params=7), "has another size of the pruned network"),
    ],
)
def test_a_plan_that_no_network_has(
    command: Command, demo: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None],
    words: str,
) -> None:  # fmt: skip
    copy = shutil.copytree(demo, tmp_path / "copy")
    changed_plan(copy, change)
    done = command("verify", copy)
    assert done.code == 6, done.out
    assert words in done.err


def test_weights_that_are_none(command: Command, demo: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(demo, tmp_path / "copy")
    (copy / "pruned.safetensors").write_bytes(b"\xff" * 64)
    described_anew(copy)
    done = command("verify", copy)
    assert done.code == 6, done.out
    assert "pruned.safetensors" in done.err
    assert "does not fit" in done.err


def test_what_is_no_bundle(command: Command, tmp_path: Path) -> None:
    assert command("verify", tmp_path).code == 6
    done = command("verify")
    assert done.code == 2
    assert "fix: cswap-deploy verify BUNDLE, or --schema" in done.err
