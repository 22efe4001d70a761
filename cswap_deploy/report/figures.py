"""The report's figures as inline SVG; the same values give the same bytes."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cswap_deploy.records.manifest import Manifest
from cswap_deploy.records.measurements import AccuracyChange, Latency
from cswap_deploy.records.plan import GroupPlan, PrunePlan
from cswap_deploy.report.explain import cut, ranked_by, split_costs, verdict_counts

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
_GROUPS_IN_A_ROW = 18
_SLOT = 0.88
"""Width of a group where the next one is 1 further right."""
_MOST_BARS = 48
"""A group with more units is drawn by this many of them, evenly chosen."""
_ROOM = 96
"""Characters that fit side by side above the bars."""


def units_figure(plan: PrunePlan) -> str:
    """Units kept and removed per group over depth, for a plan without effects.

    Args:
        plan: With at least one group.

    Returns:
        An ``<svg>`` element.
    """
    rows = _in_rows(plan.groups)

    def draw(figure: Figure) -> None:
        panels = figure.subplots(len(rows), squeeze=False)[:, 0]
        for axes, groups in zip(panels, rows, strict=True):
            kept = [100 * len(g.kept) / g.units for g in groups]
            gone = [100 - share for share in kept]
            at = range(len(groups))
            axes.bar(at, kept, color=KEPT_COLOUR, width=_SLOT, label="kept")
            axes.bar(at, gone, bottom=kept, color=REMOVED_COLOUR, width=_SLOT, label="removed")
            _kept_counts(axes, groups)
            axes.set_ylim(0, 100)
            axes.set_yticks(range(0, 101, 25))
            axes.set_ylabel("units, %")
            _depth_axis(axes, groups, len(rows[0]))
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)

    height = 0.5 + 2.2 * len(rows)
    return _svg(draw, height=height, name="units", title="Units kept and removed in each group")


def effects_figure(plan: PrunePlan) -> str:
    """Every measured unit's effect against the cut, per group over depth; verdicts below.

    In each group the removed units stand left and the kept ones right, each from the smallest
    effect to the largest, so that the width of a colour is its share of the units. Units that were
    not measured (round 0) are left out.

    Args:
        plan: With at least one measured unit; see ``explain.has_effects``.

    Returns:
        An ``<svg>`` element.
    """
    by = ranked_by(plan)
    rows = _in_rows(plan.groups)
    costs = {g.name: split_costs(g, by) for g in plan.groups}
    positive = sorted(c for parts in costs.values() for part in parts for c in part if c > 0)
    # a whole power of ten, or its label lands on that of zero
    smallest = positive[len(positive) // 20] if positive else 1.0
    smallest = 10.0 ** max(math.floor(math.log10(smallest)), -9)
    largest = 2 * positive[-1] if positive else 10.0

    def draw(figure: Figure) -> None:
        panels = figure.subplots(
            2 * len(rows), squeeze=False, gridspec_kw={"height_ratios": [1.0, 0.09] * len(rows)}
        )[:, 0]
        for above, below, groups in zip(panels[::2], panels[1::2], rows, strict=True):
            above.set_yscale("symlog", linthresh=smallest)
            above.set_ylim(-smallest / 3, largest)
            above.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            above.set_ylabel("KL divergence, nats" if by == "kl" else "|true-class effect|")
            for at, group in enumerate(groups):
                _skyline(above, at, costs[group.name], floor=-smallest / 3)
            _kept_counts(above, groups)
            above.set_xlim(-0.6, len(rows[0]) - 0.4)
            above.grid(visible=False, axis="x")
            above.tick_params(axis="x", bottom=False, labelbottom=False)
            above.spines["bottom"].set_visible(False)
            _verdict_strip(below, groups)
            _depth_axis(below, groups, len(rows[0]))
        _effects_legend(figure)

    height = 0.7 + 2.7 * len(rows)
    return _svg(draw, height=height, name="effects", title="Effect of each unit against the cut")


def latency_figure(manifest: Manifest) -> str | None:
    """Empirical distribution of the latency samples, dense and pruned, one panel per target.

    Returns:
        An ``<svg>`` element, or None where no target was timed.
    """
    timed = [(r.engine.target, r.latency, r.dense_latency) for r in manifest.targets if r.latency]
    if not timed:
        return None

    def draw(figure: Figure) -> None:
        panels = figure.subplots(len(timed), squeeze=False)[:, 0]
        for axes, (target, pruned, dense) in zip(panels, timed, strict=True):
            pairs = [("dense", dense, DENSE_COLOUR), ("pruned", pruned, PRUNED_COLOUR)]
            shown = [(name, latency, colour) for name, latency, colour in pairs if latency]
            _distributions(axes, shown)
            axes.set_ylabel(f"{target}\nshare of calls, %")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)

    height = 0.6 + 2.3 * len(timed)
    return _svg(draw, height=height, name="latency", title="Latency of dense and pruned network")


def accuracy_figure(manifest: Manifest) -> str | None:
    """Top-1 with its 95 % interval, dense and pruned, wherever it was measured.

    Returns:
        An ``<svg>`` element, or None where nothing was scored.
    """
    rows = scored(manifest)
    if not rows:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for at, (_, change) in enumerate(rows):
            for name, accuracy, colour, shift in (
                ("dense", change.dense, DENSE_COLOUR, -0.14),
                ("pruned", change.pruned, PRUNED_COLOUR, 0.14),
            ):
                top1 = 100 * accuracy.top1
                axes.errorbar(
                    top1,
                    at + shift,
                    xerr=[[top1 - 100 * accuracy.low], [100 * accuracy.high - top1]],
                    fmt="o",
                    color=colour,
                    capsize=4,
                    label=name if at == 0 else None,
                )
                axes.annotate(
                    f"{top1:.1f}",
                    (top1, at + shift),
                    xytext=(0, 6),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                )
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlabel("top-1, %, with 95 % Wilson interval")
        axes.grid(visible=False, axis="y")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2)

    height = 1.2 + 0.6 * len(rows)
    return _svg(draw, height=height, name="accuracy", title="Accuracy of dense and pruned network")


def scored(manifest: Manifest) -> list[tuple[str, AccuracyChange]]:
    """Where accuracy was measured: the targets that ran, then PyTorch."""
    rows = [(r.engine.target, r.accuracy) for r in manifest.targets if r.accuracy is not None]
    if manifest.torch_accuracy is not None:
        rows.append(("PyTorch", manifest.torch_accuracy))
    return rows


# --- parts ---------------------------------------------------------------------------------------


def _in_rows(groups: tuple[GroupPlan, ...]) -> list[tuple[GroupPlan, ...]]:
    """Groups in order of depth, in as few rows of about equal length as leave room for names."""
    width = math.ceil(len(groups) / math.ceil(len(groups) / _GROUPS_IN_A_ROW))
    return [groups[at : at + width] for at in range(0, len(groups), width)]


def _skyline(
    axes: Axes, at: int, costs: tuple[tuple[float, ...], tuple[float, ...]], *, floor: float
) -> None:
    """One group's units as bars: the removed, then the kept, each ascending; a line at the cut."""
    removed, kept = costs
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
    level = cut(removed, kept)
    if level is not None:
        axes.hlines(level, at - 0.48, at + 0.48, colors=_INK, linewidth=1.2)


def _verdict_strip(axes: Axes, groups: tuple[GroupPlan, ...]) -> None:
    """How many units have each verdict, below the removed and the kept ones of the picture."""
    for at, group in enumerate(groups):
        start = at - _SLOT / 2
        counts = [verdict_counts(group, kept=kept) for kept in (False, True)]
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
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_visible(False)


def _effects_legend(figure: Figure) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    colours = {"removed": REMOVED_COLOUR, "kept": KEPT_COLOUR}
    handles: list[Patch | Line2D] = [Patch(color=c, label=n) for n, c in colours.items()]
    handles.append(Line2D([], [], color=_INK, linewidth=1.2, label="the cut"))
    handles += [Patch(color=c, label=f"{n} (strip below)") for n, c in VERDICT_COLOURS.items()]
    # columns fill first: what the bars show is the upper line, what the strips show the lower one
    order = [handles[i] for i in (0, 3, 1, 4, 2, 5)]
    figure.legend(handles=order, loc="outside upper center", ncols=3)


def _kept_counts(axes: Axes, groups: tuple[GroupPlan, ...]) -> None:
    """Kept and all units above each group, where there is room for every one."""
    texts = [f"{len(group.kept)}/{group.units}" for group in groups]
    if max(map(len, texts)) * len(texts) <= _ROOM:
        for at, text in enumerate(texts):
            axes.annotate(
                text, (at, 1.02), xycoords=("data", "axes fraction"), ha="center", va="bottom",
                fontsize=7,
            )  # fmt: skip


def _distributions(axes: Axes, shown: list[tuple[str, Latency, str]]) -> None:
    for name, latency, colour in shown:
        ordered = sorted(latency.samples_ms)
        count = len(ordered)
        shares = [100 * (i + 1) / count for i in range(count)]
        axes.step(ordered, shares, where="post", color=colour, linewidth=1.8, label=name)
        axes.plot(latency.p50_ms, 50, "o", color=colour, markersize=5)
    edge = 1.1 * max(latency.p99_ms for _, latency, _ in shown)
    beyond = sum(sample > edge for _, latency, _ in shown for sample in latency.samples_ms)
    first = min(min(latency.samples_ms) for _, latency, _ in shown)
    axes.set_xlim(first - 0.05 * (edge - first), edge)
    axes.set_ylim(0, 103)
    note = f"; {beyond} slower calls lie outside" if beyond else ""
    batch = shown[0][1].batch
    axes.set_xlabel(f"milliseconds per call, batch {batch}; dots are medians{note}")


def _depth_axis(axes: Axes, groups: tuple[GroupPlan, ...], width: int) -> None:
    axes.set_xlim(-0.6, width - 0.4)
    axes.grid(visible=False, axis="x")
    axes.set_xticks(range(len(groups)), [g.name for g in groups], rotation=40, ha="right")
    axes.tick_params(axis="x", labelsize=8, length=2)


def _svg(draw: Callable[[Figure], None], *, height: float, name: str, title: str) -> str:
    """Draw and return an ``<svg>`` element that scales with the page and follows its theme."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "svg.hashsalt": "cswap-deploy",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 9,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "axes.edgecolor": _LINE,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": _LINE,
        "grid.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.unicode_minus": True,
        "legend.frameon": False,
        "hatch.linewidth": 0.5,
        "text.parse_math": False,  # a layer's name may hold a dollar sign
    }
    with mpl.rc_context(rc=settings):
        figure = Figure(figsize=(7.6, height), layout="constrained")
        draw(figure)
        out = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", dpi=150, metadata=nothing)
    return _inline(out.getvalue(), name=name, title=title)


def _inline(document: str, *, name: str, title: str) -> str:
    """From an SVG document to an element for HTML: no header, own ids, CSS colours, a title."""
    body = document[document.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r"url\(#", f"url(#{name}-", body)
    body = re.sub(r'href="#', f'href="#{name}-', body)
    body = body.replace(_INK, "currentColor").replace(_LINE, "var(--line)")
    head, rest = body.split(">", 1)
    head = re.sub(r' (width|height|version|xmlns(:xlink)?)="[^"]*"', "", head)
    label = f'role="img" aria-labelledby="{name}-title"><title id="{name}-title">{title}</title>'
    return f"{head} {label}{rest.rstrip()}"
