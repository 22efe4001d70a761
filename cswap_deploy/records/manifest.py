"""The manifest: what a bundle holds and how it came about."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from cswap_deploy.config import RatioOf
from cswap_deploy.records.engine import EngineArtifact, OnnxArtifact
from cswap_deploy.records.measurements import (
    AccuracyChange,
    Agreement,
    DenseCheck,
    Device,
    Latency,
    MetricChange,
    OutputChange,
    Parity,
    PrecisionResult,
)
from cswap_deploy.records.model import DataSpec, ModelSpec
from cswap_deploy.records.plan import ScoringCost, Size
from cswap_deploy.records.value import FileRef, Sealed, Value


class TargetResult(Value):
    """One target's engine and what was measured on it."""

    engine: EngineArtifact
    parity: Parity | None = None
    accuracy: AccuracyChange | None = None
    """``None`` where it was not run, or the validation images have no labels."""
    agreement: Agreement | None = None
    """Of a classifier, from the dense network in PyTorch to the engine."""
    reduced: AccuracyChange | None = None
    """From the pruned float32 network (``dense`` here) to the graph of reduced precision."""
    judged_by: str = ""
    """What ``reduced`` was measured on: the engine, or a stand-in where it does not run here."""
    outputs: OutputChange | None = None
    """In place of ``accuracy`` for a task without classes: dense network in PyTorch to engine."""
    reduced_outputs: OutputChange | None = None
    """In place of ``reduced``."""
    latency: Latency | None = None
    dense_latency: Latency | None = None
    """The dense graph on the same runtime, interleaved with ``latency``."""
    speedup_low: float | None = None
    """95 % interval of ``speedup``, from the pairs of calls that alternated."""
    speedup_high: float | None = None

    @property
    def speedup(self) -> float | None:
        """Dense over pruned, by median."""
        if self.latency is None or self.dense_latency is None:
            return None
        return self.dense_latency.p50_ms / self.latency.p50_ms


class Manifest(Sealed):
    """What a bundle holds and how it came about."""

    sealed_since: ClassVar[int] = 5
    schema_version: Literal[5] = 5
    """Earlier ones are read as this; see ``runtime.manifest``."""
    created: str
    """ISO 8601, UTC."""
    tool_version: str
    model: ModelSpec
    calibration: DataSpec | None
    validation: DataSpec | None
    shared_images: int = 0
    """Images in both sets; above zero only where the user allowed it."""
    dense_checks: tuple[DenseCheck, ...] = ()
    """Whether the dense network was better than guessing; none for random weights."""
    ratio_effective: dict[RatioOf, float]
    dense: Size
    pruned: Size
    onnx: OnnxArtifact
    export_parity: tuple[Parity, ...]
    """After export and after each graph pass."""
    torch_accuracy: AccuracyChange | None = None
    """Dense and pruned network in PyTorch."""
    torch_agreement: Agreement | None = None
    """The same whatever the labels."""
    torch_outputs: OutputChange | None = None
    """In its place for a task without classes."""
    metric: MetricChange | None = None
    """``None`` where the user named none."""
    targets: tuple[TargetResult, ...]
    precision: PrecisionResult | None = None
    """``None`` for float32."""
    scoring: ScoringCost | None = None
    """``None`` where nothing was measured."""
    settings: dict[str, Any]
    """Every setting of the build by name; see ``config.Config.settings``."""
    versions: dict[str, str]
    device: Device
    fallbacks: tuple[str, ...] = ()
    stages: dict[str, Literal["run", "reused"]] = Field(default_factory=dict)
    files: tuple[FileRef, ...] = ()

    def lists(self, name: str) -> bool:
        """Whether a file belongs to the bundle; others in its folder are not read."""
        return any(ref.path == name for ref in self.files)

    @property
    def doubts(self) -> tuple[str, ...]:
        """Why its accuracy says little: random weights, or a dense network that only guesses."""
        if self.model.is_random:
            return (f"the weights are {self.model.weights}: accuracy says nothing",)
        return tuple(check.words for check in self.dense_checks if check.verdict != "above")

    @property
    def ratio_requested(self) -> float:
        """The fraction that was to be removed."""
        return float(self.settings["ratio"])

    @property
    def ratio_of(self) -> RatioOf:
        """What the ratio is a fraction of."""
        of: RatioOf = self.settings["ratio_of"]
        return of


def schema() -> dict[str, Any]:
    """JSON Schema of ``manifest.json``; what is published, ``MANIFEST_SCHEMA``, is this."""
    made = Manifest.model_json_schema()
    made["required"] += ["schema_version", "seal"]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "manifest.json of cswap-deploy",
    } | {name: value for name, value in made.items() if name != "title"}
