"""Flags that many commands have, and how their values are read."""

from __future__ import annotations

import math
import re
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from cswap_deploy.cli.output import Console

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary.")]
_SECONDS = re.compile(r"(\d+\.?\d*|\.\d+)\s*(s|sec|min|m|h|d)?")
_MOST_SECONDS = 1e9
"""Thirty years."""
_UNITS = {"s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


class CheckedPaths(TyperCommand):
    """A command whose paths are such that a system has a file of that name, or may have one."""

    def invoke(self, ctx: Any) -> Any:
        """Run it.

        Raises:
            UsageError: A name in a path is too long.
        """
        from cswap_deploy.errors import UsageError
        from cswap_deploy.settings import check_path

        given = [each if isinstance(each, list) else [each] for each in ctx.params.values()]
        for value in chain.from_iterable(given):
            if isinstance(value, Path):
                try:
                    check_path(value)
                except ValueError as err:
                    raise UsageError(str(err), fix="pass a path that is there") from err
        return super().invoke(ctx)


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
        return [_finite(part) for part in (text or "").split(",") if part.strip()]
    except ValueError as err:
        raise UsageError(f"{text!r}: numbers with commas between them are wanted") from err


def seconds(text: str) -> float:
    """``30s``, ``2min``, ``30d``, ``45`` -> seconds.

    Raises:
        UsageError: It is no duration.
    """
    from cswap_deploy.errors import UsageError

    found = _SECONDS.fullmatch(text.strip())
    value = float(found[1]) * _UNITS[found[2] or "s"] if found else 0.0
    if not 0 < value <= _MOST_SECONDS:
        raise UsageError(f"{text!r} is no duration", fix="write 30s, 2min, 30d, or seconds")
    return value


def fraction(text: str) -> float:
    """``2%`` or ``0.02`` -> 0.02.

    Raises:
        UsageError: It is neither.
    """
    from cswap_deploy.errors import UsageError

    try:
        stripped = text.strip()
        if stripped.endswith("%"):
            return _finite(stripped[:-1]) / 100
        return _finite(stripped)
    except ValueError as err:
        raise UsageError(
            f"{text!r} is no fraction: a fraction between 0 and 1 is wanted",
            fix="write 2% or 0.02",
        ) from err


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is not finite")
    return number
