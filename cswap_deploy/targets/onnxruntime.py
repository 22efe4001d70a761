"""ONNX Runtime, on the CPU or on an NVIDIA GPU."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

from cswap_deploy.config import BuilderOptions
from cswap_deploy.errors import ArtifactError, BuildError, own_words
from cswap_deploy.records.engine import EngineArtifact
from cswap_deploy.runtime.onnx_session import (
    OnnxSession,
    import_onnxruntime,
    refusals,
    require_provider,
)
from cswap_deploy.targets import BuildRequest, Target, read_engine, try_batches
from cswap_deploy.targets.trial import try_graph


class OnnxRuntime(Target):
    """The graph itself is the engine.

    ONNX Runtime optimises a graph when it loads it, for the processor it is on. An
    offline-optimised file would only be right for processors like the builder's, so none is
    written: the engine is the bundle's ``model.onnx``, which runs wherever ONNX Runtime does.
    """

    name = "onnxruntime"
    device: Literal["cpu", "cuda"] = "cpu"

    def check(self, options: BuilderOptions, *, int8: bool) -> None:
        """Refuse a missing provider; there are no options."""
        require_provider(self.device)

    def fingerprint(self) -> dict[str, str]:
        """The version alone: the graph is the engine."""
        return {"onnxruntime": str(import_onnxruntime().__version__)}

    def build(self, request: BuildRequest) -> EngineArtifact:
        """Run the graph once at the smallest and the largest batch, on zeros.

        Nothing is written; the build time is that of loading and optimising (seconds).
        """
        onnx, version = request.onnx, import_onnxruntime().__version__
        if self.device == "cpu":  # CUDA takes more address space than there is memory
            try_graph("onnxruntime", request)
        start = time.perf_counter()
        try:
            session = OnnxSession(onnx.path, threads=None, device=self.device)
        except refusals() as err:
            words = f"onnxruntime {version} refused {onnx.path.name}: {err}"
            raise BuildError(words, log=own_words(err)) from err
        seconds = time.perf_counter() - start
        try_batches(session, request, loads=f"onnxruntime {version} loads")
        return EngineArtifact(
            target=self.name, path=onnx.path, sha256=onnx.sha256, size_bytes=onnx.size_bytes,
            build_seconds=seconds, precision=onnx.precision, runnable=True,
            versions=self.fingerprint(), device=session.provider,
        )  # fmt: skip

    def load(
        self, engine: EngineArtifact, *, threads: int | None = None, onnx: Path | None = None
    ) -> OnnxSession:
        """Load and optimise the graph."""
        ort = import_onnxruntime()
        read_engine(engine.path, engine.sha256)
        try:
            return OnnxSession(engine.path, threads=threads, device=self.device)
        except refusals() as err:
            words = f"onnxruntime {ort.__version__} does not load {engine.path}: {err}"
            raise ArtifactError(words, log=own_words(err)) from err


class OnnxRuntimeCuda(OnnxRuntime):
    """The same graph on the CUDA provider; where it does not load, that is an error.

    onnxruntime falls back to the CPU without a word, even when only CUDA was asked for; the
    session asks which provider really runs.
    """

    name = "onnxruntime-cuda"
    device = "cuda"
