"""Figures and tables of what ``bench_accuracy.py`` measured."""

from __future__ import annotations

import io
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from accuracy_results import Result, read_results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OURS = ("cswap", "paper")
# Colour by what a ranking looks at: weights blue, activations green, gradients violet.
_STYLES = {
    "cswap": ("#c2571a", "-", "o"),
    "paper": ("#d99a1c", "-", "s"),
    "random": ("#8a97a3", ":", ""),
    "magnitude-l1": ("#7fb2dd", "-", ""),
    "magnitude-l2": ("#2b7cb8", "-", ""),
    "bn-scale": ("#7fb2dd", "--", ""),
    "lamp": ("#2b7cb8", "--", ""),
    "fpgm": ("#2b7cb8", ":", ""),
    "taylor": ("#7d5bb5", "-", ""),
    "integrated-gradients": ("#7d5bb5", "--", ""),
    "activation": ("#6fb586", "-", ""),
    "wanda": ("#2f8a57", "-", ""),
    "obs": ("#16202a", "-.", ""),
}
_INK, _LINE = "#16202a", "#dfe4e8"
_OF = {"channels": "channels", "params": "parameters", "macs": "MACs"}
_LEAST_SPAN = 5
"""Points that an axis shows at least: what two methods differ by for no reason must look small."""


@dataclass(frozen=True)
class Spread:
    """One method at one ratio, over the seeds."""

    by_seed: dict[int, float]
    """A fraction of the test images."""
    cost_aware: bool

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.by_seed.values())))

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation; ``None`` for one seed."""
        values = list(self.by_seed.values())
        return float(np.std(values, ddof=1)) if len(values) > 1 else None


Curves = dict[str, dict[float, Spread]]
"""Method -> ratio -> what it keeps."""
Value = Literal["top1", "agreement"]
_NAMES: dict[Value, str] = {"top1": "top-1", "agreement": "agreement with the dense network"}


def publish(results: Path, figures: Path, *, value: Value = "top1") -> list[str]:
    """Write ``accuracy-<model>.svg`` for every file of results, and print their tables.

    Args:
        results: The folder of results.
        figures: Where the figures go.
        value: What the tables show; curves show top-1, dots agreement.
    """
    written = []
    for path in sorted(results.glob("*.json")):
        rows = main_rows(list(read_results(path).values()))
        if not rows:
            continue
        for ours in (True, False):
            codes = {row.code for row in rows if (row.method in OURS) is ours}
            if len(codes) > 1:
                print(f"{path.name}: rows of {len(codes)} versions of the code", file=sys.stderr)
        figure = figures / f"accuracy-{path.stem}.svg"
        figure.write_text(draw(path.stem, rows))
        written.append(str(figure))
        print(tables(path.stem, rows, value=value))
    return written


def main_rows(rows: list[Result]) -> list[Result]:
    """With a refit as without, those with the calibration size that most methods share there."""
    found = []
    for refit in (False, True):
        here = [row for row in rows if row.refit == refit]
        methods: dict[int, list[str]] = defaultdict(list)
        for row in here:
            methods[row.calibration].append(row.method)
        usual = max(methods, key=lambda n: (len({*methods[n]}), len(methods[n]), n), default=0)
        found += [row for row in here if row.calibration == usual]
    return found


def curves(rows: list[Result], *, refit: bool, value: Value = "top1") -> Curves:
    """What every method keeps; of a peer's two rankings the better one at each ratio."""
    found: dict[tuple[str, float, bool], dict[int, float]] = defaultdict(dict)
    for row in rows:
        if row.refit == refit:
            found[row.method, row.ratio, row.cost_aware][row.seed] = getattr(row, value)
    best: Curves = defaultdict(dict)
    for (method, ratio, cost_aware), by_seed in found.items():
        here = Spread(by_seed, cost_aware)
        other = best[method].get(ratio)
        if other is None or here.mean > other.mean:
            best[method][ratio] = here
    return {m: dict(sorted(best[m].items())) for m in _STYLES if m in best}


def tables(model: str, rows: list[Result], *, value: Value = "top1") -> str:
    """Markdown: percent of the test images, natively and with the refit."""
    dense = np.mean([row.top1_dense for row in rows])
    first = rows[0]
    about = (
        f"**{model}**, {_NAMES[value]}, dense top-1 {dense:.1%}, {first.images} test images; "
        f"ratio of the {_OF[first.ratio_of]}"
    )
    parts = [about.replace("%", " %")]
    for refit, title in ((False, "as ranked, no refit"), (True, "with the same refit")):
        found = curves(rows, refit=refit, value=value)
        if found:
            images = next(row.calibration for row in rows if row.refit == refit)
            head = f"{title}, {images} calibration images"
            parts.append(_table(head, found, ratio_of=first.ratio_of))
    return "\n\n".join(parts) + "\n"


def _table(title: str, found: Curves, *, ratio_of: str) -> str:
    ratios = sorted({ratio for line in found.values() for ratio in line})
    top = {r: max(line[r].mean for line in found.values() if r in line) for r in ratios}
    lines = [
        f"| {title} | " + " | ".join(f"{ratio:.0%}".replace("%", " %") for ratio in ratios) + " |",
        "| --- |" + " --: |" * len(ratios),
    ]
    starred = False
    for method, line in found.items():
        cells = []
        for ratio in ratios:
            spread = line.get(ratio)
            if spread is None:
                cells.append("")
                continue
            text = f"{100 * spread.mean:.1f}"
            if spread.mean == top[ratio]:
                text = f"**{text}**"
            if spread.deviation is not None:
                text += f" ±{100 * spread.deviation:.1f}"
            if spread.cost_aware and method not in OURS:
                text, starred = f"{text}*", True
            cells.append(text)
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    lines += _margin(found, ratios)
    if starred:
        lines.append(f"\n\\* ranked per saving ({ratio_of}); the others plainly")
    return "\n".join(lines)


def _margin(found: Curves, ratios: list[float]) -> list[str]:
    """How far ``cswap`` is ahead of the best peer, in points, paired by seed."""
    if "cswap" not in found:
        return []
    cells = []
    for ratio in ratios:
        ours = found["cswap"].get(ratio)
        others = [line[ratio] for m, line in found.items() if m not in OURS and ratio in line]
        if ours is None or not others:
            cells.append("")
            continue
        best = max(others, key=lambda spread: spread.mean)
        # A ranking by weights alone has one seed where the others have five.
        one = next(iter(best.by_seed.values())) if len(best.by_seed) == 1 else None
        pairs = [
            100 * (value - (best.by_seed[seed] if one is None else one))
            for seed, value in ours.by_seed.items()
            if one is not None or seed in best.by_seed
        ]
        text = f"{np.mean(pairs):+.1f}" if pairs else ""
        cells.append(text + (f" ±{np.std(pairs, ddof=1):.1f}" if len(pairs) > 1 else ""))
    return ["| *cswap − best peer* | " + " | ".join(cells) + " |"]


def draw(model: str, rows: list[Result]) -> str:
    """An SVG: curves against the fraction removed, or dots at the one that most have in common.

    A card of its own colour: the page around it may be light or dark.
    """
    import matplotlib as mpl

    settings: dict[Any, Any] = {
        "svg.hashsalt": "cswap-deploy", "svg.fonttype": "none", "font.size": 10,
        "font.sans-serif": ["system-ui", "DejaVu Sans"],
        "text.color": _INK, "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK,
        "axes.edgecolor": _LINE, "figure.facecolor": "none", "axes.facecolor": "none",
        "axes.grid": True, "grid.color": _LINE, "axes.axisbelow": True,
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    }  # fmt: skip
    with mpl.rc_context(rc=settings):
        there = {row.ratio: {r.method for r in rows if r.ratio == row.ratio} for row in rows}
        most = max(map(len, there.values()))
        common = [ratio for ratio, methods in there.items() if 2 * len(methods) >= most]
        if len(common) > 1:
            title = f"Top-1 accuracy of {model} against the fraction removed, by ranking"
            return _svg(_curves(model, rows), title)
        rows = [row for row in rows if row.ratio == common[0]]
        return _svg(_dots(model, rows), f"Agreement of pruned {model} with the dense one")


def _curves(model: str, rows: list[Result]) -> Figure:
    """Top-1 against the fraction removed, natively and with the refit."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(10, 4.2), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    left, right = figure.subplots(1, 2)
    for axes, refit, title in (
        (left, False, "as ranked, nothing makes up for it"),
        (right, True, "with the same closed-form refit"),
    ):
        for method, line in curves(rows, refit=refit).items():
            colour, style, marker = _STYLES[method]
            ratios = [100 * ratio for ratio in line]
            means = np.array([100 * spread.mean for spread in line.values()])
            spread = np.array([100 * (s.deviation or 0.0) for s in line.values()])
            ours = method in OURS
            axes.plot(
                ratios, means, style, color=colour, marker=marker, markersize=4,
                linewidth=2.4 if ours else 1.2, zorder=4 if ours else 3, label=method,
            )  # fmt: skip
            axes.fill_between(
                ratios, means - spread, means + spread, color=colour, alpha=0.15, linewidth=0
            )
        dense = 100 * np.mean([row.top1_dense for row in rows])
        axes.axhline(dense, color=_INK, linewidth=0.8, linestyle=(0, (2, 3)))
        axes.annotate(
            f"dense {dense:.1f} %", (0, dense), xycoords=("axes fraction", "data"),
            xytext=(4, 3), textcoords="offset points", fontsize=8,
        )  # fmt: skip
        low, high = axes.get_ylim()
        span = max(high - low, _LEAST_SPAN)
        axes.set_ylim(high - span, high + 0.05 * span)  # room for the line's name
        axes.set_title(title, fontsize=10)
        axes.set_xticks(sorted({100 * row.ratio for row in rows if row.refit == refit}))
        axes.set_xlabel(f"removed, % of the {_OF[rows[0].ratio_of]}")
        axes.set_ylabel("top-1 on unseen images, %")
    lines = {t.get_label(): t for a in (left, right) for t in a.get_lines()}
    names = [name for name in _STYLES if name in lines]
    figure.legend([lines[n] for n in names], names, loc="outside right center", fontsize=9)
    figure.suptitle(model, fontsize=12, fontweight="bold")
    return figure


def _dots(model: str, rows: list[Result]) -> Figure:
    """Agreement with the dense network at the one fraction, the best on top.

    Top-1 tells good rankings less apart: some answers that change were wrong before.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    refit = any(row.refit for row in rows)
    found = curves(rows, refit=refit, value="agreement")
    (ratio,) = {row.ratio for row in rows}
    order = sorted(found, key=lambda method: found[method][ratio].mean)
    figure = Figure(
        figsize=(7, 0.9 + 0.3 * len(order)),
        layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08),
    )  # fmt: skip
    axes = figure.subplots()
    values = [100 * found[m][ratio].mean for m in order]
    colours = [_STYLES["cswap"][0] if m in OURS else "#8a97a3" for m in order]
    errors = [100 * (found[m][ratio].deviation or 0.0) for m in order]
    # Dots, not bars: the axis does not begin at zero.
    for at, (value, colour, error) in enumerate(zip(values, colours, errors, strict=True)):
        axes.errorbar(value, at, xerr=error or None, fmt="o", color=colour, markersize=8)
        axes.annotate(
            f"{value:.1f} %", (value, at), xytext=(9, 0), textcoords="offset points",
            va="center", fontsize=9,
        )  # fmt: skip
    axes.set_yticks(range(len(order)), order)
    axes.set_xlim(right=min(100, max(values)) + 0.17 * (max(values) - min(values)))
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("unseen images that get the dense network's answer, %")
    how = ",\nwith the same closed-form refit" if refit else ""
    axes.set_title(
        f"{model}, {ratio:.0%} of the {_OF[rows[0].ratio_of]} removed{how}".replace("%", " %"),
        loc="left", fontsize=10,
    )  # fmt: skip
    return figure


def _svg(figure: Figure, title: str) -> str:
    out = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(out, format="svg", metadata=nothing)
    document = out.getvalue()
    body = re.sub(r"<metadata>.*?</metadata>", "", document[document.index("<svg") :], flags=re.S)
    head, rest = body.split(">", 1)
    card = '<rect width="100%" height="100%" rx="10" fill="#ffffff"/>'
    return f'{head} role="img" aria-label="{title}">\n{card}{rest}'
