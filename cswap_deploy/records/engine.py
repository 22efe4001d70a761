"""Graphs and engines: what was built, for which batches, with which options."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from cswap_deploy.config import BuilderOptions
from cswap_deploy.records.value import Count, Digest, Value
from cswap_deploy.settings import BatchRange


class TensorSpec(Value):
    """One input or output. A dimension is a size, or a name where it is dynamic."""

    name: str
    dtype: str
    """NumPy's name, for example ``float32``."""
    shape: tuple[int | str, ...]


class OnnxArtifact(Value):
    """A self-contained ONNX file."""

    path: Path
    sha256: Digest
    size_bytes: Count
    opset: Count
    nodes: Count
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    precision: str = "fp32"
    notes: tuple[str, ...] = ()


class EngineArtifact(Value):
    """What a target made of the graph."""

    target: str
    path: Path
    sha256: Digest
    size_bytes: Count
    build_seconds: float
    precision: str
    runnable: bool
    """Whether this machine can execute it."""
    reason: str = ""
    """Why not, when it cannot."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Versions of the runtime and of what it links."""
    device: str = ""
    """What it was built for: provider, GPU, compute capabilities."""
    batch: BatchRange | None = None
    """What it accepts; ``None`` where any batch runs."""
    options: BuilderOptions | None = None
    """What its builder was told; ``None`` where the runtime has no such options."""
    compute_capability: str = ""
    """The GPU's that the engine was built on; empty where it is not bound to one."""
    stripped: bool = False
    """Without weights; see ``BuilderOptions.strip_weights``."""
    extra_files: tuple[str, ...] = ()
    """Files beside ``path`` that belong to it, by name, for example ``layers.json``."""
    notes: tuple[str, ...] = ()
    """Fallbacks taken."""
