"""What the tests of whole builds share: a small network, small data, one finished bundle.

Heavy imports stand inside the fixtures: most tests need none of them.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from small_disks import mounted

HERE = Path(__file__).parent
RTX = find_spec("tensorrt_rtx") is not None
SAMPLES = {
    "calibration_samples": 100,
    "validation_samples": 200,
    "scoring_samples": 25,
    "rounds": 2,
    "round_to": 1,
    "latency_runs": 10,
}
"""Settings that make a build quick."""


def pytest_configure() -> None:
    """A shell starts what runs in the background with SIGINT ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, or one worker is busy with them when the others are done."""
    items.sort(key=lambda item: "slow" not in item.keywords)


def pytest_collection_finish() -> None:
    """What was imported stays, so no collection has to look through it again.

    Every measurement of a latency makes one, which took a second in a process that has all tests.
    """
    gc.collect()
    gc.freeze()


@dataclass(frozen=True, slots=True)
class Ran:
    """A command that ended."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """Its result; the whole of stdout must be one JSON object."""
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value


@dataclass(frozen=True, slots=True)
class Made:
    """What a real ``cswap-deploy build`` in a process of its own left."""

    ran: Ran
    bundle: Path
    store: Path
    settings: dict[str, Any]
    """The same build for the Python API, without output and store."""
    flags: tuple[str, ...]
    """The same build for the command, without output and store."""

    @property
    def own(self) -> tuple[str, ...]:
        """What a later stage is told again: a folder's own words are not enough."""
        named = ("model", "data", "validation_data")
        return tuple(p for n in named for p in (f"--{n.replace('_', '-')}", self.settings[n]))


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test reads or fills the user's own store."""
    monkeypatch.setenv("CSWAP_STORE", str(tmp_path / "store"))
    monkeypatch.delenv("CSWAP_CONFIG", raising=False)


def environment(**more: str) -> dict[str, str]:
    """For a process that can import ``small_models``."""
    return {**os.environ, "PYTHONPATH": str(HERE), **more}


def in_a_process(
    *arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None
) -> Ran:
    """The real command, from its first import to its exit code."""
    done = subprocess.run(
        [sys.executable, "-m", "cswap_deploy.cli", *map(str, arguments)],
        cwd=cwd, env=environment() if env is None else env,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    return Ran(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def process() -> Callable[..., Ran]:
    """Runs the command in a process of its own."""
    return in_a_process


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ran]:
    """Runs the command in this process, which has imported torch already."""

    def run(*arguments: object) -> Ran:
        from cswap_deploy.cli.main import main

        monkeypatch.setattr(sys, "argv", ["cswap-deploy", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return Ran(stop.value.code, out, err)

    return run


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A calibration and a validation file."""
    import numpy as np
    from small_models import pictures

    folder = tmp_path_factory.mktemp("pictures")
    for name, count, seed in (("calibration", 150, 0), ("validation", 300, 1)):
        images, labels = pictures(count, seed=seed)
        np.savez(folder / f"{name}.npz", images=images, labels=labels)
    return folder / "calibration.npz", folder / "validation.npz"


@pytest.fixture(scope="session")
def settings(pictures: tuple[Path, Path]) -> dict[str, Any]:
    """A quick build for the Python API."""
    from small_models import INPUT_SIZE, MEAN, STD

    targets = ("onnxruntime", "tensorrt-rtx") if RTX else ("onnxruntime",)
    return {
        "model": "small_models:small",
        "input_size": INPUT_SIZE,
        "mean": MEAN,
        "std": STD,
        "data": str(pictures[0]),
        "validation_data": str(pictures[1]),
        "target": targets,
        **SAMPLES,
    }


@pytest.fixture(scope="session")
def flags(settings: dict[str, Any]) -> tuple[str, ...]:
    """The same build for the command."""
    given: list[str] = [settings["model"]]
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if name == "target":
            given += [part for target in value for part in (flag, target)]
        elif name != "model":
            given += [flag, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return tuple(given)


@pytest.fixture(scope="session")
def made(
    tmp_path_factory: pytest.TempPathFactory, settings: dict[str, Any], flags: tuple[str, ...]
) -> Made:
    """One build by the real command; nobody writes into it."""
    folder = tmp_path_factory.mktemp("made")
    bundle, store = folder / "bundle", folder / "store"
    ran = in_a_process("build", *flags, "--json", "-o", bundle, "--store", store)
    assert ran.code == 0, ran.err
    return Made(ran, bundle, store, settings, flags)


@pytest.fixture
def store(made: Made, tmp_path: Path) -> Path:
    """A store of one's own that holds every stage of ``made``."""
    return shutil.copytree(made.store, tmp_path / "store")


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """Room for less than a bundle."""
    yield from mounted(tmp_path / "tiny", "size=64k")


@pytest.fixture
def locked_disk(tmp_path: Path) -> Iterator[Path]:
    """Nothing can be written there, by root neither."""
    yield from mounted(tmp_path / "locked", "size=64k", "ro")
