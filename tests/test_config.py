"""Settings from flags, a TOML file and the environment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cswap_deploy.errors import UsageError
from cswap_deploy.old_config import BuildConfig, load_config
from cswap_deploy.records.plan import PrunePlan
from cswap_deploy.records.value import read_value
from cswap_deploy.stages import BuildRecord

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
    assert (config.model, config.ratio, config.ratio_of) == ("resnet18", 0.5, "macs")
    assert config.input_size == (3, 64, 64)
    assert config.target == ("onnxruntime", "tensorrt-rtx")
    assert (config.scoring_samples, config.rounds) == (8, BuildConfig(model="x").rounds)


def test_the_environment_names_defaults_that_a_file_and_arguments_win_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    defaults = toml(tmp_path / "defaults.toml", "ratio = 0.1\nrounds = 2\nseed = 5\n")
    monkeypatch.setenv("CSWAP_CONFIG", str(defaults))
    file = toml(tmp_path / "c.toml", "ratio = 0.2\nrounds = 3\n")
    config = load_config(file, model="m", ratio=0.3)
    assert (config.ratio, config.rounds, config.seed) == (0.3, 3, 5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ratio": -0.1}, "--ratio: Input should be greater than or equal to 0 (got -0.1)"),
        ({"ratio": 1.0}, "--ratio: Input should be less than 1 (got 1.0)"),
        ({"round_to": 0}, "--round-to: Value error, must be 1 or more, or auto (got 0)"),
        ({"opset": 17}, "--opset: Value error, must be 18 or higher, or auto (got 17)"),
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
        ({"ratio_of": "bytes"}, "--ratio-of: Input should be 'params', 'channels' or 'macs'"),
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
        assert config.method == "cswap"
        assert chosen(config) == ("predicted", "kl", "set", True)
    assert BuildConfig(model="m") == load_config(model="m", method="cswap")


def test_paper_stands_for_what_was_published() -> None:
    config = load_config(model="m", method="paper")
    assert config.method == "paper"
    assert chosen(config) == ("zero", "true-class", "unit", False)
    assert not config.mix
    assert not config.refit_producers
    best = load_config(model="m")
    assert best.mix
    assert best.refit_producers


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
    assert chosen(BuildConfig(model="m", **settings)) == wanted


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
    assert {(log.order, log.kl) for log in plan.rounds} == {("effect", None)}
    assert plan.settings["intervention"] == "zero"
    assert sum(log.measured for log in plan.rounds) > 0


def chosen(config: BuildConfig) -> tuple[str, str, str, bool]:
    return config.intervention, config.effect, config.select, config.refit
