"""A pruned network that is not faster is called that, in colour, wherever results are told."""

from __future__ import annotations

import io
import random
from typing import Any

import pytest
from made_up_bundle import latency, made_up_manifest, made_up_plan, made_up_targets
from rich.console import Console as RichConsole

from cswap_deploy.cli.output import Console
from cswap_deploy.measure.engine import summary
from cswap_deploy.measure.statistics import median_ratio_interval
from cswap_deploy.records.bundle import describe
from cswap_deploy.records.manifest import Manifest, TargetResult
from cswap_deploy.report import sections
from cswap_deploy.report.pages import render_html, render_markdown
from cswap_deploy.report.terminal import draw


def target(speedup: float, low: float | None = None, high: float | None = None) -> TargetResult:
    update: dict[str, Any] = {
        "latency": latency(1.0, seed=1), "speedup_low": low, "speedup_high": high,
    }  # fmt: skip
    result = made_up_targets()[0].model_copy(update=update)
    dense = latency(1.0, seed=1).model_copy(update={"p50_ms": speedup * result.latency.p50_ms})  # type: ignore[union-attr]
    return result.model_copy(update={"dense_latency": dense})


def manifest(ratio: float = 0.4, **measured: Any) -> Manifest:
    made = made_up_manifest(targets=(target(**measured),))
    return made.model_copy(update={"settings": made.settings | {"ratio": ratio}})


def screen(of: Manifest) -> str:
    console = Console(as_json=False, quiet=False)
    told = io.StringIO()
    console.err = RichConsole(
        file=told, force_terminal=True, color_system="standard", highlight=False
    )
    console.bundle({"bundle": "out"} | describe(of))
    return told.getvalue()


SLOW = [
    ({"speedup": 0.98}, "not faster: 0.98x"),
    ({"speedup": 1.01, "low": 0.99, "high": 1.03}, "not faster: 1.01x, within the noise"),
]


@pytest.mark.parametrize(("measured", "words"), SLOW)
def test_it_is_said_everywhere(measured: dict[str, float], words: str) -> None:
    made = manifest(**measured)
    assert f"\x1b[33m, {words}" in screen(made)
    assert words in summary(made.targets[0])
    markdown, page = (f(made, made_up_plan()) for f in (render_markdown, render_html))
    for text in (markdown, page):
        top = text.split("Accuracy")[0]
        assert top.count(words) == 3, "in the summary, in the tile, among the warnings"
    assert '<span class="slow">not faster: ' in page
    report = sections.describe(made, made_up_plan(), ())
    coloured = [str(line) for line in draw(report, 100) if line.style == "yellow"]
    assert sum(words in line for line in coloured) == 2


@pytest.mark.parametrize(
    "measured",
    [{"speedup": 1.36}, {"speedup": 1.05, "low": 1.02, "high": 1.08}, {"speedup": 0.9, "ratio": 0}],
)
def test_what_is_faster_or_was_not_pruned_is_not_called_so(measured: dict[str, float]) -> None:
    made = manifest(**measured)
    assert "not faster" not in screen(made)
    assert f"{measured['speedup']:.2f}x the dense network's speed" in screen(made)
    assert "not faster" not in render_markdown(made, made_up_plan())
    assert "not faster" not in summary(made.targets[0], pruned=measured.get("ratio") != 0)


def test_the_interval_of_a_ratio() -> None:
    assert median_ratio_interval([2.0] * 20, [1.0] * 20) == (2.0, 2.0)
    low, high = median_ratio_interval(range(1, 101), [1.0] * 100)
    assert (low, high) == (41, 61)  # 50 -+ 1.96 * 5, at these places of the ordered ratios
    assert median_ratio_interval([3.0], [2.0]) == (1.5, 1.5)
    inside, rng = 0, random.Random(0)
    for _ in range(400):
        first = [rng.lognormvariate(0, 0.3) for _ in range(50)]
        low, high = median_ratio_interval(first, [1.0] * 50)
        inside += low <= 1 <= high
    assert 0.93 <= inside / 400 <= 0.99
