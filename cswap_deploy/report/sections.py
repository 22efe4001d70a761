"""The body of the report, as plain sections that both templates lay out.

Every figure comes from the manifest, the plan or the verdicts; nothing is measured here.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from cswap_deploy.gate.budgets import BudgetVerdict
from cswap_deploy.measure.trtexec import TOOLS, trtexec_line
from cswap_deploy.records.bundle import tensor_text
from cswap_deploy.records.manifest import Manifest, TargetResult
from cswap_deploy.records.measurements import Accuracy, AccuracyChange, GpuState, Latency, Spread
from cswap_deploy.records.model import DataSpec
from cswap_deploy.records.plan import PrunePlan
from cswap_deploy.report import figures
from cswap_deploy.report.explain import VERDICTS, Explanation, Unit, explain
from cswap_deploy.report.words import (
    effect_interval,
    ms,
    nats,
    percent,
    points,
    size,
    some,
    top1,
)

_FOLD_ABOVE = 30
"""Rows that a table shows without being opened."""
_UNITS = 10
"""Units in each list of the largest effects."""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under a heading; columns from ``text_columns`` on hold numbers."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: int = 1

    @property
    def folded(self) -> bool:
        """Whether a page should show it only when asked."""
        return len(self.rows) > _FOLD_ABOVE


@dataclass(frozen=True, slots=True)
class Figure:
    """An ``<svg>`` element and what it shows."""

    svg: str
    caption: str


@dataclass(frozen=True, slots=True)
class Section:
    """A heading with sentences, tables and figures."""

    title: str
    text: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()


def sections(
    manifest: Manifest, plan: PrunePlan, verdicts: tuple[BudgetVerdict, ...], *, draw: bool
) -> tuple[Section, ...]:
    """The report's body.

    Args:
        manifest: Of the bundle.
        plan: Of the same build.
        verdicts: On the budgets; none where no budgets were given.
        draw: Make the figures.

    Returns:
        Sections in reading order; those that would be empty are left out.
    """
    told = explain(plan, manifest, top=_UNITS)
    made = (
        _budgets(verdicts),
        _accuracy(manifest, draw=draw),
        _precision(manifest),
        _targets(manifest, draw=draw),
        _removed(told, plan, draw=draw),
        _effects(told, plan, draw=draw),
        _progress(plan),
        _parity(manifest),
        _data(manifest),
        _notes(manifest),
        _reproduce(manifest, plan),
        _files(manifest),
    )
    return tuple(section for section in made if section is not None)


# --- sections ------------------------------------------------------------------------------------


def _budgets(verdicts: tuple[BudgetVerdict, ...]) -> Section | None:
    if not verdicts:
        return None
    rows = tuple(("pass" if v.ok else "FAIL", v.name, v.text) for v in verdicts)
    return Section("Budgets", tables=(Table(("", "budget", "measured"), rows, 3),))


def _accuracy(manifest: Manifest, *, draw: bool) -> Section:
    rows = []
    for where, change in figures.scored(manifest):
        rows.append(
            (
                where,
                _interval(change.dense),
                _interval(change.pruned),
                _drop(change),
                percent(change.agreement),
                f"{change.pruned.images:,}",
            )
        )
    if not rows:
        return Section("Accuracy", ("Not measured: no validation images were scored.",))
    head = ("where", "dense top-1", "pruned top-1", "drop", "same class", "images")
    picture = figures.accuracy_figure(manifest) if draw else None
    return Section(
        "Accuracy",
        (
            "In brackets are 95 % intervals: Wilson's for each top-1, paired by image for the "
            "drop. “Same class” is the share of images on which both networks agree.",
        ),
        (Table(head, tuple(rows)),),
        _figure(picture, "Top-1 of the dense and the pruned network."),
    )


def _drop(change: AccuracyChange) -> str:
    """Points of top-1, with their interval."""
    return f"{points(change.drop)} ({points(change.low)} to {points(change.high)})"


def _precision(manifest: Manifest) -> Section | None:
    """What the number formats cost, and which layers they left out."""
    result = manifest.precision
    if result is None:
        return None
    text = [
        f"model.onnx is {result.precision}. On {result.images:,} calibration images "
        f"{percent(result.agreement)} of its predictions are the float32 graph's (KL divergence "
        f"{nats(result.kl)} nats); the gate allows a loss of {points(result.drop_limit)} points of "
        "top-1 on the validation images, or of one image. All figures are of the pruned network.",
    ]
    if result.calibration:
        text.append(f"Q/DQ pairs and their ranges: {result.calibration}.")
    trials = tuple(
        (
            t.what, "not finite" if t.kl is None else nats(t.kl), percent(t.agreement),
            "passes" if t.passes else "fails",
        )
        for t in result.tried
    )  # fmt: skip
    tables = [Table(("tried", "KL, nats", "same class", "judged"), trials)] if trials else []
    rows = tuple(
        (
            r.engine.target, r.judged_by, top1(r.reduced.dense), top1(r.reduced.pruned),
            _drop(r.reduced), percent(r.reduced.agreement), f"{r.reduced.pruned.images:,}",
        )
        for r in manifest.targets
        if r.reduced is not None
    )  # fmt: skip
    head = ("target", "measured on", "float32", result.precision, "drop")
    if rows:
        tables.append(Table((*head, "same class", "images"), rows, 2))
    if result.kept:
        tables.append(
            Table(
                ("node kept wider", "operator", "because of", "value"),
                tuple(
                    (
                        k.node, k.operator, _REASONS[k.reason],
                        "-" if k.value is None else f"{k.value:.3g}",
                    )
                    for k in result.kept
                ),
                3,
            )
        )  # fmt: skip
        text.append(
            f"Nodes that keep a wider type: {len(result.kept):,}. The value is the largest one "
            "met, or the KL divergence (nats) when this node alone is narrowed."
        )
    return Section("Precision", tuple(text), tuple(tables))


_REASONS = {
    "range": "values beyond the type's range",
    "accuracy": "its effect on the predictions",
    "asked": "--keep-fp32",
}


def _targets(manifest: Manifest, *, draw: bool) -> Section | None:
    if not manifest.targets:
        return None
    engines = tuple(
        (
            r.engine.target,
            r.engine.device or "not recorded",
            r.engine.precision,
            "yes" if r.engine.runnable else "no",
            size(r.engine.size_bytes),
            f"{r.engine.build_seconds:.1f} s",
        )
        for r in manifest.targets
    )
    tables = [
        Table(("target", "built for", "precision", "run here", "size", "built in"), engines, 4)
    ]
    rows = [row for result in manifest.targets for row in _latency_rows(result)]
    if rows:
        head = ("target", "network", "provider", "p50", "p90", "p99", "batch", "calls")
        tables.append(Table((*head, "warm-up", "threads"), tuple(rows), 3))
    tables += _gpu_tables(manifest)
    text = [
        f"{r.engine.target} was not run on this machine: {r.engine.reason or 'no reason recorded'}."
        for r in manifest.targets
        if not r.engine.runnable
    ]
    if rows:
        text.append(
            f"Latency is the wall clock of one inference call, copies included, on "
            f"{manifest.device.cpu} ({manifest.device.cores} cores); dense and pruned calls "
            "alternate."
        )
    text += _gpu_text(manifest)
    picture = figures.latency_figure(manifest) if draw else None
    caption = "Share of calls that ended within a given time; further left is faster."
    return Section("Engines and latency", tuple(text), tuple(tables), _figure(picture, caption))


def _latency_rows(result: TargetResult) -> list[tuple[str, ...]]:
    return [
        (
            result.engine.target,
            name,
            latency.provider,
            ms(latency.p50_ms),
            ms(latency.p90_ms),
            ms(latency.p99_ms),
            str(latency.batch),
            f"{len(latency.samples_ms):,}",
            str(latency.warmup),
            str(latency.threads),
        )
        for name, latency in _timed(result)
    ]


def _timed(result: TargetResult) -> list[tuple[str, Latency]]:
    pairs = (("dense", result.dense_latency), ("pruned", result.latency))
    return [(name, latency) for name, latency in pairs if latency is not None]


def _gpu_tables(manifest: Manifest) -> list[Table]:
    """Where a call's time goes on a GPU, the GPU's state, and how to time the engine elsewhere."""
    parts: list[tuple[str, ...]] = []
    states: list[tuple[str, ...]] = []
    commands: list[tuple[str, ...]] = []
    for result in manifest.targets:
        target, latency = result.engine.target, result.latency
        for name, timed in _timed(result):
            if timed.device is not None:
                d, graph = timed.device, "yes" if timed.settings.get("cuda_graph") else "no"
                times = (d.p50_ms, d.p90_ms, d.p99_ms)
                copies = (d.host_to_device_p50_ms, d.device_to_host_p50_ms)
                parts.append((target, name, d.clock, graph, *map(ms, times + copies)))
        if latency is not None and latency.gpu is not None and latency.gpu.samples:
            states.append((target, *_gpu_row(latency.gpu)))
        has_tool = target in TOOLS and not result.engine.stripped
        if latency is not None and latency.device is not None and has_tool:
            commands.append((target, "pruned", trtexec_line(result.engine, latency)))
    copied = ("copied in, p50", "copied out, p50")
    heads: tuple[tuple[tuple[str, ...], int], ...] = (
        (("target", "network", "clock", "CUDA graph", "compute p50", "p90", "p99", *copied), 4),
        (
            (
                "target", "GPU", "driver", "held down by", "SM clock", "memory clock", "power",
                "temperature", "samples",
            ),
            4,
        ),
        (("target", "network", "the same with NVIDIA's tool, in the bundle's folder"), 3),
    )  # fmt: skip
    return [
        Table(head, tuple(rows), text_columns)
        for (head, text_columns), rows in zip(heads, (parts, states, commands), strict=True)
        if rows
    ]


def _gpu_row(gpu: GpuState) -> tuple[str, ...]:
    def spread(values: Spread | None, unit: str, limit: float | None = None) -> str:
        if values is None:
            return "not known"
        most = "" if limit is None else f", at most {limit:,.0f}"
        return f"{values.median:,.0f} {unit} ({values.min:,.0f} to {values.max:,.0f}{most})"

    held = "not known"
    if gpu.throttling is not None:
        counts = (f"{why} ({n} of {gpu.samples})" for why, n in gpu.throttling.items())
        held = ", ".join(counts) or "nothing"
    return (
        gpu.name or gpu.pci_bus_id,
        gpu.driver or "not known",
        held,
        spread(gpu.sm_clock_mhz, "MHz", gpu.sm_clock_max_mhz),
        spread(gpu.memory_clock_mhz, "MHz"),
        spread(gpu.power_w, "W", gpu.power_limit_w),
        spread(gpu.temperature_c, "°C"),
        f"{gpu.samples:,}",
    )


def _gpu_text(manifest: Manifest) -> list[str]:
    text = []
    timed = [(r.engine.target, r.latency) for r in manifest.targets if r.latency is not None]
    if any(latency.device is not None for _, latency in timed):
        text.append(
            "On the GPU a call is split by CUDA events on its stream: copying in, computing, "
            "copying out. The wall clock also holds the host's share. NVIDIA's tool feeds random "
            "data; its GPU Compute Time is the computing here."
        )
    text += [
        f"{target} has the host's wall clock only: ONNX Runtime records no CUDA events."
        for target, latency in timed
        if latency.gpu is not None and latency.device is None
    ]
    text += [
        f"{target}: {note}."
        for target, latency in timed
        if latency.gpu is not None
        for note in latency.gpu.notes
    ]
    return text


def _removed(told: Explanation, plan: PrunePlan, *, draw: bool) -> Section:
    counted = [v for v in VERDICTS if v in figures.VERDICT_COLOURS or _verdicts(told)[v]]
    head = ["group", "kind", "units", "kept", "kept, %"]
    rows = []
    for group in told.groups:
        row = [
            group.name,
            group.kind,
            f"{group.units:,}",
            f"{group.kept:,}",
            percent(group.kept / group.units if group.units else 0.0),
        ]
        if told.ranked_by is not None:
            row += [f"{group.kept_verdicts[v]:,} / {group.removed_verdicts[v]:,}" for v in counted]
            row.append(_effect(group.largest) if group.largest is not None else "-")
        rows.append(tuple(row))
    if told.ranked_by is not None:
        head += [*counted, "largest effect, 95 %"]
    tables = [Table(tuple(head), tuple(rows), 2)] if rows else []
    if plan.excluded:
        tables.append(Table(("left as it is", "why"), tuple(sorted(plan.excluded.items())), 2))
    text = [
        f"Criterion {plan.criterion}. Each group is the units of one coupled set of layers, from "
        "the input to the output."
    ]
    if told.ranked_by is not None:
        text.append("The columns of verdicts count kept / removed units.")
        return Section("What was removed", (" ".join(text),), tuple(tables))
    picture = figures.units_figure(plan) if draw and plan.groups else None
    caption = "Units of each group; numbers (if any) are kept/all."
    return Section(
        "What was removed", (*text, *told.reading), tuple(tables), _figure(picture, caption)
    )


def _effects(told: Explanation, plan: PrunePlan, *, draw: bool) -> Section | None:
    if told.ranked_by is None:
        return None
    counts = _verdicts(told)
    shares = ", ".join(f"{counts[v]:,} {v}" for v in VERDICTS if counts[v])
    text = (*told.reading, f"Verdicts on all {sum(counts.values()):,} units: {shares}.")
    tables = [
        _units_table(title, units)
        for title, units in (
            ("largest effects", told.largest),
            ("detrimental", told.detrimental),
            ("removed at the largest cost", told.removed_at_largest_cost),
        )
        if units
    ]
    caption = (
        "Each group's units from the input to the output, the removed ones left and the kept ones "
        "right, each from the smallest effect to the largest. The line is the cut: as many units "
        "lie below it as were removed. The strip under a group counts the verdicts on its removed "
        "units and, right of the mark, on its kept ones. The axis is logarithmic away from zero."
    )
    picture = figures.effects_figure(plan) if draw else None
    return Section("Measured effects", text, tuple(tables), _figure(picture, caption))


def _verdicts(told: Explanation) -> Counter[str]:
    """How many units of the network have each verdict."""
    counts: Counter[str] = Counter()
    for group in told.groups:
        counts.update(group.kept_verdicts)
        counts.update(group.removed_verdicts)
    return counts


def _units_table(title: str, units: tuple[Unit, ...]) -> Table:
    columns: dict[str, list[str]] = {
        title: [u.group for u in units],
        "unit": [str(u.unit) for u in units],
        "": ["kept" if u.kept else "removed" for u in units],
        "verdict": [str(u.verdict) for u in units],
        "serves": [some(tuple(c.name for c in u.serves), 3) for u in units],
        "harms": [some(tuple(c.name for c in u.harms), 3) for u in units],
        "effect, 95 %": [_effect(u) for u in units],
        "KL, nats": [nats(u.kl) for u in units],
    }
    told = {head: cells for head, cells in columns.items() if any(cells)}
    return Table(tuple(told), tuple(zip(*told.values(), strict=True)), len(told) - 2)


def _progress(plan: PrunePlan) -> Section | None:
    if not plan.rounds:
        return None
    rows = tuple(
        (
            str(r.round), f"{r.measured:,}", f"{r.forwards:,}" if r.forwards else "-",
            f"{r.removed:,}", f"{r.params:,}", f"{r.seconds:.1f} s",
        )
        for r in plan.rounds
    )  # fmt: skip
    text = []
    cost = plan.scoring
    if cost is not None and cost.forwards < cost.forwards_exact:
        text.append(
            f"Measured as far as decisions needed ({cost.measuring}): {cost.forwards:,} masked "
            f"forwards, {cost.forwards / cost.forwards_exact:.1%} of those of every unit on all "
            f"{cost.images:,} images."
        )
    if plan.refitted:
        text.append(
            f"Layers solved again in closed form, without training: {len(plan.refitted):,}."
        )
    if plan.producers:
        text.append(
            "Layers whose remaining units took over what others carried, in closed form: "
            f"{len(plan.producers):,}."
        )
    if plan.biased:
        text.append(f"Layers that gained a bias for what was folded in: {len(plan.biased):,}.")
    head = ("round", "units measured", "masked forwards", "removed", "parameters left", "time")
    return Section("Rounds", tuple(text), (Table(head, rows, 0),))


def _parity(manifest: Manifest) -> Section:
    rows = tuple(
        (
            p.reference,
            p.candidate,
            "not asked" if p.tolerance is None else "yes" if p.ok else "NO",
            f"{p.max_abs:.2e}",
            "-" if p.tolerance is None else f"{p.tolerance:g}",
            f"{p.images:,}",
            ", ".join(map(str, p.batches)),
        )
        for p in (*manifest.export_parity, *(r.parity for r in manifest.targets if r.parity))
    )
    if not rows:
        return Section("Parity", ("Not measured.",))
    head = ("reference", "candidate", "within tolerance", "largest difference")
    return Section(
        "Parity",
        ("Largest absolute difference of logits between a network and what was made of it.",),
        (Table((*head, "tolerance", "images", "batch sizes"), rows, 3),),
    )


def _data(manifest: Manifest) -> Section:
    pairs = (("calibration", manifest.calibration), ("validation", manifest.validation))
    rows = tuple(_data_row(role, data) for role, data in pairs if data is not None)
    text = [f"No {role} images were used." for role, data in pairs if data is None]
    for role, data in pairs:
        if data is None:
            continue
        if data.class_indices:
            named = [f"{name} = {index}" for name, index in sorted(data.class_indices.items())]
            text.append(f"Class indices of the {role} set: {some(tuple(named), 12)}.")
    if manifest.calibration and manifest.validation:
        text.append(
            f"{manifest.shared_images:,} images are in both sets."
            if manifest.shared_images
            else "No image is in both sets."
        )
    spec = manifest.model.preprocessing
    text.append(
        f"Preprocessing: shorter side to {spec.resize_shorter} pixels ({spec.interpolation}), "
        f"centre crop to {' x '.join(map(str, spec.input_size))} (C x H x W), mean "
        f"{_numbers(spec.mean)}, standard deviation {_numbers(spec.std)}."
    )
    head = ("set", "source", "class mapping", "sha256", "images", "classes", "unreadable")
    return Section("Data", tuple(text), (Table(head, rows, 4),) if rows else ())


def _data_row(role: str, data: DataSpec) -> tuple[str, ...]:
    return (
        role,
        data.source,
        data.mapping or "none",
        data.sha256[:16],
        f"{data.count:,}",
        f"{data.classes:,}",
        f"{len(data.unreadable):,}",
    )


def _notes(manifest: Manifest) -> Section:
    rows = [("build", note) for note in manifest.fallbacks]
    rows += [("ONNX", note) for note in manifest.onnx.notes]
    rows += [
        ("data", f"{name} was unreadable and left out")
        for data in (manifest.calibration, manifest.validation)
        if data is not None
        for name in data.unreadable
    ]
    rows += [(r.engine.target, note) for r in manifest.targets for note in r.engine.notes]
    if not rows:
        return Section("Fallbacks and notes", ("None.",))
    return Section("Fallbacks and notes", (), (Table(("where", "what"), tuple(rows), 2),))


def _reproduce(manifest: Manifest, plan: PrunePlan) -> Section:
    device = manifest.device
    facts = (
        ("created", manifest.created),
        ("cswap-deploy", manifest.tool_version),
        ("model", f"{manifest.model.name} ({manifest.model.source})"),
        ("weights", manifest.model.weights),
        ("weights sha256", manifest.model.weights_sha256),
        ("CPU", f"{device.cpu}, {device.cores} cores, {device.memory_mib:,} MiB"),
        ("GPU", ", ".join(device.gpus) or "none"),
        ("platform", device.platform or "not recorded"),
        *(("input", tensor_text(tensor)) for tensor in manifest.onnx.inputs),
        *(("output", tensor_text(tensor)) for tensor in manifest.onnx.outputs),
        ("ONNX", f"opset {manifest.onnx.opset}, {manifest.onnx.nodes} nodes"),
    )
    versions = dict(manifest.versions)
    for result in manifest.targets:
        versions |= result.engine.versions
    tables = [Table(("", ""), facts, 2), _pairs("stage", "this time", manifest.stages)]
    tables.append(_pairs("setting", "value", manifest.settings))
    only_plan = {k: v for k, v in plan.settings.items() if k not in manifest.settings}
    if only_plan:
        tables.append(_pairs("setting of the plan", "value", only_plan))
    tables.append(_pairs("tool", "version", versions))
    return Section("To reproduce", (), tuple(table for table in tables if table.rows))


def _files(manifest: Manifest) -> Section | None:
    if not manifest.files:
        return None
    rows = tuple((ref.path, ref.sha256, size(ref.size_bytes)) for ref in manifest.files)
    return Section("Files", (), (Table(("file", "sha256", "size"), rows, 2),))


# --- parts ---------------------------------------------------------------------------------------


def _interval(accuracy: Accuracy) -> str:
    return f"{top1(accuracy)} ({100 * accuracy.low:.2f} to {100 * accuracy.high:.2f})"


def _effect(unit: Unit) -> str:
    return effect_interval(unit.true_class, unit.low, unit.high)


def _figure(svg: str | None, caption: str) -> tuple[Figure, ...]:
    return () if svg is None else (Figure(svg, caption),)


def _numbers(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"


def _pairs(left: str, right: str, values: dict[str, Any]) -> Table:
    def text(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value, default=str)

    return Table((left, right), tuple((k, text(v)) for k, v in sorted(values.items())), 2)
