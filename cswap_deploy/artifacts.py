"""The values that stages pass to each other, and the manifest that a bundle carries.

What is written to disk is a frozen pydantic model; unknown fields are refused, so a file from
another schema version is noticed and not half understood. Latency is in milliseconds, sizes in
bytes, accuracy a fraction.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cswap_deploy.errors import ArtifactError

SCHEMA_VERSION = 1
RatioOf = Literal["params", "channels", "macs"]
Verdict = Literal["critical", "neutral", "detrimental"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Value(BaseModel):
    """Base of everything that is saved: immutable, and strict about its fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def canonical_json(self) -> str:
        """Sorted keys, no blanks: the same value gives the same bytes."""
        return canonical_json(self.model_dump(mode="json"))


def canonical_json(value: Any) -> str:
    """Serialise plain data to one spelling, for hashing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sha256_text(text: str) -> str:
    """Hex digest of UTF-8 text."""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class FileRef(Value):
    """A file of the bundle. ``path`` is relative to the bundle."""

    path: str
    sha256: str
    size_bytes: int


# --- model ---------------------------------------------------------------------------------------


class Preprocessing(Value):
    """From a decoded RGB (or grey) image to the network's input.

    Resize the shorter side to ``resize_shorter`` pixels, crop the centre to ``input_size``, divide
    by 255, subtract ``mean``, divide by ``std``. An image that already has the input's height and
    width is neither resized nor cropped when ``resize_shorter`` equals that size.
    """

    input_size: tuple[int, int, int]
    """(C, H, W)."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize_shorter: int
    """Pixels."""
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bicubic"


class ModelSpec(Value):
    """What a model is and where its weights came from; enough to make it again."""

    name: str
    """As the user typed it."""
    source: Literal["demo", "timm", "factory"]
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of ``timm.create_model``, for example ``img_size``."""
    weights: str
    """Where the weights came from, for people: a file, a hub repository, a package, ``random``."""
    weights_sha256: str
    """Over every tensor's name, dtype, shape and bytes."""
    num_classes: int
    label_space: Literal["imagenet-1k", "fashion-mnist"] | None = None
    class_names: tuple[str, ...] = ()
    preprocessing: Preprocessing


# --- data ----------------------------------------------------------------------------------------


class DataSpec(Value):
    """Which images were used: enough to tell whether two runs saw the same ones."""

    source: str
    """As the user named it, or the embedded set's name."""
    sha256: str
    """Over the preprocessed uint8 pixels and the labels, in order."""
    count: int
    classes: int
    """Distinct labels among the images."""
    mapping: str = ""
    """How folder or column names became class indices, in words."""
    class_indices: dict[str, int] = Field(default_factory=dict)
    """Folder or label name -> class index of the model, where names had to be mapped."""
    unreadable: tuple[str, ...] = ()
    """Files that did not decode and were left out."""


# --- pruning -------------------------------------------------------------------------------------


class UnitEffect(Value):
    """One unit's last measurement before it was removed or kept for good."""

    unit: int
    true_class: float
    """Mean over images of (p_masked - p) / p."""
    harm: float = 0.0
    """Nats; what ranks units by ``true-class``; see :func:`causal.effects.likely_harm`."""
    kl: float
    """Mean over images of KL(p || p_masked), nats."""
    low: float
    """Lower end of the interval of ``true_class``."""
    high: float
    verdict: Verdict
    round: int
    """The round in which this was measured, from 1; 0 where it was not."""
    serves: tuple[int, ...] = ()
    """Classes that removing the unit significantly hurts, strongest first."""
    harms: tuple[int, ...] = ()
    """Classes that removing it significantly helps, strongest first."""
    images: int | None = None
    """On how many the effect was measured, where the plan says; for the others it was estimated."""


class GroupPlan(Value):
    """What happens to the units of one coupled set of layers."""

    name: str
    """Name of the group's root layer."""
    kind: Literal["channels", "heads", "neurons"]
    units: int
    kept: tuple[int, ...]
    """Indices of the units that stay, ascending, in the dense model's numbering."""
    effects: tuple[UnitEffect, ...] = ()


class Size(Value):
    """How large a network is."""

    units: int
    params: int
    macs: int
    """Multiply-accumulates for one image."""


class RoundLog(Value):
    """One round of measure-and-remove."""

    round: int
    measured: int
    """Units whose effect was measured."""
    forwards: int = 0
    """Masked forwards that this took: one for each unit and image."""
    forwards_exact: int = 0
    """Those of measuring the same units on every image."""
    removed: int
    """Units removed in this round."""
    params: int
    """Parameters left."""
    order: str = "effect"
    """Which order gave the set that was removed."""
    kl: float | None = None
    """That set's own effect once the network had taken over: mean KL divergence from the dense
    network (nats), on calibration images that it was not solved on."""
    ridge: float | None = None
    """Of the layers solved again in this round."""
    seconds: float


class ScoringCost(Value):
    """What measuring the effects took, over all rounds."""

    measuring: str
    """``exact``, ``adaptive`` or ``bf16``."""
    images: int
    """On which each unit's effect is known in a round."""
    forwards: int
    """Masked forwards in float32, one for each unit and image."""
    forwards_exact: int
    """What measuring the same units on all of these images would have taken."""


class PrunePlan(Value):
    """Everything that turns the dense network into the pruned one, except the weights."""

    schema_version: Literal[1] = 1
    criterion: str
    """``cswap`` or a baseline's name."""
    settings: dict[str, Any]
    ratio_requested: float
    ratio_of: RatioOf
    dense: Size
    pruned: Size
    groups: tuple[GroupPlan, ...]
    excluded: dict[str, str] = Field(default_factory=dict)
    """Root layer -> why its units cannot be removed."""
    biased: tuple[str, ...] = ()
    """Layers that gained a bias to hold what was folded into them."""
    refitted: tuple[str, ...] = ()
    """Layers whose weights were solved again."""
    producers: tuple[str, ...] = ()
    """Layers whose remaining units took over, by solution, what the removed ones carried."""
    rounds: tuple[RoundLog, ...] = ()
    alpha: float = 0.05
    """False-discovery rate of the verdicts."""

    @property
    def scoring(self) -> ScoringCost | None:
        """What measuring took; ``None`` where nothing was measured."""
        forwards = sum(r.forwards for r in self.rounds)
        if not forwards:
            return None
        return ScoringCost(
            measuring=str(self.settings.get("measuring", "exact")),
            images=int(self.settings["scoring_samples"]),
            forwards=forwards,
            forwards_exact=sum(r.forwards_exact for r in self.rounds),
        )

    def effective(self, of: RatioOf) -> float:
        """The fraction really removed."""
        total = {
            "params": (self.dense.params, self.pruned.params),
            "channels": (self.dense.units, self.pruned.units),
            "macs": (self.dense.macs, self.pruned.macs),
        }[of]
        return 1.0 - total[1] / total[0] if total[0] else 0.0


# --- graphs and engines --------------------------------------------------------------------------


class TensorSpec(Value):
    """One input or output. A dimension is a size, or a name where it is dynamic."""

    name: str
    dtype: str
    """NumPy's name, for example ``float32``."""
    shape: tuple[int | str, ...]


class OnnxArtifact(Value):
    """A self-contained ONNX file."""

    path: Path
    sha256: str
    size_bytes: int
    opset: int
    nodes: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    precision: str = "fp32"
    notes: tuple[str, ...] = ()


class BatchRange(Value):
    """Smallest, tuned-for and largest batch (samples); as text ``1:8:64``."""

    min: int = 1
    opt: int = 1
    max: int = 16

    @model_validator(mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        parts = value.split(":")
        if len(parts) != 3 or not all(part.isdigit() for part in parts):
            raise ValueError("MIN:OPT:MAX is wanted, for example 1:8:64")
        return dict(zip(("min", "opt", "max"), map(int, parts), strict=True))

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if not 1 <= self.min <= self.opt <= self.max:
            raise ValueError(f"batches must ascend from 1: {self}")
        return self

    def __str__(self) -> str:
        return f"{self.min}:{self.opt}:{self.max}"


class EngineOptions(Value):
    """What a TensorRT builder can be told; each names the packages that have it (see
    ``targets.tensorrt``)."""

    workspace_mib: int | None = Field(default=None, ge=1)
    """Cap on the builder's scratch memory (MiB of GPU memory); the GPU's memory unless said."""
    optimization_level: int | None = Field(default=None, ge=0, le=5)
    """How long the builder looks for fast kernels; TensorRT's own 3 unless said."""
    hardware_compat: Literal["none", "ampere+", "same-cc"] = "none"
    """Which other GPUs the engine runs on."""
    version_compatible: bool = False
    """Runs with later minor versions of TensorRT too; brings the lean runtime in the engine."""
    compute_capability: tuple[str, ...] = ()
    """Of the GPUs that an ahead-of-time engine is for, for example ``8.9``."""
    strip_weights: bool = False
    """Leave the weights out: the engine gets them from ``model.onnx`` when it is loaded."""
    refit_engine: bool = False
    """Let the weights be replaced in the finished engine."""


class EngineArtifact(Value):
    """What a target made of the graph."""

    target: str
    path: Path
    sha256: str
    size_bytes: int
    build_seconds: float
    precision: str
    runnable: bool
    """Whether this machine can execute it."""
    reason: str = ""
    """Why not, when it cannot."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Of the runtime and what it links."""
    device: str = ""
    """What it was built for: provider, GPU, compute capabilities."""
    batch: BatchRange | None = None
    """What it accepts; ``None`` where any batch runs."""
    options: EngineOptions | None = None
    """What its builder was told; ``None`` where the runtime has no such options."""
    compute_capability: str = ""
    """Of the GPU it was built on; empty where it is not bound to one."""
    stripped: bool = False
    """Without weights; see ``EngineOptions.strip_weights``."""
    extra_files: tuple[str, ...] = ()
    """Files beside ``path`` that belong to it, by name, for example ``layers.json``."""
    notes: tuple[str, ...] = ()
    """Fallbacks taken."""


# --- precision -----------------------------------------------------------------------------------


class KeptLayer(Value):
    """A layer that stays in a wider type than the precision asks for."""

    node: str
    """Name in the graph: the PyTorch module, a slash, the operator."""
    operator: str
    reason: Literal["range", "accuracy", "asked"]
    """``range``: its values exceed what the type can hold. ``accuracy``: the network predicts too
    differently without it. ``asked``: by the user."""
    value: float | None = None
    """``range``: the largest absolute value. ``accuracy``: KL divergence of the prediction (nats)
    when only this layer is narrowed."""


class PrecisionTrial(Value):
    """A graph that was judged on the way to the final one."""

    what: str
    kl: float | None
    """Mean KL divergence from the float32 graph (nats); ``None`` where logits are not finite."""
    agreement: Fraction
    """Of the images that get the float32 graph's class."""
    passes: bool


class PrecisionResult(Value):
    """How a graph came to its number formats, and what that did to its predictions."""

    precision: str
    layers: int
    """That could be narrowed."""
    kept: tuple[KeptLayer, ...] = ()
    calibration: str = ""
    """How int8 ranges were found, and by which quantiser."""
    tried: tuple[PrecisionTrial, ...] = ()
    """What was measured on the way, in this order."""
    images: int
    """Calibration images that it was judged on."""
    kl: float
    """Mean KL divergence from the float32 graph on them (nats)."""
    agreement: Fraction
    """Of them that get the float32 graph's class."""
    drop_limit: float
    """Largest loss of top-1 against the float32 graph that the gate allows (fraction)."""
    emulated: bool = False
    """Judged by rounding float32 results after every operator, as a GPU would: 16-bit types."""


# --- measurements --------------------------------------------------------------------------------


class Parity(Value):
    """Largest difference of logits between a reference and what it became."""

    reference: str
    candidate: str
    max_abs: float
    tolerance: float | None
    """``None`` where accuracy decides instead: a graph of reduced precision."""
    images: int
    batches: tuple[int, ...]
    """Batch sizes compared."""

    @property
    def ok(self) -> bool:
        """Within tolerance."""
        return self.tolerance is None or self.max_abs <= self.tolerance


class Accuracy(Value):
    """Top-1 with a 95 % Wilson score interval."""

    top1: Fraction
    low: Fraction
    high: Fraction
    images: int


class AccuracyChange(Value):
    """Pruned against dense on the same images."""

    dense: Accuracy
    pruned: Accuracy
    drop: float
    """dense.top1 - pruned.top1; below zero the pruned network is better."""
    low: float
    """95 % interval of the drop, paired by image."""
    high: float
    agreement: Fraction
    """Images on which both predict the same class."""


class Spread(Value):
    """What a reading ranged over."""

    min: float
    median: float
    max: float


class DeviceTimes(Value):
    """Where a call's time went on the GPU, by CUDA events on its stream (milliseconds)."""

    host_to_device_ms: tuple[float, ...]
    """Raw, in the order taken, as all three."""
    compute_ms: tuple[float, ...]
    device_to_host_ms: tuple[float, ...]
    p50_ms: float
    """Of ``compute_ms``, as are the next three: copies are not in it."""
    p90_ms: float
    p99_ms: float
    mean_ms: float
    host_to_device_p50_ms: float
    device_to_host_p50_ms: float
    clock: Literal["CUDA events"] = "CUDA events"


class GpuState(Value):
    """The GPU while it was timed, as NVML tells it; see ``measure.gpu``."""

    name: str = ""
    uuid: str = ""
    pci_bus_id: str = ""
    """Of CUDA device 0, by which NVML's device was chosen."""
    driver: str = ""
    persistence_mode: bool | None = None
    compute_mode: str = ""
    samples: int = 0
    sm_clock_mhz: Spread | None = None
    sm_clock_max_mhz: float | None = None
    """The highest that this GPU has."""
    memory_clock_mhz: Spread | None = None
    power_w: Spread | None = None
    power_limit_w: float | None = None
    temperature_c: Spread | None = None
    throttling: dict[str, int] | None = None
    """What held the clocks down -> in how many of the samples; ``None`` where NVML did not say."""
    notes: tuple[str, ...] = ()
    """What NVML did not tell, and why."""


class Latency(Value):
    """Host wall clock of one inference call, copies included; beside it what the GPU says."""

    batch: int
    samples_ms: tuple[float, ...]
    """Raw, in the order taken."""
    warmup: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    mean_ms: float
    threads: int
    provider: str
    """What really executed, asked of the runtime."""
    clock: Literal["host wall clock"] = "host wall clock"
    """Of every figure above, so that CPU and GPU targets mean the same."""
    device: DeviceTimes | None = None
    """The parts on the GPU, where the runtime records CUDA events."""
    gpu: GpuState | None = None
    """``None`` for what runs on the CPU."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """How it was measured; see ``measure.latency``. Empty in manifests of older versions."""


class TargetResult(Value):
    """One target's engine and what was measured on it."""

    engine: EngineArtifact
    parity: Parity | None = None
    accuracy: AccuracyChange | None = None
    reduced: AccuracyChange | None = None
    """From the pruned float32 network (``dense`` here) to the graph of reduced precision."""
    judged_by: str = ""
    """What ``reduced`` was measured on: the engine, or a stand-in where it does not run here."""
    latency: Latency | None = None
    dense_latency: Latency | None = None
    """The dense graph on the same runtime, interleaved with ``latency``."""

    @property
    def speedup(self) -> float | None:
        """Dense over pruned, by median."""
        if self.latency is None or self.dense_latency is None:
            return None
        return self.dense_latency.p50_ms / self.latency.p50_ms


class Device(Value):
    """The machine a measurement was taken on."""

    cpu: str
    cores: int
    memory_mib: int
    gpus: tuple[str, ...] = ()
    platform: str = ""


class Manifest(Value):
    """What a bundle holds and how it came about."""

    schema_version: Literal[1] = 1
    created: str
    """ISO 8601, UTC."""
    tool_version: str
    model: ModelSpec
    calibration: DataSpec | None
    validation: DataSpec | None
    shared_images: int = 0
    """Images in both sets; above zero only where the user allowed it."""
    ratio_requested: float
    ratio_of: RatioOf
    ratio_effective: dict[RatioOf, float]
    dense: Size
    pruned: Size
    onnx: OnnxArtifact
    export_parity: tuple[Parity, ...]
    """After export and after each graph pass."""
    torch_accuracy: AccuracyChange | None = None
    """Dense and pruned network in PyTorch."""
    targets: tuple[TargetResult, ...]
    precision: PrecisionResult | None = None
    """``None`` for float32."""
    scoring: ScoringCost | None = None
    """``None`` where nothing was measured."""
    settings: dict[str, Any]
    versions: dict[str, str]
    device: Device
    fallbacks: tuple[str, ...] = ()
    stages: dict[str, Literal["run", "reused"]] = Field(default_factory=dict)
    files: tuple[FileRef, ...] = ()


V = TypeVar("V", bound=Value)


def read_value(path: Path, kind: type[V]) -> V:
    """Read a saved value.

    Raises:
        ArtifactError: The file is absent, damaged or of another schema version.
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError as err:
        raise ArtifactError(f"{path} does not exist") from err
    except ValidationError as err:
        first = err.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        raise ArtifactError(
            f"{path} is not a {kind.__name__} of schema version {SCHEMA_VERSION}: "
            f"{where}: {first['msg']}",
            fix="build the bundle again with this version of cswap-deploy",
        ) from err
