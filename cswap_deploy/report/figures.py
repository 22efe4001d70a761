"""The report's figures as inline SVG; the same values give the same bytes."""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cswap_deploy.artifacts import (
    AccuracyChange,
    GroupPlan,
    Latency,
    Manifest,
    PrunePlan,
    UnitEffect,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VERDICT_COLOURS = {
    "critical": "#2b7fb8",
    "neutral": "#93a1ad",
    "detrimental": "#d9822b",
    "not measured": "#c9b8dd",
}
KEPT_COLOUR = "#2b7fb8"
REMOVED_COLOUR = "#d9543f"
DENSE_COLOUR = "#93a1ad"
PRUNED_COLOUR = "#2b7fb8"
# Stand-ins that become CSS colours, so that text and lines follow the page's light or dark theme.
_INK, _LINE = "#010203", "#040506"
_MANY_UNITS = 2000
"""Above this many dots they are drawn as one picture, or the page would weigh megabytes."""
_MANY_GROUPS = 24
_ROOM = 84
"""Characters that fit side by side above the bars."""


def units_figure(plan: PrunePlan) -> str:
    """Units kept and removed per group over depth, coloured by the verdict on them.

    Args:
        plan: With at least one group.

    Returns:
        An ``<svg>`` element.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        base = [0.0] * len(plan.groups)
        for kept in (True, False):
            for verdict, colour in VERDICT_COLOURS.items():
                shares = [
                    verdict_counts(g, kept=kept)[verdict] / g.units * 100 for g in plan.groups
                ]
                if not any(shares):
                    continue
                axes.bar(
                    range(len(shares)),
                    shares,
                    bottom=base,
                    color=colour if kept else _faint(colour),
                    hatch=None if kept else "////",
                    edgecolor=_LINE if kept else colour,
                    linewidth=0.4,
                    label=f"{'kept' if kept else 'removed'}, {verdict}",
                    width=0.8,
                )
                base = [b + s for b, s in zip(base, shares, strict=True)]
        texts = [f"{len(group.kept)}/{group.units}" for group in plan.groups]
        if sum(map(len, texts)) <= _ROOM:
            for at, text in enumerate(texts):
                axes.annotate(text, (at, 101.5), ha="center", va="bottom", fontsize=8)
        axes.set_ylim(0, 110)
        axes.set_yticks(range(0, 101, 25))
        axes.set_ylabel("units of the group, %")
        _depth_axis(axes, plan.groups)
        figure.legend(loc="outside upper center", ncols=3)

    return _svg(draw, height=4.0, name="units", title="Units kept and removed in each group")


def effects_figure(plan: PrunePlan) -> str:
    """Measured effect of every unit per group, kept and removed apart: both measures.

    Units that were not measured (round 0) are left out.

    Args:
        plan: With at least one measured unit; see ``has_effects``.

    Returns:
        An ``<svg>`` element.
    """

    def draw(figure: Figure) -> None:
        above, below = figure.subplots(2, sharex=True)
        _strip(above, plan, lambda effect: effect.kl)
        above.grid(visible=False, axis="x")
        above.set_ylabel("KL divergence, nats")
        measured = [e.kl for g in plan.groups for e in g.effects if e.round > 0]
        positive = sorted(value for value in measured if value > 0)
        if positive:
            # a whole power of ten, or its label lands on that of zero
            smallest = 10.0 ** max(math.floor(math.log10(positive[len(positive) // 20])), -9)
            above.set_yscale("symlog", linthresh=smallest)
            above.set_ylim(-smallest / 3, 2 * positive[-1])
            above.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        _strip(below, plan, lambda effect: 100 * effect.true_class)
        below.axhline(0, color=_INK, linewidth=0.8)
        below.set_yscale("symlog", linthresh=1.0)
        low, high = below.dataLim.intervaly
        below.set_ylim(min(1.5 * low, -1.0), max(1.5 * high, 1.0))
        below.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        below.set_ylabel("true-class effect, %")
        _depth_axis(below, plan.groups)
        handles, labels = above.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=2)

    return _svg(draw, height=5.2, name="effects", title="Measured effect of each unit")


def has_effects(plan: PrunePlan) -> bool:
    """Whether any unit was measured; a baseline criterion measures none."""
    return any(effect.round > 0 for group in plan.groups for effect in group.effects)


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


def verdict_counts(group: GroupPlan, *, kept: bool) -> Counter[str]:
    """How many of a group's kept (or removed) units have each verdict."""
    verdicts = {effect.unit: effect.verdict for effect in group.effects if effect.round > 0}
    staying = set(group.kept)
    chosen = (unit for unit in range(group.units) if (unit in staying) is kept)
    return Counter(verdicts.get(unit, "not measured") for unit in chosen)


def _strip(axes: Axes, plan: PrunePlan, measure: Callable[[UnitEffect], float]) -> None:
    """One dot per unit: kept ones left of the group's tick, removed ones right of it."""
    many = sum(len(group.effects) for group in plan.groups) > _MANY_UNITS
    for kept, colour in ((True, KEPT_COLOUR), (False, REMOVED_COLOUR)):
        xs: list[float] = []
        ys: list[float] = []
        for at, group in enumerate(plan.groups):
            staying = set(group.kept)
            for effect in group.effects:
                if effect.round > 0 and (effect.unit in staying) is kept:
                    spread = (effect.unit * 0.618034) % 1.0  # even, and the same every time
                    xs.append(at + (-0.38 if kept else 0.06) + 0.32 * spread)
                    ys.append(measure(effect))
        axes.scatter(
            xs,
            ys,
            s=9,
            color=colour,
            alpha=0.7,
            linewidths=0,
            label="kept" if kept else "removed",
            rasterized=many,
        )


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


def _depth_axis(axes: Axes, groups: tuple[GroupPlan, ...]) -> None:
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.grid(visible=False, axis="x")
    if len(groups) <= _MANY_GROUPS:
        axes.set_xticks(range(len(groups)), [g.name for g in groups], rotation=40, ha="right")
        axes.tick_params(axis="x", labelsize=8)
    else:
        axes.set_xlabel("group, from the input to the output (names in the table)")


def _faint(colour: str) -> str:
    """The colour at a quarter of its strength, as hex with alpha."""
    return f"{colour}40"


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
