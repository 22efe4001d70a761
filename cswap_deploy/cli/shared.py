"""Flags that many commands have, and how their values are read."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cswap_deploy.cli.output import Console

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary.")]
_SECONDS = re.compile(r"(\d+\.?\d*|\.\d+)\s*(s|sec|min|m|h|d)?")
_UNITS = {"s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


def console_of(*, as_json: bool, quiet: bool = False) -> Console:
    """Where a command's results and progress go."""
    from cswap_deploy.cli.output import Console

    return Console(as_json=as_json, quiet=quiet)


def numbers(text: str | None) -> list[float]:
    """``1.2,1.5`` -> both.

    Raises:
        UsageError: They are no numbers.
    """
    from cswap_deploy.errors import UsageError

    try:
        return [float(part) for part in (text or "").split(",") if part.strip()]
    except ValueError as err:
        raise UsageError(f"{text!r}: numbers with commas between them are wanted") from err


def seconds(text: str) -> float:
    """``30s``, ``2min``, ``30d``, ``45`` -> seconds.

    Raises:
        UsageError: It is no duration.
    """
    from cswap_deploy.errors import UsageError

    found = _SECONDS.fullmatch(text.strip())
    if found is None or float(found[1]) <= 0:
        raise UsageError(f"{text!r} is no duration", fix="write 30s, 2min, 30d, or seconds")
    return float(found[1]) * _UNITS[found[2] or "s"]


def fraction(text: str) -> float:
    """``2%`` or ``0.02`` -> 0.02.

    Raises:
        UsageError: It is neither.
    """
    from cswap_deploy.errors import UsageError

    try:
        stripped = text.strip()
        if stripped.endswith("%"):
            return float(stripped[:-1]) / 100
        return float(stripped)
    except ValueError as err:
        raise UsageError(f"{text!r} is no fraction", fix="write 2% or 0.02") from err
