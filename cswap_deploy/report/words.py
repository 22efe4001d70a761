"""Numbers for people: percent, points, milliseconds, sizes, counts."""

from __future__ import annotations

from cswap_deploy.records.measurements import Accuracy


def percent(share: float) -> str:
    """A fraction for people."""
    return f"{100 * share:.1f} %"


def top1(accuracy: Accuracy) -> str:
    """Top-1 accuracy; two decimals, since drops are fractions of a point."""
    return f"{100 * accuracy.top1:.2f} %"


def points(share: float) -> str:
    """A difference of two fractions, in percentage points."""
    return f"{100 * share:.2f}"


def drop_text(drop: float) -> str:
    """A drop of accuracy in words: below zero the pruned network is better."""
    if drop < 0:
        return f"{points(-drop)} points higher"
    return f"{points(drop)} points lower" if drop > 0 else "no change"


def change_text(before: float, after: float) -> str:
    """Relative change of a size."""
    return f"{100 * (after / before - 1):+.1f} %".replace("-", "−") if before else "not known"


def effect(share: float) -> str:
    """An effect as a signed percentage with two or three digits, without the sign of percent."""
    percents = 100 * share
    decimals = 0 if abs(percents) >= 9.95 else 1 if abs(percents) >= 0.995 else 2
    text = f"{percents:+.{decimals}f}".replace("-", "−")
    return text if text.strip("+−0.") else "0"


def effect_interval(share: float, low: float, high: float) -> str:
    """An effect with its interval: −45 % (−52 to −38)."""
    return f"{effect(share)} % ({effect(low)} to {effect(high)})"


def nats(value: float) -> str:
    """A KL divergence with two digits."""
    return "0" if value == 0 else f"{value:.0f}" if value >= 9.95 else f"{value:#.2g}"


def ms(value: float) -> str:
    """Milliseconds with three significant digits."""
    decimals = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{decimals}f} ms"


def size(count: int) -> str:
    """Bytes for people."""
    if count < 1 << 10:
        return f"{count} B"
    return f"{count / (1 << 10):.1f} KiB" if count < 1 << 20 else f"{count / (1 << 20):.2f} MiB"


def short(count: int) -> str:
    """A count for people: 163.1 k, 25.6 M, 4.1 G."""
    for unit, one in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= one:
            return (
                f"{count / one:.3g} {unit}" if count < 1000 * one else f"{count / one:,.0f} {unit}"
            )
    return str(count)


def some(names: tuple[str, ...], limit: int = 5) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more:,} more" if more > 0 else "")
