"""A report as data: sections of sentences, tables and figures; drawn by the modules beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from cswap_deploy.report.cells import Amount, Cell, text

Row: TypeAlias = tuple[Cell, ...]
_FOLD_ABOVE = 30
"""Rows that a page shows without being asked."""


@dataclass(frozen=True, slots=True)
class Column:
    """A table's column."""

    head: str
    cells: tuple[Cell, ...]

    @property
    def is_number(self) -> bool:
        """Whether it is set flush right."""
        return any(isinstance(cell, int | Amount) for cell in self.cells)


@dataclass(frozen=True, slots=True)
class Table:
    """Columns of cells."""

    columns: tuple[Column, ...]
    optional: tuple[str, ...] = ()
    """Headings of the columns that a narrow terminal leaves out."""

    @property
    def shown(self) -> list[Column]:
        """Columns that hold some text."""
        return [column for column in self.columns if any(map(text, column.cells))]

    @property
    def rows(self) -> Iterator[tuple[tuple[Cell, bool], ...]]:
        """Row by row: each cell that is shown, and whether its column is of numbers."""
        return zip(*([(cell, c.is_number) for cell in c.cells] for c in self.shown), strict=True)

    @property
    def folded(self) -> int:
        """How many rows it has, where a page should show it only when asked; else 0."""
        rows = len(self.columns[0].cells)
        return rows if rows > _FOLD_ABOVE else 0


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture and what it shows."""

    svg: Callable[[], str]
    """Draws it, as an ``<svg>`` element."""
    caption: str


@dataclass(frozen=True, slots=True)
class Picture:
    """A small photo; only pages show it."""

    source: str
    """A ``data:`` address."""
    text: str
    mark: str
    """A word above the text."""


@dataclass(frozen=True, slots=True)
class Section:
    """A heading with sentences, tables, figures and pictures."""

    title: str
    text: tuple[str, ...]
    tables: tuple[Table, ...]
    figures: tuple[Figure, ...]
    pictures: tuple[Picture, ...] = ()
    code: str = ""
    """Lines to copy."""


@dataclass(frozen=True, slots=True)
class Tile:
    """One of the figures at the top: what it was, what it is."""

    label: str
    value: Cell
    note: str


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that a reader sees, in reading order."""

    title: str
    sections: tuple[Section, ...]
    about: str = ""
    """Which version made it, and when."""
    sources: tuple[str, ...] = ("manifest.json", "plan.json")
    """The files that its numbers come from."""
    summary: str = ""
    card: str = ""
    """Metadata at the top of the Markdown, in YAML, as the Hugging Face Hub reads it."""
    tiles: tuple[Tile, ...] = ()
    warnings: tuple[str, ...] = ()


def table(heads: str, rows: Iterable[Row], *, optional: tuple[str, ...] = ()) -> Table | None:
    """Make a table, where there are rows; headings with ``|`` between them."""
    made = tuple(zip(*rows, strict=True))
    names = [head.strip() for head in heads.split("|")]
    return Table(tuple(map(Column, names, made)), optional) if made else None


def section(
    title: str, *sentences: str, tables: Iterable[Table | None] = (),
    figures: Iterable[Figure] = (), pictures: Iterable[Picture] = (), code: str = "",
) -> Section | None:  # fmt: skip
    """Make a section of what there is; nothing where there is nothing."""
    made = tuple(table for table in tables if table is not None)
    if not sentences and not made:
        return None
    return Section(title, sentences, made, tuple(figures), tuple(pictures), code)
