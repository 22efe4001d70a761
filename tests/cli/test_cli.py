"""The command as users and scripts meet it: streams, exit codes, interruption."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import small_models

from cswap_deploy.cli.commands import command_line
from cswap_deploy.config import sections
from cswap_deploy.records.bundle import verify_bundle
from cswap_deploy.settings import flag_of

if TYPE_CHECKING:
    from conftest import Made, Ran

Command = Callable[..., "Ran"]
HERE = Path(__file__).parents[1]
OFF = {"--no-pretrained", "--no-refit", "--no-branches", "--fresh"}
HEAVY = (
    "torch", "torchvision", "timm", "onnx", "onnxscript", "onnxsim", "onnxruntime", "tensorrt",
    "tensorrt_rtx", "matplotlib", "scipy", "datasets", "safetensors", "pydantic",
    "cswap_deploy.config",
)  # fmt: skip


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; sys.argv = ['cswap-deploy', '--help']\n"
        "from cswap_deploy.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as stop: assert stop.code == 0, stop.code\n"
        "print(*sorted(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    imported = set(done.stderr.split())
    assert "typer" in imported
    assert imported.isdisjoint(HEAVY), imported.intersection(HEAVY)
    later = (
        "export engine validate check compare bench budget history inspect explain models doctor"
    )
    for name in f"build prune sweep profile-kit verify sign {later}".split():
        assert name in done.stdout


def test_every_command_says_what_it_does(command: Command) -> None:
    names = [
        c.name or (c.callback.__name__ if c.callback else "")
        for c in command_line().registered_commands
    ]
    assert len(names) == 16
    for name in names:
        done = command(name, "--help")
        assert done.code == 0
        assert "Usage: " in done.out
        assert done.err == ""


def shown_flags(text: str) -> set[str]:
    """Long flags that a help text lists."""
    return set(re.findall(r"(?<![\w`-])--[a-z][a-z0-9-]+", text))


@pytest.mark.parametrize("name", ["build", "prune", "export", "engine", "validate"])
def test_a_command_has_the_flags_of_its_sections(command: Command, name: str) -> None:
    own = {"--help", "--json", "--quiet"}
    later = name in ("export", "engine", "validate")
    own |= set() if later else {"--config", "--dry-run"}
    own |= {"--check-ops"} if name == "engine" else set()
    wanted = {
        f"--{field.replace('_', '-')}"
        for section, kind in sections().items()
        for field in kind.model_fields
        if not (later and section in ("model", "prune"))
        if field != "model" and not flag_of(kind, field).expert
    }
    wanted |= {"--model", "--checkpoint"} if later else set()
    text = command(name, "--help").out
    missing = {flag for flag in wanted | own if flag not in text}
    assert not missing
    assert shown_flags(text) - wanted - own <= {
        "--no-pretrained",
        "--no-refit",
        "--no-branches",
        "--fresh",
        "--batch",
    }


def test_help_fits_on_two_screens_with_the_common_flags_first(command: Command) -> None:
    text = command("build", "--help").out
    assert len(text.splitlines()) <= 120
    first = text[text.index("─ Options ") : text.index("─ Network and images ")]
    assert {"--data", "--ratio", "--target", "--precision", "--output"} <= shown_flags(first)
    assert len(shown_flags(first)) <= 12


def test_a_setting_for_experts_says_where_it_goes(command: Command, tmp_path: Path) -> None:
    done = command("build", "demo-resnet", "--error-rate", "0.1")
    assert done.code == 2
    assert "--error-rate is no flag" in done.err
    assert "write `error-rate = ...` into FILE.toml, and pass --config FILE.toml" in done.err


def test_the_installed_script_tells_the_version() -> None:
    script = shutil.which("cswap-deploy", path=str(Path(sys.executable).parent))
    assert script is not None, "the package is installed, with its command"
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == version("cswap-deploy") + "\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("bulid",), "No such command 'bulid'"),
        (("build", "demo-resnet", "--raito", "0.4"), "No such option: --raito"),
        (("build", "demo-resnet", "--ratio", "much"), "--ratio: Input should be a valid number"),
        (("check", "somewhere"), "Missing option '--budget'"),
    ],
)
def test_a_mistyped_command_line(command: Command, arguments: tuple[str, ...], words: str) -> None:
    done = command(*arguments)
    assert (done.code, done.out) == (2, "")
    assert words in done.err
    told = command(*arguments, "--json")
    assert told.code == 2
    assert told.json()["exit_code"] == 2


# --- what goes where -----------------------------------------------------------------------------


def test_json_is_all_that_stdout_carries(made: Made) -> None:
    told = made.ran.json()  # the whole of stdout parses as one object
    assert told["bundle"] == str(made.bundle)
    assert set(told["stages"].values()) == {"run"}
    dense, pruned = told["dense"]["params"], told["pruned"]["params"]
    assert told["ratio_effective"]["params"] == pytest.approx(1 - pruned / dense, abs=1e-9)
    assert told["targets"][0]["target"] == "onnxruntime"
    for words in ("measuring effects, round 1/2", "exporting the pruned network", "% removed)"):
        assert words in made.ran.err
    assert "\x1b" not in made.ran.err, "no colours where there is no terminal"


def test_without_json_stdout_is_the_path_alone(
    command: Command, made: Made, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ("build", *made.flags, "-o", "here", "--store", store)
    done = command(*line)
    assert (done.code, done.out) == (0, "here\n")
    assert "(reused)" in done.err
    assert "here/report.html" in done.err
    verify_bundle(tmp_path / "here")
    done = command(*line, "--quiet")
    assert (done.code, done.out, done.err) == (0, "here\n", "")


def test_quiet_leaves_stderr_empty(
    process: Command, made: Made, store: Path, tmp_path: Path
) -> None:
    line = ("prune", *made.flags, "--ratio", "0.3", "-o", tmp_path / "quiet", "--store", store)
    done = process(*line, "-q", "--json")
    assert (done.code, done.err) == (0, "")
    assert done.json()["ratio_requested"] == 0.3


def test_a_failure_with_json_is_one_object_too(command: Command, tmp_path: Path) -> None:
    done = command("inspect", tmp_path / "none", "--json")
    assert done.code == 6
    told = done.json()
    assert told["exit_code"] == 6
    assert f"cannot read {tmp_path / 'none'}: No such file or directory" in told["error"]


def test_a_reader_that_leaves_is_no_error(made: Made) -> None:
    line = [sys.executable, "-m", "cswap_deploy.cli", "inspect", str(made.bundle), "--json"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()
        said = running.stderr.read().decode()
    assert (running.returncode, said) == (0, "")


def test_dry_run_says_what_would_be_done_and_does_nothing(
    command: Command, flags: tuple[str, ...], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    done = command("build", *flags, "--dry-run", "--json", "-o", output)
    assert done.code == 0, done.err
    told = done.json()
    assert (told["params"], told["units"], told["rounds"]) == (14_533, 81, 2)
    assert told["scoring_images"] == 25
    assert told["scoring_seconds"] > 0
    assert told["calibration_images"] == 100
    assert sorted(told["groups"].values()) == [
        "1 branch", "16 channels", "32 channels", "32 channels",
    ]  # fmt: skip
    assert not output.exists()
    assert not (tmp_path / "store").exists()


# --- check, inspect, models, doctor --------------------------------------------------------------


def budgets(folder: Path, text: str) -> Path:
    file = folder / "budgets.toml"
    file.write_text(text)
    return file


def test_budgets_that_hold(command: Command, made: Made, tmp_path: Path) -> None:
    limits = budgets(
        tmp_path,
        "accuracy_drop_max = 0.9\nparity_max = 1e-3\nsize_max_mib = 1.0\nparams_max = 12_000\n"
        "[latency.onnxruntime]\np50_ms = 10_000.0\n",
    )
    done = command("check", made.bundle, "--budget", limits, "--junit", tmp_path / "j.xml")
    assert done.code == 0, done.err
    suite = ET.parse(tmp_path / "j.xml").getroot()
    assert len(suite.findall(".//testcase")) == 5
    assert suite.findall(".//failure") == []
    told = command("check", made.bundle, "--budget", limits, "--json").json()
    assert told["ok"] is True
    assert [b["ok"] for b in told["budgets"]] == [True] * 5


def test_a_budget_that_fails(command: Command, made: Made, tmp_path: Path) -> None:
    limits = budgets(tmp_path, "params_max = 5_000\nsize_max_mib = 1.0\n")
    done = command("check", made.bundle, "--budget", limits, "--junit", tmp_path / "j.xml")
    assert done.code == 3
    assert "error: 1 of 2 budgets failed:" in done.err
    assert "params_max: pruned network" in done.err
    assert "limit at most 5,000 parameters" in done.err
    suite = ET.parse(tmp_path / "j.xml").getroot()
    [case] = [c for c in suite.iter("testcase") if c.find("failure") is not None]
    assert "params_max" in case.attrib["name"]
    done = command("check", made.bundle, "--budget", limits, "--json")
    assert done.code == 3
    assert done.json()["ok"] is False


def test_a_build_with_a_budget_that_fails_leaves_the_bundle_and_says_so(
    command: Command, made: Made, store: Path, tmp_path: Path
) -> None:
    limits = budgets(tmp_path, "params_max = 5_000\n")
    output = tmp_path / "out"
    done = command(
        "build", *made.flags, "--store", store, "-o", output, "--budget", limits, "--json"
    )
    assert done.code == 3
    assert done.json()["bundle"] == str(output)
    assert "error: 1 of 1 budgets failed:" in done.err
    verify_bundle(output)
    assert (output / "budgets.toml").read_text() == limits.read_text()
    assert "params_max" in (output / "report.md").read_text()


def test_a_budget_that_is_unknown(command: Command, made: Made, tmp_path: Path) -> None:
    limits = budgets(tmp_path, "parms_max = 5_000\n")
    done = command("check", made.bundle, "--budget", limits)
    assert done.code == 2
    assert "parms_max: no such budget; did you mean params_max?" in done.err


def test_a_bad_budget_stops_a_build_before_it_starts(
    command: Command, flags: tuple[str, ...], tmp_path: Path
) -> None:
    limits = budgets(tmp_path, "parms_max = 5_000\n")
    done = command("build", *flags, "--budget", limits, "-o", tmp_path / "out")
    assert done.code == 2
    assert "no such budget" in done.err
    assert "load" not in done.err
    assert not (tmp_path / "out").exists()


def test_a_damaged_bundle_is_refused_by_name(command: Command, made: Made, tmp_path: Path) -> None:
    copy = shutil.copytree(made.bundle, tmp_path / "copy")
    with (copy / "model.onnx").open("ab") as f:
        f.write(b"\0")
    (copy / "plan.json").unlink()
    limits = budgets(tmp_path, "params_max = 12_000\n")
    for line in (("inspect", copy), ("check", copy, "--budget", limits)):
        done = command(*line)
        assert (done.code, done.out) == (6, "")
        assert f"{copy} is damaged: " in done.err
        assert "model.onnx has " in done.err
        assert "plan.json is missing" in done.err
        assert "fix: copy the bundle again, or build it again" in done.err


def test_inspect(command: Command, made: Made, tmp_path: Path) -> None:
    told = command("inspect", made.bundle, "--json").json()
    assert told["model"] == "small_models:small"
    assert told["onnx"]["inputs"][0]["shape"][1:] == [3, 16, 16]
    assert isinstance(told["onnx"]["inputs"][0]["shape"][0], str)
    assert told["unlisted_files"] == []
    graph = command("inspect", made.bundle / "model.onnx", "--json").json()
    assert graph["inputs"] == told["onnx"]["inputs"]
    assert graph["opset"] == told["onnx"]["opset"] == 18
    text = command("inspect", made.bundle)
    assert text.code == 0
    assert "ratio_effective.params" in text.out

    junk = tmp_path / "junk.onnx"
    junk.write_bytes(b"this is no graph")
    done = command("inspect", junk)
    assert (done.code, done.out) == (6, "")
    assert str(junk) in done.err
    done = command("inspect", tmp_path)
    assert done.code == 6
    assert "is not a bundle: it has no manifest.json" in done.err


def test_models(command: Command) -> None:
    names = [m["name"] for m in command("models", "--json").json()["models"]]
    assert names[:2] == ["demo-resnet", "demo-vit"]
    assert "resnet50" in names
    found = command("models", "resnet1*", "--json").json()["models"]
    assert {"resnet18", "resnet101"} <= {m["name"] for m in found}
    assert all(m["name"].startswith("resnet1") for m in found)
    assert "resnet18" in command("models", "resnet1*").out
    done = command("models", "no-such-thing*")
    assert (done.code, done.out) == (2, "")
    assert "no timm model matches 'no-such-thing*'" in done.err
    assert "fix: try a wider pattern" in done.err


# --- interruption --------------------------------------------------------------------------------


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "cswap_deploy.cli", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(HERE)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def strike(running: subprocess.Popen[str], blow: signal.Signals) -> tuple[str, str]:
    """Send a signal while the second round is measured; what was printed."""
    assert running.stderr is not None
    before = ""
    for line in running.stderr:
        before += line
        if "measuring effects, round 2/3" in line:
            break
    running.send_signal(blow)
    out, err = running.communicate(timeout=120)
    return out, before + err


def test_an_interrupted_build_goes_on_after_its_last_round(
    command: Command, flags: tuple[str, ...], tmp_path: Path
) -> None:
    """It measures for a while in each of three rounds, and is struck twice in the second."""
    images, labels = small_models.pictures(1500, seed=0)
    np.savez(tmp_path / "many.npz", images=images, labels=labels)
    (tmp_path / "quick.toml").write_text('select = "unit"\nrefit-producers = false\n')
    line: tuple[object, ...] = (
        "prune", *flags, "--data", tmp_path / "many.npz", "--calibration-samples", 1500,
        "--rounds", 3, "--scoring-samples", 1500, "--config", tmp_path / "quick.toml",
    )  # fmt: skip
    whole = tmp_path / "whole"
    undisturbed = command(*line, "-o", whole, "--store", tmp_path / "other")
    assert undisturbed.code == 0, undisturbed.err

    output, store = tmp_path / "out", tmp_path / "store"
    line = (*line, "-o", output, "--store", store)
    for blow, code in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        with start(*line) as running:
            out, err = strike(running, blow)
        assert out == ""
        assert "refitting" not in err.partition("round 2/3")[2], "it was struck while it measured"
        assert running.returncode == code, err
        if blow == signal.SIGINT:
            assert err.rstrip().endswith(
                "error: interrupted; finished stages are kept, the same command goes on from there"
            )
            assert "Traceback" not in err
        else:
            assert "going on after round 1" in err
        assert not output.exists()
        assert not list(tmp_path.glob(".out*"))
        entries = [p for p in store.iterdir() if not p.name.startswith(".")]
        assert len(entries) == 1, "the first round"

    again = command(*line)
    assert again.code == 0, again.err
    assert "going on after round 1" in again.err
    assert "round 1/3" not in again.err
    assert [p.name for p in store.iterdir() if p.name.startswith(".partial-")] == []

    plans = [json.loads((folder / "plan.json").read_text()) for folder in (output, whole)]
    for plan in plans:
        for round_ in plan["rounds"]:
            round_.pop("seconds")
    assert plans[0] == plans[1]
    weights = [(folder / "pruned.safetensors").read_bytes() for folder in (output, whole)]
    assert weights[0] == weights[1]
