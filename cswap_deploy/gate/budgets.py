"""Limits on what a bundle may cost, from ``budgets.toml``.

    inconclusive = "pass"         # or "fail": what a limit inside an interval counts as

    accuracy_drop_max = 0.02      # dense top-1 minus pruned top-1, fraction
    top1_min = 0.90               # top-1 of the pruned network, fraction
    agreement_min = 0.95          # images on which both predict the same class, fraction
    output_db_min = 30.0          # error of every output (dB), for a task without classes
    parity_max = 1e-3             # |difference of logits|, over every graph pass and engine
    size_max_mib = 4.0            # model.onnx
    params_max = 200_000
    macs_max = 30_000_000         # one image

    [latency.onnxruntime]         # one table per target
    p50_ms = 5.0                  # also p90_ms, p99_ms
    throughput_min = 150.0        # images a second
    memory_max_mib = 400          # peak of a process that runs it
    speedup_min = 1.1             # dense over pruned; measured here with `build --with-dense`
    slowdown_max = 0.03           # over the baseline, in alternation with it
    batch = 1                     # the limits are for this batch only

    [engine.tensorrt-rtx]
    size_max_mib = 5.0

    [baseline]
    bundle = "git:main:bundles/net"    # or a path, from this file's folder
    top1_drop_max = 0.005              # paired by image
    size_growth_max = 0.02             # of each engine

Every name may be left out. What was not measured fails: a gate that cannot see must not pass. This
file holds the build's own figures against them; :mod:`cswap_deploy.gate.fresh` measures here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from cswap_deploy.errors import GateError, UsageError
from cswap_deploy.records.amounts import exact, fixed
from cswap_deploy.records.manifest import Manifest, TargetResult
from cswap_deploy.records.measurements import Agreement
from cswap_deploy.records.value import Value
from cswap_deploy.settings import read_toml, shown

MIB = 1 << 20
_IDENTICAL = 300.0
"""Decibels; float64 holds no smaller error."""
Limit = Annotated[float, Field(strict=True, ge=0.0, allow_inf_nan=False)]
Share = Annotated[float, Field(strict=True, ge=0.0, le=1.0, allow_inf_nan=False)]
Inconclusive = Literal["pass", "fail"]
Count = Annotated[int, Field(strict=True, ge=0)]


class LatencyBudget(Value):
    """Limits on one target's latency (milliseconds)."""

    p50_ms: Limit | None = None
    p90_ms: Limit | None = None
    p99_ms: Limit | None = None
    throughput_min: Limit | None = None
    memory_max_mib: Limit | None = None
    speedup_min: Limit | None = None
    slowdown_max: Limit | None = None
    batch: Annotated[int, Field(strict=True, ge=1)] | None = None


class EngineBudget(Value):
    """Limits on one target's engine file."""

    size_max_mib: Limit | None = None


class BaselineBudget(Value):
    """What a bundle is held against, and limits on what changes from there."""

    bundle: Annotated[str, Field(min_length=1)]
    top1_drop_max: Share | None = None
    size_growth_max: Limit | None = None


class Budgets(Value):
    """The limits of ``budgets.toml``; ``None`` is no limit."""

    inconclusive: Inconclusive = "pass"
    """What a limit counts as that lies inside the interval of what was measured."""
    accuracy_drop_max: Share | None = None
    top1_min: Share | None = None
    agreement_min: Share | None = None
    output_db_min: Limit | None = None
    parity_max: Limit | None = None
    size_max_mib: Limit | None = None
    params_max: Count | None = None
    macs_max: Count | None = None
    latency: dict[str, LatencyBudget] = Field(default_factory=dict)
    engine: dict[str, EngineBudget] = Field(default_factory=dict)
    baseline: BaselineBudget | None = None

    @model_validator(mode="after")
    def _has_a_baseline(self) -> Self:
        asks = [name for name, table in self.latency.items() if table.slowdown_max is not None]
        if asks and self.baseline is None:
            raise ValueError(
                f"latency.{asks[0]}.slowdown_max needs a baseline: add [baseline] with "
                'bundle = "PATH", or "git:REF:PATH"'
            )
        return self


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
    low: float | None = None
    """95 % interval of ``measured``; None for what is exact, or was not judged by it."""
    high: float | None = None
    inconclusive: bool = False
    """The limit lies inside the interval; ``ok`` is then what the file says of that."""


def read_budgets(path: Path) -> Budgets:
    """Read ``budgets.toml``.

    Raises:
        UsageError: The file cannot be read, a name or a value is wrong, or no limit is set.
    """
    data = read_toml(path, "budgets")
    try:
        budgets = Budgets.model_validate(data)
    except ValidationError as err:
        lines = [_problem(p["loc"], p["type"], p["msg"], p["input"]) for p in err.errors()]
        raise UsageError(f"bad budgets in {path}:\n  " + "\n  ".join(lines)) from err
    tables: list[Value] = [budgets, *budgets.latency.values(), *budgets.engine.values()]
    tables += [] if budgets.baseline is None else [budgets.baseline]
    no_limits = {"latency", "engine", "batch", "inconclusive", "baseline", "bundle"}
    if not any(table.model_dump(exclude=no_limits, exclude_none=True) for table in tables):
        raise UsageError(
            f"{path} sets no limit, so it would pass anything",
            fix=f"set one of: {', '.join(_known(()))}",
        )
    return budgets


def check_budgets(manifest: Manifest, budgets: Budgets) -> tuple[BudgetResult, ...]:
    """Hold every budget against the manifest's measurements, as they stand.

    Accuracy is the worst over the targets that were run, and PyTorch; it counts as not measured
    when the bundle has targets and none of them was run. Parity is the worst over all comparisons.

    Returns:
        One result for each limit, in the order of ``budgets.toml``'s documentation.
    """
    held = exact_limits(manifest, budgets)
    measured = {result.engine.target: result for result in manifest.targets}
    for target, limits in budgets.latency.items():
        held += _latency(target, measured, limits)
    held += engine_limits(manifest, budgets)
    if budgets.baseline is not None:
        why = "the build did not compare with the baseline; `cswap-deploy check` without --recorded"
        for name in ("top1_drop_max", "size_growth_max"):
            limit = getattr(budgets.baseline, name)
            held += hold(f"baseline.{name}", limit, Seen(None, why=why))
    return tuple(held)


def exact_limits(
    manifest: Manifest, budgets: Budgets, inconclusive: Inconclusive | None = None
) -> list[BudgetResult]:
    """What needs no timing and no engine's file; intervals count where ``inconclusive`` is set."""
    pruned, size = manifest.pruned, manifest.onnx.size_bytes / MIB
    results = [*_accuracy(manifest, budgets, inconclusive), *_outputs(manifest, budgets)]
    results += _parity(manifest, budgets)
    results += hold("size_max_mib", budgets.size_max_mib, Seen(size, "model.onnx"))
    results += hold("params_max", budgets.params_max, Seen(pruned.params, "pruned network"))
    results += hold("macs_max", budgets.macs_max, Seen(pruned.macs, "pruned network"))
    return results


def engine_limits(manifest: Manifest, budgets: Budgets) -> list[BudgetResult]:
    """Of the engines' files."""
    results: list[BudgetResult] = []
    measured = {result.engine.target: result for result in manifest.targets}
    for target, engine in budgets.engine.items():
        mib = measured[target].engine.size_bytes / MIB if target in measured else None
        seen = Seen(mib, f"{target} engine", why=_absent(target, measured))
        results += hold(f"engine.{target}.size_max_mib", engine.size_max_mib, seen)
    return results


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
class Seen:
    """What was measured and on what; or why it was not. ``aside`` says what it leaves out."""

    value: float | None
    what: str = ""
    why: str = ""
    aside: str = ""
    low: float | None = None
    """Interval of ``value``."""
    high: float | None = None


def _within(seen: Seen, limit: float, *, at_least: bool) -> bool | None:
    """Whether all of an interval is within a limit, or beyond; ``None`` for neither."""
    assert seen.low is not None
    assert seen.high is not None
    if at_least:
        return True if seen.low >= limit else False if seen.high < limit else None
    return True if seen.high <= limit else False if seen.low > limit else None


_AMOUNTS: dict[str, tuple[int, int, str]] = {
    "accuracy_drop_max": (100, 2, " points"), "top1_drop_max": (100, 2, " points"),
    "top1_min": (100, 2, " %"), "agreement_min": (100, 1, " %"), "output_db_min": (1, 1, " dB"),
    "size_max_mib": (1, 3, " MiB"), "memory_max_mib": (1, 0, " MiB"), "speedup_min": (1, 2, "x"),
    "slowdown_max": (100, 1, " %"), "size_growth_max": (100, 1, " %"),
    "throughput_min": (1, 1, " images/s"),
}  # fmt: skip
"""How the value of a budget is written for people: times a factor, with so many decimals, and its
unit; percentiles of latency have none here."""
_COUNTS = {"params_max": " parameters", "macs_max": " MACs"}
_MOST_DECIMALS = 12


def _written(name: str, value: float | None, limit: float) -> tuple[str, str]:
    """A value and its limit, with decimals enough that they differ where the numbers do."""
    if name in _COUNTS:
        return f"{value or 0:,}{_COUNTS[name]}", f"{limit:,}{_COUNTS[name]}"
    if name == "parity_max":
        rounded = f"{value or 0:.2g}"
        return (f"{value:.9g}" if float(rounded) == limit != value else rounded), f"{limit:.12g}"
    factor, decimals, unit = _AMOUNTS.get(name, (1, 3, " ms"))
    seen, bound = factor * (value or 0.0), exact(factor * limit, decimals)
    decimals = len(bound.partition(".")[2])
    while float(fixed(seen, decimals)) == float(bound) and value != limit:
        if decimals == _MOST_DECIMALS:
            break
        decimals += 1
    return f"{fixed(seen, decimals)}{unit}", f"{bound}{unit}"


def hold(
    name: str, limit: float | None, seen: Seen, inconclusive: Inconclusive | None = None
) -> Iterator[BudgetResult]:
    """The result of one limit, a least one where its name ends so; none where no limit is set.

    Where ``inconclusive`` says what a limit inside an interval counts as, intervals decide.
    """
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
    if inconclusive is None or seen.low is None or seen.high is None:
        yield BudgetResult(name, seen.value, limit, ok, text)
        return
    unit = value.partition(" ")[2]
    ends = (_written(name.rpartition(".")[2], end, limit)[0] for end in (seen.low, seen.high))
    between = " to ".join(end.removesuffix(f" {unit}") for end in ends)
    text = f"{seen.what} {value} ({between}), {bound}{seen.aside}"
    state = _within(seen, limit, at_least=at_least)
    if state is None:
        text += "; inconclusive: the limit lies in the interval"
    ok = inconclusive == "pass" if state is None else state
    yield BudgetResult(name, seen.value, limit, ok, text, seen.low, seen.high, state is None)


def _accuracy(
    manifest: Manifest, budgets: Budgets, inconclusive: Inconclusive | None
) -> Iterator[BudgetResult]:
    changes = {r.engine.target: r.accuracy for r in manifest.targets if r.accuracy is not None}
    unseen = [r.engine.target for r in manifest.targets if r.accuracy is None]
    why = "no validation images were scored"
    if manifest.targets and not changes:
        why = f"no engine was run on validation images (targets: {', '.join(unseen)})"
    elif manifest.torch_accuracy is not None:
        changes["PyTorch"] = manifest.torch_accuracy
    if manifest.model.task != "classify":
        why = f"a network of task {manifest.model.task} has no top-1; output_db_min is for it"
    drop = top1 = same = Seen(None, why=why)
    alike = alike_on(manifest)
    if alike:
        where, x = min(alike, key=lambda found: found[1].share)
        same = Seen(x.share, f"same class ({where}, {x.images:,} images)", "", "", x.low, x.high)
    if manifest.validation is not None and not manifest.validation.labelled and alike:
        why = "the validation images have no labels; agreement_min needs none"
        drop = top1 = Seen(None, why=why)
    if changes:
        aside = f"; not run: {', '.join(unseen)}" if unseen else ""
        where, worst = max(changes.items(), key=lambda c: (math.isnan(c[1].drop), c[1].drop))
        what = f"top-1 drop ({where})"
        drop = Seen(worst.drop, what, aside=aside, low=worst.low, high=worst.high)
        where, least = min(changes.items(), key=lambda c: c[1].pruned.top1)
        images = f"{least.pruned.images:,} images"
        found = least.pruned
        top1 = Seen(
            found.top1, f"top-1 ({where}, {images})", aside=aside, low=found.low, high=found.high
        )
    yield from hold("accuracy_drop_max", budgets.accuracy_drop_max, drop, inconclusive)
    yield from hold("top1_min", budgets.top1_min, top1, inconclusive)
    yield from hold("agreement_min", budgets.agreement_min, same, inconclusive)


def alike_on(manifest: Manifest) -> list[tuple[str, Agreement]]:
    """Where predictions were compared whatever the labels: the targets that ran, then PyTorch."""
    rows = [(r.engine.target, r.agreement) for r in manifest.targets]
    rows.append(("PyTorch", manifest.torch_agreement))
    return [(where, found) for where, found in rows if found is not None]


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
    seen = Seen(None, why=why)
    if changes:
        errors = {w: _IDENTICAL if x.worst_db is None else x.worst_db for w, x in changes.items()}
        where = min(errors, key=lambda name: errors[name])
        aside = f"; not run: {', '.join(unseen)}" if unseen else ""
        seen = Seen(errors[where], f"output error ({where})", aside=aside)
    yield from hold("output_db_min", budgets.output_db_min, seen)


def _parity(manifest: Manifest, budgets: Budgets) -> Iterator[BudgetResult]:
    parities = [*manifest.export_parity]
    parities += [r.parity for r in manifest.targets if r.parity is not None]
    unseen = [r.engine.target for r in manifest.targets if r.parity is None]
    seen = Seen(None, why="no graph was compared")
    if parities:
        p = max(parities, key=lambda p: (math.isnan(p.max_abs), p.max_abs))
        aside = f"; not run: {', '.join(unseen)}" if unseen else ""
        seen = Seen(p.max_abs, f"{p.candidate} against {p.reference}, logits", aside=aside)
    yield from hold("parity_max", budgets.parity_max, seen)


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
        seen = Seen(value, f"{name.removesuffix('_ms')} ({where})", why)
        yield from hold(f"latency.{target}.{name}", getattr(limits, name), seen)
    rate = None if latency is None else 1e3 * latency.batch / latency.mean_ms
    seen = Seen(rate, f"throughput ({where})", why)
    yield from hold(f"latency.{target}.throughput_min", limits.throughput_min, seen)
    for name in ("memory_max_mib", "slowdown_max"):
        seen = Seen(None, why="the build does not measure it; `cswap-deploy check` here does")
        yield from hold(f"latency.{target}.{name}", getattr(limits, name), seen)
    speedup = None if latency is None or result is None else result.speedup
    if latency is not None and speedup is None:
        why = "the dense graph was not timed"
    seen = Seen(speedup, f"speed-up ({where})", why)
    yield from hold(f"latency.{target}.speedup_min", limits.speedup_min, seen)


def _absent(target: str, results: dict[str, TargetResult]) -> str:
    """Why nothing was measured on a target."""
    if target not in results:
        return f"the bundle has no target {target} (it has: {', '.join(results) or 'none'})"
    return f"the engine was not run: {results[target].engine.reason or 'no reason was recorded'}"


def _known(loc: tuple[int | str, ...]) -> list[str]:
    """Names that may stand in the table at ``loc``."""
    tables: dict[str, type[Value]] = {
        "latency": LatencyBudget, "engine": EngineBudget, "baseline": BaselineBudget,
    }  # fmt: skip
    return list((tables[str(loc[0])] if len(loc) > 1 else Budgets).model_fields)


def _problem(loc: tuple[int | str, ...], kind: str, message: str, got: object) -> str:
    name = ".".join(map(str, loc))
    if not name:
        return message.removeprefix("Value error, ")
    if kind != "extra_forbidden":
        return f"{name}: {message} (got {shown(got, repr)})"
    known = _known(loc)
    close = get_close_matches(str(loc[-1]), known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"{name}: no such budget{hint} known here: {', '.join(known)}"
