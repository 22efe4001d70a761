"""The first NVIDIA GPU: its context through pycuda, CUDA graphs through the driver."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from typing import Any

from cswap_deploy.errors import MissingDependencyError, StageError


def import_pycuda() -> Any:
    """``pycuda.driver``; :class:`MissingDependencyError` where it is absent or does not load."""
    try:
        return importlib.import_module("pycuda.driver")
    except ImportError as err:
        absent = isinstance(err, ModuleNotFoundError) and err.name == "pycuda"
        state = "is not installed" if absent else f"is installed but does not load: {err}"
        raise MissingDependencyError(
            f"pycuda {state}",
            fix="pip install pycuda, with CUDA's bin folder on PATH: it is compiled there",
        ) from err


def take_gpu(driver: Any) -> Any:
    """Make the first GPU's primary context current; TensorRT uses the same one.

    Returns:
        The context; ``pop`` it before the process ends, or pycuda aborts the process.

    Raises:
        MissingDependencyError: The GPU cannot be used, or has no memory left.
    """
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


class CudaGraph:
    """Work of a stream, recorded once and replayed; pycuda has no graphs.

    Source:
        CUDA driver API, "Graph Management" and "Stream Management".
    """

    _RELAXED = 2

    def __init__(self) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._graph, self._executable = ctypes.c_void_p(), ctypes.c_void_p()

    def capture(self, stream: int, work: Callable[[], None]) -> None:
        """Record what ``work`` puts on the stream; nothing runs meanwhile.

        Raises:
            StageError: The driver refused.
        """
        handle = ctypes.c_void_p(stream)
        self._do("cuStreamBeginCapture_v2", handle, ctypes.c_int(self._RELAXED))
        try:
            work()
        finally:
            self._do("cuStreamEndCapture", handle, ctypes.byref(self._graph))
        made, flags = ctypes.byref(self._executable), ctypes.c_ulonglong(0)
        self._do("cuGraphInstantiateWithFlags", made, self._graph, flags)

    def launch(self, stream: int) -> None:
        """Put the recorded work on a stream."""
        self._do("cuGraphLaunch", self._executable, ctypes.c_void_p(stream))

    def destroy(self) -> None:
        """Free its memory; it must not be running."""
        self._do("cuGraphExecDestroy", self._executable)
        self._do("cuGraphDestroy", self._graph)

    def _do(self, name: str, *arguments: Any) -> None:
        status = getattr(self._driver, name)(*arguments)
        if status:
            raise StageError(
                f"CUDA graph: {name} failed with {status}", fix="leave out --cuda-graph"
            )
