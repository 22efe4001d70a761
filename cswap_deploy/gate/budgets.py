"""Absolute limits on what a bundle may cost, from ``budgets.toml``.

    accuracy_drop_max = 0.02      # dense top-1 minus pruned top-1, fraction
    top1_min = 0.90               # top-1 of the pruned network, fraction
    output_db_min = 30.0          # error of every output (dB), for a task without classes
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
from cswap_deploy.records.amounts import exact, fixed
from cswap_deploy.records.manifest import Manifest, TargetResult
from cswap_deploy.records.value import Value

MIB = 1 << 20
_IDENTICAL = 300.0
"""Decibels; float64 holds no smaller error."""
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
    output_db_min: Limit | None = None
    parity_max: Limit | None = None
    size_max_mib: Limit | None = None
    params_max: Count | None = None
    macs_max: Count | None = None
    latency: dict[str, LatencyBudget] = Field(default_factory=dict)
    engine: dict[str, EngineBudget] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BudgetResult:
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
        UsageError: The file cannot be read, a name or a value is wrong, or no limit is set.
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
    no_limits = {"latency", "engine", "batch"}
    if not any(table.model_dump(exclude=no_limits, exclude_none=True) for table in tables):
        raise UsageError(
            f"{path} sets no limit, so it would pass anything",
            fix=f"set one of: {', '.join(_known(()))}",
        )
    return budgets


def check_budgets(manifest: Manifest, budgets: Budgets) -> tuple[BudgetResult, ...]:
    """Hold every budget against the manifest's measurements.

    Accuracy is the worst over the targets that were run, and PyTorch; it counts as not measured
    when the bundle has targets and none of them was run. Parity is the worst over all comparisons.

    Returns:
        One result for each limit, in the order of ``budgets.toml``'s documentation.
    """
    pruned, size = manifest.pruned, manifest.onnx.size_bytes / MIB
    results = [*_accuracy(manifest, budgets), *_outputs(manifest, budgets)]
    results += _parity(manifest, budgets)
    results += _hold("size_max_mib", budgets.size_max_mib, _Seen(size, "model.onnx"))
    results += _hold("params_max", budgets.params_max, _Seen(pruned.params, "pruned network"))
    results += _hold("macs_max", budgets.macs_max, _Seen(pruned.macs, "pruned network"))
    measured = {result.engine.target: result for result in manifest.targets}
    for target, limits in budgets.latency.items():
        results += _latency(target, measured, limits)
    for target, engine in budgets.engine.items():
        mib = measured[target].engine.size_bytes / MIB if target in measured else None
        seen = _Seen(mib, f"{target} engine", why=_absent(target, measured))
        results += _hold(f"engine.{target}.size_max_mib", engine.size_max_mib, seen)
    return tuple(results)


def require(results: tuple[BudgetResult, ...]) -> None:
    """Go on only when every budget is met.

    Raises:
        GateError: One or more failed; each is named with its measurement and its limit.
    """
    failed = [result for result in results if not result.ok]
    if failed:
        lines = "\n  ".join(f"{result.name}: {result.text}" for result in failed)
        raise GateError(f"{len(failed)} of {len(results)} budgets failed:\n  {lines}")


@dataclass(frozen=True, slots=True)
class _Seen:
    """What was measured and on what; or why it was not. ``aside`` says what it leaves out."""

    value: float | None
    what: str = ""
    why: str = ""
    aside: str = ""


_AMOUNTS: dict[str, tuple[int, int, str]] = {
    "accuracy_drop_max": (100, 2, " points"), "top1_min": (100, 2, " %"),
    "output_db_min": (1, 1, " dB"),
    "size_max_mib": (1, 3, " MiB"), "speedup_min": (1, 2, "x"),
    **dict.fromkeys(("p50_ms", "p90_ms", "p99_ms"), (1, 3, " ms")),
}  # fmt: skip
"""How the value of a budget is written for people: times a factor, with so many decimals, and its
unit."""
_COUNTS = {"params_max": " parameters", "macs_max": " MACs"}
_MOST_DECIMALS = 12


def _written(name: str, value: float | None, limit: float) -> tuple[str, str]:
    """A value and its limit, with decimals enough that they differ where the numbers do."""
    if name in _COUNTS:
        return f"{value or 0:,}{_COUNTS[name]}", f"{limit:,}{_COUNTS[name]}"
    if name == "parity_max":
        rounded = f"{value or 0:.2g}"
        return (f"{value:.9g}" if float(rounded) == limit != value else rounded), f"{limit:.12g}"
    factor, decimals, unit = _AMOUNTS[name]
    seen, bound = factor * (value or 0.0), exact(factor * limit, decimals)
    decimals = len(bound.partition(".")[2])
    while float(fixed(seen, decimals)) == float(bound) and value != limit:
        if decimals == _MOST_DECIMALS:
            break
        decimals += 1
    return f"{fixed(seen, decimals)}{unit}", f"{bound}{unit}"


def _hold(name: str, limit: float | None, seen: _Seen) -> Iterator[BudgetResult]:
    """The result of one limit, a least one where its name ends so; none where no limit is set."""
    if limit is None:
        return
    value, least = _written(name.rpartition(".")[2], seen.value, limit)
    at_least = name.endswith("_min")
    bound = f"limit {'at least' if at_least else 'at most'} {least}"
    if seen.value is None:
        yield BudgetResult(name, None, limit, False, f"not measured: {seen.why}; {bound}")
        return
    ok = seen.value >= limit if at_least else seen.value <= limit  # NaN is neither
    text = f"{seen.what} {value}, {bound}{seen.aside}"
    yield BudgetResult(name, seen.value, limit, ok, text)


def _accuracy(manifest: Manifest, budgets: Budgets) -> Iterator[BudgetResult]:
    changes = {r.engine.target: r.accuracy for r in manifest.targets if r.accuracy is not None}
    unseen = [r.engine.target for r in manifest.targets if r.accuracy is None]
    why = "no validation images were scored"
    if manifest.targets and not changes:
        why = f"no engine was run on validation images (targets: {', '.join(unseen)})"
    elif manifest.torch_accuracy is not None:
        changes["PyTorch"] = manifest.torch_accuracy
    if manifest.model.task != "classify":
        why = f"a network of task {manifest.model.task} has no top-1; output_db_min is for it"
    drop = top1 = _Seen(None, why=why)
    if changes:
        aside = f"; not run: {', '.join(unseen)}" if unseen else ""
        where, worst = max(changes.items(), key=lambda c: (math.isnan(c[1].drop), c[1].drop))
        drop = _Seen(worst.drop, f"top-1 drop ({where})", aside=aside)
        where, least = min(changes.items(), key=lambda c: c[1].pruned.top1)
        images = f"{least.pruned.images:,} images"
        top1 = _Seen(least.pruned.top1, f"top-1 ({where}, {images})", aside=aside)
    yield from _hold("accuracy_drop_max", budgets.accuracy_drop_max, drop)
    yield from _hold("top1_min", budgets.top1_min, top1)


def _outputs(manifest: Manifest, budgets: Budgets) -> Iterator[BudgetResult]:
    """The worst output on the worst target; what did not change at all counts as 300 dB."""
    changes = {r.engine.target: r.outputs for r in manifest.targets if r.outputs is not None}
    unseen = [r.engine.target for r in manifest.targets if r.outputs is None]
    why = "no outputs were compared"
    if manifest.model.task == "classify":
        why = "a classifier is held against accuracy_drop_max"
    elif manifest.targets and not changes:
        why = f"no engine was run on validation images (targets: {', '.join(unseen)})"
    elif manifest.torch_outputs is not None:
        changes["PyTorch"] = manifest.torch_outputs
    seen = _Seen(None, why=why)
    if changes:
        errors = {w: _IDENTICAL if x.worst_db is None else x.worst_db for w, x in changes.items()}
        where = min(errors, key=lambda name: errors[name])
        aside = f"; not run: {', '.join(unseen)}" if unseen else ""
        seen = _Seen(errors[where], f"output error ({where})", aside=aside)
    yield from _hold("output_db_min", budgets.output_db_min, seen)


def _parity(manifest: Manifest, budgets: Budgets) -> Iterator[BudgetResult]:
    parities = [*manifest.export_parity]
    parities += [r.parity for r in manifest.targets if r.parity is not None]
    unseen = [r.engine.target for r in manifest.targets if r.parity is None]
    seen = _Seen(None, why="no graph was compared")
    if parities:
        p = max(parities, key=lambda p: (math.isnan(p.max_abs), p.max_abs))
        aside = f"; not run: {', '.join(unseen)}" if unseen else ""
        seen = _Seen(p.max_abs, f"{p.candidate} against {p.reference}, logits", aside=aside)
    yield from _hold("parity_max", budgets.parity_max, seen)


def _latency(
    target: str, results: dict[str, TargetResult], limits: LatencyBudget
) -> Iterator[BudgetResult]:
    result = results.get(target)
    latency = None if result is None else result.latency
    why = _absent(target, results)
    if latency is not None and limits.batch not in (None, latency.batch):
        why = f"measured at batch {latency.batch}, the budget is for batch {limits.batch}"
        latency = None
    where = target if latency is None else f"{target}, batch {latency.batch}"
    for name in ("p50_ms", "p90_ms", "p99_ms"):
        value = None if latency is None else getattr(latency, name)
        seen = _Seen(value, f"{name.removesuffix('_ms')} ({where})", why)
        yield from _hold(f"latency.{target}.{name}", getattr(limits, name), seen)
    speedup = None if latency is None or result is None else result.speedup
    if latency is not None and speedup is None:
        why = "the dense graph was not timed"
    seen = _Seen(speedup, f"speed-up ({where})", why)
    yield from _hold(f"latency.{target}.speedup_min", limits.speedup_min, seen)


def _absent(target: str, results: dict[str, TargetResult]) -> str:
    """Why nothing was measured on a target."""
    if target not in results:
        return f"the bundle has no target {target} (it has: {', '.join(results) or 'none'})"
    return f"the engine was not run: {results[target].engine.reason or 'no reason was recorded'}"


def _known(loc: tuple[int | str, ...]) -> list[str]:
    """Names that may stand in the table at ``loc``."""
    tables: dict[str, type[Value]] = {"latency": LatencyBudget, "engine": EngineBudget}
    return list((tables[str(loc[0])] if len(loc) > 1 else Budgets).model_fields)


def _problem(loc: tuple[int | str, ...], kind: str, message: str, got: object) -> str:
    name = ".".join(map(str, loc))
    if kind != "extra_forbidden":
        return f"{name}: {message} (got {got!r})"
    known = _known(loc)
    close = get_close_matches(str(loc[-1]), known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"{name}: no such budget{hint} known here: {', '.join(known)}"
