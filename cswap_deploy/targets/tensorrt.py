"""TensorRT, and what it shares with TensorRT for RTX: both Python packages have one API.

This version builds engines and does not run them.
"""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import Any, NoReturn

from cswap_deploy.artifacts import (
    BatchRange,
    EngineArtifact,
    OnnxArtifact,
    sha256_file,
)
from cswap_deploy.errors import (
    ArtifactError,
    BuildError,
    MissingDependencyError,
    UsageError,
    missing,
)
from cswap_deploy.measure.device import cuda_problem, list_gpus
from cswap_deploy.targets import Session, check_digest

_NOT_RUN = "this version of cswap-deploy builds {name} engines and does not run them"


class TensorRt:
    """An engine for the GPU of the machine that builds it. TensorRT 10 and 11."""

    name = "tensorrt"
    module = "tensorrt"
    extra = "trt"
    file_name = "model.plan"
    needs_gpu = True

    def build(self, onnx: OnnxArtifact, *, batch: BatchRange, out_dir: Path) -> EngineArtifact:
        """Compile the graph; the dtypes in the graph are the dtypes of the engine.

        Args:
            onnx: Simplified graph with a dynamic batch axis.
            batch: Smallest, tuned-for and largest batch (samples): one optimisation profile.
            out_dir: Existing folder; ``model.plan`` or ``model.engine`` is written there.

        Returns:
            The engine; not runnable, with the reason.

        Raises:
            UsageError: The batches are not in ascending order.
            MissingDependencyError: The package is absent or does not load, or there is no GPU and
                the builder needs one.
            BuildError: The parser or the builder refused the graph; ``err.log`` has its words.

        Source:
            TensorRT documentation, "Python API"; "Working with Dynamic Shapes"; "Strongly Typed
            Networks".
        """
        if not 1 <= batch.min <= batch.opt <= batch.max:
            raise UsageError(
                f"batches must ascend from 1: min {batch.min}, opt {batch.opt}, max {batch.max}"
            )
        trt = self._import()
        problem = cuda_problem()
        if problem and self.needs_gpu:
            raise MissingDependencyError(
                f"{self.name} {trt.__version__} builds its engines on the GPU: {problem}",
                fix="build on the device, or use --target tensorrt-rtx, which needs no GPU",
            )
        logger = _make_logger(trt)
        start = time.perf_counter()
        plan = self._compile(trt, logger, onnx, batch)
        seconds = time.perf_counter() - start
        path = out_dir / self.file_name
        path.write_bytes(plan)
        return EngineArtifact(
            target=self.name,
            path=path,
            sha256=sha256_file(path),
            size_bytes=path.stat().st_size,
            build_seconds=seconds,
            precision=onnx.precision,
            runnable=False,
            reason=problem or _NOT_RUN.format(name=self.name),
            versions=self.versions(),
            device=self._device(),
            notes=tuple(f"{self.name} warns: {words}" for words in logger.warnings),
        )

    def load(self, engine: EngineArtifact, *, threads: int | None = None) -> Session:
        """Refuse, with the reason: engines of this target are not run by this version.

        Args:
            engine: What ``build`` returned.
            threads: Not used.

        Raises:
            MissingDependencyError: There is no GPU or no driver, or running is not part of this
                version.
            ArtifactError: The engine's file is absent or altered.
        """
        check_digest(engine)
        problem = cuda_problem() or _NOT_RUN.format(name=self.name)
        raise MissingDependencyError(
            f"{engine.path.name} ({self.name}) cannot run here: {problem}",
            fix="run it with NVIDIA's tools on the device, or measure with --target onnxruntime",
        )

    def versions(self) -> dict[str, str]:
        """The package's version.

        Raises:
            MissingDependencyError: The package is absent or does not load.
        """
        return {self.name: str(self._import().__version__)}

    def _device(self) -> str:
        return ", ".join(list_gpus())

    def _import(self) -> Any:
        try:
            return importlib.import_module(self.module)
        except ImportError as err:
            raise missing(self.module, self.extra, err) from err
        except (OSError, RuntimeError) as err:  # a library of NVIDIA's that does not load
            raise missing(self.module, self.extra, ImportError(str(err))) from err

    def _compile(self, trt: Any, logger: Any, onnx: OnnxArtifact, batch: BatchRange) -> bytes:
        try:
            builder = trt.Builder(logger)
        except TypeError as err:  # how pybind11 reports that the library made none
            words = logger.errors[0] if logger.errors else str(err)
            raise MissingDependencyError(
                f"{self.name} {trt.__version__} makes no builder: {words}"
            ) from err
        # TensorRT 11 has strong typing only and may lose the flag; 10 must be told.
        typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        network = builder.create_network(0 if typed is None else 1 << int(typed))
        parser = trt.OnnxParser(network, logger)
        try:
            graph = onnx.path.read_bytes()
        except OSError as err:
            raise ArtifactError(f"cannot read {onnx.path}: {err.strerror or err}") from err
        if not parser.parse(graph):
            self._refuse_graph(trt, onnx, [parser.get_error(i) for i in range(parser.num_errors)])
        config = builder.create_builder_config()
        profile = builder.create_optimization_profile()
        tensor = network.get_input(0)
        rest = tuple(tensor.shape)[1:]
        shapes = [(size, *rest) for size in (batch.min, batch.opt, batch.max)]
        profile.set_shape(tensor.name, *shapes)
        config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            words = logger.errors[0] if logger.errors else "no reason given"
            raise BuildError(
                f"{self.name} {trt.__version__} built no engine from {onnx.path.name} "
                f"(batch {batch.min}/{batch.opt}/{batch.max}): {words}",
                log=tuple(logger.errors + logger.warnings),
            )
        return bytes(plan)

    def _refuse_graph(self, trt: Any, onnx: OnnxArtifact, errors: list[Any]) -> NoReturn:
        words = "no reason given"
        if errors:
            first, more = errors[0], len(errors) - 1
            at = f"node {first.node_name()!r} ({first.node_operator()}): "
            words = (at if first.node() >= 0 else "") + first.desc()
            words += f" (and {more} more)" if more else ""
        raise BuildError(
            f"the parser of {self.name} {trt.__version__} refused {onnx.path.name}: {words}",
            log=tuple(str(error) for error in errors),
        )


def _make_logger(trt: Any) -> Any:
    """A logger that keeps errors and warnings and prints nothing."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(message)
            elif severity == trt.ILogger.Severity.WARNING:
                self.warnings.append(message)

    return Log()
