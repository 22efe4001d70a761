"""An explanation for people at a terminal: tables and strips of text that fit its width."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from cswap_deploy.report.explain import Explanation, Unit
from cswap_deploy.report.words import effect_interval, nats, some

_NARROW = 110
"""Below this many characters the three columns of verdicts become one."""
_STRIP, _SHORTEST_STRIP = 32, 8
"""Characters of the strip of costs that each group gets where there is room."""
_BARS = "▁▂▃▄▅▆▇█"
_VERDICTS = ("critical", "neutral", "detrimental")
_COLOURS = {"critical": "magenta", "neutral": "", "detrimental": "yellow"}
_REMOVED, _KEPT = "red", "blue"


def explanation(told: Explanation, width: int) -> Iterator[RenderableType]:
    """What a plan says about its units.

    Args:
        told: See :func:`cswap_deploy.report.explain.explain`.
        width: Characters in a line.

    Returns:
        What to print, in order, with rich's markup.
    """
    yield _headline(told)
    for sentence in told.reading:
        yield ""
        yield escape(sentence)
    if told.groups:
        yield ""
        yield from _groups(told, width)
    for title, units in (
        ("Largest effects on the true class", told.largest),
        ("Detrimental: removing them helps", told.detrimental),
        ("Removed at the largest cost", told.removed_at_largest_cost),
    ):
        if units:
            yield ""
            yield from _units(title, units, width)


def _headline(told: Explanation) -> str:
    kept, units = sum(g.kept for g in told.groups), sum(g.units for g in told.groups)
    many = f"{len(told.groups)} groups" if len(told.groups) != 1 else told.groups[0].name
    return (
        f"[bold]{escape(told.model or 'plan')}[/]: criterion {escape(told.criterion)}, "
        f"{told.ratio_effective:.1%} of {told.ratio_of} removed; {escape(many)}: {kept:,} of "
        f"{units:,} units kept"
    )


# --- groups --------------------------------------------------------------------------------------


def _groups(told: Explanation, width: int) -> Iterator[RenderableType]:
    """One line for each group; what room is left goes to its strip."""
    heads, rows = _cells(told, apart=width >= _NARROW)
    gap = 2 if width >= _NARROW else 1
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="dim")
    used = 0
    for head, *cells in zip(heads, *rows, strict=True):
        longest = max(map(len, (*head.split(), *cells)))
        used += longest + gap
        if head == "group":  # what rich folds where even the rest is too wide
            table.add_column(head, overflow="fold", vertical="bottom")
        else:
            table.add_column(head, justify="right", width=longest)
    room = min(width - used, _STRIP)
    strips = told.ranked_by is not None and room >= _SHORTEST_STRIP
    if strips:
        head = "removed │ kept"
        table.add_column(head if room >= len(head) else "strip", width=room, no_wrap=True)
    scale = _Scale([cost for g in told.groups for part in g.costs for cost in part])
    for row, g in zip(rows, told.groups, strict=True):
        table.add_row(*map(escape, row), *([scale.strip(g.costs, room)] if strips else []))
    notes = []
    if told.ranked_by is not None:
        notes.append("Verdicts are counted on kept + removed units.")
    if strips:
        measure = {"kl": "KL divergence", "true-class": "|effect on the true class|"}
        notes.append(
            f"Strips: the units from the least {measure[told.ranked_by or 'kl']} to the most, the "
            "removed ones first, on one logarithmic scale."
        )
    yield "[bold]Groups, from the input to the output[/]"
    if notes:
        yield " ".join(notes)
    yield table


def _cells(told: Explanation, *, apart: bool) -> tuple[list[str], list[list[str]]]:
    """Headings and rows without the strips; verdicts in columns of their own, or in one."""
    heads, rows = ["group", "kept"], [[g.name, f"{g.kept:,}/{g.units:,}"] for g in told.groups]
    if told.ranked_by is None:
        return heads, rows
    counted = [
        [f"{g.kept_verdicts[v]}+{g.removed_verdicts[v]}" for v in _VERDICTS] for g in told.groups
    ]
    largest = [
        [] if g.largest is None else
        [effect_interval(g.largest.true_class, g.largest.low, g.largest.high)]
        for g in told.groups
    ]  # fmt: skip
    verdicts = [c if apart else [" ".join(c)] for c in _aligned(counted, right=range(3))]
    return (
        [*heads, *(_VERDICTS if apart else (" ".join(_VERDICTS),)), "largest effect"],
        [
            [*row, *v, *(most or ["-"])]
            for row, v, most in zip(rows, verdicts, largest, strict=True)
        ],
    )


class _Scale:
    """Costs as bars of text, on one logarithmic scale."""

    def __init__(self, costs: list[float]) -> None:
        positive = sorted(c for c in costs if c > 0) or [1.0]
        self._low = math.log(positive[len(positive) // 20])  # a few near zero would flatten all
        self._high = max(math.log(positive[-1]), self._low + 1e-9)

    def strip(self, costs: tuple[tuple[float, ...], tuple[float, ...]], room: int) -> Text:
        """The removed units, the cut, the kept ones."""
        removed, kept = costs
        if not removed and not kept:
            return Text()
        first = round((room - 1) * len(removed) / (len(removed) + len(kept)))
        first = min(max(first, bool(removed)), room - 1 - bool(kept))
        return Text.assemble(
            (self._bars(removed, first), _REMOVED),
            "│",
            (self._bars(kept, room - 1 - first), _KEPT),
        )

    def _bars(self, costs: Sequence[float], count: int) -> str:
        return "".join(
            self._bar(costs[int((i + 0.5) * len(costs) / count)]) for i in range(count) if costs
        )

    def _bar(self, cost: float) -> str:
        share = (math.log(cost) - self._low) / (self._high - self._low) if cost > 0 else 0.0
        return _BARS[min(max(int(share * len(_BARS)), 0), len(_BARS) - 1)]


# --- units ---------------------------------------------------------------------------------------


def _units(title: str, units: tuple[Unit, ...], width: int) -> Iterator[RenderableType]:
    """A line for each unit; its classes behind it where there is room, below it where not."""
    heads = ["group", "unit", "", "effect, 95 %", "KL", "verdict"]
    rows = [
        [
            u.group,
            str(u.unit),
            "kept" if u.kept else "removed",
            effect_interval(u.true_class, u.low, u.high),
            nats(u.kl),
            u.verdict,
        ]
        for u in units
    ]
    head, *lines = _aligned([heads, *rows], right=(1, 3, 4))
    classes = [_classes(u) for u in units]
    used = sum(map(len, head)) + 2 * (len(head) - 1)
    beside = used + 2 + max(map(len, classes)) <= width
    own_line = used > width  # long names: the group on a line of its own
    skip, indent = (1, "  ") if own_line else (0, "")
    yield f"[bold]{title}[/]"
    yield Text(indent + "  ".join(head[skip:]).rstrip(), style="dim")
    before = ""
    for u, cells, text in zip(units, lines, classes, strict=True):
        if own_line and u.group != before:
            yield escape(u.group)
            before = u.group
        styles = ("", "", "" if u.kept else _REMOVED, "", "", _COLOURS[u.verdict])
        parts = [Text(c, style=s) for c, s in zip(cells, styles, strict=True)]
        line = Text(indent).append_text(Text("  ").join(parts[skip:]))
        if text and beside:
            line.append("  " + text)
        line.rstrip()
        yield line
        if text and not beside:
            yield Text(f"{indent}  {text}")


def _classes(unit: Unit) -> str:
    told = []
    for word, classes in (("serves", unit.serves), ("harms", unit.harms)):
        if classes:
            told.append(f"{word} {some(tuple(c.name for c in classes), 3)}")
    return "; ".join(told)


def _aligned(rows: list[list[str]], *, right: Sequence[int]) -> list[list[str]]:
    """Cells padded to their column's width, some of them on the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        [
            cell.rjust(widths[i]) if i in right else cell.ljust(widths[i])
            for i, cell in enumerate(row)
        ]
        for row in rows
    ]
