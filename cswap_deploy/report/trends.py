"""Measurements over time: a table and, on a page, one picture a series."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from cswap_deploy.gate.history import Measurement, Trend
from cswap_deploy.report import cells as c
from cswap_deploy.report.document import Figure, Report, section, table
from cswap_deploy.report.figures import trend_figure
from cswap_deploy.report.pages import page

_PICTURES = 40


def render_html(trends: Sequence[Trend], name: str) -> str:
    """A history as one HTML page."""
    return page(described(trends, name=name))


def described(trends: Sequence[Trend], *, name: str = "history") -> Report:
    """Every series: how many measurements, the last one, and where another level began."""
    rows = [
        (
            trend.series, trend.runner, len(trend.measurements), _amount(trend.measurements[-1]),
            trend.measurements[-1].at[:16].replace("T", " "), _changes(trend),
        )
        for trend in trends
    ]  # fmt: skip
    words = (
        "A change point is where the level of a series changes by more than the noise between "
        "neighbours explains; series of one runner are never mixed with those of another."
        if trends
        else "Nothing matches."
    )
    figures = [
        Figure(partial(trend_figure, trend), f"{trend.series} on {trend.runner}.")
        for trend in trends[:_PICTURES]
        if len(trend.measurements) > 1
    ]
    heads = "series | runner | measurements | last | at | change points"
    made = section("Trends", words, tables=[table(heads, rows)], figures=figures)
    assert made is not None
    return Report(title=name, sections=(made,), sources=(name,))


def _amount(one: Measurement) -> c.Amount:
    if one.unit == "ms":
        return c.ms(one.value)
    if one.unit == "bytes":
        return c.size(one.value)
    if one.unit == "fraction":
        return c.top1(one.value)
    return c.Amount(f"{one.value:.4g}" if one.unit == "ratio" else f"{one.value:.4g} {one.unit}")


def _changes(trend: Trend) -> str:
    places = [trend.measurements[at] for at in trend.changes]
    told = ", ".join(f"{m.at[:10]} {m.revision[:8]}".strip() for m in places)
    change = trend.last_change
    return told if change is None else f"{told}; by {100 * change:+.1f} % at the last"
