"""Graphs and engines: what was built, for which batches, with which options."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from cswap_deploy.records.value import Value


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
