"""A TensorRT engine on this device: pinned buffers, one stream, CUDA graphs where asked.

Needs the package that built the engine (``tensorrt`` or ``tensorrt_rtx``) and ``pycuda``.
"""

from __future__ import annotations

import ctypes
import importlib
import weakref
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from cswap_deploy.errors import ArtifactError, MissingDependencyError, StageError, missing
from cswap_deploy.runtime.host import compute_capability as this_gpu
from cswap_deploy.runtime.host import cuda_problem

MODULES = {"tensorrt": ("tensorrt", "trt"), "tensorrt-rtx": ("tensorrt_rtx", "trt-rtx")}
"""Target -> its Python package, and the extra that brings it."""


@dataclass(frozen=True)
class CallTimes:
    """One call, by CUDA events on its stream (milliseconds)."""

    host_to_device: float
    compute: float
    device_to_host: float


class TensorRtSession:
    """One engine, loaded and ready to run.

    Source:
        TensorRT documentation, "Performing Inference"; "CUDA Graphs". TensorRT-RTX documentation,
        "Working with RTX CUDA Graphs".
    """

    threads = 1

    def __init__(
        self,
        plan: bytes,
        *,
        target: str,
        version: str,
        compute_capability: str = "",
        version_compatible: bool = False,
        weights: bytes | None = None,
        cuda_graph: bool = False,
    ) -> None:
        """Check that the engine fits this device, then deserialise it.

        Args:
            plan: The engine's bytes, whose digest the caller has checked.
            target: ``tensorrt`` or ``tensorrt-rtx``.
            version: Of the package that built it.
            compute_capability: Of the GPU it is bound to; empty for none.
            version_compatible: Built to run with later versions too.
            weights: The ONNX model that a stripped engine takes its weights from, checked likewise.
            cuda_graph: Capture the engine's work when the batch's size changes, and replay it.

        Raises:
            MissingDependencyError: The package, pycuda, the driver or the GPU is not there, or the
                GPU's memory does not suffice.
            ArtifactError: The engine is for another version or GPU, or is damaged.
        """
        self._trt = trt = import_tensorrt(*MODULES[target])
        self._name = f"{target} {trt.__version__}"
        if not version_compatible and str(trt.__version__) != version:
            raise ArtifactError(
                f"the engine was built with {target} {version}, this device has {trt.__version__}",
                fix=f"pip install '{target}=={version}', or build the bundle again; its model.onnx "
                "runs as it is",
            )
        problem = cuda_problem()
        if problem:
            raise MissingDependencyError(
                f"{target} engines run on an NVIDIA GPU: {problem}",
                fix="run the bundle's model.onnx: --target onnxruntime",
            )
        here = this_gpu()
        if compute_capability and here != compute_capability:
            raise ArtifactError(
                f"the engine was built on a GPU of compute capability {compute_capability}, this "
                f"one has {here}",
                fix="build on this device, or with --hardware-compat ampere+; the bundle's "
                "model.onnx runs as it is",
            )
        self._driver = _import_pycuda()
        self._context = _take_gpu(self._driver)
        # pycuda aborts a process that ends with a context current: this pops it then, or earlier,
        # when the session goes.
        self._give_back = weakref.finalize(self, self._context.pop)
        # RTX knows best when its kernels are final, and captures by itself.
        self._wanted_graph = cuda_graph and not hasattr(trt, "CudaGraphStrategy")
        self._graph: tuple[int, _CudaGraph] | None = None
        try:
            self._prepare(plan, version_compatible, weights, cuda_graph)
        except BaseException:
            self.close()
            raise
        self.provider = f"{self._name}, {self._driver.Device(0).name()} (sm {here})"
        if cuda_graph:
            self.provider += ", CUDA graph"
        self.settings: dict[str, Any] = {
            "input": self._input,
            "streams": 1,
            "cuda_graph": cuda_graph,
            "transfers": True,
            "host_memory": "pinned",
            # The context's flags are the default ones: the driver spins where there are more
            # processors than contexts; on some Tegra boards it blocks.
            "synchronisation": "automatic",
        }
        """How a call is made; a latency records it."""

    def _prepare(
        self, plan: bytes, version_compatible: bool, weights: bytes | None, cuda_graph: bool
    ) -> None:
        trt, driver = self._trt, self._driver
        self._log = make_logger(trt)
        try:
            self._runtime = trt.Runtime(self._log)
        except TypeError as err:  # how pybind11 reports that the library made none
            raise MissingDependencyError(
                f"{self._name} does not start: {self._log.words()}",
                fix="a newer NVIDIA driver may be needed; model.onnx runs as it is",
                log=tuple(self._log.errors),
            ) from err
        if version_compatible:
            self._runtime.engine_host_code_allowed = True
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise ArtifactError(
                f"{self._name} does not load the engine: {self._why_not(plan)}",
                fix="build the bundle again on this device; its model.onnx runs as it is",
                log=tuple(self._log.errors),
            )
        if weights is not None:
            self._refit(weights)
        self._execution = self._make_execution(cuda_graph)
        if self._execution is None:
            raise MissingDependencyError(
                f"{self._name} made no execution context: {self._log.words()}",
                fix="free GPU memory, or build with a smaller largest batch (--batch)",
            )
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        self._input = next(n for n in names if self._mode(n) == trt.TensorIOMode.INPUT)
        self._output = next(n for n in names if self._mode(n) == trt.TensorIOMode.OUTPUT)
        smallest, _, largest = self._engine.get_tensor_profile_shape(self._input, 0)
        self.batch_min, self.batch_max = int(smallest[0]), int(largest[0])
        self._shape = tuple(int(size) for size in tuple(largest)[1:])
        self.classes = int(tuple(self._engine.get_tensor_shape(self._output))[1])
        try:
            self._stream = driver.Stream()
            self._events = [driver.Event() for _ in range(4)]
            self._host_in = driver.pagelocked_empty((self.batch_max, *self._shape), np.float32)
            self._host_out = driver.pagelocked_empty((self.batch_max, self.classes), np.float32)
            self._device_in = driver.mem_alloc(self._host_in.nbytes)
            self._device_out = driver.mem_alloc(self._host_out.nbytes)
        except driver.MemoryError as err:
            raise MissingDependencyError(
                f"the GPU has no memory for a batch of {self.batch_max}: {err}",
                fix="free GPU memory, or build with a smaller largest batch (--batch)",
            ) from err
        self._execution.set_tensor_address(self._input, int(self._device_in))
        self._execution.set_tensor_address(self._output, int(self._device_out))

    def run(self, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Copy in, run, copy out, wait.

        Args:
            images: (N, C, H, W) float32, N within the engine's profile.

        Returns:
            (N, classes) float32 logits, the caller's own.

        Raises:
            StageError: The batch is outside the profile or of another shape, or the run failed.
        """
        return self._call(images)[0]

    def timed(self, images: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], CallTimes]:
        """As :meth:`run`, and how long each part took on the device."""
        logits, events = self._call(images)
        steps = [after.time_since(before) for before, after in pairwise(events)]
        return logits, CallTimes(*(float(step) for step in steps))

    def close(self) -> None:
        """Give the GPU back; more than once does no harm."""
        self._give_back()

    def _call(self, images: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], list[Any]]:
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
            driver.memcpy_dtoh_async(self._host_out[:size], self._device_out, stream)
            self._events[3].record(stream)
            stream.synchronize()
        except driver.Error as err:  # of a call that failed, or of one before it
            raise StageError(f"{self._name} failed on a batch of {size}: {err}") from err
        return np.array(self._host_out[:size]), self._events

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
            graph = _CudaGraph()
            graph.capture(self._stream.handle, lambda: self._execute(size))
            self._graph = size, graph

    def _execute(self, size: int) -> None:
        if not self._execution.execute_async_v3(self._stream.handle):
            raise StageError(
                f"{self._name} refused a batch of {size}: {self._log.words()}",
                log=tuple(self._log.errors),
            )

    def _check(self, images: npt.NDArray[np.float32]) -> int:
        size = len(images)
        if not self.batch_min <= size <= self.batch_max:
            raise StageError(
                f"a batch of {size} is outside the engine's profile, {self.batch_min} to "
                f"{self.batch_max}",
                fix=f"build with --batch {min(size, self.batch_min)}:{self.batch_min}:"
                f"{max(size, self.batch_max)}",
            )
        if images.shape[1:] != self._shape or images.dtype != np.float32:
            raise StageError(
                f"the engine takes (batch, {', '.join(map(str, self._shape))}) float32, not "
                f"{images.shape} {images.dtype}"
            )
        return size

    def _make_execution(self, cuda_graph: bool) -> Any:
        if not cuda_graph or self._wanted_graph:
            return self._engine.create_execution_context()
        config = self._engine.create_runtime_config()
        config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return self._engine.create_execution_context(config)

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
        trt = self._trt
        refitter = trt.Refitter(self._engine, self._log)
        parser = trt.OnnxParserRefitter(refitter, self._log)
        if not parser.refit_from_bytes(weights) or not refitter.refit_cuda_engine():
            raise ArtifactError(
                f"{self._name} cannot put the weights of model.onnx into the engine: "
                f"{self._log.words()}",
                fix="use the model.onnx of the same bundle",
                log=tuple(self._log.errors),
            )

    def _mode(self, name: str) -> Any:
        return self._engine.get_tensor_mode(name)


class _CudaGraph:
    """A stream's work, recorded once; pycuda has no graphs, so by the driver's own functions.

    Source:
        CUDA driver API, "Graph Management" and "Stream Management".
    """

    _RELAXED = 2

    def __init__(self) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._graph, self._executable = ctypes.c_void_p(), ctypes.c_void_p()

    def capture(self, stream: int, work: Any) -> None:
        """Record what ``work`` puts on the stream; nothing runs meanwhile."""
        handle = ctypes.c_void_p(stream)
        self._do("cuStreamBeginCapture_v2", handle, ctypes.c_int(self._RELAXED))
        try:
            work()
        finally:
            self._do("cuStreamEndCapture", handle, ctypes.byref(self._graph))
        self._do(
            "cuGraphInstantiateWithFlags", ctypes.byref(self._executable), self._graph,
            ctypes.c_ulonglong(0),
        )  # fmt: skip

    def launch(self, stream: int) -> None:
        """Replay it."""
        self._do("cuGraphLaunch", self._executable, ctypes.c_void_p(stream))

    def destroy(self) -> None:
        """Give its memory back; it must not be running."""
        self._do("cuGraphExecDestroy", self._executable)
        self._do("cuGraphDestroy", self._graph)

    def _do(self, name: str, *arguments: Any) -> None:
        status = getattr(self._driver, name)(*arguments)
        if status:
            raise StageError(
                f"CUDA graph: {name} failed with {status}", fix="leave out --cuda-graph"
            )


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


def _import_pycuda() -> Any:
    try:
        return importlib.import_module("pycuda.driver")
    except ImportError as err:
        absent = isinstance(err, ModuleNotFoundError) and err.name == "pycuda"
        state = "is not installed" if absent else f"is installed but does not load: {err}"
        raise MissingDependencyError(
            f"pycuda {state}",
            fix="pip install pycuda, with CUDA's bin folder on PATH: it is compiled there",
        ) from err


def _take_gpu(driver: Any) -> Any:
    """The first GPU's primary context, which TensorRT uses too, made current."""
    try:
        driver.init()
        context = driver.Device(0).retain_primary_context()
        context.push()
    except driver.Error as err:
        full = isinstance(err, driver.MemoryError)
        raise MissingDependencyError(
            f"the GPU {'has no memory left' if full else 'cannot be used'}: {err}",
            fix="free GPU memory" if full else "run the bundle's model.onnx: --target onnxruntime",
        ) from err
    return context


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
