"""A sweep as a page, where a figure or an engine is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cswap_deploy.cli.output import Console
from cswap_deploy.records.measurements import Device
from cswap_deploy.records.sweep import Sweep, SweepPoint
from cswap_deploy.report.sweep import described, render_html, render_markdown


def swept(*points: SweepPoint) -> Sweep:
    return Sweep(
        created="2026-01-01T00:00:00+00:00", tool_version="1", model="net", target="tensorrt-rtx",
        ratio_of="params", points=points, settings={}, seconds=1.0,
        device=Device(cpu="a processor", cores=2, memory_mib=1),
    )  # fmt: skip


def test_what_does_not_run_here_is_said_and_not_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    """A TensorRT engine without a GPU, and outputs without classes."""
    found = swept(
        SweepPoint(label="dense", kind="dense", params=10, macs=10),
        SweepPoint(label="0.5", kind="pruned", bundle="0.5", params=5, macs=5, error_db=31.0),
    )
    (curve, _) = described(found).sections
    assert any("nothing was timed" in text for text in curve.text)
    assert not curve.figures
    for written in (render_html(found), render_markdown(found)):
        assert "31.0" in written
        assert "0.5" in written
    Console(as_json=True, quiet=True).sweep(Path("out"), found)
    told = json.loads(capsys.readouterr().out)
    assert [point["latency"] for point in told["points"]] == [None, None]
