"""The history file: many writers, killed writers, damage, trends."""

from __future__ import annotations

import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from cswap_deploy.errors import ArtifactError, UsageError
from cswap_deploy.gate.history import (
    History,
    Measurement,
    change_points,
    measurements_of,
)

if TYPE_CHECKING:
    from conftest import Made, Ran


def one(value: float, at: int = 0, series: str = "net/p50", **more: str) -> Measurement:
    return Measurement(f"2026-01-{1 + at:02}T00:00:00+00:00", series, value, "ms", **more)


def series(values: list[float]) -> list[Measurement]:
    return [Measurement(f"2026-01-01T{at:06}", "net/p50", v, "ms") for at, v in enumerate(values)]


_WRITER = """
import sys
from pathlib import Path
from cswap_deploy.gate.history import History, Measurement
file, who, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
history = History(file)
print("ready", flush=True)
for at in range(count):
    history.add([
        Measurement("2026-01-01", f"{who}/{k}", float(at), "ms", runner="r") for k in range(2)
    ])
"""


def test_eight_processes_adding_at_once_lose_nothing(tmp_path: Path) -> None:
    file = tmp_path / "h.db"
    writers = [
        subprocess.Popen([sys.executable, "-c", _WRITER, str(file), f"w{k}", "25"])
        for k in range(8)
    ]
    assert [writer.wait(timeout=120) for writer in writers] == [0] * 8
    trends = History(file).trends()
    assert len(trends) == 16
    for trend in trends:
        assert [m.value for m in trend.measurements] == [float(at) for at in range(25)]


def test_a_killed_writer_leaves_whole_entries_and_a_readable_file(tmp_path: Path) -> None:
    file = tmp_path / "h.db"
    for turn in range(5):
        writer = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(file), f"t{turn}", "100000"],
            stdout=subprocess.PIPE,
        )  # fmt: skip
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(0.05 * turn)
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        counts = [len(t.measurements) for t in History(file).trends(f"t{turn}/*")]
        assert not counts or counts == [counts[0]] * 2, "both of an addition, or none"
        History(file).add([one(1.0, series=f"after{turn}")])
    assert len(History(file).trends("after*")) == 5


def test_what_is_no_history_is_refused_and_left_alone(
    command: Callable[..., Ran], tmp_path: Path
) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("important " * 500)
    with pytest.raises(ArtifactError, match="is no history"):
        History(text)
    assert text.read_text() == "important " * 500
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE mine (x)")
    with pytest.raises(ArtifactError, match="no history of version 1"):
        History(other)
    later = tmp_path / "later.db"
    History(later)
    with sqlite3.connect(later) as connection:
        connection.execute("PRAGMA user_version = 7")
    with pytest.raises(ArtifactError, match=r"version 1 \(it says 7\)"):
        History(later)
    with pytest.raises(UsageError):
        History(tmp_path / "no" / "folder" / "h.db")
    assert command("history", "show", tmp_path / "gone.db").code == 2
    assert not (tmp_path / "gone.db").exists()


def test_change_points() -> None:
    rng = np.random.default_rng(0)
    level = np.repeat([5.0, 5.5], 15)
    (found,) = change_points(series(list(level * rng.lognormal(0, 0.01, size=30))))
    assert abs(found - 15) <= 1
    false = sum(
        bool(change_points(series(list(rng.lognormal(0, 0.02, size=30))))) for _ in range(100)
    )
    assert false <= 10
    assert change_points(series([5.0] * 4 + [9.0] * 3)) == (), "too few to tell"
    assert change_points(series([5.0] * 30)) == ()


def test_runners_are_never_mixed(tmp_path: Path) -> None:
    history = History(tmp_path / "h.db")
    history.add([one(5.0, at, runner="a") for at in range(3)] + [one(9.0, runner="b")])
    trends = history.trends("net/*")
    assert [(t.runner, len(t.measurements)) for t in trends] == [("a", 3), ("b", 1)]
    assert history.trends("other/*") == []


def test_bundles_and_results_are_kept_and_shown(
    command: Callable[..., Ran], made: Made, tmp_path: Path
) -> None:
    file, bench = tmp_path / "h.db", tmp_path / "bench.json"
    done = command("bench", made.bundle, "--runs", 20, "--threads", 1, "--json")
    assert done.code == 0, done.err
    bench.write_text(done.out)
    done = command("history", "add", file, made.bundle, bench, "--revision", "abc", "--json")
    assert done.code == 0, done.err
    assert done.json()["added"] == len(measurements_of(made.bundle)) + 2
    page = tmp_path / "trends.html"
    assert command("history", "add", file, made.bundle, "--json").json()["added"] == 0, "known"
    for second in (1, 2):
        told = json.loads(bench.read_text())
        told["created"] = f"2026-01-01T00:00:0{second}+00:00"
        bench.write_text(json.dumps(told))
        assert command("history", "add", file, bench).code == 0
    done = command("history", "show", file, "*/p50", "--html", page, "--json")
    assert done.code == 0, done.err
    trends = done.json()["trends"]
    shown = {t["series"]: len(t["measurements"]) for t in trends}
    assert shown[f"{made.bundle.name}/onnxruntime/b1/p50"] == 4
    assert all(math.isfinite(m["value"]) for t in trends for m in t["measurements"])
    assert "<svg" in page.read_text()
    assert "Trends" in command("history", "show", file).out
    for text in ("[]", "{}x", json.dumps({"rows": 3}), json.dumps({"a": 1})):
        bench.write_text(text)
        assert command("history", "add", file, bench).code == 2, text


@pytest.mark.parametrize("value", ["'fast'", "9e999", "X'00'"])
def test_a_history_of_something_else_than_numbers(tmp_path: Path, value: str) -> None:
    """SQLite keeps what it is given in any column."""
    file = tmp_path / "h.db"
    History(file).add([Measurement("2026-11-22", "runner/self-test", 1.0, "ms", runner="here")])
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute(f"UPDATE measurements SET value = {value}")
    history = History(file)
    with pytest.raises(ArtifactError, match="is a damaged history: it holds the figure"):
        history.trends()
    with pytest.raises(ArtifactError, match="is a damaged history: it holds the figure"):
        history.smallest_effect("here")


def test_text_that_is_none_is_refused(tmp_path: Path) -> None:
    history = History(tmp_path / "h.db")
    with pytest.raises(UsageError, match=r"takes text, not '\\ud800'"):
        history.add([Measurement("\ud800", "net/b1/p50", 1.0, "ms", runner="here")])
    assert history.trends() == []
