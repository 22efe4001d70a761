"""A FAKE NVIDIA GPU: stands in for the driver, pycuda and TensorRT's runtime, all absent here.

* ``pycuda.driver`` with the names and the manners of pycuda 2026.1 (``wrap_cudadrv.cpp``,
  ``cuda.hpp``): what needs a current context fails without one, host memory must be contiguous, a
  process that ends with a context current is aborted.
* Device memory is NumPy arrays full of NaN until something is copied there; it has a limit.
* A stream does nothing until it is waited for, so what is read too early is NaN and what is queued
  in the wrong order gives wrong numbers.
* ``tensorrt`` and ``tensorrt_rtx`` with one version's names (``strict_bindings``); an "engine" is a
  line of JSON and an ONNX graph (``fake_builder``), which ONNX Runtime executes.
* ``libcuda.so.1``: what ``runtime.host`` asks of it, and CUDA graphs.

Nothing here says how fast a GPU is or how exactly it computes.
"""
# ruff: noqa: N802  the driver's functions have names of their own

from __future__ import annotations

import ctypes
import hashlib
import itertools
import json
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
from fake_builder import BEHAVIOUR, Dims, Script, pack, unpack
from strict_bindings import strict_module

INVALID = "invalid device context"
_RealCDLL = ctypes.CDLL


class Gpu:
    """The state of the one GPU, its driver and the process's context stack."""

    def __init__(self, *, capability: str = "8.9", memory: int = 2**24, name: str = "Fake L4"):
        self.capability, self.memory, self.name = capability, memory, name
        self.driver = True
        """Whether there is one."""
        self.status = 0
        """Of ``cuInit``."""
        self.count = 1
        self.stack: list[Any] = []
        self.streams: dict[int, Any] = {}
        self.allocated: dict[int, np.ndarray[Any, Any]] = {}
        self.pinned: list[np.ndarray[Any, Any]] = []
        self.clock = 0.0
        """Milliseconds."""
        self.calls: list[str] = []
        """What was asked of the runtime and the driver, in order."""
        self.recording: list[Callable[[], None]] | None = None
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.trouble: dict[str, str] = {}
        """A function -> the words that it fails with."""
        self._numbers = itertools.count(0x7000, 0x10)

    def number(self) -> int:
        """A fresh handle or address."""
        return next(self._numbers)

    def used(self) -> int:
        """Bytes."""
        return sum(array.nbytes for array in self.allocated.values())


# --- pycuda --------------------------------------------------------------------------------------


def fake_pycuda(gpu: Gpu) -> tuple[ModuleType, Any]:
    """``pycuda`` and ``pycuda.driver``.

    Source:
        pycuda 2026.1, ``src/wrapper/wrap_cudadrv.cpp`` and ``src/cpp/cuda.hpp``.
    """
    package, driver = ModuleType("pycuda"), ModuleType("pycuda.driver")
    package.__path__ = []  # type: ignore[attr-defined]
    package.driver = driver  # type: ignore[attr-defined]

    class Error(Exception):
        pass

    class MemoryError(Error):
        pass

    class LogicError(Error):
        pass

    class LaunchError(Error):
        pass

    class RuntimeError(Error):
        pass

    def needs_context(function: str) -> None:
        if not gpu.stack:
            raise LogicError(f"{function} failed: {INVALID}")
        if function in gpu.trouble:
            kind = MemoryError if "out of memory" in gpu.trouble[function] else LaunchError
            raise kind(f"{function} failed: {gpu.trouble[function]}")

    class Context:
        def push(self) -> None:
            gpu.stack.append(self)

        @staticmethod
        def pop() -> None:
            if not gpu.stack:
                raise LogicError(f"context::pop failed: {INVALID} - cannot pop non-current context")
            gpu.stack.pop()

    class Device:
        def __init__(self, ordinal: int) -> None:
            if not initialised:
                raise LogicError("cuDeviceGet failed: initialization error")
            if ordinal >= gpu.count:
                raise LogicError("cuDeviceGet failed: invalid device ordinal")

        def name(self) -> str:
            return gpu.name

        def compute_capability(self) -> tuple[int, ...]:
            return tuple(map(int, gpu.capability.split(".")))

        def retain_primary_context(self) -> Context:
            if "cuDevicePrimaryCtxRetain" in gpu.trouble:
                words = gpu.trouble["cuDevicePrimaryCtxRetain"]
                kind = MemoryError if "out of memory" in words else LogicError
                raise kind(f"cuDevicePrimaryCtxRetain failed: {words}")
            return Context()

    class Stream:
        def __init__(self, flags: int = 0) -> None:
            needs_context("cuStreamCreate")
            self.handle = gpu.number()
            self._queue: list[Callable[[], None]] = []
            gpu.streams[self.handle] = self

        def synchronize(self) -> None:
            needs_context("cuStreamSynchronize")
            if gpu.recording is not None:
                raise LogicError("cuStreamSynchronize failed: not permitted when capturing")
            queue, self._queue = self._queue, []
            for work in queue:
                work()

        def _put(self, work: Callable[[], None]) -> None:
            (self._queue if gpu.recording is None else gpu.recording).append(work)

    class Event:
        def __init__(self, flags: int = 0) -> None:
            needs_context("cuEventCreate")
            self._time: float | None = None

        def record(self, stream: Stream | None = None) -> Event:
            needs_context("cuEventRecord")
            assert isinstance(stream, Stream), "nothing here uses the default stream"
            self._time = None

            def work() -> None:
                self._time = gpu.clock

            stream._put(work)
            return self

        def time_since(self, before: Event) -> float:
            if self._time is None or before._time is None:
                raise RuntimeError("cuEventElapsedTime failed: device not ready")
            return self._time - before._time

    class DeviceAllocation:
        def __init__(self, size: int) -> None:
            self._address = gpu.number()
            gpu.allocated[self._address] = np.full(size, 0xFF, np.uint8)  # NaN as float32

        def __int__(self) -> int:
            return self._address

        __index__ = __int__

        def free(self) -> None:
            del gpu.allocated[self._address]

        def __del__(self) -> None:
            gpu.allocated.pop(getattr(self, "_address", 0), None)

    def mem_alloc(size: int) -> DeviceAllocation:
        needs_context("cuMemAlloc")
        if gpu.used() + size > gpu.memory:
            raise MemoryError("cuMemAlloc failed: out of memory")
        return DeviceAllocation(size)

    def pagelocked_empty(
        shape: Any, dtype: Any, order: str = "C", mem_flags: int = 0
    ) -> np.ndarray[Any, Any]:
        needs_context("cuMemHostAlloc")
        sizes = (shape,) if isinstance(shape, int) else tuple(shape)
        if not all(type(size) is int for size in sizes):  # Boost.Python converts no NumPy integers
            raise TypeError("No registered converter was able to produce a C++ rvalue")
        made = np.empty(sizes, dtype)
        made.reshape(-1).view(np.uint8)[:] = 0xFF
        gpu.pinned.append(made)
        return made

    def host_bytes(array: Any, *, writable: bool) -> np.ndarray[Any, Any]:
        view = memoryview(array)
        if not view.contiguous or (writable and view.readonly):
            raise ValueError("ndarray is not contiguous")
        found = np.asarray(array)
        assert any(np.shares_memory(found, one) for one in gpu.pinned), "not page-locked"
        return found.reshape(-1).view(np.uint8)

    def device_bytes(pointer: Any) -> np.ndarray[Any, Any]:
        assert type(pointer) is DeviceAllocation or type(pointer) is int
        return gpu.allocated[int(pointer)]

    def memcpy_htod_async(dest: Any, src: Any, stream: Stream | None = None) -> None:
        needs_context("cuMemcpyHtoDAsync")
        assert isinstance(stream, Stream)
        there, here = device_bytes(dest), host_bytes(src, writable=False)

        def work() -> None:
            there[: len(here)] = here
            gpu.clock += 0.25

        stream._put(work)

    def memcpy_dtoh_async(dest: Any, src: Any, stream: Stream | None = None) -> None:
        needs_context("cuMemcpyDtoHAsync")
        assert isinstance(stream, Stream)
        here, there = host_bytes(dest, writable=True), device_bytes(src)

        def work() -> None:
            here[:] = there[: len(here)]
            gpu.clock += 0.125

        stream._put(work)

    initialised: list[bool] = []

    def init(flags: int = 0) -> None:
        initialised.append(True)

    for item in (
        Error, MemoryError, LogicError, LaunchError, RuntimeError, Context, Device, Stream, Event,
        DeviceAllocation, mem_alloc, pagelocked_empty, memcpy_htod_async, memcpy_dtoh_async, init,
    ):  # fmt: skip
        setattr(driver, item.__name__, item)
    return package, driver


# --- the driver's C library ----------------------------------------------------------------------


class FakeLibcuda:
    """``libcuda.so.1`` as ctypes sees it: what is called here and no more."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu

    def cuInit(self, flags: int) -> int:
        return self._gpu.status

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self._gpu.count
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: int) -> int:
        major, minor = self._gpu.capability.split(".")
        value._obj.value = int({75: major, 76: minor}[attribute])
        return 0

    def cuGetErrorString(self, status: int, words: Any) -> int:
        words._obj.value = b"system not yet initialized"
        return 0

    def _fails(self, name: str) -> int:
        self._gpu.calls.append(name)
        return int(self._gpu.trouble.get(name, 0))

    def cuStreamBeginCapture_v2(self, stream: Any, mode: Any) -> int:
        assert self._gpu.streams[stream.value]._queue == [], "the stream has work of before"
        assert (self._gpu.recording, mode.value) == (None, 2)
        if not self._fails("cuStreamBeginCapture_v2"):
            self._gpu.recording = []
            return 0
        return 900

    def cuStreamEndCapture(self, stream: Any, graph: Any) -> int:
        if self._gpu.recording is None:
            return 901
        graph._obj.value = self._gpu.number()
        self._gpu.graphs[graph._obj.value], self._gpu.recording = self._gpu.recording, None
        return self._fails("cuStreamEndCapture")

    def cuGraphInstantiateWithFlags(self, executable: Any, graph: Any, flags: Any) -> int:
        executable._obj.value = self._gpu.number()
        self._gpu.graphs[executable._obj.value] = list(self._gpu.graphs[graph.value])
        return self._fails("cuGraphInstantiateWithFlags")

    def cuGraphLaunch(self, executable: Any, stream: Any) -> int:
        for work in self._gpu.graphs[executable.value]:
            self._gpu.streams[stream.value]._put(work)
        return self._fails("cuGraphLaunch")

    def cuGraphExecDestroy(self, executable: Any) -> int:
        del self._gpu.graphs[executable.value]
        return self._fails("cuGraphExecDestroy")

    def cuGraphDestroy(self, graph: Any) -> int:
        del self._gpu.graphs[graph.value]
        return self._fails("cuGraphDestroy")


def fake_cdll(gpu: Gpu) -> Callable[..., Any]:
    """For ``ctypes.CDLL``: the driver is the fake's, all else is real."""

    def load(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name != "libcuda.so.1":
            return _RealCDLL(name, *arguments, **keywords)
        if not gpu.driver:
            raise OSError("libcuda.so.1: cannot open shared object file: No such file or directory")
        return FakeLibcuda(gpu)

    return load


# --- TensorRT's runtime --------------------------------------------------------------------------


def make_engine(
    onnx: bytes,
    *,
    version: str,
    capability: str = "8.9",
    version_compatible: bool = False,
    stripped: bool = False,
    batch: tuple[int, int, int] = (1, 4, 8),
) -> bytes:
    """An engine that the fake runs.

    Args:
        onnx: The graph; a stripped engine keeps its weights' names and shapes only.
        version: Of the package that loads it, unless it is version compatible.
        capability: Of the GPU that loads it; empty for any.
        version_compatible: Brings code that the runtime must be allowed to run.
        stripped: Without weights.
        batch: Smallest, tuned-for and largest.
    """
    header = {
        "version": version, "compute_capability": capability, "batch": batch,
        "version_compatible": version_compatible, "stripped": stripped,
        "weights": _structure(onnx), "io": _io(onnx),
    }  # fmt: skip
    return pack(header, b"" if stripped else onnx)


def _structure(onnx: bytes) -> str:
    import onnx as package

    graph = package.load_model_from_string(onnx).graph
    told = sorted((value.name, tuple(value.dims)) for value in graph.initializer)
    return hashlib.sha256(repr(told).encode()).hexdigest()


def layers_of(onnx: bytes) -> dict[str, str]:
    """Layer of a fake engine -> its metadata: all behind the last convolution is one region, and a
    convolution has what follows it."""
    import onnx as package

    nodes = package.load_model_from_string(onnx).graph.node
    last = max((at for at, node in enumerate(nodes) if node.op_type == "Conv"), default=-1)
    fused: list[list[str]] = []
    for node in nodes[: last + 1]:
        if node.op_type == "Conv" or not fused:
            fused.append([])
        fused[-1].append(node.name)
    found = {" + ".join(n): "\x1e".join(f"[ONNX Layer: {each}]" for each in n) for n in fused}
    if rest := nodes[last + 1 :]:
        found[f"{{ForeignNode[{rest[0].name}...{rest[-1].name}]}}"] = ""
    return {"Reformatting CopyNode for Input Tensor 0 to x": "", **found}


def _io(onnx: bytes) -> list[tuple[str, list[int]]]:
    import onnx as package

    graph = package.load_model_from_string(onnx).graph
    return [
        (value.name, [dim.dim_value or -1 for dim in value.type.tensor_type.shape.dim])
        for value in (*graph.input, *graph.output)
    ]


def fake_tensorrt(gpu: Gpu, package: str) -> Any:
    """The runtime half of one version, on this GPU.

    Args:
        gpu: What it runs on.
        package: For example ``tensorrt 10.3.0``.
    """
    made = strict_module(package, BEHAVIOUR | RUNTIME)
    made.gpu, made.script = gpu, Script()
    return made


class Runtime:
    _trt: Any
    engine_host_code_allowed: Any

    def __init__(self, logger: Any) -> None:
        assert isinstance(logger, self._trt.ILogger)
        self._log = logger
        if "Runtime" in self._trt.gpu.trouble:
            self._say(self._trt.gpu.trouble["Runtime"])
            raise TypeError("pybind11::init(): factory function returned nullptr")

    def _say(self, words: str) -> None:
        self._log.log(self._trt.ILogger.Severity.ERROR, words)

    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        gpu = self._trt.gpu
        gpu.calls.append("deserialize")
        assert gpu.stack, "no context is current"
        found = unpack(plan)
        if found is None:
            self._say("Error Code 1: Serialization (Serialization assertion magicTagRead failed.)")
            return None
        header, onnx = found
        if header["version_compatible"]:
            if not self.engine_host_code_allowed:
                self._say("Error Code 4: engine host code is not allowed")
                return None
        elif header["version"] != self._trt.__version__:
            self._say("Error Code 1: Serialization (Version tag does not match)")
            return None
        if header["compute_capability"] not in ("", gpu.capability):
            self._say("Error Code 6: API Usage Error (The engine plan file is generated on an "
                      "incompatible device)")  # fmt: skip
            return None
        header.setdefault("io", _io(onnx))
        return self._trt.ICudaEngine(header, onnx, self._log)

    def get_engine_validity(self, plan: bytes) -> tuple[Any, int]:
        self._trt.gpu.calls.append("get_engine_validity")
        found = unpack(plan)
        kind, why = self._trt.EngineValidity, self._trt.EngineInvalidityDiagnostics
        if found is None:
            return kind.INVALID, int(why.MALFORMED_ENGINE)
        wrong = 0
        if found[0]["version"] != self._trt.__version__:
            wrong |= int(why.VERSION_MISMATCH)
        if found[0]["compute_capability"] not in ("", self._trt.gpu.capability):
            wrong |= int(why.UNSUPPORTED_CC)
        wrong |= int(self._trt.gpu.trouble.get("validity", 0))
        return (kind.INVALID if wrong else kind.VALID), wrong


class ICudaEngine:
    _trt: Any

    def __init__(self, header: dict[str, Any], onnx: bytes, log: Any) -> None:
        self._header, self._onnx, self._log = header, onnx, log

    @property
    def num_io_tensors(self) -> int:
        return len(self._header["io"])

    def get_tensor_name(self, index: int) -> str:
        return str(self._header["io"][::-1][index][0])  # outputs first, as may be

    def get_tensor_mode(self, name: str) -> Any:
        first = name == self._header["io"][0][0]
        return self._trt.TensorIOMode.INPUT if first else self._trt.TensorIOMode.OUTPUT

    def get_tensor_shape(self, name: str) -> Any:
        return self._trt.Dims(dict(self._header["io"])[name])

    def get_tensor_dtype(self, name: str) -> Any:
        return self._trt.DataType.FLOAT

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[Any]:
        assert (name, profile) == (self._header["io"][0][0], 0)
        rest = self._header["io"][0][1][1:]
        return [self._trt.Dims((size, *rest)) for size in self._header["batch"]]

    def create_runtime_config(self) -> Any:
        return self._trt.IRuntimeConfig()

    def create_engine_inspector(self) -> Any:
        return self._trt.EngineInspector(self)

    def create_execution_context(self, config: Any = None) -> Any:
        gpu = self._trt.gpu
        if config is not None:
            assert isinstance(config, self._trt.IRuntimeConfig)
            gpu.calls.append(f"strategy {config.cuda_graph_strategy.name}")
        if "create_execution_context" in gpu.trouble:
            words = gpu.trouble["create_execution_context"]
            self._log.log(self._trt.ILogger.Severity.ERROR, words)
            return None
        return self._trt.IExecutionContext(self)


class EngineInspector:
    _trt: Any

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def get_engine_information(self, format: Any) -> str:
        assert format is self._trt.LayerInformationFormat.JSON
        layers = layers_of(self._engine._onnx).items()
        return json.dumps({"Layers": [{"Name": n, "Metadata": m} for n, m in layers]})


class IExecutionContext:
    _trt: Any
    profiler: Any

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._addresses: dict[str, int] = {}
        self._shape: tuple[int, ...] | None = None
        self._changes = 0
        self._settled = False
        """The first call after another shape does what must not be recorded."""
        self._session: Any = None

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert name == self._engine._header["io"][0][0]
        assert all(type(size) is int for size in shape)
        low, _, high = self._engine._header["batch"]
        if not low <= shape[0] <= high:
            return False
        if shape != self._shape:
            self._shape, self._settled = shape, False
            self._changes += 1
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert type(memory) is int
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        gpu, (source, *targets) = self._trt.gpu, (name for name, _ in self._engine._header["io"])
        gpu.calls.append(f"execute {self._shape and self._shape[0]}")
        trouble = gpu.trouble.get("execute_async_v3")
        if not self._engine._onnx:
            trouble = "Error Code 3: API Usage Error (the engine has no weights)"
        if gpu.recording is not None and not self._settled:
            trouble = "Error Code 1: Cuda Runtime (not permitted when stream is capturing)"
        if trouble or self._shape is None or len(self._addresses) < 1 + len(targets):
            words = trouble or "Error Code 3: API Usage Error (shapes or addresses are missing)"
            self._engine._log.log(self._trt.ILogger.Severity.ERROR, words)
            return False
        self._settled = True
        shape, change = self._shape, self._changes

        def work() -> None:
            given = gpu.allocated[self._addresses[source]].view(np.float32)
            images = given[: int(np.prod(shape))].reshape(shape)
            for target, logits in zip(targets, self._run(images.copy()), strict=True):
                if change != self._changes:  # a graph that was recorded for another shape
                    logits[:] = np.nan
                room = gpu.allocated[self._addresses[target]].view(np.float32)
                room[: logits.size] = logits.reshape(-1)
            gpu.clock += 2.0
            for at, layer in enumerate(layers_of(self._engine._onnx)) if self.profiler else ():
                self.profiler.report_layer_time(layer, 0.125 * at)

        gpu.streams[stream_handle]._put(work)
        return True

    def _run(self, images: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
        import onnxruntime

        if self._session is None:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            self._session = onnxruntime.InferenceSession(self._engine._onnx, options)
        return list(self._session.run(None, {"input": images}))


class Refitter:
    _trt: Any

    def __init__(self, engine: Any, logger: Any) -> None:
        assert isinstance(engine, self._trt.ICudaEngine)
        self._engine, self._log, self._onnx = engine, logger, b""

    def refit_cuda_engine(self) -> bool:
        self._engine._onnx = self._onnx
        self._trt.gpu.calls.append("refit")
        return bool(self._onnx)


class OnnxParserRefitter:
    _trt: Any

    def __init__(self, refitter: Any, logger: Any) -> None:
        assert isinstance(refitter, self._trt.Refitter)
        self._refitter, self._log = refitter, logger

    def refit_from_bytes(self, model: bytes, path: str | None = None) -> bool:
        assert type(model) is bytes
        if _structure(model) != self._refitter._engine._header["weights"]:
            error = self._trt.ILogger.Severity.ERROR
            self._log.log(error, "Error Code 4: Refit weights of stem.weight have another shape")
            return False
        self._refitter._onnx = model
        return True


class IRuntimeConfig:
    """Settings only."""


RUNTIME: dict[str, type] = {
    "Dims": Dims,
    **{
        kind.__name__: kind
        for kind in (
            EngineInspector, ICudaEngine, IExecutionContext, IRuntimeConfig, OnnxParserRefitter,
            Refitter, Runtime,
        )
    },
}  # fmt: skip
"""Class -> what its members do."""


def install(gpu: Gpu, package: str, *, pycuda: bool = True) -> Any:
    """Put the fakes where ``import`` and ctypes find them, for a process of its own.

    Returns:
        The fake ``tensorrt`` or ``tensorrt_rtx``.
    """
    trt = fake_tensorrt(gpu, package)
    sys.modules[package.partition(" ")[0]] = trt
    if pycuda:
        sys.modules["pycuda"], sys.modules["pycuda.driver"] = fake_pycuda(gpu)
    ctypes.CDLL = fake_cdll(gpu)  # type: ignore[misc,assignment]
    return trt
