"""A sweep: one pruning whose rounds are the points of a curve, and other networks beside it.

Each point is a build of its own, with a bundle. It goes on from the last round of the point before,
so that all of them together cost little more than the deepest. At the end every engine is timed in
one loop, the dense network's among them.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from cswap_deploy.config import AIMS, Config, load_config
from cswap_deploy.errors import GateError, PruneError, UsageError
from cswap_deploy.pipeline import Built, build
from cswap_deploy.progress import Progress, Silent
from cswap_deploy.records.bundle import MODEL
from cswap_deploy.records.files import atomic_folder, check_output
from cswap_deploy.records.manifest import Manifest
from cswap_deploy.records.sweep import Sweep, SweepPoint
from cswap_deploy.records.value import now

if TYPE_CHECKING:
    from torch import nn

RECORD, PAGE, TEXT = "sweep.json", "sweep.html", "sweep.md"
DENSE = "dense"
_CONDITION = re.compile(
    r"(?P<what>drop|agreement|top1|speedup|latency)\s*(?P<how><=|>=)\s*"
    r"(?P<value>\d+\.?\d*|\.\d+)\s*(?P<unit>%|x|ms)?"
)
_UNITS = {"drop": "%", "agreement": "%", "top1": "%", "speedup": "x", "latency": "ms"}


@dataclass(frozen=True, slots=True)
class Condition:
    """What a point must meet to be picked, as ``drop<=1%``."""

    what: str
    how: Literal["<=", ">="]
    limit: float
    """A fraction, a speed-up, or milliseconds."""

    def value(self, point: SweepPoint) -> float | None:
        """What it is about; ``None`` where that was not measured."""
        if self.what == "speedup":
            return point.speedup
        if self.what == "latency":
            return None if point.latency is None else point.latency.p50_ms
        if self.what == "top1":
            return None if point.accuracy is None else point.accuracy.top1
        change = point.change
        return (
            None
            if change is None
            else {"drop": change.drop, "agreement": change.agreement}[self.what]
        )

    def holds(self, point: SweepPoint) -> bool:
        """Whether the point meets it."""
        value = self.value(point)
        if value is None:
            return False
        return value <= self.limit + 1e-9 if self.how == "<=" else value >= self.limit - 1e-9


def conditions(text: str) -> tuple[Condition, ...]:
    """Read ``drop<=1%`` or several with commas between them.

    Raises:
        UsageError: It says something else.
    """
    found = []
    for part in text.split(","):
        match = _CONDITION.fullmatch(part.strip())
        unit = match and match["unit"]
        if match is None or (unit and unit != _UNITS[match["what"]]):
            raise UsageError(
                f"--pick {text!r}: {part.strip()!r} is no condition",
                fix="write drop<=1%, agreement>=95%, top1>=0.7, speedup>=1.5x or latency<=4ms; "
                "several with commas",
            )
        how: Literal["<=", ">="] = "<=" if match["how"] == "<=" else ">="
        value = float(match["value"]) / (100 if unit == "%" else 1)
        found.append(Condition(match["what"], how, value))
    return tuple(found)


def pick(points: Sequence[SweepPoint], wanted: Sequence[Condition]) -> SweepPoint:
    """The fastest pruned point that meets all conditions.

    Raises:
        GateError: None does.
    """
    pruned = [point for point in points if point.kind == "pruned"]
    fit = [point for point in pruned if all(each.holds(point) for each in wanted)]
    if not fit:
        nearest = ", ".join(_words(point, wanted) for point in pruned)
        raise GateError(f"no point of the sweep meets the condition: {nearest}",
                        fix="loosen --pick, or sweep smaller steps")  # fmt: skip
    return min(fit, key=lambda p: p.latency.p50_ms if p.latency is not None else p.macs)


def sweep(
    config: Config,
    *,
    speedups: Sequence[float] = (),
    ratios: Sequence[float] = (),
    against: Sequence[str] = (),
    picked_by: str | None = None,
    module: nn.Module | None = None,
    progress: Progress | None = None,
) -> tuple[Path, Sweep]:
    """Build a network at several sizes and leave their bundles, a table and a picture.

    Args:
        config: Of a build; its aim is not looked at, but for ``ratio_of`` with ``ratios``.
        speedups: Above one. These or ratios.
        ratios: Between zero and one, of what ``config.prune.ratio_of`` says.
        against: Names of dense networks that are measured in the same loop, on the same images.
        picked_by: A condition; only the bundle of the fastest point that meets it is kept.
        module: As for :func:`cswap_deploy.pipeline.build`.
        progress: Told of everything that takes time.

    Returns:
        The folder, and what was found.

    Raises:
        UsageError: The points or the condition cannot be read.
        PruneError: Not even the first point can be reached.
        GateError: No point meets the condition; the folder is left with table and picture.
        CswapError: As for a build.
    """
    from cswap_deploy import stages
    from cswap_deploy.run import tool_versions

    begun = time.perf_counter()
    progress = progress if progress is not None else Silent()
    wanted = conditions(picked_by) if picked_by else ()
    aims = _aims(config, speedups, ratios)
    output = config.folder("sweep")
    check_output(output)
    with TemporaryDirectory(prefix="cswap-sweep-", ignore_cleanup_errors=True) as scratch:
        work = Path(scratch)
        others = [_other(config, name) for name in against]
        built: dict[str, tuple[SweepPoint, Built]] = {}
        for name, other in zip(against, others, strict=True):
            progress.note(f"{name}, dense, to compare with")
            built[name] = _built(other, name, "other", work, progress)
        so_many = f"{len(aims)} point{'s' * (len(aims) > 1)}"
        progress.note(f"{config.model.model}: the dense network, and {so_many}")
        inputs = stages.load(config, module, progress)
        dense = _with_aim(config, {"ratio": 0})
        first = _built(dense, DENSE, "dense", work, progress, module=module, inputs=inputs)
        pruned: dict[str, tuple[SweepPoint, Built]] = {}
        missed: dict[str, str] = {}
        for at, label in enumerate(labels := list(aims)):
            progress.note(f"point {at + 1} of {len(labels)}: {label}")
            try:
                pruned[label] = _built(
                    _with_aim(config, aims[label]), label, "pruned", work, progress,
                    module=module, inputs=inputs, goes_on=label != labels[-1],
                )  # fmt: skip
            except PruneError as err:
                if label == labels[-1] and not pruned:
                    raise
                missed[label] = str(err)
                progress.note(f"{label} was not reached: {err}")
                # Those beyond may be: their way is not by this one.
                reached = [x for x in (*speedups, *ratios) if _label(x, speedups) not in missed]
                aims = _aims(config, reached if speedups else (), () if speedups else reached)
        progress.stage("compare", f"{1 + len(pruned) + len(built)} networks in one loop")
        points = _timed(config, [first, *pruned.values(), *built.values()], progress)
        progress.done(config.engine.target[0], reused=False)
        chosen, refused = None, None
        try:
            chosen = pick(points, wanted) if wanted else None
        except GateError as err:
            refused = err
        found = Sweep(
            created=now(),
            tool_version=tool_versions("cswap-deploy")["cswap-deploy"],
            model=config.model.model, target=config.engine.target[0],
            ratio_of="latency" if speedups else config.prune.ratio_of,
            points=tuple(_kept(point, chosen, bool(wanted)) for point in points),
            missed=missed, pick=picked_by or "", picked="" if chosen is None else chosen.label,
            settings={n: v for n, v in config.settings().items() if n not in AIMS},
            device=_manifest(first[1]).device, seconds=round(time.perf_counter() - begun, 1),
        )  # fmt: skip
        _write(output, found, work)
    if refused is not None:
        raise refused
    return output, found


def _aims(
    config: Config, speedups: Sequence[float], ratios: Sequence[float]
) -> dict[str, dict[str, Any]]:
    """Label -> the settings that make a build of the point, in ascending order.

    Raises:
        UsageError: There are no points, or both kinds, or one is out of range.
    """
    if bool(speedups) == bool(ratios):
        raise UsageError(
            "a sweep needs its points", fix="pass --speedups 1.2,1.5,2, or --ratios 0.2,0.4,0.6"
        )
    low, high, what = (1, None, "speed-ups") if speedups else (0, 1, "ratios")
    wrong = [x for x in (*speedups, *ratios) if x <= low or (high is not None and x >= high)]
    if wrong:
        limits = "above 1" if speedups else "between 0 and 1"
        raise UsageError(f"{what} lie {limits}: {', '.join(f'{x:g}' for x in wrong)}")
    if speedups:
        asked = sorted(set(speedups))
        points = tuple(1 - 1 / speedup for speedup in asked)
        return {_label(x, speedups): {"speedup": x, "waypoints": points} for x in asked}
    points, of = tuple(sorted(set(ratios))), config.prune.ratio_of
    return {_label(x): {"ratio": x, "ratio_of": of, "waypoints": points} for x in points}


def _label(point: float, speedups: Sequence[float] = ()) -> str:
    return f"{point:g}x" if speedups else f"{point:g}"


def _with_aim(config: Config, aim: dict[str, Any], **others: Any) -> Config:
    """The settings of a build with another aim."""
    before = config.settings()
    for name in (*AIMS, "ratio_of", "waypoints"):
        del before[name]
    return load_config(**before | others | aim)


def _other(config: Config, name: str) -> Config:
    """A dense network of its own weights and input, with the same images, targets and checks.

    What a factory takes only the user knows: it is given what the pruned network is.
    """
    own: tuple[str, ...] = ("checkpoint", "checkpoint_key")
    own += () if ":" in name else ("input_size", "mean", "std", "task", "exif_rotate")
    fields = type(config.model).model_fields
    return _with_aim(
        config, {"ratio": 0}, model=name, **{field: fields[field].default for field in own}
    )


def _built(
    config: Config, label: str, kind: Literal["dense", "pruned", "other"], work: Path,
    progress: Progress, **given: Any,
) -> tuple[SweepPoint, Built]:  # fmt: skip
    """A finished bundle in the scratch folder, and its point without what is measured together."""
    folder = work / re.sub(r"[^\w.-]", "-", label)
    run = config.run.model_copy(update={"output": folder})
    built = build(config.model_copy(update={"run": run}), progress=progress, **given)
    manifest = _manifest(built)
    result = manifest.targets[0]
    change, outputs = result.accuracy or manifest.torch_accuracy, result.outputs
    point = SweepPoint(
        label=label, kind=kind, bundle=folder.name,
        params=manifest.pruned.params, macs=manifest.pruned.macs,
        accuracy=None if change is None else change.pruned,
        change=change if kind == "pruned" else None,
        error_db=None if outputs is None or kind != "pruned" else outputs.worst_db,
    )  # fmt: skip
    return point, built


def _timed(
    config: Config, built: Sequence[tuple[SweepPoint, Built]], progress: Progress
) -> list[SweepPoint]:
    """All engines of the first target in one loop, where they run on this machine."""
    import numpy as np

    from cswap_deploy.measure.latency import measure_latency
    from cswap_deploy.measure.statistics import median_ratio_interval
    from cswap_deploy.targets import get_target

    points = [point for point, _ in built]
    if not all(_manifest(each).targets[0].engine.runnable for _, each in built):
        return points
    target = get_target(config.engine.target[0])
    rng = np.random.default_rng(config.run.seed)
    with ExitStack() as stack:
        sessions, images = {}, {}
        for point, each in built:
            engine = _manifest(each).targets[0].engine
            path = each.path / engine.path
            session = target.load(
                engine.model_copy(update={"path": path}), threads=config.measure.threads,
                onnx=each.path / MODEL,
            )  # fmt: skip
            stack.callback(session.close)
            sessions[point.label] = session
            shape = (config.timed_batch, *_manifest(each).model.preprocessing.input_size)
            images[point.label] = rng.standard_normal(shape, dtype=np.float32)
        runs = config.measure.latency_runs
        progress.begin(f"timing {runs} calls of each of {len(sessions)} networks", 0)
        times = measure_latency(sessions, images=images, runs=runs, data="normal noise")
        progress.end()
    dense = times[DENSE]
    found = []
    for point in points:
        own = times[point.label]
        low, high = median_ratio_interval(dense.samples_ms, own.samples_ms)
        ratios = [a / b for a, b in zip(dense.samples_ms, own.samples_ms, strict=True)]
        update = {"latency": own, "speedup": statistics.median(ratios)}
        found.append(point.model_copy(update=update | {"speedup_low": low, "speedup_high": high}))
    return found


def _manifest(built: Built) -> Manifest:
    assert built.manifest is not None
    return built.manifest


def _kept(point: SweepPoint, chosen: SweepPoint | None, picks: bool) -> SweepPoint:
    """The point, without the bundle that is not kept."""
    stays = point.kind != "dense" and (not picks or (chosen and point.label == chosen.label))
    return point if stays else point.model_copy(update={"bundle": ""})


def _write(output: Path, found: Sweep, work: Path) -> None:
    """The sweep's folder, whole or not at all."""
    import shutil

    from cswap_deploy.pipeline import add_to_report
    from cswap_deploy.report.sweep import curve, render_html, render_markdown

    with atomic_folder(output) as folder:
        for point in found.points:
            if point.bundle:
                shutil.copytree(work / point.bundle, folder / point.bundle)
                add_to_report(folder / point.bundle, curve(found, point.label))
        (folder / RECORD).write_text(found.model_dump_json(indent=1))
        (folder / TEXT).write_text(render_markdown(found))
        (folder / PAGE).write_text(render_html(found))


def _words(point: SweepPoint, wanted: Sequence[Condition]) -> str:
    """What a point has, of what was asked."""
    told = []
    for each in dict.fromkeys(condition.what for condition in wanted):
        value = Condition(each, "<=", 0).value(point)
        unit = _UNITS[each]
        shown = "not measured" if value is None else f"{value * (100 if unit == '%' else 1):.3g}"
        told.append(f"{each} {shown}{'' if value is None else unit}")
    return f"{point.label} has {' and '.join(told)}"
