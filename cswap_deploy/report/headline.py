"""The top of the report: the result in words, in figures, and what to know before trusting it."""

from __future__ import annotations

import math

from cswap_deploy.gate.budgets import alike_on
from cswap_deploy.records.amounts import fixed, speed
from cswap_deploy.records.manifest import Manifest, TargetResult
from cswap_deploy.records.measurements import AccuracyChange, Agreement, OutputChange, Parity
from cswap_deploy.records.model import DataSpec
from cswap_deploy.records.plan import PrunePlan
from cswap_deploy.report import cells as c
from cswap_deploy.report.document import Tile
from cswap_deploy.report.units import RATIO_WORDS


def scored(manifest: Manifest) -> list[tuple[str, AccuracyChange]]:
    """Where accuracy was measured: the targets that ran, then PyTorch."""
    rows = [(r.engine.target, r.accuracy) for r in manifest.targets]
    return [(name, x) for name, x in (*rows, ("PyTorch", manifest.torch_accuracy)) if x is not None]


def unlabelled(manifest: Manifest) -> list[tuple[str, Agreement]]:
    """Where there is agreement with the dense network alone, since the images have no labels."""
    labelled = manifest.validation is None or manifest.validation.labelled
    return [] if labelled or manifest.model.task != "classify" else alike_on(manifest)


def changed(manifest: Manifest) -> list[tuple[str, OutputChange]]:
    """The same for a task without classes: where outputs were compared."""
    rows = [(r.engine.target, r.outputs) for r in manifest.targets]
    return [(name, x) for name, x in (*rows, ("PyTorch", manifest.torch_outputs)) if x is not None]


def compared(manifest: Manifest) -> list[Parity]:
    """Every comparison of outputs: after each graph pass, then on each target."""
    return [*manifest.export_parity, *(r.parity for r in manifest.targets if r.parity is not None)]


def image_sets(manifest: Manifest) -> dict[str, DataSpec]:
    """The sets of images that were used, by their role."""
    sets = (("calibration", manifest.calibration), ("validation", manifest.validation))
    return {role: data for role, data in sets if data is not None}


def summary(manifest: Manifest, plan: PrunePlan | None = None) -> str:
    """The result in two or three sentences."""
    name, of, reached = manifest.model.name, manifest.ratio_of, manifest.ratio_effective
    text = f"{name} was exported dense: no removal was asked for."
    if manifest.ratio_requested > 0:
        kinds = sorted((k for k in reached if k != "latency"), key=lambda kind: kind != of)
        got = ", ".join(f"{c.percent(reached[kind])} of the {RATIO_WORDS[kind]}" for kind in kinds)
        asked = f"{c.percent(manifest.ratio_requested)} of the {RATIO_WORDS[of]}"
        text = f"{name}: {asked} were to be removed; removed were {got}."
        if of == "latency":
            faster = 1 / (1 - manifest.ratio_requested)
            text = f"{name} was to become {faster:.2f}x as fast; removed were {got}."
    for where, change in scored(manifest)[:1]:
        text += (
            f" Top-1 went from {c.top1(change.dense.top1)} to {c.top1(change.pruned.top1)} on "
            f"{change.pruned.images:,} images ({where}): {_drop(change.drop)}, 95 % interval "
            f"{c.points(change.low)} to {c.points(change.high)}."
        )
    for where, found in unlabelled(manifest)[:1]:
        text += f" The images have no labels, so top-1 is not known; {_alike(found)} ({where})."
    for where, moved in changed(manifest)[:1]:
        text += (
            f" Task {manifest.model.task}: {_moved(moved)}, on {moved.images:,} images ({where})."
        )
    if not scored(manifest) and not changed(manifest) and not unlabelled(manifest):
        text += " Accuracy was not measured."
    trained = None if plan is None else plan.recovery
    if trained is not None:
        text += (
            f" After pruning it was trained for {trained.seconds / 60:.1f} minutes, towards the "
            "dense network and without labels: these figures are with that."
        )
    elif manifest.ratio_requested > 0:
        text += " Nothing was trained."
    if any(check.verdict == "at" for check in manifest.dense_checks):
        text += " The dense network is no better than guessing on these images."
    if manifest.metric is not None:
        m = manifest.metric
        text += f" {m.name} went from {m.dense:.4g} to {m.pruned:.4g} (PyTorch)."
    for r in manifest.targets:
        if r.latency is not None and r.dense_latency is not None:
            text += (
                f" The median call on {r.engine.target} takes {c.ms(r.latency.p50_ms)} instead of "
                f"{c.ms(r.dense_latency.p50_ms)} ({_speed(manifest, r)})."
            )
    return text


def _speed(manifest: Manifest, result: TargetResult) -> str:
    """The speed-up, and whether it is one; a marked word where pruning did not make it faster."""
    assert result.speedup is not None
    faster, words = speed(result.speedup, result.speedup_low, result.speedup_high)
    if faster or manifest.ratio_requested == 0:
        return f"{fixed(result.speedup, 2)}x"
    return c.Mark(words)


def tiles(manifest: Manifest) -> tuple[Tile, ...]:
    """The figures at the top."""
    dense, pruned, onnx = manifest.dense, manifest.pruned, manifest.onnx
    made = []
    for label, before, after in (
        ("parameters", dense.params, pruned.params),
        ("MACs per image", dense.macs, pruned.macs),
    ):
        change = "not known"
        if before:
            change = f"{fixed(100 * (after / before - 1), 1, sign='+')} %".replace("-", "−")
        made.append(Tile(label, c.short(after), f"{change} from {c.short(before)}"))
    for where, scores in scored(manifest)[:1]:
        between = f"{c.points(scores.low)} to {c.points(scores.high)}"
        note = f"{_drop(scores.drop)} from {c.top1(scores.dense.top1)} ({between}); {where}"
        made.append(Tile("top-1", c.top1(scores.pruned.top1), note))
    for where, found in unlabelled(manifest)[:1]:
        share = c.interval(c.percent, found.share, found.low, found.high)
        kl = "" if found.kl is None else f"KL {c.nats(found.kl)} nats; "
        made.append(Tile("same class", share, f"as the dense network; {kl}{where}"))
    for where, moved in changed(manifest)[:1]:
        note = f"{_moved(moved)}; {where}"
        made.append(Tile("output error", c.decibels(moved.worst_db), note))
    if not scored(manifest) and not changed(manifest) and not unlabelled(manifest):
        made.append(Tile("top-1", "not measured", "no validation images"))
    timed = [(r, r.latency) for r in manifest.targets if r.latency is not None]
    for result, latency in timed:
        note = "the dense network was not timed"
        if result.dense_latency is not None:
            words = _speed(manifest, result)
            between = ""
            if result.speedup_low is not None and result.speedup_high is not None:
                between = f" ({fixed(result.speedup_low, 2)} to {fixed(result.speedup_high, 2)})"
            note = type(words)(f"{words}{between} from {c.ms(result.dense_latency.p50_ms)}")
        made.append(Tile(f"p50, {result.engine.target}", c.ms(latency.p50_ms), note))
    if not timed:
        made.append(Tile("latency", "not measured", "no engine was run on this machine"))
    made.append(Tile("ONNX", c.size(onnx.size_bytes), f"{onnx.precision}, opset {onnx.opset}"))
    return (*made, _parity(manifest))


def _parity(manifest: Manifest) -> Tile:
    """The comparison that is nearest to its tolerance, or furthest beyond."""
    held = [
        (p.ok, p.max_abs / p.tolerance, p.max_abs, p.tolerance)
        for p in compared(manifest)
        if p.tolerance is not None
    ]
    if not held:
        return Tile("parity", "not measured", "no graph was compared")
    _, _, largest, tolerance = max(held, key=lambda p: (not p[0], p[1]))
    what = "logits" if manifest.model.task == "classify" else "outputs"
    note = f"largest difference of {what}; at most {tolerance:g} allowed"
    return Tile("parity", f"{largest:.1e}", note)


def warnings(manifest: Manifest) -> tuple[str, ...]:
    """What a reader must know before trusting the figures."""
    out = [f"{doubt[0].upper()}{doubt[1:]}." for doubt in manifest.doubts]
    if manifest.shared_images:
        out.append(
            f"{manifest.shared_images:,} images are in both the calibration and the validation "
            "set: the accuracy is not that on unseen images."
        )
    out += [
        f"{len(data.unreadable):,} {role} files could not be read and were left out: "
        f"{c.some(data.unreadable)}."
        for role, data in image_sets(manifest).items()
        if data.unreadable
    ]
    out += [
        f"The {e.target} engine was built but not run here: {e.reason or 'no reason was recorded'}."
        for e in (r.engine for r in manifest.targets)
        if not e.runnable
    ]
    out += [
        f"The pruned network on {r.engine.target} is {words}{_ask_for_speed(manifest)}."
        for r in manifest.targets
        if r.speedup is not None and isinstance(words := _speed(manifest, r), c.Mark)
    ]
    out += [
        f"Parity is lost: {p.candidate} differs from {p.reference} by {p.max_abs:.2g} (at most "
        f"{p.tolerance or 0:g} allowed)."
        for p in compared(manifest)
        if not p.ok
    ]
    return tuple(out)


def _ask_for_speed(manifest: Manifest) -> str:
    """What to do where fewer parameters saved no time."""
    if manifest.ratio_of == "latency":
        return ""
    return (
        f"; a ratio of {RATIO_WORDS[manifest.ratio_of]} need not save time, --speedup asks for it"
    )


def _alike(found: Agreement) -> str:
    """Agreement in words."""
    share = c.interval(c.percent, found.share, found.low, found.high)
    kl = "" if found.kl is None else f", at a KL divergence of {c.nats(found.kl)} nats"
    return f"it has the dense network's class on {share} of {found.images:,} images{kl}"


def _moved(change: OutputChange) -> str:
    """How far the outputs moved, in words: the worst of each kind."""
    text = "no output changed"
    worst = min(change.outputs, key=lambda o: math.inf if o.error_db is None else o.error_db)
    if worst.error_db is not None:
        text = f"output {worst.name} is {c.decibels(worst.error_db)} above its change"
    shares = [o.agreement for o in change.outputs if o.agreement is not None]
    return f"{text}, {c.percent(min(shares))} of the decisions are the same" if shares else text


def _drop(drop: float) -> str:
    """A drop of accuracy in words: below zero the pruned network is better."""
    if drop < 0:
        return f"{c.points(-drop)} points higher"
    return f"{c.points(drop)} points lower" if drop > 0 else "no change"
