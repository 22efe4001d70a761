"""The top of the report: the result in words, in figures, and what to know before trusting it."""

from __future__ import annotations

from dataclasses import dataclass

from cswap_deploy.records.manifest import Manifest
from cswap_deploy.records.plan import RatioOf
from cswap_deploy.report import figures
from cswap_deploy.report.words import (
    change_text,
    drop_text,
    ms,
    percent,
    points,
    short,
    size,
    some,
    top1,
)

RATIO_WORDS: dict[RatioOf, str] = {
    "params": "parameters",
    "channels": "units (channels, heads, neurons)",
    "macs": "MACs",
}


@dataclass(frozen=True, slots=True)
class Tile:
    """One of the figures at the top: what it was, what it is."""

    label: str
    value: str
    note: str


def summary(manifest: Manifest) -> str:
    """The result in two or three sentences."""
    asked = percent(manifest.ratio_requested)
    got = ", ".join(
        f"{percent(share)} of the {RATIO_WORDS[of]}"
        for of, share in sorted(
            manifest.ratio_effective.items(), key=lambda item: item[0] != manifest.ratio_of
        )
    )
    text = (
        f"{manifest.model.name}: {asked} of the {RATIO_WORDS[manifest.ratio_of]} were to be "
        f"removed; removed were {got}."
        if manifest.ratio_requested > 0
        else f"{manifest.model.name} was exported dense: no removal was asked for."
    )
    scored = figures.scored(manifest)
    if scored:
        where, change = scored[0]
        text += (
            f" Top-1 went from {top1(change.dense)} to {top1(change.pruned)} on "
            f"{change.pruned.images:,} images ({where}): {drop_text(change.drop)}, 95 % interval "
            f"{points(change.low)} to {points(change.high)}."
        )
    else:
        text += " Accuracy was not measured."
    for result in manifest.targets:
        if result.latency is not None and result.dense_latency is not None:
            text += (
                f" The median call on {result.engine.target} takes {ms(result.latency.p50_ms)} "
                f"instead of {ms(result.dense_latency.p50_ms)} ({result.speedup:.2f}x)."
            )
    return text


def tiles(manifest: Manifest) -> tuple[Tile, ...]:
    """The figures at the top."""
    dense, pruned = manifest.dense, manifest.pruned
    out = [
        Tile(
            "parameters",
            short(pruned.params),
            f"{change_text(dense.params, pruned.params)} from {short(dense.params)}",
        ),
        Tile(
            "MACs per image",
            short(pruned.macs),
            f"{change_text(dense.macs, pruned.macs)} from {short(dense.macs)}",
        ),
    ]
    scored = figures.scored(manifest)
    if scored:
        where, change = scored[0]
        note = f"{drop_text(change.drop)} from {top1(change.dense)}; {where}"
        out.append(Tile("top-1", top1(change.pruned), note))
    else:
        out.append(Tile("top-1", "not measured", "no validation images"))
    timed = [r for r in manifest.targets if r.latency is not None]
    for result in timed:
        assert result.latency is not None
        note = "the dense network was not timed"
        if result.dense_latency is not None:
            note = f"{result.speedup:.2f}x from {ms(result.dense_latency.p50_ms)}"
        out.append(Tile(f"p50, {result.engine.target}", ms(result.latency.p50_ms), note))
    if not timed:
        out.append(Tile("latency", "not measured", "no engine was run on this machine"))
    out.append(
        Tile(
            "ONNX",
            size(manifest.onnx.size_bytes),
            f"{manifest.onnx.precision}, opset {manifest.onnx.opset}",
        )
    )
    compared = [
        (p.ok, p.max_abs / p.tolerance, p.max_abs, p.tolerance)
        for p in (*manifest.export_parity, *(r.parity for r in manifest.targets if r.parity))
        if p.tolerance is not None
    ]
    if compared:
        _, _, largest, tolerance = max(compared, key=lambda p: (not p[0], p[1]))
        note = f"largest difference of logits; at most {tolerance:g} allowed"
        out.append(Tile("parity", f"{largest:.1e}", note))
    else:
        out.append(Tile("parity", "not measured", "no graph was compared"))
    return tuple(out)


def warnings(manifest: Manifest) -> tuple[str, ...]:
    """What a reader must know before trusting the figures."""
    out = []
    if manifest.shared_images:
        out.append(
            f"{manifest.shared_images:,} images are in both the calibration and the validation "
            "set: the accuracy is not that on unseen images."
        )
    for role, data in (("calibration", manifest.calibration), ("validation", manifest.validation)):
        if data is not None and data.unreadable:
            out.append(
                f"{len(data.unreadable):,} {role} files could not be read and were left out: "
                f"{some(data.unreadable)}."
            )
    for result in manifest.targets:
        engine = result.engine
        if not engine.runnable:
            why = engine.reason or "no reason was recorded"
            out.append(f"The {engine.target} engine was built but not run here: {why}.")
    for parity in (*manifest.export_parity, *(r.parity for r in manifest.targets if r.parity)):
        if not parity.ok:
            out.append(
                f"Parity is lost: {parity.candidate} differs from {parity.reference} by "
                f"{parity.max_abs:.2g} (at most {parity.tolerance or 0:g} allowed)."
            )
    return tuple(out)
