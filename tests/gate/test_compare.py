"""Verdicts of comparisons, on real engines and by their intervals."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cswap_deploy.errors import ArtifactError, UsageError
from cswap_deploy.gate.compare import (
    CompareOptions,
    compare,
    effect_on,
    latency_verdict,
    results_of,
)
from cswap_deploy.gate.history import History, Measurement
from cswap_deploy.gate.subjects import fetched, open_subject
from cswap_deploy.measure import paired
from cswap_deploy.records.comparison import Ratio

if TYPE_CHECKING:
    from conftest import Made, Ran

QUICK = CompareOptions(threads=1, at_most=20)


@pytest.fixture(autouse=True)
def _short_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paired, "_EPOCH_SECONDS", 0.02)


def small_graph(path: Path, *, channels: int = 3) -> Path:
    """An ONNX file that does almost nothing, on the images of the small network."""
    from small_onnx import small_onnx

    path.write_bytes(small_onnx(shape=(channels, 16, 16), width=1))
    return path


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (1.011, 1.2, "worse"), (1.009, 1.2, "inconclusive"), (0.99, 1.019, "same"),
        (1.011, 1.015, "worse"), (0.98, 1.0, "inconclusive"), (0.985, 1.0, "same"),
        (0.8, 0.989, "better"), (0.8, 0.995, "inconclusive"), (0.9, 1.1, "inconclusive"),
    ],
)  # fmt: skip
def test_an_interval_decides(low: float, high: float, verdict: str) -> None:
    found = Ratio(value=(low + high) / 2, low=low, high=high)
    assert latency_verdict(found, 0.02) == verdict


def test_a_bundle_with_itself(made: Made) -> None:
    found = compare(made.bundle, made.bundle, QUICK)
    parts = {part.what: part for part in found.parts}
    assert list(parts) == ["latency", "accuracy", "size"]
    assert parts["size"].verdict == "same"
    assert parts["accuracy"].verdict in ("same", "inconclusive"), "two hundred images only"
    change = parts["accuracy"].change
    assert change is not None
    assert (change.drop, change.agreement, parts["accuracy"].p_value) == (0.0, 1.0, 1.0)
    assert parts["latency"].ratio is not None
    assert parts["latency"].ratio.epochs
    assert found.target == "onnxruntime"


def test_a_bundle_against_what_does_almost_nothing(made: Made, tmp_path: Path) -> None:
    nothing = small_graph(tmp_path / "small.onnx")
    found = compare(nothing, made.bundle, QUICK)
    assert found.verdict == "worse"
    assert {part.what for part in found.parts} == {"latency", "size"}, "no predictions to pair"
    results = results_of(found, inconclusive_passes=True)
    assert [r.ok for r in results] == [False, False]
    assert "slower" in results[0].text
    assert compare(made.bundle, nothing, QUICK).verdict == "better"


def test_the_command_s_exit_codes_and_files(
    command: Callable[..., Ran], made: Made, tmp_path: Path
) -> None:
    from junitparser import JUnitXml

    nothing = small_graph(tmp_path / "small.onnx")
    flags = ("--threads", 1, "--at-most", "20s", "--html", tmp_path / "c.html",
             "--junit", tmp_path / "j.xml", "--markdown", tmp_path / "c.md")  # fmt: skip
    done = command("compare", nothing, made.bundle, *flags)
    assert (done.code, done.out) == (3, "worse\n"), done.err
    assert "is worse (compare.latency, compare.size)" in done.err
    assert JUnitXml.fromfile(str(tmp_path / "j.xml")).failures == 2
    assert "| FAIL | `compare.latency` |" in (tmp_path / "c.md").read_text()
    page = (tmp_path / "c.html").read_text()
    assert "Side by side" in page
    done = command("compare", made.bundle, nothing, "--json", *flags[:4])
    assert done.code == 0
    assert done.json()["verdict"] == "better"


def test_other_inputs_and_bad_settings_are_refused(
    command: Callable[..., Ran], made: Made, tmp_path: Path
) -> None:
    other = small_graph(tmp_path / "one.onnx", channels=1)
    with pytest.raises(UsageError, match="unlike inputs"):
        compare(other, made.bundle, QUICK)
    with pytest.raises(UsageError, match="has no engine for openvino"):
        compare(made.bundle, made.bundle, CompareOptions(target="openvino"))
    for flags, words in (
        (("--min-effect", "nan%"), "a fraction between 0 and 1"),
        (("--min-effect", "much"), "is no fraction"),
        (("--at-most", "soon"), "is no duration"),
        (("--inconclusive", "maybe"), "pass or fail"),
    ):
        done = command("compare", made.bundle, made.bundle, *flags)
        assert done.code == 2, flags
        assert words in done.err
    assert command("compare", tmp_path / "gone", made.bundle).code == 2
    copy = shutil.copytree(made.bundle, tmp_path / "copy")
    with (copy / "model.onnx").open("ab") as file:
        file.write(b"\0")
    assert command("compare", made.bundle, copy).code == 6


def test_a_runner_s_own_noise_raises_what_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CSWAP_RUNNER", "here")
    file = tmp_path / "h.db"
    assert effect_on(None, None) == 0.02
    assert effect_on(file, None) == 0.02
    noise = [Measurement("2026-01-01", "runner/self-test", x, "fraction") for x in (0.01, 0.05)]
    History(file).add(noise)
    assert effect_on(file, None) == 0.05
    assert effect_on(file, 0.1) == 0.1
    monkeypatch.setenv("CSWAP_RUNNER", "there")
    assert effect_on(file, None) == 0.02


def test_plain_graphs_are_opened_for_the_batch(tmp_path: Path) -> None:
    graph = small_graph(tmp_path / "small.onnx")
    subject = open_subject(graph, tmp_path, batch=4)
    assert (subject.target, subject.input_size) == ("onnxruntime", (3, 16, 16))
    session = subject.load(threads=1, batch=4)
    assert session.run(subject.images(4)).shape == (4, 5)
    session.close()
    (tmp_path / "bad.onnx").write_bytes(b"no graph")
    with pytest.raises(ArtifactError):
        open_subject(tmp_path / "bad.onnx", tmp_path)


def test_baselines_come_from_paths_and_from_git(made: Made, tmp_path: Path) -> None:
    import subprocess

    repository = tmp_path / "repository"
    shutil.copytree(made.bundle, repository / "bundles" / "net")
    line = ["git", "-C", str(repository), "-c", "user.name=t", "-c", "user.email=t@t"]
    for more in (["init", "-q", "-b", "main"], ["add", "-A"], ["commit", "-q", "-m", "net"]):
        subprocess.run([*line, *more], check=True)
    shutil.rmtree(repository / "bundles")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    found = fetched("git:main:bundles/net", scratch, near=repository)
    assert (found / "manifest.json").read_bytes() == (made.bundle / "manifest.json").read_bytes()
    open_subject(found, scratch)
    assert fetched(str(made.bundle), scratch, near=tmp_path) == made.bundle
    for place in ("gone", "git:main:gone", "git:none:bundles/net", "git:main", "git:--x:y"):
        with pytest.raises(UsageError):
            fetched(place, scratch, near=repository)
