"""Settings from flags, a TOML file and the environment."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pytest
import typer
from pydantic import Field

import cswap_deploy.config
from cswap_deploy.cli.flags import with_settings
from cswap_deploy.config import Config, PruneConfig, load_config, sections
from cswap_deploy.errors import UsageError
from cswap_deploy.records.bundle import BuildRecord
from cswap_deploy.records.plan import PrunePlan
from cswap_deploy.records.value import read_value
from cswap_deploy.settings import Flag, flag_of

if TYPE_CHECKING:
    from conftest import Ran

Command = Callable[..., "Ran"]


def toml(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_file_gives_settings_and_arguments_win(tmp_path: Path) -> None:
    file = toml(
        tmp_path / "c.toml",
        'model = "resnet18"\nratio = 0.3\nratio-of = "macs"\ninput-size = [3, 64, 64]\n'
        'target = ["onnxruntime", "tensorrt-rtx"]\nround-to = "auto"\nscoring_samples = 8\n',
    )
    config = load_config(file, ratio=0.5, rounds=None)
    assert (config.model.model, config.prune.ratio, config.prune.ratio_of) == (
        "resnet18",
        0.5,
        "macs",
    )
    assert config.model.input_size == (3, 64, 64)
    assert config.engine.target == ("onnxruntime", "tensorrt-rtx")
    assert (config.prune.scoring_samples, config.prune.rounds) == (8, PruneConfig().rounds)


def test_the_environment_names_defaults_that_a_file_and_arguments_win_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    defaults = toml(tmp_path / "defaults.toml", "ratio = 0.1\nrounds = 2\nseed = 5\n")
    monkeypatch.setenv("CSWAP_CONFIG", str(defaults))
    file = toml(tmp_path / "c.toml", "ratio = 0.2\nrounds = 3\n")
    config = load_config(file, model="m", ratio=0.3)
    assert (config.prune.ratio, config.prune.rounds, config.run.seed) == (0.3, 3, 5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ratio": -0.1}, "--ratio: Input should be greater than or equal to 0 (got -0.1)"),
        ({"ratio": 1.0}, "--ratio: Input should be less than 1 (got 1.0)"),
        ({"round_to": 0}, "--round-to: Value error, must be 1 or more, or auto (got 0)"),
        ({"opset": 17}, "--opset: Value error, must be 18 or higher, or auto (got 17)"),
        ({"opset": 13}, "torch's exporter writes opset 18 and for some networks leaves it at that"),
        ({"opset": 11}, "\n  fix: leave --opset out"),
        ({"precision": "bf16", "opset": 20, "target": ("tensorrt-rtx",)}, "or pass 22"),
        ({"precision": "fp64"}, "--precision: Input should be 'fp32', 'fp16', 'bf16', 'int8' or"),
        ({"mean": (0.5,)}, "mean and std go together"),
        (
            {"batch": "1:2:2", "latency_batch": 4},
            "latency_batch 4 is outside the profile --batch 1:2:2",
        ),
        ({"batch": "2:1:16"}, "--batch: Value error, batches must ascend from 1: 2:1:16"),
        (
            {"batch": "8"},
            "--batch: Value error, MIN:OPT:MAX is wanted, for example 1:8:64 (got '8')",
        ),
        ({"precision": "mixed", "opset": 18}, "mixed needs opset 21 or higher, got 18"),
        ({"workspace_mib": 64}, "workspace_mib: for the tensorrt targets, not onnxruntime"),
        ({"precision": "bf16"}, "bf16 runs on the tensorrt targets alone"),
        (
            {"hardware_compat": "all"},
            "--hardware-compat: Input should be 'none', 'ampere+' or 'same-cc'",
        ),
        ({"colour": 1}, "--colour: Extra inputs are not permitted"),
        (
            {"ratio_of": "bytes"},
            "--ratio-of: Input should be 'params', 'channels', 'macs'",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_bad_setting_is_named_with_its_value(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as err:
        load_config(model="m", **settings)
    assert words in str(err.value)


def test_every_bad_setting_is_named_at_once() -> None:
    with pytest.raises(UsageError) as err:
        load_config(model="m", ratio=2, rounds=0, seed="x")
    assert all(f"--{name}: " in str(err.value) for name in ("ratio", "rounds", "seed"))


def test_a_model_is_wanted(command: Command) -> None:
    done = command("build")
    assert done.code == 2
    assert "--model: Field required" in done.err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ratio = ", "cannot read the configuration {file}: Invalid value"),
        ("ratoi = 0.3\n", "--ratoi: Extra inputs are not permitted"),
        ('rounds = "many"\n', "--rounds: Input should be a valid integer"),
        ("[build]\nratio = 0.3\n", "--build: Extra inputs are not permitted"),
    ],
)
def test_a_bad_file_is_named(command: Command, tmp_path: Path, text: str, words: str) -> None:
    file = toml(tmp_path / "c.toml", text)
    done = command("build", "demo-resnet", "--config", file, "-o", tmp_path / "out")
    assert done.code == 2
    assert words.format(file=file) in done.err
    assert str(file) in done.err
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_absent_is_named(command: Command, tmp_path: Path) -> None:
    done = command("build", "demo-resnet", "--config", tmp_path / "none.toml")
    assert done.code == 2
    assert f"cannot read the configuration {tmp_path / 'none.toml'}" in done.err


def test_flags_win_over_the_file_in_a_real_run(
    command: Command, flags: tuple[str, ...], tmp_path: Path
) -> None:
    file = toml(tmp_path / "c.toml", 'ratio = 0.15\ncriterion = "random"\nratio-of = "channels"\n')
    done = command(
        "prune", *flags, "--config", file, "--ratio", "0.25", "-o", tmp_path / "out", "--json"
    )
    assert done.code == 0, done.err
    told = done.json()
    assert (told["ratio_requested"], told["ratio_of"]) == (0.25, "channels")
    assert abs(told["ratio_effective"]["channels"] - 0.25) <= 1 / told["dense"]["units"]
    record = read_value(tmp_path / "out" / "build.json", BuildRecord)
    assert record.settings["criterion"] == "random"


# --- methods -------------------------------------------------------------------------------------


def test_the_method_is_ours_unless_said() -> None:
    for config in (load_config(model="m"), load_config(model="m", method="cswap")):
        assert config.prune.method == "cswap"
        assert chosen(config) == ("predicted", "kl", "set", True)
    assert load_config(model="m") == load_config(model="m", method="cswap")


def test_paper_stands_for_what_was_published() -> None:
    config = load_config(model="m", method="paper")
    assert config.prune.method == "paper"
    assert chosen(config) == ("zero", "true-class", "unit", False)
    assert not config.prune.mix
    assert not config.prune.refit_producers
    best = load_config(model="m")
    assert best.prune.mix
    assert best.prune.refit_producers


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"method": "paper", "refit": True}, ("zero", "true-class", "unit", True)),
        ({"method": "paper", "intervention": "mean"}, ("mean", "true-class", "unit", False)),
        ({"method": "paper", "select": "set"}, ("zero", "true-class", "set", False)),
        ({"method": "paper", "effect": None}, ("zero", "true-class", "unit", False)),
        ({"effect": "true-class"}, ("predicted", "true-class", "set", True)),
        ({"method": "cswap", "refit": False}, ("predicted", "kl", "set", False)),
    ],
)
def test_a_setting_of_its_own_wins_over_the_method(
    settings: dict[str, Any], wanted: tuple[str, str, str, bool]
) -> None:
    assert chosen(load_config(model="m", **settings)) == wanted


def test_method_and_setting_may_come_from_different_places(tmp_path: Path) -> None:
    file = toml(tmp_path / "c.toml", 'method = "paper"\nrefit = true\n')
    assert chosen(load_config(file, model="m")) == ("zero", "true-class", "unit", True)
    config = load_config(file, model="m", method="cswap", effect="true-class")
    assert chosen(config) == ("predicted", "true-class", "set", True)


def test_an_unknown_method_is_named(command: Command) -> None:
    with pytest.raises(UsageError) as err:
        load_config(model="m", method="taylor")
    assert "--method: Input should be 'cswap' or 'paper' (got 'taylor')" in str(err.value)
    done = command("build", "demo-resnet", "--method", "taylor")
    assert done.code == 2
    assert "taylor" in done.err


def test_the_paper_s_method_in_a_real_run(
    command: Command, flags: tuple[str, ...], tmp_path: Path
) -> None:
    done = command("prune", *flags, "--method", "paper", "-o", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    record = read_value(tmp_path / "out" / "build.json", BuildRecord)
    settings = record.settings
    assert settings["method"] == "paper"
    assert [settings[n] for n in ("intervention", "effect", "select", "refit")] == [
        "zero", "true-class", "unit", False,
    ]  # fmt: skip
    plan = read_value(tmp_path / "out" / "plan.json", PrunePlan)
    assert plan.refitted == plan.producers == ()
    assert {(log.candidate, log.kl) for log in plan.rounds} == {("effect", None)}
    assert plan.settings["intervention"] == "zero"
    assert sum(log.measured for log in plan.rounds) > 0


def chosen(config: Config) -> tuple[str, str, str, bool]:
    prune = config.prune
    return prune.intervention, prune.effect, prune.select, prune.refit


# --- one field is a setting ----------------------------------------------------------------------


def test_a_new_setting_is_one_field(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Flag, help, bounds, TOML name, section table and key come from the field alone."""
    from typer.testing import CliRunner

    class Wider(PruneConfig):
        patience: Annotated[int, Field(ge=1), Flag("Rounds without gain.")] = 3

    class Whole(Config):
        prune: Wider = Field(default_factory=Wider)

    monkeypatch.setattr(cswap_deploy.config, "Config", Whole)
    assert load_config(model="m").prune.key()["patience"] == 3  # type: ignore[attr-defined]
    file = toml(tmp_path / "c.toml", "[prune]\npatience = 5\nratio = 0.2\n")
    read = load_config(file, model="m")
    assert (read.prune.patience, read.prune.ratio) == (5, 0.2)  # type: ignore[attr-defined]
    assert read.prune.key() != load_config(model="m", ratio=0.2).prune.key()
    with pytest.raises(UsageError, match="--patience: Input should be greater than or equal to 1"):
        load_config(model="m", patience=0)

    given: list[Any] = []
    app = typer.Typer()
    app.command()(with_settings(lambda **settings: given.append(settings), ("prune",)))
    run = CliRunner().invoke(app, ["--patience", "7"])
    assert run.exit_code == 0, run.output
    assert load_config(model="m", **given[0]).prune.patience == 7  # type: ignore[attr-defined]
    assert "Rounds without gain (3)." in CliRunner().invoke(app, ["--help"]).output


def test_every_name_is_in_one_section_and_every_setting_has_its_help() -> None:
    names = [name for section in sections().values() for name in section.model_fields]
    assert len(names) == len(set(names))
    for section in sections().values():
        for name in section.model_fields:
            assert flag_of(section, name).help.endswith("."), name


def test_a_file_may_have_a_table_for_each_section(tmp_path: Path) -> None:
    flat = toml(tmp_path / "flat.toml", 'ratio = 0.3\ntarget = ["openvino"]\nlatency-runs = 20\n')
    tables = toml(
        tmp_path / "tables.toml",
        '[prune]\nratio = 0.3\n[engine]\ntarget = ["openvino"]\n[measure]\nlatency-runs = 20\n',
    )
    assert load_config(flat, model="m") == load_config(tables, model="m")


def test_what_changes_no_result_is_not_in_the_key() -> None:
    one = load_config(model="m", workers=2, memory_budget="1GiB").prune
    assert one.key() == load_config(model="m").prune.key()
    assert one.key() == load_config(model="m", device="cuda:1").prune.key(), "the device's name is"


def test_a_size_is_read_without_torch() -> None:
    script = (
        "import sys; from cswap_deploy.config import load_config\n"
        "budget = load_config(model='m', memory_budget='2GiB').prune.memory_budget\n"
        "assert budget == 2**31, budget\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    with pytest.raises(UsageError, match="--memory-budget: Value error, is no amount of memory"):
        load_config(model="m", memory_budget="much")


def test_an_aim_that_is_given_replaces_one_in_a_file(tmp_path: Path) -> None:
    file = toml(tmp_path / "c.toml", 'ratio = 0.3\nratio-of = "macs"\n')
    faster = load_config(file, model="net", speedup=1.5).prune
    assert (faster.speedup, faster.ratio_of) == (1.5, "latency")
    assert faster.ratio == pytest.approx(1 / 3)
    smaller = load_config(file, model="net", ratio=0.5).prune
    assert (smaller.ratio, smaller.ratio_of) == (0.5, "macs")
    file = toml(tmp_path / "d.toml", 'max-latency = "4ms"\n')
    assert load_config(file, model="net", ratio=0.5).prune.max_latency is None
    both = toml(tmp_path / "e.toml", "ratio = 0.5\nspeedup = 1.5\n")
    with pytest.raises(UsageError, match="one aim"):
        load_config(both, model="net")
