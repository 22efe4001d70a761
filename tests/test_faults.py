"""``bench_faults`` in its smallest form, and that it does see what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
CARELESS = """
import contextlib, shutil, sys
from pathlib import Path
import bench_faults
from cswap_deploy import pipeline
@contextlib.contextmanager
def careless(target):
    shutil.rmtree(target, ignore_errors=True)
    Path(target).mkdir(parents=True)
    beside = [Path(target, str(n)) for n in range(300)]  # takes most of the operations on files
    for file in beside:
        file.touch()
    for file in beside:
        file.unlink()
    yield Path(target)
pipeline.atomic_folder = careless
sys.exit(bench_faults.main())
"""


def bench(*line: object) -> tuple[int, dict[str, Any]]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    done = subprocess.run(
        [sys.executable, *map(str, line), "--seeds", "1"], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_builds_that_are_killed_and_builds_that_race_leave_nothing_wrong() -> None:
    script = ROOT / "benchmarks" / "bench_faults.py"
    line = ("--points", 3, "--scenarios", "prune", "--builders", 2, "--race-until", "prune")
    code, told = bench(script, *line)
    assert (code, told["faults"], told["kill_points"]) == (0, 0, 3), told["results"]
    assert sum(result["killed"] for result in told["results"]) >= 2
    assert [r["scenario"] for r in told["results"]] == ["prune", "race", "race, --fresh"]


@pytest.mark.slow
def test_an_output_that_is_written_in_place_is_found_out() -> None:
    line = ("--points", 3, "--scenarios", "prune", "--builders", 0)
    code, told = bench("-c", CARELESS, *line)
    assert code == 1
    [result] = told["results"]
    assert any("half-written output" in f or "not taken again" in f for f in result["faults"])
