"""The runtimes that a graph is built for: one file each, found through one table."""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, cast

import numpy as np

from cswap_deploy.config import BuilderOptions
from cswap_deploy.errors import BuildError, StageError, UsageError
from cswap_deploy.export.child import ChildLimits
from cswap_deploy.progress import Progress, Silent
from cswap_deploy.records.engine import EngineArtifact, OnnxArtifact
from cswap_deploy.runtime.bundle import read_verified
from cswap_deploy.runtime.session import Floats, Session
from cswap_deploy.settings import BatchRange

MOST_INT8_IMAGES = 300
"""Calibration images that a runtime with ``own_int8`` gets; NNCF's own default."""


@dataclass(frozen=True, slots=True)
class Int8:
    """What a runtime with ``own_int8`` needs to quantise a float32 graph."""

    images: Floats
    """(N, C, H, W), normalised, for the ranges of activations."""
    keep_fp32: tuple[str, ...] = ()
    """Modules, or patterns of ONNX nodes, that stay in float32."""


@dataclass(frozen=True, slots=True)
class BuildRequest:
    """An engine that is to be built."""

    onnx: OnnxArtifact
    """Simplified graph with a dynamic batch axis; its dtypes are the engine's."""
    batch: BatchRange
    """Smallest, tuned-for and largest batch (samples)."""
    out_dir: Path
    """Existing folder, owned by the caller."""
    options: BuilderOptions = field(default_factory=BuilderOptions)
    """For TensorRT's builders; other runtimes have none of these."""
    int8: Int8 | None = None
    """The engine is to be quantised. Only where the target has ``own_int8``."""
    progress: Progress = field(default_factory=Silent)
    """Told of the builder's steps."""
    trial: ChildLimits | None = None
    """What a first load may take, in a process of its own; without: there is none."""
    store: Path | None = None
    """Root of the store, for what saves time in later builds; by default the user's."""


class Target(Protocol):
    """A runtime: builds engines, and loads them where this machine can run them."""

    name: str
    own_int8: bool = False
    """Takes the float32 graph for int8 too, and quantises it itself."""

    def check(self, options: BuilderOptions, *, int8: bool) -> None:
        """Refuse what :meth:`build` would refuse for any graph; ``int8``: it is to quantise.

        Raises:
            UsageError: The runtime does not have one of the options.
            MissingDependencyError: The runtime, or a device that it builds on, is not there.
        """
        ...

    def fingerprint(self) -> dict[str, str]:
        """For keys in the store: versions, and what of this machine shapes an engine.

        Raises:
            MissingDependencyError: The runtime is absent or does not load.
        """
        ...

    def build(self, request: BuildRequest) -> EngineArtifact:
        """Build the runtime's engine from a graph.

        Raises:
            UsageError: The runtime does not have one of the options.
            MissingDependencyError: The runtime is absent or does not load.
            BuildError: The runtime refused the graph; ``err.log`` has its words.
        """
        ...

    def load(
        self, engine: EngineArtifact, *, threads: int | None = None, onnx: Path | None = None
    ) -> Session:
        """Load an engine.

        Args:
            engine: From :meth:`build`.
            threads: Threads of a CPU runtime; by default the process's cores.
            onnx: The graph that it was built from, where a stripped engine finds its weights.

        Raises:
            MissingDependencyError: The runtime or the device is not there.
            ArtifactError: A file is absent or altered, or the runtime cannot read it.
        """
        ...

    def check_ops(self, onnx: Path) -> tuple[str, ...]:
        """The parser's errors on a graph; empty where all is supported. Nothing is built.

        Raises:
            UsageError: The runtime has no parser to ask.
            MissingDependencyError: The runtime is absent or does not load.
            ArtifactError: The file cannot be read.
        """
        raise UsageError(
            f"{self.name} has no parser to ask", fix="--target tensorrt-rtx, or --target tensorrt"
        )


TARGETS: dict[str, str] = {
    "onnxruntime": "cswap_deploy.targets.onnxruntime:OnnxRuntime",
    "onnxruntime-cuda": "cswap_deploy.targets.onnxruntime:OnnxRuntimeCuda",
    "openvino": "cswap_deploy.targets.openvino:OpenVino",
    "tensorrt-rtx": "cswap_deploy.targets.tensorrt_rtx:TensorRtRtx",
    "tensorrt": "cswap_deploy.targets.tensorrt:TensorRt",
}


def get_target(name: str) -> Target:
    """The target of a name.

    Raises:
        UsageError: There is no such target.
    """
    if name not in TARGETS:
        raise UsageError(f"unknown target {name!r}; known: {', '.join(TARGETS)}")
    return cast(Target, pkgutil.resolve_name(TARGETS[name])())


def check_operators(graph: Path, targets: list[str]) -> None:
    """Ask the targets' parsers whether they support a graph; nothing is built.

    Raises:
        BuildError: One of them does not; the message has its words.
        UsageError: A target is unknown, or has no parser to ask.
    """
    problems = [f"{name}: {line}" for name in targets for line in get_target(name).check_ops(graph)]
    if problems:
        raise BuildError(f"{graph} is not supported:\n  " + "\n  ".join(problems))


def build_and_load(target: Target, request: BuildRequest, *, threads: int | None) -> Session:
    """An engine that only this process needs."""
    return target.load(target.build(request), threads=threads, onnx=request.onnx.path)


def read_engine(path: Path, sha256: str) -> bytes:
    """A file of an engine, if its digest is the one that the build recorded.

    Raises:
        ArtifactError: The file is absent or differs.
    """
    return read_verified(path, sha256, fix="build the bundle again")


def try_batches(session: Session, request: BuildRequest, *, loads: str) -> None:
    """Run a new engine once at its smallest and its largest batch, on zeros.

    ``loads`` begins the error, for example ``onnxruntime 1.22 loads``.

    Raises:
        BuildError: It refused a batch; ``err.log`` has its words.
    """
    onnx = request.onnx
    shape = tuple(int(size) for size in onnx.inputs[0].shape[1:])
    for size in sorted({request.batch.min, request.batch.max}):
        try:
            session.run(np.zeros((size, *shape), dtype=np.float32))
        except StageError as err:
            raise BuildError(
                f"{loads} {onnx.path.name} but does not run it at batch {size}: {err}", log=err.log
            ) from err
