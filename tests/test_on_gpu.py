"""The command for the rare hour with a GPU, here on the CPU: all of its logic runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_every_step_answers_or_says_what_is_missing(tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    flags = ["--device", "cpu", "--quick", "--minutes", "8", "--output", str(output)]
    done = subprocess.run(
        [sys.executable, "benchmarks/on_gpu.py", *flags],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert found == json.loads(done.stdout.splitlines()[-1])
    assert found["machine"]["gpu"] is None
    assert "torch" in found["machine"]["versions"]
    steps = found["steps"]
    assert list(steps) == ["kernel", "effects", "prune", "latency", "sanitizer", "engines"]
    assert steps["kernel"]["skipped"] == "the kernel needs a GPU"
    assert "skipped" in steps["sanitizer"]
    answers = {name: step["answer"] for name, step in steps.items() if "answer" in step}
    assert set(answers) == {"effects", "prune", "latency", "engines"}, steps
    for name, effects in answers["effects"].items():
        assert effects["largest_difference"] == 0, f"{name}: both are the CPU"
        assert effects["largest_difference_fused"] < 1e-4 * effects["largest_effect"], name
    dense, pruned = answers["prune"]["params"]
    assert pruned < dense
    assert answers["prune"]["passes"] > 0
    for batches in (answers["latency"], answers["engines"]):
        times = [v for k, v in batches.items() if "batch" in k]
        assert times
        assert all(t["median_ms"] > 0 for each in times for t in each.values())
