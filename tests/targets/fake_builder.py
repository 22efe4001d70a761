"""A FAKE of TensorRT's builder and parser, for machines without a GPU and without TensorRT.

It stands in for ``tensorrt`` and ``tensorrt_rtx``, with the names of one version's official
bindings and no others (see ``strict_bindings``). The "engine" that it builds is a line of JSON and
the ONNX file; ``tests/runtime/fake_gpu.py`` runs such engines.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from strict_bindings import strict_module

PHASES = (("Building engine", None, 3), ("Timing tactics", "Building engine", 4))
"""Names, parents and steps as tensorrt-rtx 1.7 tells them, fewer of them."""


@dataclass
class Script:
    """What the builder is to do, and what it was seen doing."""

    device: str = "NVIDIA L4"
    compute_capability: str = "8.9"
    makes_builder: bool = True
    parser_errors: list[dict[str, Any]] = field(default_factory=list)
    build_errors: list[str] = field(default_factory=list)
    """With any, no engine is built."""
    warnings: list[str] = field(default_factory=list)
    ctrl_c_at: str = ""
    """The callback before which the process gets a real SIGINT: ``log``, ``phase_start`` ..."""
    while_building: list[Any] = field(default_factory=list)
    """Functions called in the middle of a build."""
    escaped: list[BaseException] = field(default_factory=list)
    """What left a callback: NVIDIA's bindings print it and go on."""
    networks: list[Any] = field(default_factory=list)
    configs: list[Any] = field(default_factory=list)
    profiles: list[Any] = field(default_factory=list)


def fake_builder(package: str) -> Any:
    """The module, with ``script`` on it.

    Args:
        package: For example ``tensorrt 10.3.0``.
    """
    module = strict_module(package, BEHAVIOUR)
    module.script = Script()
    return module


def pack(header: dict[str, Any], onnx: bytes) -> bytes:
    """An engine."""
    return json.dumps(header).encode() + b"\n" + onnx


def unpack(plan: bytes) -> tuple[dict[str, Any], bytes] | None:
    """Its two parts; None for what is no engine."""
    head, _, onnx = bytes(plan).partition(b"\n")
    try:
        return json.loads(head), onnx
    except ValueError:
        return None


class Dims:
    """A shape."""

    def __init__(self, sizes: Sequence[int] = ()) -> None:
        self._sizes = tuple(sizes)

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, index: Any) -> Any:
        return self._sizes[index]


class IHostMemory:
    """Bytes that the library owns."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def __bytes__(self) -> bytes:
        return self._content

    @property
    def nbytes(self) -> int:
        return len(self._content)


class ITensor:
    _trt: Any

    def __init__(self, name: str, shape: Sequence[int], dtype: str) -> None:
        self._told = name, shape, dtype

    @property
    def name(self) -> str:
        return self._told[0]

    @property
    def shape(self) -> Any:
        return self._trt.Dims(self._told[1])

    @property
    def dtype(self) -> Any:
        return getattr(self._trt.DataType, self._told[2])


class ILayer:
    _trt: Any

    def __init__(self, name: str, kind: str, outputs: int) -> None:
        self._told = name, kind, outputs

    @property
    def name(self) -> str:
        return self._told[0]

    @property
    def type(self) -> Any:
        return getattr(self._trt.LayerType, self._told[1])

    @property
    def num_outputs(self) -> int:
        return self._told[2]

    def get_output(self, index: int) -> Any:
        return self._trt.ITensor(f"{self._told[0]}_out{index}", (-1, 8), "FLOAT")


class INetworkDefinition:
    _trt: Any

    def __init__(self, flags: int) -> None:
        self._flags, self._onnx = flags, b""
        self._layers: list[Any] = []
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def get_layer(self, index: int) -> Any:
        return self._layers[index]

    @property
    def num_inputs(self) -> int:
        return len(self._inputs)

    def get_input(self, index: int) -> Any:
        return self._inputs[index]

    @property
    def num_outputs(self) -> int:
        return len(self._outputs)

    def get_output(self, index: int) -> Any:
        return self._outputs[index]

    def _take(self, content: bytes) -> bool:
        import onnx

        try:
            model = onnx.load_model_from_string(content)
        except Exception:  # noqa: BLE001  whatever protobuf raises
            return False
        kinds = {"Conv": "CONVOLUTION", "Relu": "ACTIVATION", "Gemm": "MATRIX_MULTIPLY"}
        self._onnx = content
        self._layers = [
            self._trt.ILayer(node.name, kinds.get(node.op_type, "SHUFFLE"), len(node.output))
            for node in model.graph.node
        ]
        self._inputs, self._outputs = (
            [
                self._trt.ITensor(
                    value.name,
                    [dim.dim_value or -1 for dim in value.type.tensor_type.shape.dim],
                    "FLOAT",
                )
                for value in values
            ]
            for values in (model.graph.input, model.graph.output)
        )
        return True


class ParserError:
    _trt: Any

    def __init__(self, told: dict[str, Any]) -> None:
        self._told = {"node": -1, "name": "", "operator": "", "desc": "", "code": "INVALID_NODE"}
        self._told |= told

    def code(self) -> Any:
        return getattr(self._trt.ErrorCode, str(self._told["code"]))

    def desc(self) -> str:
        return str(self._told["desc"])

    def node(self) -> int:
        return int(self._told["node"])

    def node_name(self) -> str:
        return str(self._told["name"])

    def node_operator(self) -> str:
        return str(self._told["operator"])

    def __str__(self) -> str:
        return f"In node {self.node()} with name: {self.node_name()}: {self.desc()}"


class OnnxParser:
    _trt: Any

    def __init__(self, network: Any, logger: Any) -> None:
        assert isinstance(network, self._trt.INetworkDefinition)
        assert isinstance(logger, self._trt.ILogger)
        self._network = network

    def parse(self, model: bytes, path: str | None = None) -> bool:
        assert isinstance(model, bytes)
        return not self._trt.script.parser_errors and self._network._take(model)

    def supports_model_v2(self, model: bytes, path: str | None = None) -> bool:
        return self.parse(model)

    @property
    def num_errors(self) -> int:
        return len(self._trt.script.parser_errors)

    def get_error(self, index: int) -> Any:
        return self._trt.ParserError(self._trt.script.parser_errors[index])


class IOptimizationProfile:
    _trt: Any

    def __init__(self) -> None:
        self._shapes: dict[str, tuple[Any, ...]] = {}
        self._trt.script.profiles.append(self)

    def set_shape(self, name: str, low: Any, opt: Any, high: Any) -> None:
        assert all(type(size) is int for shape in (low, opt, high) for size in shape)
        self._shapes[name] = (low, opt, high)

    def get_shape(self, name: str) -> list[Any]:
        return [self._trt.Dims(shape) for shape in self._shapes[name]]


class ITimingCache:
    _trt: Any

    def __init__(self, content: bytes) -> None:
        self._content = content

    def serialize(self) -> Any:
        return self._trt.IHostMemory(self._content)


class IBuilderConfig:
    _trt: Any

    def __init__(self) -> None:
        self._flags: list[Any] = []
        self._pools: dict[str, int] = {}
        self._capabilities: list[Any] = []
        self._profile: Any = None
        self._cache: Any = None
        self._monitor: Any = None
        self._trt.script.configs.append(self)

    def set_flag(self, flag: Any) -> None:
        assert isinstance(flag, self._trt.BuilderFlag)
        self._flags.append(flag)

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        assert isinstance(pool, self._trt.MemoryPoolType)
        self._pools[pool.name] = size

    def add_optimization_profile(self, profile: Any) -> int:
        self._profile = profile
        return 0

    def create_timing_cache(self, content: bytes) -> Any:
        assert isinstance(content, bytes)
        return self._trt.ITimingCache(content)

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        if not isinstance(cache, self._trt.ITimingCache):
            raise TypeError("set_timing_cache(): incompatible function arguments")
        device = cache._content.partition(b"|")[0].decode()
        if device not in ("", self._trt.script.device) and not ignore_mismatch:
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> Any:
        return self._cache

    @property
    def progress_monitor(self) -> Any:
        return self._monitor

    @progress_monitor.setter
    def progress_monitor(self, monitor: Any) -> None:
        assert isinstance(monitor, self._trt.IProgressMonitor)
        self._monitor = monitor

    @property
    def num_compute_capabilities(self) -> int:
        return len(self._capabilities)

    @num_compute_capabilities.setter
    def num_compute_capabilities(self, count: int) -> None:
        self._capabilities = [None] * count

    def set_compute_capability(self, capability: Any, index: int) -> bool:
        assert isinstance(capability, self._trt.ComputeCapability)
        if index >= len(self._capabilities):
            return False
        self._capabilities[index] = capability
        return True


class Builder:
    _trt: Any

    def __init__(self, logger: Any) -> None:
        assert isinstance(logger, self._trt.ILogger)
        self._log = logger
        if not self._trt.script.makes_builder:
            logger.log(self._trt.ILogger.Severity.ERROR, "CUDA initialization failure: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")

    def create_network(self, flags: int = 0) -> Any:
        network = self._trt.INetworkDefinition(flags)
        self._trt.script.networks.append(network)
        return network

    def create_builder_config(self) -> Any:
        return self._trt.IBuilderConfig()

    def create_optimization_profile(self) -> Any:
        return self._trt.IOptimizationProfile()

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        assert isinstance(network, self._trt.INetworkDefinition)
        assert isinstance(config, self._trt.IBuilderConfig)
        script, severity = self._trt.script, self._trt.ILogger.Severity
        ((name, (low, opt, high)),) = config._profile._shapes.items()
        assert name == network.get_input(0).name
        for words in script.warnings:
            self._call(self._log, "log", severity.WARNING, words)
        self._call(self._log, "log", severity.VERBOSE, "what tactics cost")
        goes_on = True
        for phase, parent, steps in PHASES if config._monitor is not None else ():
            self._call(config._monitor, "phase_start", phase, parent, steps)
        for something in script.while_building:
            something()
        for phase, _, steps in reversed(PHASES) if config._monitor is not None else ():
            for step in range(steps):
                goes_on = goes_on and self._call(config._monitor, "step_complete", phase, step)
            self._call(config._monitor, "phase_finish", phase)
        for words in script.build_errors:
            self._call(self._log, "log", severity.ERROR, words)
        if not goes_on:
            self._call(self._log, "log", severity.ERROR, "Error Code 7: BuildCanceled")
        if not goes_on or script.build_errors:
            return None
        if config._cache is not None:
            config._cache._content = f"{script.device}|measured".encode()
        flags = {flag.name for flag in config._flags}
        level = config.hardware_compatibility_level
        header = {
            "version": self._trt.__version__,
            "compute_capability": "" if level is not None else script.compute_capability,
            "version_compatible": "VERSION_COMPATIBLE" in flags,
            "stripped": "STRIP_PLAN" in flags,
            "batch": [low[0], opt[0], high[0]],
        }
        return self._trt.IHostMemory(pack(header, network._onnx))

    def _call(self, receiver: Any, callback: str, *arguments: Any) -> Any:
        """From C++: an exception goes no further, and counts as a step that cancels."""
        try:
            if self._trt.script.ctrl_c_at == callback:
                self._trt.script.ctrl_c_at = ""
                signal.raise_signal(signal.SIGINT)
            return getattr(receiver, callback)(*arguments)
        except BaseException as err:  # noqa: BLE001
            self._trt.script.escaped.append(err)
            return False


class EngineInspector:
    _trt: Any

    def get_engine_information(self, format: Any) -> str:
        assert format is self._trt.LayerInformationFormat.JSON
        return json.dumps({"Layers": ["fused"]})


class ICudaEngine:
    _trt: Any

    def create_engine_inspector(self) -> Any:
        return self._trt.EngineInspector()


class Runtime:
    _trt: Any
    engine_host_code_allowed: Any

    def __init__(self, logger: Any) -> None:
        assert isinstance(logger, self._trt.ILogger)

    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        found = unpack(plan)
        if found is None:
            return None
        if found[0]["version_compatible"] and not self.engine_host_code_allowed:
            return None
        return self._trt.ICudaEngine()


BEHAVIOUR: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        Builder, Dims, EngineInspector, IBuilderConfig, ICudaEngine, IHostMemory, ILayer,
        INetworkDefinition, IOptimizationProfile, ITensor, ITimingCache, OnnxParser, ParserError,
        Runtime,
    )
}  # fmt: skip
"""Class -> what its members do."""
