"""A report at a terminal: tables and strips of text that fit its width; figures are left out."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TypeAlias

from rich.text import Text

from cswap_deploy.errors import printable
from cswap_deploy.report.cells import Cell, KeptRemoved, Mark, Names, Strip, text
from cswap_deploy.report.document import Column, Report, Table

_STRIP, _SHORTEST_STRIP = 32, 11
"""Characters of a strip where there is room, and where there is little: a word of its heading."""
_BARS = "▁▂▃▄▅▆▇█"
_STYLES = {
    "critical": "magenta", "detrimental": "yellow", "removed": "red", "FAIL": "red", "NO": "red",
}  # fmt: skip


def draw(report: Report, width: int) -> Iterator[Text]:
    """What to print in lines of ``width`` characters, in order."""
    yield _said(report.title, "bold")
    if report.summary:
        yield _said(report.summary)
    for tile in report.tiles:
        style = "yellow" if isinstance(tile.note, Mark) else ""
        yield _said(f"{tile.label}: {text(tile.value)} ({tile.note})", style)
    for warning in report.warnings:
        yield _said(f"! {warning}", "yellow")
    for section in report.sections:
        yield _said(f"\n{section.title}", "bold")
        yield from map(_said, section.text)
        for table in section.tables:
            yield Text()
            yield from _lines(table, width)


def _said(words: str, style: str = "") -> Text:
    """Names in them may be anyone's."""
    return Text(printable(words), style=style)


@dataclass(frozen=True, slots=True)
class _Layout:
    """How a table gives way to a narrow line; the first layout that fits is taken."""

    beside: bool = False
    """Names stand at the end of their row, not below it."""
    optional: bool = False
    """With the columns that can be spared."""
    narrow: bool = True
    """Headings take several lines, and neighbouring counts share a column."""
    own_line: bool = False
    """The first column's cells stand on lines of their own."""
    gap: int = 2
    strip: int = 0
    """Characters that a strip must have; 0: it may be left out."""


_LAYOUTS = (
    _Layout(beside=True, optional=True, narrow=False, strip=_STRIP),
    _Layout(optional=True, narrow=False, strip=_STRIP),
    _Layout(narrow=False, strip=_STRIP),
    _Layout(strip=_SHORTEST_STRIP),
    _Layout(gap=1),
    _Layout(own_line=True),
    _Layout(own_line=True, gap=1),
)
_Block: TypeAlias = tuple[list[str], list[Text]]
"""A column's heading, in lines, and its cells, all of one width."""


def _lines(table: Table, width: int) -> Iterator[Text]:
    """A table, laid out for a width."""
    asides = [c for c in table.shown if isinstance(c.cells[0], Names)]
    strips = [c for c in table.columns if isinstance(c.cells[0], Strip)]
    ends = [  # names with their headings: serves Trouser; harms Coat
        "; ".join(f"{c.head} {text(c.cells[row])}" for c in asides if text(c.cells[row]))
        for row in range(len(table.columns[0].cells))
    ]
    for layout in _LAYOUTS:
        spared = () if layout.optional else table.optional
        columns = [c for c in table.shown if c not in asides and c.head not in spared]
        first = columns.pop(0) if layout.own_line else None
        blocks = list(_blocks(columns, narrow=layout.narrow))
        used = 2 * layout.own_line + sum(len(cells[0]) + layout.gap for _, cells in blocks)
        beside = max(map(len, ends)) + 2 if layout.beside and any(ends) else 0
        room = min(width - used, _STRIP)
        if used - layout.gap + beside <= width and (not strips or room >= layout.strip):
            break
    for column in strips if room >= _SHORTEST_STRIP else ():
        yield Text("Strips: each unit's value, ascending, on one logarithmic scale.")
        blocks.append(_block(column.head, _strips(column.cells, room), fold=True))
    yield from _rows(blocks, ends, first, layout)


def _rows(
    blocks: list[_Block], ends: list[str], first: Column | None, layout: _Layout
) -> Iterator[Text]:
    """The lines of a table whose columns are laid out; ``first`` has lines of its own."""
    indent, space = "  " if first else "", " " * layout.gap
    if first:
        yield Text(first.head, style="dim")
    for at in range(-max(len(head) for head, _ in blocks), 0):
        heads = (h[at] if -at <= len(h) else " " * len(cells[0]) for h, cells in blocks)
        yield Text((indent + space.join(heads)).rstrip(), style="dim")
    for row, end in enumerate(ends):
        if first and (row == 0 or first.cells[row] != first.cells[row - 1]):
            yield _cell(first.cells[row])
        line = Text(indent) + Text(space).join(cells[row] for _, cells in blocks)
        line.append(f"  {printable(end)}" if layout.beside else "")
        line.rstrip()
        yield line
        if end and not layout.beside:
            yield _said(f"{indent}  {end}")


def _blocks(columns: list[Column], *, narrow: bool) -> Iterator[_Block]:
    for counts, part in groupby(columns, key=lambda c: isinstance(c.cells[0], KeptRemoved)):
        made = [(c.head, [_cell(cell) for cell in c.cells], c.is_number) for c in part]
        if counts and narrow:
            rows = zip(*(_block("", cells, right=True)[1] for _, cells, _ in made), strict=True)
            cells = [Text(" ").join(row) for row in rows]
            made = [(" ".join(head for head, _, _ in made), cells, False)]
        for head, cells, right in made:
            yield _block(head, cells, right=right, fold=narrow)


def _block(head: str, cells: list[Text], *, right: bool = False, fold: bool = False) -> _Block:
    """A column that is as wide as its widest cell or its heading, which may be folded."""
    words = head.replace(" %", "\u00a0%").split(" ") if fold else [head]
    width = max([*map(len, words), *map(len, cells)])
    for cell in cells:
        cell.align("right" if right else "left", width)
    lines = textwrap.wrap(" ".join(words), width)
    return [line.rjust(width) if right else line.ljust(width) for line in lines], cells


def _cell(cell: Cell) -> Text:
    return _said(text(cell), _STYLES.get(cell, "") if isinstance(cell, Mark) else "")


def _strips(cells: tuple[Cell, ...], room: int) -> list[Text]:
    """The removed units, the mark, the kept ones; every bar on one logarithmic scale."""
    strips = [cell for cell in cells if isinstance(cell, Strip)]
    positive = sorted(c for s in strips for c in (*s.removed, *s.kept) if c > 0) or [1.0]
    low = math.log(positive[len(positive) // 20])  # a few near zero would flatten all
    high = max(math.log(positive[-1]), low + 1e-9)

    def bar(cost: float) -> str:
        share = (math.log(cost) - low) / (high - low) if cost > 0 else 0.0
        return _BARS[min(max(int(share * len(_BARS)), 0), len(_BARS) - 1)]

    def bars(costs: tuple[float, ...], count: int) -> str:
        return "".join(
            bar(costs[int((i + 0.5) * len(costs) / count)]) for i in range(count) if costs
        )

    def strip(removed: tuple[float, ...], kept: tuple[float, ...]) -> Text:
        if not removed and not kept:
            return Text()
        first = round((room - 1) * len(removed) / (len(removed) + len(kept)))
        first = min(max(first, bool(removed)), room - 1 - bool(kept))
        return Text.assemble(
            (bars(removed, first), "red"), "│", (bars(kept, room - 1 - first), "blue")
        )

    return [strip(s.removed, s.kept) for s in strips]
