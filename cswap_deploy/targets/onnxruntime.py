"""ONNX Runtime on the CPU."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cswap_deploy.artifacts import BatchRange, EngineArtifact, OnnxArtifact
from cswap_deploy.errors import (
    ArtifactError,
    BuildError,
    MissingDependencyError,
    StageError,
    missing,
)
from cswap_deploy.measure.device import usable_cores
from cswap_deploy.targets import check_digest

PROVIDER = "CPUExecutionProvider"


class OnnxRuntime:
    """The graph itself is the engine.

    ONNX Runtime optimises a graph when it loads it, for the processor it is on. An
    offline-optimised file would only be right for processors like the builder's, so none is
    written: the engine is the bundle's ``model.onnx``, which runs wherever ONNX Runtime does.
    """

    name = "onnxruntime"

    def build(self, onnx: OnnxArtifact, *, batch: BatchRange, out_dir: Path) -> EngineArtifact:
        """Check that the runtime takes the graph, at the smallest and the largest batch.

        Args:
            onnx: Graph with a dynamic batch axis; becomes the engine as it is.
            batch: Smallest and largest batch are run once, on zeros.
            out_dir: Not used: nothing is written.

        Returns:
            ``onnx.path`` as the engine; the time is that of loading and optimising (seconds).

        Raises:
            MissingDependencyError: onnxruntime is absent, does not load, or has no CPU provider.
            BuildError: The runtime refused the graph; ``err.log`` has its words.
        """
        ort = _import()
        start = time.perf_counter()
        try:
            session = CpuSession(onnx.path, threads=None)
        except _refusals() as err:
            raise _refused(ort, onnx.path, err) from err
        seconds = time.perf_counter() - start
        shape = tuple(int(size) for size in onnx.inputs[0].shape[1:])
        for size in sorted({batch.min, batch.max}):
            try:
                session.run(np.zeros((size, *shape), dtype=np.float32))
            except StageError as err:
                raise BuildError(
                    f"onnxruntime {ort.__version__} loads {onnx.path.name} but does not run it at "
                    f"batch {size}: {err}",
                    log=err.log,
                ) from err
        return EngineArtifact(
            target=self.name,
            path=onnx.path,
            sha256=onnx.sha256,
            size_bytes=onnx.size_bytes,
            build_seconds=seconds,
            precision=onnx.precision,
            runnable=True,
            versions=self.versions(),
            device=session.provider,
        )

    def load(self, engine: EngineArtifact, *, threads: int | None = None) -> CpuSession:
        """Load the graph on the CPU.

        Args:
            engine: What ``build`` returned.
            threads: Of one operator; the cores that this process may use unless said.

        Returns:
            A session.

        Raises:
            MissingDependencyError: onnxruntime is absent, does not load, or has no CPU provider.
            ArtifactError: The file is absent, altered, or refused by the runtime.
        """
        ort = _import()
        check_digest(engine)
        try:
            return CpuSession(engine.path, threads=threads)
        except _refusals() as err:
            raise ArtifactError(
                f"onnxruntime {ort.__version__} does not load {engine.path}: {err}",
                log=tuple(str(err).splitlines()),
            ) from err

    def versions(self) -> dict[str, str]:
        """The runtime's version.

        Raises:
            MissingDependencyError: onnxruntime is absent or does not load.
        """
        return {"onnxruntime": str(_import().__version__)}


class CpuSession:
    """One graph on the CPU provider."""

    def __init__(self, path: Path, *, threads: int | None) -> None:
        ort = _import()
        self.threads = threads or usable_cores()
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 4  # what it has to say comes as an exception
        # Workers that spin while idle disturb the session timed next to this one, and on a busy
        # machine themselves: two threads, load 6 on 2 cores, ViT-Ti at 32 px: 10 ms against 2 ms.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session: Any = ort.InferenceSession(os.fspath(path), options, providers=[PROVIDER])
        self.provider: str = self._session.get_providers()[0]
        if self.provider != PROVIDER:
            raise MissingDependencyError(
                f"onnxruntime {ort.__version__} runs {path.name} on {self.provider}, "
                f"{PROVIDER} was asked for"
            )
        self._input: str = self._session.get_inputs()[0].name

    def run(self, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """(N, C, H, W) float32 -> logits (N, classes) float32."""
        try:
            logits: npt.NDArray[np.float32] = self._session.run(None, {self._input: images})[0]
        except _refusals() as err:
            words = tuple(line.strip() for line in str(err).splitlines())
            raise StageError(
                f"onnxruntime refused a batch of shape {images.shape}, {images.dtype}: "
                + " ".join(words),
                log=words,
            ) from err
        return logits


def _import() -> Any:
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as err:
        raise missing("onnxruntime", "cpu", err) from err
    return onnxruntime


def _refusals() -> tuple[type[Exception], ...]:
    """The runtime's exceptions; they share no base class but Exception."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    found = (getattr(state, name) for name in dir(state))
    return tuple(kind for kind in found if isinstance(kind, type) and issubclass(kind, Exception))


def _refused(ort: Any, path: Path, err: Exception) -> BuildError:
    return BuildError(
        f"onnxruntime {ort.__version__} refused {path.name}: {err}",
        log=tuple(str(err).splitlines()),
    )
