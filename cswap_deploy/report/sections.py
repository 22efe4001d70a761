"""The body of the report, from the manifest, the plan and the budgets' results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

from cswap_deploy.gate.budgets import BudgetResult, alike_on
from cswap_deploy.measure.noise import noise_in
from cswap_deploy.measure.statistics import percentile_interval
from cswap_deploy.measure.trtexec import TOOLS, trtexec_line
from cswap_deploy.records.bundle import tensor_text
from cswap_deploy.records.manifest import Manifest
from cswap_deploy.records.measurements import (
    Accuracy,
    AccuracyChange,
    GpuState,
    Latency,
    OutputChange,
    PrecisionResult,
    Spread,
)
from cswap_deploy.records.plan import PrunePlan
from cswap_deploy.report import cells as c
from cswap_deploy.report import figures, headline
from cswap_deploy.report.classes import Evidence, class_by_class
from cswap_deploy.report.document import Figure, Report, Row, Section, Table, section, table
from cswap_deploy.report.explain import class_names, explain
from cswap_deploy.report.reproduce import card, command, speed_instead
from cswap_deploy.report.rounds import recovery, rounds
from cswap_deploy.report.time import time_by_layer
from cswap_deploy.report.units import RATIO_WORDS, effects, removal

_UNITS = 10
"""Units in each list of the largest effects."""
_REASONS = {
    "range": "values beyond the type's range",
    "accuracy": "its effect on the predictions",
    "asked": "--keep-fp32",
}


def describe(
    manifest: Manifest, plan: PrunePlan, results: tuple[BudgetResult, ...],
    evidence: Evidence | None = None,
) -> Report:  # fmt: skip
    """The report of a bundle: manifest, plan, the budgets' results and what was predicted.

    Sections stand in reading order; those that would be empty are left out.
    """
    told = explain(plan, manifest, top=_UNITS)
    budgets = ((c.Mark("pass" if r.ok else "FAIL"), r.name, r.text) for r in results)
    files = ((ref.path, c.Digest(ref.sha256), c.size(ref.size_bytes)) for ref in manifest.files)
    made = (
        section("Budgets", tables=[table("| budget | measured", budgets)]),
        _accuracy(manifest),
        None if evidence is None else class_by_class(evidence, manifest, class_names(manifest)),
        _precision(manifest),
        _targets(manifest),
        _speed_instead(manifest),
        removal(told, plan.excluded),
        effects(told),
        time_by_layer(plan),
        rounds(plan, 0 if manifest.calibration is None else manifest.calibration.count),
        recovery(plan),
        _parity(manifest),
        _data(manifest),
        _notes(manifest),
        _reproduce(manifest, plan),
        section("Files", tables=[table("file | sha256 | size", files)]),
    )
    return Report(
        title=manifest.model.name,
        about=f"cswap-deploy {manifest.tool_version} · {manifest.created}",
        summary=headline.summary(manifest, plan),
        tiles=headline.tiles(manifest),
        warnings=headline.warnings(manifest),
        card=card(manifest),
        sections=tuple(part for part in made if part is not None),
    )


def _accuracy(manifest: Manifest) -> Section | None:
    scored, metric = headline.scored(manifest), _metric(manifest)
    if changed := headline.changed(manifest):
        return _outputs(manifest, changed, metric)
    alike = table(
        "where | the dense network's class, 95 % | KL, nats | images",
        (
            (where, c.interval(c.percent, x.share, x.low, x.high),
             None if x.kl is None else c.nats(x.kl), x.images)
            for where, x in alike_on(manifest)
        ),
    )  # fmt: skip
    if not scored and headline.unlabelled(manifest):
        words = (
            "The validation images have no labels: top-1, and whether the dense network is right, "
            "cannot be known here. What is known is how alike the two networks predict."
        )
        return section("Accuracy", words, tables=[alike, metric])
    if not scored:
        return section("Accuracy", "Not measured: no validation images were scored.")

    def wilson(accuracy: Accuracy) -> c.Amount:
        return c.interval(c.top1, accuracy.top1, accuracy.low, accuracy.high)

    rows = ((where, wilson(x.dense), wilson(x.pruned), *_change(x)) for where, x in scored)
    tested = ((where, *_tested(x)) for where, x in scored if x.p_value is not None)
    words = (
        "In brackets are 95 % intervals: Wilson's for each top-1, paired by image for the "
        "drop. “Same class” is the share of images on which both networks agree, p is McNemar's "
        "for being right equally often, and the calibration error is how far a network is, on "
        "average, surer than right."
    )
    made = table("where | dense top-1 | pruned top-1 | drop | same class | images", rows)
    more = table("where | p | calibration error, dense | pruned", tested)
    caption = "Top-1 of the dense and the pruned network."
    picture = Figure(partial(figures.accuracy_figure, scored), caption)
    return section("Accuracy", words, tables=[made, more, alike, metric], figures=[picture])


def _metric(manifest: Manifest) -> Table | None:
    """The user's own figure."""
    m = manifest.metric
    rows = [] if m is None else [(m.name, *(c.Amount(f"{v:.6g}") for v in (m.dense, m.pruned)))]
    return table("--metric, in PyTorch | dense | pruned", rows)


def _outputs(
    manifest: Manifest, changed: list[tuple[str, OutputChange]], metric: Table | None
) -> Section | None:
    """What stands for accuracy where there are no classes."""
    rows = (
        (where, o.name, c.decibels(o.error_db), _share(o.agreement), x.images)
        for where, x in changed
        for o in x.outputs
    )
    words = (
        f"Task {manifest.model.task}: outputs of the dense network in PyTorch against the pruned "
        "one's. The error is 10 log10(||o||² / ||o − o*||²) over all images: 20 dB is a change of "
        "a tenth of the size, 40 dB of a hundredth. “Same decisions” compares the sign of "
        "yes-or-no logits, the largest channel of each pixel of maps, and integers."
    )
    made = table("where | output | error | same decisions | images", rows)
    return section("Outputs", words, tables=[made, metric])


def _share(share: float | None) -> c.Amount | None:
    return None if share is None else c.percent(share)


def _change(change: AccuracyChange) -> Row:
    """Drop, agreement, images."""
    drop = c.interval(c.points, change.drop, change.low, change.high)
    return drop, c.percent(change.agreement), change.pruned.images


def _tested(change: AccuracyChange) -> Row:
    """McNemar's p, and both calibration errors."""
    errors = (change.dense.calibration_error, change.pruned.calibration_error)
    p = None if change.p_value is None else c.Amount(f"{change.p_value:.2g}")
    return p, *(None if error is None else c.percent(error) for error in errors)


def _precision(manifest: Manifest) -> Section | None:
    """What the number formats cost, and which layers they left out."""
    result = manifest.precision
    if result is None:
        return None
    if result.by_outputs:
        return _precision_by_outputs(manifest, result)
    text = [
        f"model.onnx is {result.precision}. On {result.images:,} calibration images "
        f"{c.percent(result.agreement)} of its predictions are the float32 graph's (KL divergence "
        f"{c.nats(result.kl)} nats); the gate allows a loss of {c.points(result.drop_limit)} "
        "points of top-1 on the validation images, or of one image. All figures are of the pruned "
        "network.",
    ]
    text += _kept_words(result)
    tried = (
        (t.what, "not finite" if t.kl is None else c.nats(t.kl), c.percent(t.agreement),
         "passes" if t.passes else "fails")
        for t in result.tried
    )  # fmt: skip
    cost = (
        (r.engine.target, r.judged_by, c.top1(x.dense.top1), c.top1(x.pruned.top1), *_change(x))
        for r in manifest.targets
        if (x := r.reduced) is not None
    )
    heads = f"target | measured on | float32 | {result.precision} | drop | same class | images"
    tables = [
        table("tried | KL, nats | same class | result", tried),
        table(heads, cost),
        _kept(result),
    ]
    return section("Precision", *text, tables=tables)


def _precision_by_outputs(manifest: Manifest, result: PrecisionResult) -> Section | None:
    """The same without classes."""
    text = [
        f"model.onnx is {result.precision}. On {result.images:,} calibration images the squared "
        f"change of its outputs over their squared size is {c.nats(result.kl)} on average, and "
        f"within the limit of {result.drop_limit:g} on {c.percent(result.agreement)} of them. All "
        "figures are of the pruned network.",
    ]
    text += _kept_words(result)
    tried = (
        (t.what, "not finite" if t.kl is None else c.nats(t.kl), c.percent(t.agreement),
         "passes" if t.passes else "fails")
        for t in result.tried
    )  # fmt: skip
    cost = (
        (r.engine.target, r.judged_by, o.name, c.decibels(o.error_db), _share(o.agreement))
        for r in manifest.targets
        if r.reduced_outputs is not None
        for o in r.reduced_outputs.outputs
    )
    tables = [
        table("tried | relative squared change | within the limit | result", tried),
        table("target | measured on | output | error | same decisions", cost),
        _kept(result),
    ]
    return section("Precision", *text, tables=tables)


def _kept_words(result: PrecisionResult) -> list[str]:
    text = []
    if result.calibration:
        text.append(f"Q/DQ pairs and their ranges: {result.calibration}.")
    if result.kept:
        text.append(
            f"Nodes that keep a wider type: {len(result.kept):,}. The value is the largest one "
            "met, or the KL divergence (nats) when this node alone is narrowed."
        )
    return text


def _kept(result: PrecisionResult) -> Table | None:
    rows = ((k.node, k.operator, _REASONS[k.reason], c.maybe(k.value, ".3g")) for k in result.kept)
    return table("node kept wider | operator | because of | value", rows)


def _targets(manifest: Manifest) -> Section | None:
    engines = [r.engine for r in manifest.targets]
    calls = [
        (result.engine.target, network, latency)
        for result in manifest.targets
        for network, latency in (("dense", result.dense_latency), ("pruned", result.latency))
        if latency is not None
    ]
    built = (
        (e.target, e.device or "not recorded", e.precision, "yes" if e.runnable else "no",
         c.size(e.size_bytes), c.seconds(e.build_seconds))
        for e in engines
    )  # fmt: skip
    timed = (
        (target, network, x.provider, *(_percentile(x, p) for p in (50, 90, 99)), x.batch,
         len(x.samples_ms), x.warmup, x.threads)
        for target, network, x in calls
    )  # fmt: skip
    text = [
        f"{e.target} was not run on this machine: {e.reason or 'no reason recorded'}."
        for e in engines
        if not e.runnable
    ]
    if calls:
        text.append(
            f"Latency is the wall clock of one inference call, copies included, on "
            f"{manifest.device.cpu} ({manifest.device.cores} cores); dense and pruned calls "
            "alternate. In brackets are 95 % intervals by order statistics; a percentile that has "
            "too few calls for one is left out."
        )
        text += [
            f"{target}, {network}: {words}."
            for target, network, latency in calls
            for words in noise_in(latency.samples_ms)
        ]
    heads = "target | network | provider | p50 | p90 | p99 | batch | calls | warm-up | threads"
    tables = [
        table("target | built for | precision | run here | size | built in", built),
        table(heads, timed),
        *_gpu_tables(manifest, calls),
    ]
    ran = [r for r in manifest.targets if r.latency is not None]
    caption = "Share of calls that ended within a given time; further left is faster."
    pictures = [Figure(partial(figures.latency_figure, ran), caption)] if ran else []
    text += _gpu_text(manifest)
    return section("Engines and latency", *text, tables=tables, figures=pictures)


def _percentile(latency: Latency, percent: int) -> c.Amount | None:
    """With its interval; none where the calls are too few for one."""
    ends = percentile_interval(latency.samples_ms, percent)
    return None if ends is None else c.interval(c.ms, getattr(latency, f"p{percent}_ms"), *ends)


def _gpu_tables(manifest: Manifest, calls: list[tuple[str, str, Latency]]) -> list[Table | None]:
    """Where a call's time goes on a GPU, the GPU's state, and how to time the engine elsewhere."""
    timed = [(r.engine, r.latency) for r in manifest.targets if r.latency is not None]
    parts = (
        (target, network, d.clock, "yes" if latency.settings.get("cuda_graph") else "no",
         c.ms(d.p50_ms), c.ms(d.p90_ms), c.ms(d.p99_ms), c.ms(d.host_to_device_p50_ms),
         c.ms(d.device_to_host_p50_ms))
        for target, network, latency in calls
        if (d := latency.device) is not None
    )  # fmt: skip
    states = (
        (engine.target, *_gpu_state(latency.gpu))
        for engine, latency in timed
        if latency.gpu is not None and latency.gpu.samples
    )
    commands = (
        (engine.target, "pruned", trtexec_line(engine, latency))
        for engine, latency in timed
        if latency.device is not None and engine.target in TOOLS and not engine.stripped
    )
    heads = (
        "target | network | clock | CUDA graph | compute p50 | p90 | p99 | copied in, p50 | "
        "copied out, p50",
        "target | GPU | driver | held down by | SM clock | memory clock | power | temperature | "
        "samples",
        "target | network | the same with NVIDIA's tool, in the bundle's folder",
    )
    return [table(*pair) for pair in zip(heads, (parts, states, commands), strict=True)]


def _gpu_state(gpu: GpuState) -> Row:
    def reading(spread: Spread | None, unit: str, limit: float | None = None) -> str:
        if spread is None:
            return "not known"
        most = "" if limit is None else f", at most {limit:,.0f}"
        ends = f"{spread.min:,.0f} to {spread.max:,.0f}{most}"
        return c.Amount(f"{spread.median:,.0f} {unit} ({ends})")

    held = "not known"
    if gpu.throttling is not None:
        counts = (f"{why} ({n} of {gpu.samples})" for why, n in gpu.throttling.items())
        held = ", ".join(counts) or "nothing"
    return (
        gpu.name or gpu.pci_bus_id, gpu.driver or "not known", held,
        reading(gpu.sm_clock_mhz, "MHz", gpu.sm_clock_max_mhz),
        reading(gpu.memory_clock_mhz, "MHz"), reading(gpu.power_w, "W", gpu.power_limit_w),
        reading(gpu.temperature_c, "°C"), gpu.samples,
    )  # fmt: skip


def _gpu_text(manifest: Manifest) -> list[str]:
    timed = [(r.engine.target, r.latency) for r in manifest.targets if r.latency is not None]
    split = (
        "On the GPU a call is split by CUDA events on its stream: copying in, computing, "
        "copying out. The wall clock also holds the host's share. NVIDIA's tool feeds random "
        "data; its GPU Compute Time is the computing here."
    )
    text = [split] if any(latency.device is not None for _, latency in timed) else []
    text += [
        f"{target} has the host's wall clock only: ONNX Runtime records no CUDA events."
        for target, latency in timed
        if latency.gpu is not None and latency.device is None
    ]
    gpus = [(target, latency.gpu) for target, latency in timed if latency.gpu is not None]
    return text + [f"{target}: {note}." for target, gpu in gpus for note in gpu.notes]


def _parity(manifest: Manifest) -> Section | None:
    compared = headline.compared(manifest)
    rows = (
        (
            p.reference, p.candidate,
            c.Mark("not asked" if p.tolerance is None else "yes" if p.ok else "NO"),
            c.maybe(p.max_abs, ".2e"), c.maybe(p.tolerance, "g"), p.images,
            ", ".join(map(str, p.batches)),
        )
        for p in compared
    )  # fmt: skip
    what = "logits"
    if manifest.model.output_kind != "logits":
        what = f"log-probabilities (the network gives {manifest.model.output_kind})"
    words = f"Largest absolute difference of {what} between a network and what was made of it."
    if any(p.relative for p in compared):
        words = (
            "Largest difference of outputs between a network and what was made of it, divided by "
            "the output's largest value where that is above one."
        )
    heads = (
        "reference | candidate | within tolerance | largest difference | tolerance | images | "
        "batch sizes"
    )
    return section("Parity", words if compared else "Not measured.", tables=[table(heads, rows)])


def _data(manifest: Manifest) -> Section | None:
    used = headline.image_sets(manifest)
    rows = (
        (role, data.source, data.mapping or "none", data.sha256[:16], data.count, data.classes,
         len(data.unreadable))
        for role, data in used.items()
    )  # fmt: skip
    roles = ("calibration", "validation")
    text = [f"No {role} images were used." for role in roles if role not in used]
    if manifest.calibration is not None and not manifest.calibration.labelled:
        text.append(
            "The calibration images have no labels: the KL divergence and the refit need none; "
            "where an effect on the true class is meant, it is on the class that the dense network "
            "predicts, and verdicts are of that."
        )
    for role, data in used.items():
        if data.class_indices:
            named = tuple(f"{name} = {index}" for name, index in sorted(data.class_indices.items()))
            text.append(f"Class indices of the {role} set: {c.some(named, 12)}.")
    told = (f"{data.source}: {note}." for data in used.values() for note in data.notes)
    text += dict.fromkeys(told)  # both sets often come from one source
    if len(used) == len(roles):
        both = manifest.shared_images
        text.append(f"{both:,} images are in both sets." if both else "No image is in both sets.")
    spec = manifest.model.preprocessing
    turned = "turned by EXIF orientation, " if spec.exif_rotate else ""
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (spec.mean, spec.std))
    text.append(
        f"Preprocessing: {turned}shorter side to {spec.resize_shorter} pixels "
        f"({spec.interpolation}), centre crop to {' x '.join(map(str, spec.input_size))} "
        f"(C x H x W), mean ({mean}), standard deviation ({std})."
    )
    heads = "set | source | class mapping | sha256 | images | classes | unreadable"
    return section("Data", *text, tables=[table(heads, rows)])


def _notes(manifest: Manifest) -> Section | None:
    unreadable = (name for d in headline.image_sets(manifest).values() for name in d.unreadable)
    rows = [
        *(("build", note) for note in manifest.fallbacks),
        *(("ONNX", note) for note in manifest.onnx.notes),
        *(("data", f"{name} was unreadable and left out") for name in unreadable),
        *((r.engine.target, note) for r in manifest.targets for note in r.engine.notes),
    ]
    words = () if rows else ("None.",)
    return section("Fallbacks and notes", *words, tables=[table("where | what", rows)])


def _speed_instead(manifest: Manifest) -> Section | None:
    if (line := speed_instead(manifest)) is None:
        return None
    words = (
        f"The ratio counts {RATIO_WORDS[manifest.ratio_of]}, which do not lie where time is spent. "
        "What the same accuracy buys in speed is found by pruning for speed: this sweep does, and "
        "keeps the fastest network that loses no more than this one."
    )
    return section("With speed as the aim", words, code=line)


def _reproduce(manifest: Manifest, plan: PrunePlan) -> Section | None:
    device, model, onnx = manifest.device, manifest.model, manifest.onnx
    facts = (
        ("created", manifest.created),
        ("cswap-deploy", manifest.tool_version),
        ("model", f"{model.name} ({model.source})"),
        ("output kind", model.output_kind),
        ("weights", model.weights),
        ("task", model.task),
        ("weights sha256", c.Digest(model.weights_sha256)),
        ("CPU", f"{device.cpu}, {device.cores} cores, {device.memory_mib:,} MiB"),
        ("GPU", ", ".join(device.gpus) or "none"),
        ("platform", device.platform or "not recorded"),
        *(("input", tensor_text(tensor)) for tensor in onnx.inputs),
        *(("output", tensor_text(tensor)) for tensor in onnx.outputs),
        ("ONNX", f"opset {onnx.opset}, {onnx.nodes} nodes"),
    )
    versions = dict(manifest.versions)
    for result in manifest.targets:
        versions |= result.engine.versions
    of_plan = {k: v for k, v in plan.settings.items() if k not in manifest.settings}

    def pairs(heads: str, values: Mapping[str, Any]) -> Table | None:
        plain = {
            k: v if isinstance(v, str) else json.dumps(v, default=str) for k, v in values.items()
        }
        return table(heads, sorted(plain.items()))

    tables = [
        table("|", facts),
        pairs("stage | this time", manifest.stages),
        pairs("setting | value", manifest.settings),
        pairs("setting of the plan | value", of_plan),
        pairs("tool | version", versions),
    ]
    words = "The command, and what it met."
    return section("To reproduce", words, tables=tables, code=command(manifest))
