"""What a report tells of groups and units: what was removed, and the effects that were measured.

The same sections are what the command ``explain`` shows.
"""

from __future__ import annotations

from functools import partial

from cswap_deploy.config import RatioOf
from cswap_deploy.records.amounts import percent
from cswap_deploy.records.plan import UnitEffect
from cswap_deploy.report import cells as c
from cswap_deploy.report import figures
from cswap_deploy.report.document import Figure, Report, Row, Section, section, table
from cswap_deploy.report.explain import (
    RANKED_BY,
    UNITS,
    VERDICTS,
    Explanation,
    GroupSummary,
    Unit,
)

RATIO_WORDS: dict[RatioOf, str] = {
    "params": "parameters",
    "channels": "units (channels, heads, neurons)",
    "macs": "MACs",
    "latency": "latency",
}


def explained(told: Explanation) -> Report:
    """An explanation as a report of its own."""
    kept, units = sum(g.kept for g in told.groups), sum(g.units for g in told.groups)
    many = f"{len(told.groups)} groups" if len(told.groups) != 1 else told.groups[0].name
    share = percent(told.ratio_effective, 1)
    title = (
        f"{told.model or 'plan'}: importance {told.criterion}, {share} of {told.ratio_of} "
        f"removed; {many}: {kept:,} of {units:,} units kept"
    )
    return Report(title, tuple(part for part in (removal(told), effects(told)) if part is not None))


def removal(told: Explanation, excluded: dict[str, str] | None = None) -> Section | None:
    """The groups, and what was left as it is: layer -> why (``excluded``)."""
    heads = "group | kind | units | kept | kept, %"
    text = [
        f"Importance: {told.criterion}. Each row is a coupled group of layers, from the input to "
        "the output."
    ]
    pictures: list[Figure] = []
    verdicts = VERDICTS if told.verdicts["not measured"] else VERDICTS[:-1]
    if told.ranked_by is not None and told.task != "classify":
        heads += f" | largest effect | {RANKED_BY[told.ranked_by]}: removed │ kept"
    elif told.ranked_by is not None:
        text[0] += " Verdicts are counted on kept + removed units."
        heads += f" | {' | '.join(verdicts)} | largest effect, 95 % | "
        heads += f"{RANKED_BY[told.ranked_by]}: removed │ kept"
    else:
        text += told.reading
        caption = "Units of each group; numbers (if any) are kept/all."
        pictures += [Figure(partial(figures.units_figure, told), caption)] if told.groups else []

    def row(g: GroupSummary) -> Row:
        cells = (g.name, g.kind, g.units, g.kept, c.percent(g.kept / max(g.units, 1)))
        if told.ranked_by is None:
            return cells
        if told.task != "classify":
            most = None if g.largest is None else c.nats(g.largest.effect.kl)
            return *cells, most, c.Strip(*g.costs)
        counts = (f"{g.kept_verdicts[v]:,}+{g.removed_verdicts[v]:,}" for v in verdicts)
        largest = None if g.largest is None else _effect(g.largest.effect)
        return *cells, *map(c.KeptRemoved, counts), largest, c.Strip(*g.costs)

    tables = [
        table(heads, map(row, told.groups), optional=("kind", "kept, %")),
        table("left as it is | why", sorted((excluded or {}).items())),
    ]
    return section("What was removed", *text, tables=tables, figures=pictures)


def effects(told: Explanation) -> Section | None:
    """How to read the effects, and the units that stand out; nothing where none was measured."""
    if told.ranked_by is None:
        return None
    if told.task != "classify":
        return _effects_without_classes(told)
    counts = told.verdicts
    shares = ", ".join(f"{counts[v]:,} {v}" for v in VERDICTS if counts[v])
    caption = (
        "Each group's units from the input to the output, the removed ones left and the kept ones "
        f"right, each from the smallest {RANKED_BY[told.ranked_by]} to the largest. The line is "
        "the threshold: as many units lie below it as were removed. The strip under a group counts "
        "the verdicts on its removed units and, right of the mark, on its kept ones. The axis is "
        "logarithmic away from zero."
    )
    by_harm = told.ranked_by == "true-class"
    heads = "| unit | | verdict | serves | harms | effect, 95 % | KL, nats"
    heads += " | likely harm, nats" if by_harm else ""

    def row(unit: Unit) -> Row:
        e = unit.effect
        state = c.Mark("kept" if unit.kept else "removed")
        cells = (unit.group, e.unit, state, c.Mark(e.verdict), c.Names(unit.serves))
        more = (c.Names(unit.harms), _effect(e), c.nats(e.kl))
        return *cells, *more, *((c.nats(e.harm),) if by_harm else ())

    lists = (
        ("largest effects", told.largest),
        ("detrimental", told.detrimental),
        ("removed at the largest cost", told.removed_at_largest_cost),
    )
    return section(
        "Measured effects",
        *told.reading,
        f"Verdicts on all {sum(counts.values()):,} units: {shares}.",
        tables=[table(title + heads, map(row, units)) for title, units in lists],
        figures=[Figure(partial(figures.effects_figure, told), caption)],
    )


def _effects_without_classes(told: Explanation) -> Section | None:
    """Effects on the outputs: no verdicts, no intervals, one value a unit."""
    assert told.ranked_by is not None
    name = RANKED_BY[told.ranked_by]
    caption = (
        "Each group's units from the input to the output, the removed ones left and the kept ones "
        f"right, each from the smallest {name} to the largest. The line is the threshold: as many "
        "units lie below it as were removed. The axis is logarithmic away from zero."
    )
    heads = f"| unit | | {name}{UNITS[told.ranked_by]}"

    def row(unit: Unit) -> Row:
        state = c.Mark("kept" if unit.kept else "removed")
        return unit.group, unit.effect.unit, state, c.nats(unit.effect.kl)

    lists = (
        ("largest effects", told.largest),
        ("removed at the largest cost", told.removed_at_largest_cost),
    )
    return section(
        "Measured effects",
        *told.reading,
        tables=[table(title + heads, map(row, units)) for title, units in lists],
        figures=[Figure(partial(figures.effects_figure, told), caption)],
    )


def _effect(e: UnitEffect) -> c.Amount | None:
    if e.true_class is None or e.low is None or e.high is None:
        return None
    return c.interval(c.effect, e.true_class, e.low, e.high)
