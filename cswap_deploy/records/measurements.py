"""What was measured. Latency is in milliseconds, accuracy a fraction."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from cswap_deploy.records.samples import Samples
from cswap_deploy.records.value import Fraction, Value


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
    """Fraction of the images that get the float32 graph's class."""
    passes: bool


class PrecisionResult(Value):
    """How a graph came to its number formats, and what that did to its predictions."""

    precision: str
    layers: int
    """Layers that could be narrowed."""
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
    """Fraction of them that get the float32 graph's class; without classes, whose outputs change by
    no more than the limit."""
    drop_limit: float
    """Largest loss of top-1 against the float32 graph that the gate allows (fraction); without
    classes, largest squared change over squared size."""
    by_outputs: bool = False
    """Whether outputs were compared because there are no classes: ``kl`` is then the mean squared
    change over squared size."""
    emulated: bool = False
    """Judged by rounding float32 results after every operator, as a GPU would: 16-bit types."""


class Parity(Value):
    """Largest difference of outputs between a reference and what it became."""

    reference: str
    candidate: str
    max_abs: float
    tolerance: float | None
    """``None`` where accuracy decides instead: a graph of reduced precision."""
    images: int
    batches: tuple[int, ...]
    """Batch sizes compared."""
    relative: bool = False
    """Whether ``max_abs`` is divided by the output's largest value where that is above one; logits
    of classes are not."""

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
    calibration_error: Fraction | None = None
    """Expected, over fifteen bins of confidence; ``None`` in manifests of older versions."""


Verdict = Literal["above", "at", "few"]
"""Top-1 against guessing: better, no better, or too few images to tell."""


class DenseCheck(Value):
    """The dense network's top-1 on the first images of a set, before anything is removed."""

    part: Literal["calibration", "validation"]
    right: int
    """Images that it predicts right."""
    images: int
    classes: int
    """Distinct labels among the images."""
    verdict: Verdict
    reordered: float | None = None
    """Top-1 (fraction) with its classes in another order, where that says something."""

    @property
    def words(self) -> str:
        """The check in a sentence."""
        text = (
            f"the dense network is right on {self.right} of {self.images} {self.part} images "
            f"({self.right / self.images:.1%}), guessing among their {self.classes} classes on "
            f"{1 / self.classes:.1%}"
        )
        if self.verdict == "few":
            return f"{text}: too few images to tell the two apart"
        if self.verdict == "at" and self.reordered is not None:
            text += f"; with its classes in another order it would be right on {self.reordered:.1%}"
        return text


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
    p_value: Fraction | None = None
    """McNemar's exact test that both are right equally often; ``None`` in older manifests."""


class Agreement(Value):
    """How alike two classifiers predict, whatever the labels."""

    share: Fraction
    """Of the images, that get the same class from both."""
    low: Fraction
    """95 % Wilson score interval."""
    high: Fraction
    kl: float | None
    """Mean KL divergence from the first one's prediction (nats); ``None`` where there are too many
    classes and images to keep it."""
    images: int


class OutputError(Value):
    """What changed in one output of a network."""

    name: str
    error_db: float | None
    """10 log10(||o||^2 / ||o - o*||^2), over all images; ``None`` where nothing changed, or the
    output is of integers."""
    agreement: Fraction | None = None
    """Share of the decisions that stay, where the output decides something."""


class OutputChange(Value):
    """The outputs of two networks on the same images."""

    outputs: tuple[OutputError, ...]
    images: int

    @property
    def worst_db(self) -> float | None:
        """The least of the errors; ``None`` where nothing changed."""
        return min((o.error_db for o in self.outputs if o.error_db is not None), default=None)


class MetricChange(Value):
    """The user's own figure, in PyTorch."""

    name: str
    """``package.module:function``."""
    dense: float
    pruned: float


class Spread(Value):
    """What a reading ranged over."""

    min: float
    median: float
    max: float


class DeviceTimes(Value):
    """Where a call's time went on the GPU, by CUDA events on its stream (milliseconds)."""

    host_to_device_ms: Samples
    """Raw, in the order taken, as all three."""
    compute_ms: Samples
    device_to_host_ms: Samples
    p50_ms: float
    """Median of ``compute_ms``; the next three are of it too: copies are not counted."""
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
    """Bus address of CUDA device 0, by which NVML's device was chosen."""
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
    samples_ms: Samples
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
    """Clock of every figure above, so that CPU and GPU targets mean the same."""
    device: DeviceTimes | None = None
    """The parts on the GPU, where the runtime records CUDA events."""
    gpu: GpuState | None = None
    """``None`` for what runs on the CPU."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """How it was measured; see ``measure.latency``. Empty in manifests of older versions."""


class Device(Value):
    """The machine a measurement was taken on."""

    cpu: str
    cores: int
    memory_mib: int
    gpus: tuple[str, ...] = ()
    platform: str = ""
