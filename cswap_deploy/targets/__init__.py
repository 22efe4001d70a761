"""The runtimes that a graph is built for: one file each, found through one table."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from cswap_deploy.errors import ArtifactError, UsageError
from cswap_deploy.progress import Progress
from cswap_deploy.records.engine import BatchRange, EngineArtifact, EngineOptions, OnnxArtifact
from cswap_deploy.records.value import sha256_file

Images = npt.NDArray[np.float32]


MOST_INT8_IMAGES = 300
"""That a runtime with ``own_int8`` gets; NNCF's own default."""


@dataclass(frozen=True, slots=True)
class Int8:
    """What a runtime with ``own_int8`` needs to quantise a float32 graph."""

    images: Images
    """(N, C, H, W), normalised, for the ranges of activations."""
    keep_fp32: tuple[str, ...] = ()
    """Modules, or patterns of ONNX nodes, that stay as they are."""


class Session(Protocol):
    """An engine that is loaded and ready to run."""

    provider: str
    """What really executes, asked of the runtime."""
    threads: int

    def run(self, images: Images) -> npt.NDArray[np.float32]:
        """(N, C, H, W) float32 -> logits (N, classes) float32."""
        ...


class Target(Protocol):
    """A runtime: makes engines, and loads them where this machine can run them."""

    name: str
    own_int8: bool
    """Takes the float32 graph for int8 too, and calibrates and quantises by itself."""

    def check(self, options: EngineOptions, *, int8: bool) -> None:
        """Refuse what :meth:`build` would refuse whatever the graph, before any work.

        Args:
            options: For the builder.
            int8: The runtime will be asked to quantise.

        Raises:
            UsageError: The runtime does not have one of the options.
            MissingDependencyError: The runtime, or a device that it builds on, is not there.
        """
        ...

    def here(self) -> dict[str, str]:
        """What of this machine shapes an engine, or decides whether it runs; for cache keys."""
        ...

    def build(
        self,
        onnx: OnnxArtifact,
        *,
        batch: BatchRange,
        out_dir: Path,
        options: EngineOptions | None = None,
        int8: Int8 | None = None,
        progress: Progress | None = None,
        store: Path | None = None,
    ) -> EngineArtifact:
        """Make the runtime's engine from a graph.

        Args:
            onnx: Simplified graph with a dynamic batch axis; its dtypes are the engine's.
            batch: Smallest, tuned-for and largest batch (samples).
            out_dir: Existing folder, owned by the caller.
            options: For TensorRT's builders; other runtimes have none of these.
            int8: The engine is to be quantised. Only where ``own_int8``.
            progress: Told of the builder's steps.
            store: Root of the store, for what saves time in later builds; the user's unless said.

        Returns:
            The engine, with ``runnable`` and, where false, the reason.

        Raises:
            MissingDependencyError: The runtime is absent or does not load.
            BuildError: The runtime refused the graph; ``err.log`` has its words.
        """
        ...

    def load(
        self, engine: EngineArtifact, *, threads: int | None, onnx: Path | None = None
    ) -> Session:
        """Load an engine.

        Args:
            engine: What ``build`` returned.
            threads: Of a CPU runtime; the cores that this process may use unless said.
            onnx: The graph that it was built from, where a stripped engine finds its weights.

        Returns:
            A session.

        Raises:
            MissingDependencyError: The runtime or the device is not there.
            ArtifactError: The file's digest is not the engine's, or the runtime cannot read it.
        """
        ...

    def versions(self) -> dict[str, str]:
        """Versions of what affects the engine, for cache keys.

        Raises:
            MissingDependencyError: The runtime is absent or does not load.
        """
        ...


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
    module, _, attribute = TARGETS[name].partition(":")
    factory: Any = getattr(importlib.import_module(module), attribute)
    return cast(Target, factory())


def check_digest(engine: EngineArtifact) -> None:
    """Compare an engine's file with the digest that its build recorded.

    Raises:
        ArtifactError: The file is absent or differs.
    """
    try:
        found = sha256_file(engine.path)
    except OSError as err:
        raise ArtifactError(f"cannot read {engine.path}: {err.strerror or err}") from err
    if found != engine.sha256:
        raise ArtifactError(
            f"{engine.path} is not the file that was built: sha256 {found[:12]}…, "
            f"recorded {engine.sha256[:12]}…",
            fix="build the bundle again",
        )
