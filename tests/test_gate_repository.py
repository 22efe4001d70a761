"""A repository with a bundle and its limits, as its CI sees them: every way a gate can end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from junitparser import Failure, JUnitXml, Skipped
from made_up_bundle import reseal

if TYPE_CHECKING:
    from conftest import Made, Ran

ROOT = Path(__file__).parents[1]
OFTEN = ("--at-most", "6s", "--threads", "1")


@pytest.fixture
def repository(made: Made, tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    shutil.copytree(made.bundle, folder / "bundles" / "net")
    return folder


@pytest.fixture
def check(repository: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., Ran]) -> Any:
    """``cswap-deploy check`` in it, as a GitHub runner would."""

    def run(text: str, *flags: str) -> Ran:
        monkeypatch.chdir(repository)
        monkeypatch.setenv("GITHUB_ACTIONS", "true")
        monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(repository / "summary.md"))
        Path("budgets.toml").write_text(text)
        return command(
            "check", "bundles/net", "--budget", "budgets.toml", "--junit", "j.xml", *OFTEN, *flags
        )

    return run


def cases(folder: Path) -> dict[str, str]:
    """Test case -> its outcome, as a JUnit reader sees them."""
    found = {}
    for suite in JUnitXml.fromfile(str(folder / "j.xml")):
        for case in suite:
            kinds = {Failure: "failure", Skipped: "skipped"}
            (outcome,) = [kinds[type(r)] for r in case.result] or ["pass"]
            found[case.name] = outcome
    return found


def top1(folder: Path) -> float:
    told = json.loads((folder / "bundles/net/manifest.json").read_text())
    changes = [t["accuracy"] for t in told["targets"] if t["accuracy"]]
    return float(min(c["pruned"]["top1"] for c in [*changes, told["torch_accuracy"]]))


def test_passing(check: Any, repository: Path) -> None:
    done = check("params_max = 20_000\n[latency.onnxruntime]\np90_ms = 1000.0\nbatch = 2\n")
    assert done.code == 0, done.err
    assert cases(repository) == {"params_max": "pass", "latency.onnxruntime.p90_ms": "pass"}
    assert "::error" not in done.err
    summary = (repository / "summary.md").read_text()
    assert "### bundles/net: 2 limits held" in summary
    assert "batch 2" in summary
    done = check("params_max = 20_000\n", "--json")
    assert done.json()["ok"] is True


def test_failing(check: Any, repository: Path) -> None:
    done = check(
        "[latency.onnxruntime]\np50_ms = 0.000_001\nthroughput_min = 1e9\nmemory_max_mib = 1.0\n"
    )
    assert done.code == 3
    assert set(cases(repository).values()) == {"failure"}
    assert len(cases(repository)) == 3
    assert "::error title=cswap-deploy budget latency.onnxruntime.p50_ms::p50 (onnx" in done.err
    assert "3 of 3 limits failed" in (repository / "summary.md").read_text()


def test_a_baseline_that_is_faster_fails(check: Any, repository: Path) -> None:
    sys.path.insert(0, str(ROOT / "tests" / "targets"))
    from small_onnx import small_onnx

    (repository / "nothing.onnx").write_bytes(small_onnx(width=1))
    done = check(
        '[latency.onnxruntime]\nslowdown_max = 0.05\n[baseline]\nbundle = "nothing.onnx"\n'
        "size_growth_max = 0.1\n"
    )
    assert done.code == 3, done.err
    assert cases(repository) == {
        "latency.onnxruntime.slowdown_max": "failure", "baseline.size_growth_max": "failure",
    }  # fmt: skip


def test_a_baseline_that_is_the_same_passes(check: Any, repository: Path) -> None:
    done = check(
        '[latency.onnxruntime]\nslowdown_max = 0.5\n[baseline]\nbundle = "bundles/net"\n'
        "size_growth_max = 0.0\ntop1_drop_max = 0.05\n"
    )
    assert done.code == 0, done.err
    assert set(cases(repository).values()) == {"pass"}


def test_inconclusive(check: Any, repository: Path) -> None:
    """The limit is the measured accuracy itself, so its interval lies on both sides."""
    limit = f"top1_min = {top1(repository)}\n"
    done = check(limit)
    assert done.code == 0, done.err
    assert cases(repository) == {"top1_min": "skipped"}
    assert "::warning title=cswap-deploy budget top1_min::" in done.err
    assert "| inconclusive | `top1_min` |" in (repository / "summary.md").read_text()
    done = check('inconclusive = "fail"\n' + limit)
    assert done.code == 3
    assert cases(repository) == {"top1_min": "failure"}
    done = check('inconclusive = "fail"\n' + limit, "--recorded")
    assert done.code == 0, "the build's figure is judged as it stands"


def test_a_missing_baseline(check: Any) -> None:
    limits = "[latency.onnxruntime]\nslowdown_max = 0.1\n"
    for place, words in (("gone", "there is no baseline at"), ("git:main:gone", "git has no gone")):
        done = check(f'{limits}[baseline]\nbundle = "{place}"\n')
        assert done.code == 2
        assert words in done.err
        assert "fix: " in done.err
    done = check(limits)
    assert done.code == 2
    assert "latency.onnxruntime.slowdown_max needs a baseline" in done.err


def test_a_damaged_bundle(check: Any, repository: Path) -> None:
    with (repository / "bundles/net/model.onnx").open("ab") as file:
        file.write(b"\0")
    done = check("params_max = 20_000\n")
    assert done.code == 6
    assert "model.onnx has " in done.err


def test_a_baseline_of_another_device_is_measured_here_and_said(
    check: Any, repository: Path
) -> None:
    other = shutil.copytree(repository / "bundles/net", repository / "bundles/before")
    manifest = other / "manifest.json"
    told = json.loads(manifest.read_text())
    told["device"]["cpu"] = "Another Processor"
    reseal(manifest, told)
    done = check(
        '[latency.onnxruntime]\nslowdown_max = 0.5\n[baseline]\nbundle = "bundles/before"\n'
    )
    assert done.code == 0, done.err
    assert "built on Another Processor" in done.err


def test_a_target_that_does_not_run_here_fails(check: Any, repository: Path) -> None:
    done = check("[latency.tensorrt-rtx]\np50_ms = 5.0\nspeedup_min = 1.0\n")
    assert done.code == 3
    assert set(cases(repository).values()) == {"failure"}
    assert "not measured: " in done.err


def test_a_speedup_needs_the_dense_graph(check: Any, repository: Path) -> None:
    done = check("[latency.onnxruntime]\nspeedup_min = 1.0\n")
    assert done.code == 3
    assert "build it with --with-dense" in done.err
    assert check("[latency.onnxruntime]\nspeedup_min = 0.01\n", "--recorded").code == 0


def test_a_typo(check: Any) -> None:
    done = check("[latency.onnxruntime]\np5_ms = 1.0\n")
    assert done.code == 2
    assert "latency.onnxruntime.p5_ms: no such budget; did you mean p50_ms?" in done.err


def test_what_init_writes_holds_today(
    command: Callable[..., Ran], repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    done = command("budget", "init", "bundles/net", "--margin", "20%", "--ci", "github",
                   "--baseline", "bundles/net")  # fmt: skip
    assert done.code == 0, done.err
    assert done.out.split() == ["budgets.toml", ".github/workflows/cswap.yml"]
    done = command("check", "bundles/net", "--budget", "budgets.toml", *OFTEN)
    assert done.code == 0, done.err
    again = command("budget", "init", "bundles/net")
    assert again.code == 2
    assert "--force" in again.err
    assert command("budget", "init", "bundles/net", "--force").code == 0
    assert command("budget", "init", "bundles/net", "--margin", "0", "--force").code == 2
    assert command("budget", "init", "bundles/net", "--ci", "mine", "--force").code == 2


# --- the jobs that CI services run ---------------------------------------------------------------


def ran(folder: Path, script: str, **more: str) -> subprocess.CompletedProcess[str]:
    """A shell step on a stand-in for a runner: this machine, and the command of this checkout."""
    bin_ = folder / "bin"
    bin_.mkdir(exist_ok=True)
    for name, body in {
        "cswap-deploy": f'exec "{sys.executable}" -m cswap_deploy.cli "$@"',
        "pip": 'echo "pip $@" >> pip.log', "python": 'echo "python $@" >> pip.log',
    }.items():  # fmt: skip
        (bin_ / name).write_text(f"#!/bin/sh\n{body}\n")
        (bin_ / name).chmod(0o755)
    path = f"{bin_}:{os.environ['PATH']}"
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "PATH": path, **more}
    return subprocess.run(
        ["bash", "-eo", "pipefail", "-c", script], cwd=folder, env=env, capture_output=True,
        text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(("limit", "code"), [(20_000, 0), (5, 3)])
def test_the_composite_action(repository: Path, limit: int, code: int) -> None:
    action = yaml.safe_load((ROOT / ".github/actions/check/action.yml").read_text())
    assert action["runs"]["using"] == "composite"
    (repository / "budgets.toml").write_text(f"params_max = {limit}\n")
    output, summary = repository / "output", repository / "summary"
    given = {name: str(told.get("default", "")) for name, told in action["inputs"].items()}
    given |= {"bundle": "bundles/net"}
    found = 0
    for step in action["runs"]["steps"]:
        values = {
            name: given[value.removeprefix("${{ inputs.").removesuffix(" }}")]
            for name, value in step.get("env", {}).items()
        }
        done = ran(
            repository, step["run"], GITHUB_OUTPUT=str(output), GITHUB_ACTIONS="true",
            GITHUB_STEP_SUMMARY=str(summary), **values,
        )  # fmt: skip
        found = found or done.returncode
    assert found == code, done.stderr
    assert ("::error" in done.stderr) == bool(code)
    assert "cswap-deploy[cpu]" in (repository / "pip.log").read_text()
    outputs = dict(line.split("=", 1) for line in output.read_text().splitlines())
    assert set(outputs) == set(action["outputs"])
    assert all((repository / name).is_file() for name in outputs.values())
    assert "params_max" in summary.read_text()


@pytest.mark.parametrize("service", ["github", "gitlab"])
def test_the_written_jobs(
    command: Callable[..., Ran], repository: Path, service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    done = command("budget", "init", "bundles/net", "--ci", service)
    assert done.code == 0, done.err
    job = yaml.safe_load(Path(done.out.split()[1]).read_text())
    if service == "github":
        steps = [s["run"] for s in job["jobs"]["budgets"]["steps"] if "run" in s]
        kept = job["jobs"]["budgets"]["steps"][-1]["with"]["path"].split()
    else:
        steps = [*job["cswap"]["before_script"], *job["cswap"]["script"]]
        kept = [*job["cswap"]["artifacts"]["paths"], job["cswap"]["artifacts"]["reports"]["junit"]]
    for step in steps:
        done = ran(repository, step)
        assert done.returncode == 0, done.stderr
    assert all((repository / name).is_file() for name in kept)
