"""Parity, accuracy and latency of one engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from cswap_deploy.config import Config
from cswap_deploy.errors import GateError, PruneError
from cswap_deploy.measure.accuracy import PREDICTIONS, agreement, write_predictions
from cswap_deploy.measure.evaluate import Evaluation, Predictions, torch_run
from cswap_deploy.measure.latency import measure_latency
from cswap_deploy.measure.outputs import (
    OutputRun,
    relative_error,
    torch_outputs,
    trimmed,
    worst_words,
)
from cswap_deploy.measure.parity import (
    PARITY_BATCHES,
    AnyRun,
    Run,
    logits_of,
    parity,
    require_parity,
)
from cswap_deploy.measure.statistics import median_ratio_interval
from cswap_deploy.records.amounts import fixed, percent, speed
from cswap_deploy.records.engine import EngineArtifact
from cswap_deploy.records.manifest import TargetResult
from cswap_deploy.records.measurements import AccuracyChange, Latency, OutputChange, Parity
from cswap_deploy.records.model import ModelSpec
from cswap_deploy.runtime.onnx_session import OnnxSession
from cswap_deploy.runtime.preprocess import filled_up
from cswap_deploy.runtime.probabilities import OutputKind
from cswap_deploy.runtime.session import Floats, Outputs, Session

_ATTEMPTS = 3
"""At measuring the speed that was asked for."""


@dataclass(frozen=True, slots=True)
class OutputReference:
    """What engines of networks that do not classify are compared with."""

    dense: nn.Module
    spec: ModelSpec
    rows: frozenset[str]
    """Outputs with one row an image."""

    def torch(self, module: nn.Module) -> OutputRun:
        """A network in PyTorch."""
        run = torch_outputs(module, self.spec.outputs)
        return lambda images: trimmed(run(images), self.rows, len(images))

    def engine(self, session: Session, smallest: int) -> OutputRun:
        """An engine that takes batches from ``smallest`` on."""

        def run(images: Floats) -> Outputs:
            found = session.named(filled_up(images, smallest))
            return trimmed(found, self.rows, len(images))

        return run


@dataclass(frozen=True, slots=True)
class EngineTest:
    """What engines are compared with, and how."""

    pruned: nn.Module
    reference: Predictions | OutputReference
    """Predictions of both networks in PyTorch, or what makes outputs to compare."""
    calibration: Floats
    """(N, C, H, W) float32, normalised: the first calibration images, for parity and latency."""
    evaluation: Evaluation
    config: Config
    kind: OutputKind = "logits"
    """What classifiers give."""
    least_speedup: float = 0.0
    """Of an engine that was pruned to a speed."""
    out: Path | None = None
    """Folder that a classifier engine's predictions are left in."""

    def measure(
        self, engine: EngineArtifact, session: Session, load_dense: Callable[[], Session]
    ) -> TargetResult:
        """Measure an engine that this machine can run.

        ``load_dense`` builds and loads the dense float32 graph on the same runtime.

        Raises:
            ExportError: A float32 engine's outputs differ from the pruned network's.
            GateError: An engine of reduced precision loses too much accuracy.
            PruneError: It is slower than it was pruned to be, however often it is timed.
        """
        batch, precision = self.config.engine.batch, self.config.export.precision
        candidate: AnyRun = logits_of(self._given(session), self.kind)
        expected: AnyRun = logits_of(torch_run(self.pruned), self.kind)
        if isinstance(self.reference, OutputReference):
            expected = self.reference.torch(self.pruned)
            candidate = self.reference.engine(session, batch.min)
        compared = parity(
            expected, candidate, self.calibration[: max(PARITY_BATCHES)],
            reference_name="pruned network, PyTorch", candidate_name=f"engine, {engine.target}",
            tolerance=self.config.export.parity_tolerance if precision == "fp32" else None,
            batches=tuple(min(size, batch.max) for size in PARITY_BATCHES),
        )  # fmt: skip
        judged = self._judged(engine, session, f"the engine of {engine.target}", "this engine")
        for attempt in range(_ATTEMPTS):  # a busy moment decides nothing
            latency, dense_latency = self._latency(session, load_dense)
            low, high = median_ratio_interval(dense_latency.samples_ms, latency.samples_ms)
            if high >= self.least_speedup:
                break
            if attempt + 1 == _ATTEMPTS:
                raise _too_slow(engine.target, low, high, self.least_speedup)
        return judged.model_copy(
            update={
                "parity": require_parity(compared),
                "latency": latency,
                "dense_latency": dense_latency,
                "speedup_low": low,
                "speedup_high": high,
            }
        )

    def emulate(self, engine: EngineArtifact, session: Session, name: str) -> TargetResult:
        """Judge the precision of an engine that this machine cannot run.

        ``session`` predicts as the engine would, and is ``name`` in the report; both are from
        ``export.stage.Graphs.emulate``.

        Raises:
            GateError: The precision loses too much accuracy.
        """
        what = f"the {self.config.export.precision} graph"
        judged = self._judged(engine, session, what, name)
        nothing = dict.fromkeys(("accuracy", "agreement", "outputs"))
        return judged.model_copy(update=nothing)

    def _judged(
        self, engine: EngineArtifact, session: Session, what: str, name: str
    ) -> TargetResult:
        """Accuracy against the dense network; reduced precision also against the pruned one."""
        batch, export = self.config.engine.batch, self.config.export
        gate: dict[str, Any] = {
            "precision": export.precision, "limit": export.drop_limit, "measured_on": name,
        }  # fmt: skip
        if isinstance(self.reference, Predictions):
            run = self._given(session)
            classes = self.evaluation.classify(run, what=what, largest=batch.max)
            if self.out is not None:
                write_predictions(self.out / PREDICTIONS, {engine.target: classes})
            change = self.evaluation.change(self.reference.dense, classes)
            result = TargetResult(
                engine=engine, accuracy=change if self.evaluation.labelled else None,
                agreement=agreement(self.reference.dense, classes),
            )  # fmt: skip
            if export.precision != "fp32":
                reduced = self.evaluation.change(self.reference.pruned, classes)
                require_precision(reduced, engine.target, **gate)
                result = result.model_copy(update={"reduced": reduced, "judged_by": name})
            return result
        of, task = self.reference, self.reference.spec.task
        made = of.engine(session, batch.min)

        def changed(module: nn.Module) -> OutputChange:
            before = of.torch(module)
            return self.evaluation.output_change(before, made, task, what=what, largest=batch.max)

        result = TargetResult(engine=engine, outputs=changed(of.dense))
        if export.precision != "fp32":
            moved = changed(self.pruned)
            require_outputs(moved, engine.target, **gate)
            result = result.model_copy(update={"reduced_outputs": moved, "judged_by": name})
        return result

    def _given(self, session: Session) -> Run:
        """A classifier's engine, which takes batches from the smallest on."""
        smallest = self.config.engine.batch.min
        return lambda images: session.run(filled_up(images, smallest))[: len(images)]

    def _latency(
        self, session: Session, load_dense: Callable[[], Session]
    ) -> tuple[Latency, Latency]:
        """The engine and the dense graph on the same runtime, interleaved."""
        size, runs = self.config.timed_batch, self.config.measure.latency_runs
        self.evaluation.progress.begin(f"timing {runs} calls of each network", 0)
        dense, images = load_dense(), self.calibration[:size]
        rows = np.arange(size) % len(images)
        sessions = {"pruned": session, "dense": dense}
        times = measure_latency(sessions, images=images[rows], runs=runs)
        dense.close()
        self.evaluation.progress.end()
        return times["pruned"], times["dense"]


def _too_slow(target: str, low: float, high: float, least: float) -> PruneError:
    return PruneError(
        f"the engine of {target} is {low:.2f}x to {high:.2f}x as fast as the dense one, timed "
        f"{_ATTEMPTS} times; it was pruned to be at least {least:.2f}x",
        fix="build again on a quiet machine, or ask for less speed",
    )


def images_needed(config: Config) -> int:
    """Calibration images that :class:`EngineTest` uses."""
    return max(*PARITY_BATCHES, config.timed_batch)


def check_graph(
    module: nn.Module, graph: Path, name: str, *, spec: ModelSpec, images: Floats, tolerance: float
) -> Parity:
    """Compare a float32 graph in ONNX Runtime with its network in PyTorch.

    ``name`` is the graph's in the report; of the images, (N, C, H, W) and normalised, the first 8
    are used; ``tolerance`` is the largest difference of logits, made of what the networks give
    where that is probabilities, or what ``parity`` says of other outputs.

    Raises:
        ExportError: The difference exceeds the tolerance.
    """
    session, few = OnnxSession(graph, threads=None), images[: max(PARITY_BATCHES)]
    expected: AnyRun = logits_of(torch_run(module), spec.output_kind)
    candidate: AnyRun = logits_of(session.run, spec.output_kind)
    if spec.task != "classify":
        expected, candidate = torch_outputs(module, spec.outputs), session.named
    compared = parity(
        expected, candidate, few, reference_name="PyTorch", candidate_name=name,
        tolerance=tolerance,
    )  # fmt: skip
    return require_parity(compared)


def require_precision(
    change: AccuracyChange, target: str, *, precision: str, limit: float, measured_on: str
) -> None:
    """The gate that every reduced precision must pass; a single image never fails it.

    ``change`` is from the pruned float32 network to the engine; ``limit`` a fraction of top-1.

    Raises:
        GateError: More of the top-1 is lost than allowed.
    """
    images = change.dense.images
    if change.drop * images > max(1.0, limit * images) + 1e-6:
        raise GateError(
            f"{target} in {precision} loses {fixed(100 * change.drop, 2)} points of top-1 against "
            f"the pruned float32 network ({percent(change.dense.top1, 2)} -> "
            f"{percent(change.pruned.top1, 2)} on {images} images, by {measured_on}); allowed are "
            f"{fixed(100 * limit, 2)}",
            fix="a wider --precision, --keep-fp32 for what is sensitive, or raise --precision-drop",
        )


def require_outputs(
    change: OutputChange, target: str, *, precision: str, limit: float, measured_on: str
) -> None:
    """The same gate without classes: ``limit`` is of the squared error over the squared size.

    Raises:
        GateError: An output changes by more.
    """
    error = relative_error(change)
    if error > limit:
        raise GateError(
            f"{target} in {precision} changes the outputs of the pruned float32 network by "
            f"{error:.2e} of their squared size ({worst_words(change)}, on {change.images} images, "
            f"by {measured_on}); allowed are {limit:g}",
            fix="a wider --precision, --keep-fp32 for what is sensitive, or raise --precision-drop",
        )


def summary(result: TargetResult, *, pruned: bool = True) -> str:
    """One line for the screen; a network that was ``pruned`` and is not faster is called that."""
    if result.latency is None:
        text = f"not run on this machine: {result.engine.reason}"
        if result.reduced is not None:
            text += f"; {percent(result.reduced.pruned.top1, 2)} top-1 by {result.judged_by}"
        if result.reduced_outputs is not None:
            text += f"; {worst_words(result.reduced_outputs)} by {result.judged_by}"
        return text
    change, text = result.accuracy, "not evaluated"
    if change is not None:
        text = f"top-1 {percent(change.dense.top1, 2)} -> {percent(change.pruned.top1, 2)}"
    elif result.agreement is not None:
        text = f"same class on {percent(result.agreement.share, 2)} of the images"
    elif result.outputs is not None:
        text = worst_words(result.outputs)
    if result.dense_latency is not None:
        before, after = result.dense_latency.p50_ms, result.latency.p50_ms
        text += f", p50 {fixed(before, 2)} -> {fixed(after, 2)} ms"
        faster, words = speed(before / after, result.speedup_low, result.speedup_high)
        text += f" ({words})" if pruned and not faster else ""
    return text
