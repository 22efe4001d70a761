"""A sweep as a page, as Markdown and at a terminal: one table and one picture."""

from __future__ import annotations

from functools import partial

from cswap_deploy.records.amounts import duration
from cswap_deploy.records.sweep import Sweep, SweepPoint
from cswap_deploy.report import cells as c
from cswap_deploy.report import figures
from cswap_deploy.report.document import Figure, Report, Row, Section, section, table
from cswap_deploy.report.pages import markdown, page
from cswap_deploy.report.units import RATIO_WORDS

_SPARED = ("same class", "error", "parameters", "MACs", "bundle")
"""Columns that a narrow terminal leaves out."""


def render_markdown(sweep: Sweep) -> str:
    """The sweep as Markdown, without the picture."""
    return markdown(described(sweep))


def render_html(sweep: Sweep) -> str:
    """The sweep as one HTML page."""
    return page(described(sweep))


def described(sweep: Sweep) -> Report:
    """What a sweep found, in reading order."""
    made = (_curve(sweep), _asked(sweep))
    return Report(
        title=f"{sweep.model}: sweep",
        about=f"cswap-deploy {sweep.tool_version} · {sweep.created}",
        summary=_summary(sweep),
        warnings=tuple(f"{label} was not reached: {why}" for label, why in sweep.missed.items()),
        sections=tuple(part for part in made if part is not None),
        sources=("sweep.json",),
    )


def _summary(sweep: Sweep) -> str:
    pruned = [point for point in sweep.points if point.kind == "pruned"]
    others = [point for point in sweep.points if point.kind == "other"]
    sizes = f"{len(pruned)} size{'s' * (len(pruned) > 1)}"
    text = f"{sweep.model} at {sizes}, without training, in {duration(sweep.seconds)}."
    if others:
        text += f" {len(others)} dense network{'s' * (len(others) > 1)} beside it."
        text += "".join(f" {_beside(pruned, other)}" for other in others)
    if sweep.picked:
        text += f" Picked by {sweep.pick}: {sweep.picked}."
    elif sweep.pick:
        text += f" No point meets {sweep.pick}."
    return text


def _beside(pruned: list[SweepPoint], other: SweepPoint) -> str:
    """Whether the other network would have done: the best that is no slower than it."""
    if other.latency is None or other.accuracy is None:
        return ""
    limit = other.latency.p50_ms
    fit = [p for p in pruned if p.latency is not None and p.latency.p50_ms <= limit and p.accuracy]
    if not fit:
        return f"None of these sizes is as fast as {other.label}."
    best = max(fit, key=lambda p: p.accuracy.top1 if p.accuracy else 0)
    assert best.accuracy is not None
    # Two intervals of their own; paired predictions would tell more.
    apart = best.accuracy.low > other.accuracy.high or best.accuracy.high < other.accuracy.low
    better = best.accuracy.top1 > other.accuracy.top1
    verdict = "is better" if better else "would have done better"
    if not apart:
        verdict = "is no different from it beyond chance"
    who = best.label if better or not apart else other.label
    return (
        f"At the speed of {other.label} or above {who} {verdict}: top-1 "
        f"{c.top1(best.accuracy.top1)} of {best.label} against {c.top1(other.accuracy.top1)}."
    )


def curve(sweep: Sweep, chosen: str) -> Section:
    """The curve for the page of one point's own bundle, which is marked in it."""
    found = _curve(sweep, chosen)
    assert found is not None
    return found


def _curve(sweep: Sweep, chosen: str = "") -> Section | None:
    heads = "network | top-1 | drop | same class | error | p50 | speed | parameters | MACs | bundle"
    made = table(heads, (_row(point, sweep) for point in sweep.points), optional=_SPARED)
    text = [
        "In brackets are 95 % intervals: Wilson's for top-1, paired by image for the drop, by "
        "alternating calls for the speed."
    ]
    if chosen:
        text.insert(0, f"This bundle is the point {chosen} of a sweep over {sweep.model}.")
    timed = [point for point in sweep.points if point.latency is not None]
    if not timed:
        text.append(f"{sweep.target} does not run on this machine: nothing was timed.")
    pictures = []
    if timed and any(figures.height_of(point) is not None for point in timed):
        caption = (
            f"Latency on {sweep.target}, all networks in one loop, against what they predict: up "
            "and to the left is better."
        )
        pictures = [Figure(partial(figures.sweep_figure, timed, chosen=chosen), caption)]
    return section("Accuracy against latency", *text, tables=[made], figures=pictures)


def _row(point: SweepPoint, sweep: Sweep) -> Row:
    top1, change, latency = point.accuracy, point.change, point.latency
    speed = None
    if point.speedup is not None and point.kind != "dense":
        low, high = point.speedup_low or 0.0, point.speedup_high or 0.0
        speed = c.Amount(f"{point.speedup:.2f}x ({low:.2f} to {high:.2f})")
    return (
        c.Mark(f"{point.label} (picked)") if point.label == sweep.picked else point.label,
        None if top1 is None else c.interval(c.top1, top1.top1, top1.low, top1.high),
        None if change is None else c.interval(c.points, change.drop, change.low, change.high),
        None if change is None else c.percent(change.agreement),
        None if point.error_db is None else c.decibels(point.error_db),
        None if latency is None else c.ms(latency.p50_ms),
        speed,
        point.params, c.short(point.macs), point.bundle,
    )  # fmt: skip


def _asked(sweep: Sweep) -> Section | None:
    what = RATIO_WORDS[sweep.ratio_of]
    timed = next((p.latency for p in sweep.points if p.latency is not None), None)
    device = f"{sweep.device.cpu} ({sweep.device.cores} cores)"
    rows: list[Row] = [("points are of", what), ("device", device)]
    if timed is not None:
        rows += [
            ("calls of each network", len(timed.samples_ms)), ("batch", timed.batch),
            ("threads", timed.threads), ("provider", timed.provider),
        ]  # fmt: skip
    return section("How it was measured", tables=[table(" | ", rows)])
