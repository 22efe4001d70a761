"""Ctrl-C, ``kill`` and a terminal that is closed end both commands alike, at any moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small_models

from cswap_deploy.runtime import process

HERE = Path(__file__).parents[1]
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
WORDS = {
    signal.SIGINT: "interrupted", signal.SIGTERM: "ended by SIGTERM",
    signal.SIGHUP: "ended by SIGHUP",
}  # fmt: skip
KEPT = "; finished stages are kept, the same command goes on from there"
STRUCK = """
import importlib.abc, os, signal, sys
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), {number})
sys.meta_path.insert(0, Finder())
sys.argv[0] = "command"
from {home} import main
sys.exit(main())
"""


def _begin_with(ignored: signal.Signals | None) -> None:
    """Whatever started the tests, as ``nohup`` may have."""
    for number in CODES:
        signal.signal(number, signal.SIG_IGN if number == ignored else signal.SIG_DFL)


def python(*line: object, ignored: signal.Signals | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *map(str, line)], text=True,
        env={**os.environ, "PYTHONPATH": str(HERE)}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: _begin_with(ignored),  # noqa: PLW1509
    )  # fmt: skip


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize(
    ("home", "module", "arguments"),
    [
        ("cswap_deploy.cli.main", "typer", ("models",)),
        ("cswap_deploy.cli.main", "cswap_deploy.models.listing", ("models",)),
        ("cswap_deploy.runtime.cli", "numpy", ("bundle", "picture.png")),
    ],
)
def test_a_signal_while_things_are_imported(
    number: signal.Signals, home: str, module: str, arguments: tuple[str, ...]
) -> None:
    code = STRUCK.format(home=home, module=module, number=int(number))
    with python("-c", code, *arguments) as running:
        out, err = running.communicate(timeout=60)
    kept = KEPT if "cli.main" in home else ""
    assert (running.returncode, out, err) == (
        CODES[number], "", f"error: {WORDS[number]}{kept}\n",
    )  # fmt: skip


def test_what_was_to_be_ignored_stays_so() -> None:
    """As under ``nohup``."""
    code = STRUCK.format(home="cswap_deploy.cli.main", module="typer", number=int(signal.SIGHUP))
    with python("-c", code, "models", ignored=signal.SIGHUP) as running:
        out, err = running.communicate(timeout=60)
    assert (running.returncode, err) == (0, "")
    assert "demo-resnet" in out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_build_that_is_ended_leaves_nothing_half_made(
    flags: tuple[str, ...], tmp_path: Path, number: signal.Signals
) -> None:
    images, labels = small_models.pictures(1500, seed=0)
    np.savez(tmp_path / "many.npz", images=images, labels=labels)
    line = (
        "-m", "cswap_deploy.cli", "prune", *flags, "--data", tmp_path / "many.npz",
        "--calibration-samples", 1500, "--scoring-samples", 1500, "-o", tmp_path / "new" / "out",
        "--store", tmp_path / "store",
    )  # fmt: skip
    with python(*line) as running:
        assert running.stderr is not None
        for told in running.stderr:
            if "measuring effects" in told:
                break
        scratch = list((tmp_path / "store").glob(".partial-*"))
        assert scratch, "it was struck while it had something half-made"
        running.send_signal(number)
        running.send_signal(number)  # impatient: the clearing up goes on
        out, err = running.communicate(timeout=120)
    assert (running.returncode, out) == (CODES[number], "")
    assert err.splitlines()[-1] == f"error: {WORDS[number]}{KEPT}"
    assert "Traceback" not in err
    assert not (tmp_path / "new").exists()
    assert not [p for p in tmp_path.rglob("*") if "partial" in p.name]


def test_a_process_that_a_command_started_ends_with_it(tmp_path: Path) -> None:
    started = tmp_path / "started"
    child = f"import os, time; open({str(started)!r}, 'w').write(str(os.getpid())); time.sleep(99)"
    code = f"""
import os, signal, sys, threading, time
from cswap_deploy.export.child import UNLIMITED, run_child
from cswap_deploy.runtime.process import guarded
def strike():
    while not (os.path.exists({str(started)!r}) and open({str(started)!r}).read()):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=strike).start()
sys.exit(guarded(lambda: len(run_child({child!r}, [], UNLIMITED)), print))
"""
    with python("-c", code) as running:
        out, err = running.communicate(timeout=60)
    assert (running.returncode, out, err) == (143, "143 ended by SIGTERM\n", "")
    status = Path("/proc", started.read_text(), "status")
    assert not status.exists() or "State:\tZ" in status.read_text(), "dead, or not buried yet"


def test_a_build_that_handles_the_signal_itself_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """As TensorRT's builder is: what leaves its callbacks is printed and forgotten."""
    noticed = []

    def command() -> int:
        handler = signal.getsignal(signal.SIGTERM)
        assert isinstance(handler, process.Stopper)
        with handler.noticing(lambda: noticed.append("noticed")):
            signal.raise_signal(signal.SIGTERM)
        raise KeyboardInterrupt  # as that builder does at its next step

    before = {number: signal.getsignal(number) for number in CODES}
    try:
        assert process.guarded(command, print) == 143
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert noticed == ["noticed"]
    assert capsys.readouterr().out == "143 ended by SIGTERM\n"
