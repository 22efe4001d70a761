"""TensorRT 10, TensorRT 11 and TensorRT for RTX: three packages with nearly one API.

Where they differ stands in one table, :data:`cswap_deploy.targets.tensorrt_flavours.FLAVOURS`.
No type, flag or method that one of them lacks is used without asking the table first; the tests
compare every name that is used with the official bindings' own.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from cswap_deploy.config import BuilderOptions
from cswap_deploy.errors import ArtifactError, MissingDependencyError
from cswap_deploy.measure.device import list_gpus
from cswap_deploy.records.engine import EngineArtifact, OnnxArtifact
from cswap_deploy.records.value import sha256_file
from cswap_deploy.runtime.bundle import EngineFile
from cswap_deploy.runtime.host import compute_capability, cuda_problem
from cswap_deploy.runtime.session import Session
from cswap_deploy.runtime.tensorrt_session import MODULES, TensorRtSession, import_tensorrt
from cswap_deploy.targets import BuildRequest, Target, read_engine
from cswap_deploy.targets.tensorrt_builder import EngineBuilder, read_file
from cswap_deploy.targets.tensorrt_flavours import Flavour, check_options, flavour_of

LAYERS = "layers.json"


class TensorRt(Target):
    """An engine for the GPU of the machine that builds it. TensorRT 10 and 11."""

    name = "tensorrt"

    def check(self, options: BuilderOptions, *, int8: bool) -> None:
        """Refuse options that the package lacks, and a missing GPU where its builder needs one."""
        trt, flavour, what = self._package()
        check_options(trt, flavour, options, what=what)
        problem = cuda_problem()
        if problem and flavour.needs_gpu:
            raise MissingDependencyError(
                f"{what} builds its engines on the GPU: {problem}",
                fix="build on the device, or use --target tensorrt-rtx, which needs no GPU",
            )

    def fingerprint(self) -> dict[str, str]:
        """The version and the GPU; an engine that is built ahead of time runs on some GPUs only."""
        return {
            self.name: str(import_tensorrt(*MODULES[self.name]).__version__),
            "problem": cuda_problem(),
            "compute_capability": compute_capability(),
            "gpus": ", ".join(list_gpus()),
        }

    def build(self, request: BuildRequest) -> EngineArtifact:
        """Compile the graph; the dtypes in the graph are the dtypes of the engine.

        The batch range is one optimisation profile. Beside the engine, ``layers.json`` holds its
        inputs, outputs, profile and layers. Ctrl-C ends the build at the builder's next step.

        Source:
            TensorRT documentation, "Python API"; "Working with Dynamic Shapes"; "Strongly Typed
            Networks".
        """
        options, onnx = request.options, request.onnx
        self.check(options, int8=False)
        trt, flavour, what = self._package()
        problem, capability = cuda_problem(), compute_capability()
        named, reason = options.compute_capability, problem
        if not problem and named and capability not in named:
            reason = f"built for compute capability {', '.join(named)}, this GPU has {capability}"
        start = time.perf_counter()
        builder = EngineBuilder(trt, name=what, flavour=flavour)
        plan, layers = builder.compile(request, capability=capability)
        seconds = time.perf_counter() - start
        path = request.out_dir / _file_name(str(trt.__version__), flavour, onnx, capability)
        path.write_bytes(plan)
        if not problem:
            layers |= builder.inspect(plan, version_compatible=options.version_compatible)
        (request.out_dir / LAYERS).write_text(json.dumps(layers, indent=1))
        bound = not flavour.compute_capabilities and options.hardware_compat != "ampere+"
        return EngineArtifact(
            target=self.name, path=path, sha256=sha256_file(path), size_bytes=path.stat().st_size,
            build_seconds=seconds, precision=onnx.precision, runnable=not reason, reason=reason,
            versions={self.name: str(trt.__version__)}, device=_device(flavour, options),
            batch=request.batch, options=options, compute_capability=capability if bound else "",
            stripped=options.strip_weights, extra_files=(LAYERS,),
            notes=tuple(f"{self.name} warns: {words}" for words in builder.warnings),
        )  # fmt: skip

    def load(
        self, engine: EngineArtifact, *, threads: int | None = None, onnx: Path | None = None
    ) -> Session:
        """Deserialise the engine on this machine's GPU."""
        plan = read_engine(engine.path, engine.sha256)
        weights = None
        if engine.stripped:
            if onnx is None:
                raise ArtifactError(f"{engine.path} is without weights: its graph is needed too")
            weights = read_file(onnx)
        file = EngineFile(
            target=self.name, path=str(engine.path), version=engine.versions[self.name],
            compute_capability=engine.compute_capability, stripped=engine.stripped,
            version_compatible=engine.options is not None and engine.options.version_compatible,
        )  # fmt: skip
        return TensorRtSession(plan, file, weights=weights)

    def check_ops(self, onnx: Path) -> tuple[str, ...]:
        """The parser's errors, each with the node and its PyTorch module; no GPU is needed."""
        trt, flavour, what = self._package()
        return EngineBuilder(trt, name=what, flavour=flavour).unsupported(onnx)

    def _package(self) -> tuple[Any, Flavour, str]:
        """The package, its row of the table, and both names for errors."""
        module, extra = MODULES[self.name]
        trt = import_tensorrt(module, extra)
        return trt, flavour_of(module, trt), f"{self.name} {trt.__version__}"


def _device(flavour: Flavour, options: BuilderOptions) -> str:
    if not flavour.compute_capabilities:
        return ", ".join(list_gpus())
    wanted = ", ".join(options.compute_capability) or "8.0, 8.6, 8.9, 12.0 and later"
    return f"built ahead of time for compute capability {wanted}"


def _file_name(version: str, flavour: Flavour, onnx: OnnxArtifact, capability: str) -> str:
    if flavour.compute_capabilities:
        return "model.engine"
    gpus = list_gpus()
    gpu = gpus[0].partition(" (")[0].replace(" ", "-").lower() if gpus else "gpu"
    return f"{gpu}-sm{capability.replace('.', '')}-trt{version}-{onnx.precision}.plan"
