"""Parity, accuracy and latency of one engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from cswap_deploy.config import Config
from cswap_deploy.errors import GateError
from cswap_deploy.measure.evaluate import Classes, Evaluation, Predictions, torch_run
from cswap_deploy.measure.latency import measure_latency
from cswap_deploy.measure.parity import (
    PARITY_BATCHES,
    Run,
    logits_of,
    parity,
    require_parity,
)
from cswap_deploy.measure.statistics import median_ratio_interval
from cswap_deploy.records.amounts import fixed, percent, speed
from cswap_deploy.records.engine import EngineArtifact
from cswap_deploy.records.manifest import TargetResult
from cswap_deploy.records.measurements import AccuracyChange, Latency, Parity
from cswap_deploy.runtime.onnx_session import OnnxSession
from cswap_deploy.runtime.outputs import Outputs
from cswap_deploy.runtime.preprocess import filled_up
from cswap_deploy.runtime.session import Floats, Session


@dataclass(frozen=True, slots=True)
class EngineTest:
    """What engines are compared with, and how."""

    pruned: nn.Module
    predicted: Predictions
    """Predictions of both networks in PyTorch."""
    calibration: Floats
    """(N, C, H, W) float32, normalised: the first calibration images, for parity and latency."""
    evaluation: Evaluation
    config: Config
    outputs: Outputs = "logits"
    """What the networks give."""

    def measure(
        self, engine: EngineArtifact, session: Session, load_dense: Callable[[], Session]
    ) -> TargetResult:
        """Measure an engine that this machine can run.

        ``load_dense`` builds and loads the dense float32 graph on the same runtime.

        Raises:
            ExportError: A float32 engine's logits differ from the pruned network's.
            GateError: An engine of reduced precision loses too much accuracy.
        """
        batch, precision = self.config.engine.batch, self.config.export.precision

        def network(images: Floats) -> Floats:
            return session.run(filled_up(images, batch.min))[: len(images)]

        compared = parity(
            logits_of(torch_run(self.pruned), self.outputs), logits_of(network, self.outputs),
            self.calibration[: max(PARITY_BATCHES)],
            reference_name="pruned network, PyTorch", candidate_name=f"engine, {engine.target}",
            tolerance=self.config.export.parity_tolerance if precision == "fp32" else None,
            batches=tuple(min(size, batch.max) for size in PARITY_BATCHES),
        )  # fmt: skip
        classes = self._classify(network, f"the engine of {engine.target}")
        latency, dense_latency = self._latency(session, load_dense)
        low, high = median_ratio_interval(dense_latency.samples_ms, latency.samples_ms)
        result = TargetResult(
            engine=engine, parity=require_parity(compared), latency=latency,
            accuracy=self.evaluation.change(self.predicted.dense, classes),
            dense_latency=dense_latency, speedup_low=low, speedup_high=high,
        )  # fmt: skip
        return result if precision == "fp32" else self._reduced(result, classes, "this engine")

    def emulate(self, engine: EngineArtifact, session: Session, name: str) -> TargetResult:
        """Judge the precision of an engine that this machine cannot run.

        ``session`` predicts as the engine would, and is ``name`` in the report; both are from
        ``export.stage.Graphs.emulate``.

        Raises:
            GateError: The precision loses too much accuracy.
        """
        classes = self._classify(session.run, f"the {self.config.export.precision} graph")
        return self._reduced(TargetResult(engine=engine), classes, name)

    def _classify(self, network: Run, what: str) -> Classes:
        largest = self.config.engine.batch.max
        return self.evaluation.classify(network, what=what, largest=largest)

    def _reduced(self, result: TargetResult, classes: Classes, name: str) -> TargetResult:
        reduced = self.evaluation.change(self.predicted.pruned, classes)
        export = self.config.export
        require_precision(
            reduced, result.engine.target, precision=export.precision, limit=export.drop_limit,
            measured_on=name,
        )  # fmt: skip
        return result.model_copy(update={"reduced": reduced, "judged_by": name})

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


def images_needed(config: Config) -> int:
    """Calibration images that :class:`EngineTest` uses."""
    return max(*PARITY_BATCHES, config.timed_batch)


def check_graph(
    module: nn.Module, graph: Path, name: str,
    *, images: Floats, tolerance: float, outputs: Outputs = "logits",
) -> Parity:  # fmt: skip
    """Compare a float32 graph in ONNX Runtime with its network in PyTorch.

    ``name`` is the graph's in the report; of the images, (N, C, H, W) and normalised, the first 8
    are used; ``tolerance`` is the largest difference of logits, which are made of the networks'
    ``outputs`` where these are others.

    Raises:
        ExportError: The difference exceeds the tolerance.
    """
    candidate, few = OnnxSession(graph, threads=None).run, images[: max(PARITY_BATCHES)]
    compared = parity(
        logits_of(torch_run(module), outputs), logits_of(candidate, outputs), few,
        reference_name="PyTorch", candidate_name=name,
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


def summary(result: TargetResult, *, pruned: bool = True) -> str:
    """One line for the screen; a network that was ``pruned`` and is not faster is called that."""
    if result.accuracy is None or result.latency is None:
        text = f"not run on this machine: {result.engine.reason}"
        if result.reduced is not None:
            text += f"; {percent(result.reduced.pruned.top1, 2)} top-1 by {result.judged_by}"
        return text
    change = result.accuracy
    text = f"top-1 {percent(change.dense.top1, 2)} -> {percent(change.pruned.top1, 2)}"
    if result.dense_latency is not None:
        before, after = result.dense_latency.p50_ms, result.latency.p50_ms
        text += f", p50 {fixed(before, 2)} -> {fixed(after, 2)} ms"
        faster, words = speed(before / after, result.speedup_low, result.speedup_high)
        text += f" ({words})" if pruned and not faster else ""
    return text
