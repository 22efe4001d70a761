"""What stands in a report: text of several kinds, and how numbers with units are written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from cswap_deploy.records.amounts import fixed


class Amount(str):
    """A number with its unit, as people read it."""


class KeptRemoved(Amount):
    """How many units were kept and how many removed, with ``+`` between them."""


class Mark(str):
    """A word that may stand out: a verdict, kept or removed, pass or FAIL."""


class Digest(str):
    """A whole sha256, in hexadecimal digits."""


class Names(tuple[str, ...]):
    """Names, of which the first few are shown."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Strip:
    """What ranks the units of a group, ascending; a terminal draws it, pages have figures."""

    removed: tuple[float, ...]
    kept: tuple[float, ...]


Cell: TypeAlias = int | str | Names | Strip | None


def text(cell: Cell) -> str:
    """A cell for people; what is not there is a dash."""
    if isinstance(cell, Names):
        return some(cell, 3)
    if cell is None or isinstance(cell, Strip):
        return "-" if cell is None else ""
    return f"{cell:,}" if isinstance(cell, int) else str(cell)


def maybe(value: float | None, form: str) -> Amount | None:
    """A number in one of Python's formats, where there is one."""
    return None if value is None else Amount(format(value, form))


def interval(unit: Callable[[float], str], value: float, low: float, high: float) -> Amount:
    """A number with its 95 % interval: −45 % (−52 to −38)."""
    shown = unit(value)
    own = shown.partition(" ")[2]
    ends = (unit(end).removesuffix(f" {own}") if own else unit(end) for end in (low, high))
    return Amount(f"{shown} ({' to '.join(ends)})")


def percent(share: float) -> Amount:
    """A fraction, in percent."""
    return Amount(f"{fixed(100 * share, 1)} %")


def top1(share: float) -> Amount:
    """Top-1 accuracy; two decimals, since drops are fractions of a point."""
    return Amount(f"{fixed(100 * share, 2)} %")


def points(share: float) -> Amount:
    """A difference of two fractions, in percentage points."""
    return Amount(fixed(100 * share, 2))


def signed_points(share: float) -> Amount:
    """The same with its sign, of a change."""
    return Amount(f"{fixed(100 * share, 1, sign='+')}".replace("-", "−"))


def effect(share: float) -> Amount:
    """A relative change as a signed percentage with two or three digits; 0 below 0.005 %."""
    percents = 100 * share
    decimals = 0 if abs(percents) >= 9.95 else 1 if abs(percents) >= 0.995 else 2
    written = f"{percents:+.{decimals}f}".replace("-", "−")
    return Amount(f"{written if written.strip('+−0.') else '0'} %")


def nats(value: float) -> Amount:
    """A KL divergence, or another difference of log probabilities, with two digits."""
    written = f"{abs(value):.0f}" if not value or abs(value) >= 9.95 else f"{abs(value):#.2g}"
    return Amount(f"−{written}" if value < 0 else written)


def decibels(value: float | None) -> Amount:
    """A signal over its error; ``identical`` where there is no error."""
    return Amount("identical" if value is None else f"{fixed(value, 1)} dB")


def ms(value: float) -> Amount:
    """Milliseconds with three significant digits."""
    decimals = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return Amount(f"{fixed(value, decimals)} ms")


def seconds(value: float) -> Amount:
    """Seconds with a decimal."""
    return Amount(f"{fixed(value, 1)} s")


def size(count: float) -> Amount:
    """Bytes, in binary units."""
    if count < 1 << 10:
        return Amount(f"{count} B")
    return Amount(f"{count / 2**10:.1f} KiB" if count < 1 << 20 else f"{count / 2**20:.2f} MiB")


def short(count: float) -> Amount:
    """A count with three digits: 163 k, 25.6 M, 4.09 G."""
    for unit, one in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= one:
            return Amount(f"{count / one:{'.3g' if count < 1000 * one else ',.0f'}} {unit}")
    return Amount(count)


def some(names: tuple[str, ...], limit: int = 5) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more:,} more" if more > 0 else "")
