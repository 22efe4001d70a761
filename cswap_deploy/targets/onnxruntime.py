"""ONNX Runtime, on the CPU or on an NVIDIA GPU."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

import numpy as np

from cswap_deploy.errors import ArtifactError, BuildError, StageError
from cswap_deploy.progress import Progress
from cswap_deploy.records.engine import BatchRange, EngineArtifact, EngineOptions, OnnxArtifact
from cswap_deploy.runtime.onnx_session import (
    OnnxSession,
    import_onnxruntime,
    refusals,
    require_provider,
)
from cswap_deploy.targets import Int8, check_digest


class OnnxRuntime:
    """The graph itself is the engine.

    ONNX Runtime optimises a graph when it loads it, for the processor it is on. An
    offline-optimised file would only be right for processors like the builder's, so none is
    written: the engine is the bundle's ``model.onnx``, which runs wherever ONNX Runtime does.
    """

    name = "onnxruntime"
    device: Literal["cpu", "cuda"] = "cpu"
    own_int8 = False

    def check(self, options: EngineOptions, *, int8: bool) -> None:
        """See :meth:`cswap_deploy.targets.Target.check`."""
        require_provider(self.device)

    def here(self) -> dict[str, str]:
        """Nothing: the graph is the engine."""
        return {}

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
        """Check that the runtime takes the graph, at the smallest and the largest batch.

        Args:
            onnx: Graph with a dynamic batch axis; becomes the engine as it is.
            batch: Smallest and largest batch are run once, on zeros.
            out_dir: Not used: nothing is written.
            options: Not used.
            int8: Not used: the graph's number formats are the engine's.
            progress: Not used: it takes no time.
            store: Not used.

        Returns:
            ``onnx.path`` as the engine; the time is that of loading and optimising (seconds).

        Raises:
            MissingDependencyError: onnxruntime is absent, does not load, or has no provider for
                the device.
            BuildError: The runtime refused the graph; ``err.log`` has its words.
        """
        ort = import_onnxruntime()
        start = time.perf_counter()
        try:
            session = OnnxSession(onnx.path, threads=None, device=self.device)
        except refusals() as err:
            raise BuildError(
                f"onnxruntime {ort.__version__} refused {onnx.path.name}: {err}",
                log=tuple(str(err).splitlines()),
            ) from err
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

    def load(
        self, engine: EngineArtifact, *, threads: int | None = None, onnx: Path | None = None
    ) -> OnnxSession:
        """Load the graph.

        Args:
            engine: What ``build`` returned.
            threads: Of one operator; the cores that this process may use unless said.
            onnx: Not used: the engine is the graph.

        Returns:
            A session.

        Raises:
            MissingDependencyError: onnxruntime is absent, does not load, or has no provider for
                the device.
            ArtifactError: The file is absent, altered, or refused by the runtime.
        """
        ort = import_onnxruntime()
        check_digest(engine)
        try:
            return OnnxSession(engine.path, threads=threads, device=self.device)
        except refusals() as err:
            raise ArtifactError(
                f"onnxruntime {ort.__version__} does not load {engine.path}: {err}",
                log=tuple(str(err).splitlines()),
            ) from err

    def versions(self) -> dict[str, str]:
        """The runtime's version.

        Raises:
            MissingDependencyError: onnxruntime is absent or does not load.
        """
        return {"onnxruntime": str(import_onnxruntime().__version__)}


class OnnxRuntimeCuda(OnnxRuntime):
    """The same graph on the CUDA provider; where it does not load, that is an error.

    onnxruntime falls back to the CPU without a word, even when only CUDA was asked for; the
    session asks which provider really runs.
    """

    name = "onnxruntime-cuda"
    device: Literal["cpu", "cuda"] = "cuda"
