"""The report's figures as inline SVG; the same values give the same bytes."""

from __future__ import annotations

import io
import itertools
import math
import re
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from cswap_deploy.gate.history import Trend
from cswap_deploy.records.amounts import fixed
from cswap_deploy.records.manifest import TargetResult
from cswap_deploy.records.measurements import AccuracyChange
from cswap_deploy.records.plan import LayerTime
from cswap_deploy.records.sweep import SweepPoint
from cswap_deploy.report.explain import RANKED_BY, UNITS, Explanation, GroupSummary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VERDICT_COLOURS = {"critical": "#8a63c9", "neutral": "#93a1ad", "detrimental": "#d9a02b"}
KEPT_COLOUR = "#2b7fb8"
REMOVED_COLOUR = "#d9543f"
DENSE_COLOUR = "#93a1ad"
PRUNED_COLOUR = "#2b7fb8"
# Stand-ins that become CSS colours, so that text and lines follow the page's light or dark theme.
_INK, _LINE = "#010203", "#040506"
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "cswap-deploy", "svg.fonttype": "none",
    "text.parse_math": False,  # a layer's name may hold a dollar sign
    "font.family": "sans-serif", "font.size": 9, "axes.unicode_minus": True,
    "axes.facecolor": "none", "figure.facecolor": "none", "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.linewidth": 0.6, "hatch.linewidth": 0.5,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), _LINE),
}  # fmt: skip
_GROUPS_IN_A_ROW = 18
_SLOT = 0.88
"""Width of a group where the next one is 1 further right."""
_LAYERS_IN_A_ROW = 40
_MOST_BARS = 48
"""A group with more units is drawn by this many of them, evenly chosen."""
_ROOM = 96
"""Characters that fit side by side above the bars."""


def units_figure(told: Explanation) -> str:
    """Units kept and removed in each group over depth, as an ``<svg>`` element.

    ``told`` is of a plan without effects, with at least one group.
    """
    rows = _in_rows(told.groups)

    def draw(figure: Figure) -> None:
        for axes, groups in zip(_panels(figure, len(rows)), rows, strict=True):
            kept = [100 * g.kept / g.units for g in groups]
            gone = [100 - share for share in kept]
            at = range(len(groups))
            axes.bar(at, kept, color=KEPT_COLOUR, width=_SLOT, label="kept")
            axes.bar(at, gone, bottom=kept, color=REMOVED_COLOUR, width=_SLOT, label="removed")
            _kept_counts(axes, groups)
            axes.set_ylim(0, 100)
            axes.set_yticks(range(0, 101, 25))
            axes.set_ylabel("units, %")
            _depth_axis(axes, groups, len(rows[0]))

    height = 0.5 + 2.2 * len(rows)
    return _svg(draw, height=height, name="units", title="Units kept and removed in each group")


def effects_figure(told: Explanation) -> str:
    """What ranks every measured unit, by group over depth, with the threshold; verdicts below.

    In each group the removed units stand left and the kept ones right, each from the smallest
    value to the largest, so that the width of a colour is its share of the units. Units that were
    not measured are left out. Likely harm may lie below zero: such bars hang down.

    Args:
        told: Of a plan with at least one measured unit.

    Returns:
        An ``<svg>`` element.
    """
    rows = _in_rows(told.groups)
    costs = sorted(c for g in told.groups for part in g.costs for c in part)
    sizes = sorted(abs(c) for c in costs if c) or [1.0]
    # a whole power of ten, or its label lands on that of zero
    smallest = 10.0 ** max(math.floor(math.log10(sizes[len(sizes) // 20])), -9)
    # from zero where some hang down; else from below it, so that a value of zero is seen
    floor = 0.0 if costs[0] < 0 else -smallest / 3
    limits = (min(2 * costs[0], -smallest / 3), max(2 * costs[-1], 2 * smallest))

    def draw(figure: Figure) -> None:
        panels = _panels(figure, 2 * len(rows), height_ratios=[1.0, 0.09] * len(rows))
        for above, below, groups in zip(panels[::2], panels[1::2], rows, strict=True):
            above.set_yscale("symlog", linthresh=smallest)
            above.set_ylim(*limits)
            above.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            by = told.ranked_by or "kl"
            above.set_ylabel(f"{RANKED_BY[by]}{UNITS[by]}")
            for at, group in enumerate(groups):
                _skyline(above, at, group, floor=floor)
            _kept_counts(above, groups)
            above.set_xlim(-0.6, len(rows[0]) - 0.4)
            above.grid(visible=False, axis="x")
            above.tick_params(axis="x", bottom=False, labelbottom=False)
            above.spines["bottom"].set_visible(False)
            _verdict_strip(below, groups)
            _depth_axis(below, groups, len(rows[0]))
        _effects_legend(figure, verdicts=told.task == "classify")

    height = 0.7 + 2.7 * len(rows)
    return _svg(draw, height=height, name="effects", title="Units of each group and the threshold")


def latency_figure(timed: Sequence[TargetResult]) -> str:
    """Empirical distribution of the latency samples, dense and pruned, one panel a target.

    ``timed`` are targets with a latency, at least one. Returns an ``<svg>`` element.
    """

    def draw(figure: Figure) -> None:
        for axes, result in zip(_panels(figure, len(timed)), timed, strict=True):
            pairs = (
                ("dense", result.dense_latency, DENSE_COLOUR),
                ("pruned", result.latency, PRUNED_COLOUR),
            )
            shown = [(name, x, colour) for name, x, colour in pairs if x is not None]
            for name, latency, colour in shown:
                axes.ecdf(latency.samples_ms, color=colour, linewidth=1.8, label=name)
                axes.plot(latency.p50_ms, 0.5, "o", color=colour, markersize=5)
            edge = 1.1 * max(latency.p99_ms for _, latency, _ in shown)
            samples = [sample for _, latency, _ in shown for sample in latency.samples_ms]
            beyond = sum(sample > edge for sample in samples)
            axes.set_xlim(min(samples) - 0.05 * (edge - min(samples)), edge)
            axes.set_ylim(0, 1.03)
            axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}")
            note = f"; {beyond} slower calls lie outside" if beyond else ""
            batch = shown[0][1].batch
            axes.set_xlabel(f"milliseconds per call, batch {batch}; dots are medians{note}")
            axes.set_ylabel(f"{result.engine.target}\nshare of calls, %")

    height = 0.6 + 2.3 * len(timed)
    return _svg(draw, height=height, name="latency", title="Latency of dense and pruned network")


def accuracy_figure(rows: Sequence[tuple[str, AccuracyChange]]) -> str:
    """Top-1 with its 95 % interval, dense and pruned, wherever it was measured.

    ``rows`` say where that was, and what; at least one. Returns an ``<svg>`` element.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for name, scores, colour, shift in (
            ("dense", [change.dense for _, change in rows], DENSE_COLOUR, -0.14),
            ("pruned", [change.pruned for _, change in rows], PRUNED_COLOUR, 0.14),
        ):
            at = [row + shift for row in range(len(rows))]
            top1 = [100 * score.top1 for score in scores]
            below = [100 * (score.top1 - score.low) for score in scores]
            above = [100 * (score.high - score.top1) for score in scores]
            axes.errorbar(
                top1, at, xerr=[below, above], fmt="o", color=colour, capsize=4, label=name
            )
            for x, y in zip(top1, at, strict=True):
                place: dict[str, Any] = {"xytext": (0, 6), "textcoords": "offset points"}
                axes.annotate(fixed(x, 1), (x, y), ha="center", fontsize=8, **place)
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlabel("top-1, %, with 95 % Wilson interval")
        axes.grid(visible=False, axis="y")

    height = 1.2 + 0.6 * len(rows)
    return _svg(draw, height=height, name="accuracy", title="Accuracy of dense and pruned network")


def time_figure(layers: Sequence[LayerTime]) -> str:
    """What each layer takes of a call, before and after, in the order in which they run.

    Returns an ``<svg>`` element.
    """
    per_row = math.ceil(len(layers) / math.ceil(len(layers) / _LAYERS_IN_A_ROW))
    rows = [layers[at : at + per_row] for at in range(0, len(layers), per_row)]
    top = 1.05 * max(max(layer.dense_ms, layer.pruned_ms) for layer in layers)

    def draw(figure: Figure) -> None:
        for axes, own in zip(_panels(figure, len(rows)), rows, strict=True):
            for name, times, colour, width in (
                ("dense", [layer.dense_ms for layer in own], DENSE_COLOUR, _SLOT),
                ("pruned", [layer.pruned_ms for layer in own], PRUNED_COLOUR, _SLOT / 2),
            ):
                axes.bar(range(len(own)), times, color=colour, width=width, label=name)
            axes.set_xlim(-0.6, per_row - 0.4)
            axes.set_ylim(0, top)
            axes.set_ylabel("ms of a call")
            axes.grid(visible=False, axis="x")
            axes.set_xticks(range(len(own)), [layer.layer for layer in own], rotation=90)
            axes.tick_params(axis="x", labelsize=7, length=2)

    height = 0.5 + 2.7 * len(rows)
    return _svg(draw, height=height, name="time", title="Time of each layer, dense and pruned")


def height_of(point: SweepPoint) -> tuple[float, float, float] | None:
    """What a point of a sweep stands at, and its 95 % interval: top-1 in percent, or decibels."""
    if (top1 := point.accuracy) is not None:
        return 100 * top1.top1, 100 * top1.low, 100 * top1.high
    return None if point.error_db is None else (point.error_db, point.error_db, point.error_db)


def sweep_figure(points: Sequence[SweepPoint], *, chosen: str = "") -> str:
    """Accuracy against latency: the curve of a pruned network, and others beside it.

    ``points`` of which some were timed and evaluated; one of them can be marked, by its label.
    Returns an ``<svg>`` element.
    """
    drawn = [
        (p, p.latency.p50_ms, at)
        for p in points
        if p.latency is not None and (at := height_of(p)) is not None
    ]
    drawn.sort(key=lambda each: each[1])
    looks = (
        ("pruned", PRUNED_COLOUR, "o-", ("dense", "pruned")),
        ("other networks, dense", REMOVED_COLOUR, "s", ("other",)),
    )

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for name, colour, marks, kinds in looks:
            own = [each for each in drawn if each[0].kind in kinds]
            if not own:
                continue
            below = [at - low for _, _, (at, low, _) in own]
            above = [high - at for _, _, (at, _, high) in own]
            axes.errorbar(
                [ms for _, ms, _ in own], [at for _, _, (at, _, _) in own], yerr=[below, above],
                fmt=marks, color=colour, capsize=3, label=name,
            )  # fmt: skip
            for point, ms, (at, _, _) in own:
                place: dict[str, Any] = {"xytext": (6, 5), "textcoords": "offset points"}
                axes.annotate(point.label, (ms, at), fontsize=8, **place)
                if point.label == chosen:
                    axes.plot(ms, at, "o", markersize=14, markerfacecolor="none", color=_INK)
        axes.set_xlim(0, 1.12 * drawn[-1][1])
        axes.set_xlabel("milliseconds per call, median")
        top1 = drawn[0][0].accuracy is not None
        axes.set_ylabel("top-1, %, with 95 % interval" if top1 else "error of the outputs, dB")

    return _svg(draw, height=4.2, name="sweep", title="Accuracy against latency")


def trend_figure(trend: Trend) -> str:
    """One series over its measurements, with intervals, levels and change points.

    Returns an ``<svg>`` element.
    """
    found = trend.measurements
    ends = [0, *trend.changes, len(found)]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for at, one in enumerate(found):
            if one.low is not None and one.high is not None:
                axes.vlines(at, one.low, one.high, colors=DENSE_COLOUR, linewidth=1)
        axes.plot(range(len(found)), [m.value for m in found], ".", color=PRUNED_COLOUR)
        for first, last in itertools.pairwise(ends):
            level = statistics.median(m.value for m in found[first:last])
            axes.hlines(level, first - 0.4, last - 0.6, colors=_INK, linewidth=1.4)
        for at in trend.changes:
            axes.axvline(at - 0.5, color=REMOVED_COLOUR, linewidth=1, linestyle="--")
        axes.set_ylabel(trend.unit)
        axes.set_xlabel(f"measurement, {found[0].at[:10]} to {found[-1].at[:10]}")

    name = f"trend-{trend.series}-{trend.runner}"
    return _svg(draw, height=2.4, name=name, title=f"{trend.series} over time")


def _panels(figure: Figure, count: int, **grid: Any) -> list[Axes]:
    return list(figure.subplots(count, squeeze=False, gridspec_kw=grid)[:, 0])


def _in_rows(groups: tuple[GroupSummary, ...]) -> list[tuple[GroupSummary, ...]]:
    """Groups in order of depth, in as few rows of about equal length as leave room for names."""
    width = math.ceil(len(groups) / math.ceil(len(groups) / _GROUPS_IN_A_ROW))
    return [groups[at : at + width] for at in range(0, len(groups), width)]


def _skyline(axes: Axes, at: int, group: GroupSummary, *, floor: float) -> None:
    """A group's units as bars: the removed, then the kept, each ascending; and the threshold."""
    removed, kept = group.costs
    total = len(removed) + len(kept)
    if not total:
        return
    start = at - _SLOT / 2
    for values, colour in ((removed, REMOVED_COLOUR), (kept, KEPT_COLOUR)):
        if values:
            end = start + _SLOT * len(values) / total
            bars = min(len(values), _MOST_BARS)
            heights = [values[int((i + 0.5) * len(values) / bars)] for i in range(bars)]
            edges = [start + (end - start) * i / bars for i in range(bars + 1)]
            axes.stairs(heights, edges, baseline=floor, fill=True, color=colour, linewidth=0)
            start = end
    if group.threshold is not None:
        axes.hlines(group.threshold, at - 0.48, at + 0.48, colors=_INK, linewidth=1.2)


def _verdict_strip(axes: Axes, groups: tuple[GroupSummary, ...]) -> None:
    """How many units have each verdict, below the removed and the kept ones of the picture."""
    for at, group in enumerate(groups):
        start = at - _SLOT / 2
        counts = (group.removed_verdicts, group.kept_verdicts)
        total = sum(c[v] for c in counts for v in VERDICT_COLOURS)
        for count in counts:
            for verdict in reversed(VERDICT_COLOURS):  # as above: what matters most at the right
                share = _SLOT * count[verdict] / max(total, 1)
                if share:
                    colour = VERDICT_COLOURS[verdict]
                    axes.barh(0, share, left=start, height=1.0, color=colour, linewidth=0)
                start += share
            if count is counts[0] and at - _SLOT / 2 < start < at + _SLOT / 2 - 1e-9:
                axes.vlines(start, -0.5, 0.5, colors=_INK, linewidth=1.2)
    axes.set_ylim(-0.5, 0.5)
    axes.set_yticks([])
    axes.spines[["left", "bottom"]].set_visible(False)


def _effects_legend(figure: Figure, *, verdicts: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    colours = {"removed": REMOVED_COLOUR, "kept": KEPT_COLOUR}
    handles: list[Patch | Line2D] = [Patch(color=c, label=n) for n, c in colours.items()]
    handles.append(Line2D([], [], color=_INK, linewidth=1.2, label="threshold"))
    if not verdicts:
        figure.legend(handles=handles, loc="outside upper center", ncols=3)
        return
    handles += [Patch(color=c, label=f"{n} (strip below)") for n, c in VERDICT_COLOURS.items()]
    # columns fill first: what the bars show is the upper line, what the strips show the lower one
    order = [handles[i] for i in (0, 3, 1, 4, 2, 5)]
    figure.legend(handles=order, loc="outside upper center", ncols=3)


def _kept_counts(axes: Axes, groups: tuple[GroupSummary, ...]) -> None:
    """Kept and all units above each group, where there is room for every one."""
    texts = [f"{group.kept}/{group.units}" for group in groups]
    if max(map(len, texts)) * len(texts) <= _ROOM:
        for at, text in enumerate(texts):
            axes.annotate(
                text, (at, 1.02), xycoords=("data", "axes fraction"), ha="center", va="bottom",
                fontsize=7,
            )  # fmt: skip


def _depth_axis(axes: Axes, groups: tuple[GroupSummary, ...], width: int) -> None:
    axes.set_xlim(-0.6, width - 0.4)
    axes.grid(visible=False, axis="x")
    axes.set_xticks(range(len(groups)), [g.name for g in groups], rotation=40, ha="right")
    axes.tick_params(axis="x", labelsize=8, length=2)


def _svg(draw: Callable[[Figure], None], *, height: float, name: str, title: str) -> str:
    """Draw and return an ``<svg>`` element that scales with the page and follows its theme."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(rc=_STYLE):
        figure = Figure(figsize=(7.6, height), layout="constrained")
        draw(figure)
        if not figure.legends:
            names = figure.axes[0].get_legend_handles_labels()
            figure.legend(*names, loc="outside upper center", ncols=2)
        out = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", dpi=150, metadata=nothing)
    return _inline(out.getvalue(), name=name, title=title)


def _inline(document: str, *, name: str, title: str) -> str:
    """From an SVG document to an element for HTML: no header, own ids, CSS colours, a title."""
    body = document[document.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", body)
    body = body.replace(_INK, "currentColor").replace(_LINE, "var(--line)")
    head, rest = body.split(">", 1)
    head = re.sub(r' (width|height|version|xmlns(:xlink)?)="[^"]*"', "", head)
    label = f'role="img" aria-labelledby="{name}-title"><title id="{name}-title">{title}</title>'
    return f"{head} {label}{rest.rstrip()}"
