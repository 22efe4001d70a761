"""How numbers are written for people: a value that is not zero never reads as zero."""

from __future__ import annotations

import math
from decimal import Decimal


def fixed(value: float, decimals: int, *, sign: str = "") -> str:
    """A number with so many decimals, or with two digits where those would all be zeros.

    ``sign`` is Python's: ``+`` for one before positive numbers too.
    """
    written = f"{value:{sign}.{decimals}f}"
    if not math.isfinite(value) or not value or written.strip("+-0."):
        return written
    return format(Decimal(f"{value:{sign}.2g}"), f"{sign}f")


def exact(value: float, decimals: int) -> str:
    """A number that someone chose: with so many decimals, or with all that it has."""
    digits = Decimal(f"{value:.12g}") if math.isfinite(value) else Decimal(0)
    exponent = digits.as_tuple().exponent
    more = isinstance(exponent, int) and -exponent > decimals
    return format(digits, "f") if more else f"{value:.{decimals}f}"


def percent(share: float, decimals: int) -> str:
    """A fraction as percents: ``12.50%``."""
    return f"{fixed(100 * share, decimals)}%"


def mebibytes(count: float) -> str:
    """Bytes in MiB."""
    return f"{fixed(count / 2**20, 2)} MiB"


def speed(speedup: float, low: float | None, high: float | None) -> tuple[bool, str]:
    """Whether a pruned network is faster than the dense one beyond the noise, and how to say it.

    Args:
        speedup: Dense over pruned median latency.
        low: Lower end of its 95 % interval, where there is one.
        high: Upper end.
    """
    times = f"{fixed(speedup, 2)}x"
    if speedup > 1 and (low is None or low > 1):
        return True, times
    if low is None or high is None or not low <= 1 < high:
        return False, f"not faster: {times}"
    return False, f"not faster: {times}, within the noise: {low:.2f}x to {high:.2f}x"


def duration(seconds: float) -> str:
    """``45 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
