"""Absolute limits on what a bundle may cost, from ``budgets.toml``.

    accuracy_drop_max = 0.02      # dense top-1 minus pruned top-1, fraction
    top1_min = 0.90               # top-1 of the pruned network, fraction
    parity_max = 1e-3             # |difference of logits|, over every graph pass and engine
    size_max_mib = 4.0            # model.onnx
    params_max = 200_000
    macs_max = 30_000_000         # one image

    [latency.onnxruntime]         # one table per target
    p50_ms = 5.0                  # also p90_ms, p99_ms
    speedup_min = 1.1             # dense p50 over pruned p50
    batch = 1                     # the limits are for this batch only

    [engine.tensorrt-rtx]
    size_max_mib = 5.0

Every name may be left out. What was not measured fails: a gate that cannot see must not pass.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from cswap_deploy.errors import GateError, UsageError
from cswap_deploy.records.manifest import Manifest, TargetResult
from cswap_deploy.records.value import Value

MIB = 1 << 20
Limit = Annotated[float, Field(strict=True, ge=0.0, allow_inf_nan=False)]
Share = Annotated[float, Field(strict=True, ge=0.0, le=1.0, allow_inf_nan=False)]
Count = Annotated[int, Field(strict=True, ge=0)]


class LatencyBudget(Value):
    """Limits on one target's latency (milliseconds)."""

    p50_ms: Limit | None = None
    p90_ms: Limit | None = None
    p99_ms: Limit | None = None
    speedup_min: Limit | None = None
    batch: Count | None = None


class EngineBudget(Value):
    """Limits on one target's engine file."""

    size_max_mib: Limit | None = None


class Budgets(Value):
    """The limits of ``budgets.toml``; ``None`` is no limit."""

    accuracy_drop_max: Share | None = None
    top1_min: Share | None = None
    parity_max: Limit | None = None
    size_max_mib: Limit | None = None
    params_max: Count | None = None
    macs_max: Count | None = None
    latency: dict[str, LatencyBudget] = Field(default_factory=dict)
    engine: dict[str, EngineBudget] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BudgetVerdict:
    """One budget held against what was measured."""

    name: str
    """The limit's name, with its table: ``latency.onnxruntime.p99_ms``."""
    measured: float | None
    """In the limit's unit; None where it was not measured."""
    limit: float
    ok: bool
    text: str
    """The same for people."""


def read_budgets(path: Path) -> Budgets:
    """Read ``budgets.toml``.

    Raises:
        UsageError: The file cannot be read, a name is unknown, a value is out of range, or no
            limit is set at all.
    """
    try:
        data = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as err:
        raise UsageError(f"cannot read the budgets {path}: {err}") from err
    try:
        budgets = Budgets.model_validate(data)
    except ValidationError as err:
        lines = [_problem(p["loc"], p["type"], p["msg"], p["input"]) for p in err.errors()]
        raise UsageError(f"bad budgets in {path}:\n  " + "\n  ".join(lines)) from err
    tables: list[Value] = [budgets, *budgets.latency.values(), *budgets.engine.values()]
    if not any(value is not None for table in tables for value in _limits(table).values()):
        raise UsageError(
            f"{path} sets no limit, so it would pass anything",
            fix=f"set one of: {', '.join(_known(()))}",
        )
    return budgets


def check_budgets(manifest: Manifest, budgets: Budgets) -> tuple[BudgetVerdict, ...]:
    """Hold every budget against the manifest's measurements.

    Accuracy is the worst over the targets that were run, and PyTorch; it counts as not measured
    when the bundle has targets and none of them was run. Parity is the worst over all comparisons.

    Args:
        manifest: Of the bundle to judge.
        budgets: At least one limit.

    Returns:
        One verdict per limit, in the order of ``budgets.toml``'s documentation.
    """
    verdicts = [*_accuracy(manifest, budgets), *_parity(manifest, budgets)]
    pruned = manifest.pruned
    for name, measured, limit, unit, what in (
        ("size_max_mib", manifest.onnx.size_bytes / MIB, budgets.size_max_mib, "MiB", "model.onnx"),
        ("params_max", pruned.params, budgets.params_max, "parameters", "pruned network"),
        ("macs_max", pruned.macs, budgets.macs_max, "MACs", "pruned network"),
    ):
        verdicts += _bound(name, measured, limit, unit=unit, what=what)
    results = {result.engine.target: result for result in manifest.targets}
    for target, limits in budgets.latency.items():
        verdicts += _latency(target, results, limits)
    for target, engine in budgets.engine.items():
        verdicts += _bound(
            f"engine.{target}.size_max_mib",
            results[target].engine.size_bytes / MIB if target in results else None,
            engine.size_max_mib,
            unit="MiB",
            what=f"{target} engine",
            why=_absent(target, results),
        )
    return tuple(verdicts)


def require(verdicts: tuple[BudgetVerdict, ...]) -> None:
    """Go on only when every budget is met.

    Raises:
        GateError: One or more failed; each is named with its measurement and its limit.
    """
    failed = [verdict for verdict in verdicts if not verdict.ok]
    if failed:
        lines = "\n  ".join(f"{verdict.name}: {verdict.text}" for verdict in failed)
        raise GateError(f"{len(failed)} of {len(verdicts)} budgets failed:\n  {lines}")


# --- one budget each -----------------------------------------------------------------------------


def _accuracy(manifest: Manifest, budgets: Budgets) -> Iterator[BudgetVerdict]:
    changes = {r.engine.target: r.accuracy for r in manifest.targets if r.accuracy is not None}
    unseen = [r.engine.target for r in manifest.targets if r.accuracy is None]
    why = "no validation images were scored"
    if manifest.targets and not changes:
        why = f"no engine was run on validation images (targets: {', '.join(unseen)})"
    elif manifest.torch_accuracy is not None:
        changes["PyTorch"] = manifest.torch_accuracy
    aside = f"; not run: {', '.join(unseen)}" if unseen and changes else ""
    drop: float | None = None
    top1: float | None = None
    where_drop = where_top1 = ""
    if changes:
        place = max(changes, key=lambda name: (math.isnan(changes[name].drop), changes[name].drop))
        drop, where_drop = changes[place].drop, f"top-1 drop ({place})"
        place = min(changes, key=lambda name: changes[name].pruned.top1)
        best = changes[place].pruned
        top1, where_top1 = best.top1, f"top-1 ({place}, {best.images:,} images)"
    yield from _bound(
        "accuracy_drop_max",
        drop,
        budgets.accuracy_drop_max,
        unit="points",
        what=where_drop,
        why=why,
        aside=aside,
    )
    yield from _bound(
        "top1_min",
        top1,
        budgets.top1_min,
        least=True,
        unit="%",
        what=where_top1,
        why=why,
        aside=aside,
    )


def _parity(manifest: Manifest, budgets: Budgets) -> Iterator[BudgetVerdict]:
    parities = [*manifest.export_parity]
    parities += [r.parity for r in manifest.targets if r.parity is not None]
    unseen = [r.engine.target for r in manifest.targets if r.parity is None]
    aside = f"; not run: {', '.join(unseen)}" if unseen and parities else ""
    worst = max(parities, key=lambda p: (math.isnan(p.max_abs), p.max_abs), default=None)
    yield from _bound(
        "parity_max",
        None if worst is None else worst.max_abs,
        budgets.parity_max,
        unit="logits",
        what="" if worst is None else f"{worst.candidate} against {worst.reference}, logits",
        why="no graph was compared",
        aside=aside,
    )


def _latency(
    target: str, results: dict[str, TargetResult], limits: LatencyBudget
) -> Iterator[BudgetVerdict]:
    result = results.get(target)
    latency = None if result is None else result.latency
    why = _absent(target, results)
    if latency is not None and limits.batch not in (None, latency.batch):
        why = f"measured at batch {latency.batch}, the budget is for batch {limits.batch}"
        latency = None
    where = target if latency is None else f"{target}, batch {latency.batch}"
    for name in ("p50_ms", "p90_ms", "p99_ms"):
        yield from _bound(
            f"latency.{target}.{name}",
            None if latency is None else getattr(latency, name),
            getattr(limits, name),
            unit="ms",
            what=f"{name.removesuffix('_ms')} ({where})",
            why=why,
        )
    speedup = None if latency is None or result is None else result.speedup
    if latency is not None and speedup is None:
        why = "the dense graph was not timed"
    yield from _bound(
        f"latency.{target}.speedup_min",
        speedup,
        limits.speedup_min,
        least=True,
        unit="x",
        what=f"speed-up ({where})",
        why=why,
    )


def _absent(target: str, results: dict[str, TargetResult]) -> str:
    """Why nothing was measured on a target."""
    if target not in results:
        return f"the bundle has no target {target} (it has: {', '.join(results) or 'none'})"
    return f"the engine was not run: {results[target].engine.reason or 'no reason was recorded'}"


def _bound(
    name: str,
    measured: float | None,
    limit: float | None,
    *,
    unit: str,
    what: str,
    least: bool = False,
    why: str = "",
    aside: str = "",
) -> Iterator[BudgetVerdict]:
    """The verdict on one limit; none where no limit is set."""
    if limit is None:
        return
    bound = f"{'at least' if least else 'at most'} {_amount(limit, unit)}"
    if measured is None:
        yield BudgetVerdict(name, None, limit, False, f"not measured: {why}; limit {bound}")
        return
    ok = measured >= limit if least else measured <= limit  # NaN is neither
    text = f"{what} {_amount(measured, unit)}, limit {bound}{aside}"
    yield BudgetVerdict(name, measured, limit, ok, text)


def _amount(value: float, unit: str) -> str:
    if unit == "points":
        return f"{100 * value:.2f} points"
    if unit == "%":
        return f"{100 * value:.2f} %"
    if unit == "x":
        return f"{value:.2f}x"
    if unit == "logits":
        return f"{value:.2g}"
    return f"{value:,} {unit}" if isinstance(value, int) else f"{value:.3f} {unit}"


# --- reading -------------------------------------------------------------------------------------


def _limits(table: Value) -> dict[str, object]:
    """A table's own limits; ``batch`` only says which measurement they are for."""
    skipped = {"latency", "engine", "batch"}
    return {name: getattr(table, name) for name in type(table).model_fields if name not in skipped}


def _known(loc: tuple[int | str, ...]) -> list[str]:
    """Names that may stand in the table at ``loc``."""
    tables: dict[str, type[Value]] = {"latency": LatencyBudget, "engine": EngineBudget}
    table = tables.get(str(loc[0]), Budgets) if len(loc) > 1 else Budgets
    return list(table.model_fields)


def _problem(loc: tuple[int | str, ...], kind: str, message: str, got: object) -> str:
    name = ".".join(map(str, loc))
    if kind != "extra_forbidden":
        return f"{name}: {message} (got {got!r})"
    known = _known(loc)
    close = get_close_matches(str(loc[-1]), known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"{name}: no such budget{hint} known here: {', '.join(known)}"
