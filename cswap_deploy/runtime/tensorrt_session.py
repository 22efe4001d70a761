"""A TensorRT engine on this device: pinned buffers, one stream, CUDA graphs where asked for.

Needs the package that built the engine (``tensorrt`` or ``tensorrt_rtx``) and ``pycuda``.
"""

from __future__ import annotations

import importlib
import weakref
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from cswap_deploy.errors import ArtifactError, MissingDependencyError, StageError, missing
from cswap_deploy.runtime.bundle import EngineFile
from cswap_deploy.runtime.cuda import CudaGraph, import_pycuda, take_gpu
from cswap_deploy.runtime.host import compute_capability, cuda_problem
from cswap_deploy.runtime.session import CallTimes, Floats, Outputs, Session

MODULES = {"tensorrt": ("tensorrt", "trt"), "tensorrt-rtx": ("tensorrt_rtx", "trt-rtx")}
"""Target -> its Python package, and the extra of cswap-deploy that installs it."""
_DTYPES = {
    "FLOAT": np.float32, "HALF": np.float16, "INT32": np.int32, "INT64": np.int64,
    "BOOL": np.bool_,
}  # fmt: skip
"""TensorRT's types of outputs, as NumPy's."""


@dataclass(frozen=True)
class _Output:
    """Buffers of one output."""

    host: Any
    """(largest batch, ...), pinned."""
    device: Any
    batched: bool
    """Whether it has one row an image."""

    def part(self, size: int) -> Any:
        """What a batch of ``size`` fills."""
        return self.host[:size] if self.batched else self.host

    def read(self, size: int) -> npt.NDArray[Any]:
        """A copy of that."""
        return np.array(self.part(size))


class TensorRtSession(Session):
    """One engine, loaded and ready to run.

    Source:
        TensorRT documentation, "Performing Inference"; "CUDA Graphs". TensorRT-RTX documentation,
        "Working with RTX CUDA Graphs".
    """

    threads = 1
    on_gpu = True

    def __init__(
        self, plan: bytes, file: EngineFile, *, weights: bytes | None = None,
        cuda_graph: bool = False,
    ) -> None:  # fmt: skip
        """Check that the engine fits this device, then deserialise it.

        Args:
            plan: The engine's bytes, whose digest the caller has checked.
            file: Target, version and GPU that the engine was built for.
            weights: The ONNX model that a stripped engine takes its weights from, also checked.
            cuda_graph: Capture the engine's work when the batch's size changes, and replay it.

        Raises:
            MissingDependencyError: The package, pycuda, the driver or the GPU is not there, or the
                GPU's memory does not suffice.
            ArtifactError: The engine is for another version or GPU, or is damaged.
        """
        self._trt = trt = import_tensorrt(*MODULES[file.target])
        self._name = f"{file.target} {trt.__version__}"
        here = _require_fit(str(trt.__version__), file)
        self._driver = import_pycuda()
        self._context = take_gpu(self._driver)
        # pycuda aborts a process that ends with a context current: this pops it then, or earlier,
        # when the session goes.
        self._give_back = weakref.finalize(self, self._context.pop)
        # RTX knows best when its kernels are final, and captures by itself.
        self._wanted_graph = cuda_graph and not hasattr(trt, "CudaGraphStrategy")
        self._graph: tuple[int, CudaGraph] | None = None
        self._log = make_logger(trt)
        try:
            self._engine = self._deserialise(plan, file)
            if weights is not None:
                self._refit(weights)
            self._execution = self._make_execution(cuda_graph)
            self._allocate()
        except BaseException:
            self.close()
            raise
        self.provider = f"{self._name}, {self._driver.Device(0).name()} (sm {here})"
        if cuda_graph:
            self.provider += ", CUDA graph"
        self.settings = {
            "input": self._input,
            "streams": 1,
            "cuda_graph": cuda_graph,
            "transfers": True,
            "host_memory": "pinned",
            # The context's flags are the default ones: the driver spins where there are more
            # processors than contexts; on some Tegra boards it blocks.
            "synchronisation": "automatic",
        }

    def _deserialise(self, plan: bytes, file: EngineFile) -> Any:
        try:
            self._runtime = self._trt.Runtime(self._log)
        except TypeError as err:  # how pybind11 reports that the library made none
            raise MissingDependencyError(
                f"{self._name} does not start: {self._log.words()}",
                fix="a newer NVIDIA driver may be needed; model.onnx runs as it is",
                log=tuple(self._log.errors),
            ) from err
        if file.version_compatible:
            self._runtime.engine_host_code_allowed = True
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise ArtifactError(
                f"{self._name} does not load the engine: {self._why_not(plan)}",
                fix="build the bundle again on this device; its model.onnx runs as it is",
                log=tuple(self._log.errors),
            )
        return engine

    def _allocate(self) -> None:
        """Buffers for the largest batch, pinned and on the device."""
        driver, engine, mode = self._driver, self._engine, self._trt.TensorIOMode
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self._input = next(n for n in names if engine.get_tensor_mode(n) == mode.INPUT)
        outputs = [n for n in names if engine.get_tensor_mode(n) == mode.OUTPUT]
        smallest, _, largest = engine.get_tensor_profile_shape(self._input, 0)
        self.batch_min, self.batch_max = int(smallest[0]), (most := int(largest[0]))
        self._shape = tuple(int(size) for size in tuple(largest)[1:])
        try:
            self._stream = driver.Stream()
            self._events = [driver.Event() for _ in range(4)]
            self._host_in = driver.pagelocked_empty((most, *self._shape), np.float32)
            self._device_in = driver.mem_alloc(self._host_in.nbytes)
            self._outputs = {name: self._output(name, most) for name in outputs}
        except driver.MemoryError as err:
            raise MissingDependencyError(
                f"the GPU has no memory for a batch of {most}: {err}",
                fix="free GPU memory, or build with a smaller largest batch (--batch)",
            ) from err
        self._execution.set_tensor_address(self._input, int(self._device_in))
        for name, output in self._outputs.items():
            self._execution.set_tensor_address(name, int(output.device))

    def _output(self, name: str, most: int) -> _Output:
        """Room for the largest batch of an output."""
        first, *rest = (int(size) for size in tuple(self._engine.get_tensor_shape(name)))
        kind = _DTYPES.get(self._engine.get_tensor_dtype(name).name)
        if kind is None:
            raise ArtifactError(f"output {name} of the engine has a type that is not read here")
        # The batch is the profile's, or the only one that it allows.
        batched = first in (-1, most)
        host = self._driver.pagelocked_empty((most if batched else first, *rest), kind)
        return _Output(host, self._driver.mem_alloc(host.nbytes), batched)

    def run(self, images: Floats) -> Floats:
        """One call, copies included; the logits are the caller's own."""
        size = self._call(images)
        return self._first(size)

    def named(self, images: Floats) -> Outputs:
        """One call; every output is the caller's own."""
        size = self._call(images)
        return {name: output.read(size) for name, output in self._outputs.items()}

    def timed(self, images: Floats) -> tuple[Floats, CallTimes]:
        """As :meth:`run`, and how long each part took on the device."""
        size = self._call(images)
        steps = [after.time_since(before) for before, after in pairwise(self._events)]
        return self._first(size), CallTimes(*(float(step) for step in steps))

    def profile(self, into: dict[str, list[float]]) -> str:
        """Have every call append what its layers took, ms, and wait for the GPU.

        Returns:
            What the engine's inspector tells of the layers, in JSON.
        """
        trt: Any = self._trt

        class Profiler(trt.IProfiler):  # type: ignore[misc]
            def report_layer_time(self, layer_name: str, ms: float) -> None:
                into.setdefault(layer_name, []).append(float(ms))

        self._execution.profiler = Profiler()
        inspector = self._engine.create_engine_inspector()
        return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))

    def _first(self, size: int) -> Floats:
        return next(iter(self._outputs.values())).read(size)

    def close(self) -> None:
        """Give the GPU back."""
        self._give_back()

    def _call(self, images: Floats) -> int:
        """Leave the outputs in pinned memory; the size of the batch."""
        size = self._check(images)
        driver, stream = self._driver, self._stream
        self._execution.set_input_shape(self._input, (size, *self._shape))
        self._host_in[:size] = images
        try:
            self._events[0].record(stream)
            driver.memcpy_htod_async(self._device_in, self._host_in[:size], stream)
            self._events[1].record(stream)
            self._launch(size)
            self._events[2].record(stream)
            for output in self._outputs.values():
                driver.memcpy_dtoh_async(output.part(size), output.device, stream)
            self._events[3].record(stream)
            stream.synchronize()
        except driver.Error as err:  # of a call that failed, or of one before it
            raise StageError(f"{self._name} failed on a batch of {size}: {err}") from err
        return size

    def _launch(self, size: int) -> None:
        if self._graph is not None and self._graph[0] == size:
            self._graph[1].launch(self._stream.handle)
            return
        self._execute(size)
        if self._wanted_graph:
            # The call above did what happens once for a shape: that must not be recorded.
            self._stream.synchronize()
            if self._graph is not None:
                # A graph is of the execution context as it was: another shape ends it.
                self._graph[1].destroy()
                self._graph = None
            graph = CudaGraph()
            graph.capture(self._stream.handle, lambda: self._execute(size))
            self._graph = size, graph

    def _execute(self, size: int) -> None:
        if not self._execution.execute_async_v3(self._stream.handle):
            raise StageError(
                f"{self._name} refused a batch of {size}: {self._log.words()}",
                log=tuple(self._log.errors),
            )

    def _check(self, images: Floats) -> int:
        size = len(images)
        low, high = self.batch_min, len(self._host_in)
        if not low <= size <= high:
            raise StageError(
                f"a batch of {size} is outside the engine's profile, {low} to {high}",
                fix=f"build with --batch {min(size, low)}:{low}:{max(size, high)}",
            )
        if images.shape[1:] != self._shape or images.dtype != np.float32:
            raise StageError(
                f"the engine takes (batch, {', '.join(map(str, self._shape))}) float32, not "
                f"{images.shape} {images.dtype}"
            )
        return size

    def _make_execution(self, cuda_graph: bool) -> Any:
        arguments = []
        if cuda_graph and not self._wanted_graph:
            arguments = [config := self._engine.create_runtime_config()]
            config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        execution = self._engine.create_execution_context(*arguments)
        if execution is None:
            raise MissingDependencyError(
                f"{self._name} made no execution context: {self._log.words()}",
                fix="free GPU memory, or build with a smaller largest batch (--batch)",
            )
        return execution

    def _why_not(self, plan: bytes) -> str:
        """The library's words, and of TensorRT-RTX what it reads in the engine's header.

        Only once loading has failed: on GPUs that it is not made for, it calls engines invalid
        that it then runs (1.6 on a B200).
        """
        words = str(self._log.words())
        if hasattr(self._runtime, "get_engine_validity"):
            validity, bits = self._runtime.get_engine_validity(plan)
            reasons = self._trt.EngineInvalidityDiagnostics.__members__.items()
            named = [name.lower().replace("_", " ") for name, bit in reasons if bits & int(bit)]
            words += f" ({', '.join([str(validity.name).lower(), *named])})"
        return words

    def _refit(self, weights: bytes) -> None:
        """Put back what ``--strip-weights`` left out."""
        refitter = self._trt.Refitter(self._engine, self._log)
        parser = self._trt.OnnxParserRefitter(refitter, self._log)
        if not parser.refit_from_bytes(weights) or not refitter.refit_cuda_engine():
            raise ArtifactError(
                f"{self._name} cannot put the weights of model.onnx into the engine: "
                f"{self._log.words()}",
                fix="use the model.onnx of the same bundle",
                log=tuple(self._log.errors),
            )


def _require_fit(version: str, file: EngineFile) -> str:
    """This GPU's compute capability, if the engine can run on it with the installed version."""
    if not file.version_compatible and version != file.version:
        raise ArtifactError(
            f"the engine was built with {file.target} {file.version}, this device has {version}",
            fix=f"pip install '{file.target}=={file.version}', or build the bundle again; its "
            "model.onnx runs as it is",
        )
    if problem := cuda_problem():
        raise MissingDependencyError(
            f"{file.target} engines run on an NVIDIA GPU: {problem}",
            fix="run the bundle's model.onnx: --target onnxruntime",
        )
    here = compute_capability()
    if file.compute_capability and here != file.compute_capability:
        raise ArtifactError(
            f"the engine was built on a GPU of compute capability {file.compute_capability}, this "
            f"one has {here}",
            fix="build on this device, or with --hardware-compat ampere+; the bundle's "
            "model.onnx runs as it is",
        )
    return here


def import_tensorrt(module: str, extra: str) -> Any:
    """One of the packages; see ``MODULES``.

    Raises:
        MissingDependencyError: It is absent or does not load.
    """
    try:
        return importlib.import_module(module)
    except ImportError as err:
        raise missing(module, extra, err) from err
    except (OSError, RuntimeError) as err:  # a library of NVIDIA's that does not load
        raise missing(module, extra, ImportError(str(err))) from err


def make_logger(trt: Any) -> Any:
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

        def words(self) -> str:
            return self.errors[-1] if self.errors else "no reason given"

    return Log()
