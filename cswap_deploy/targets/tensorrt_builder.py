"""TensorRT's parser and builder: from a graph to an engine's bytes, or to the reason why not."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

from cswap_deploy.config import BuilderOptions
from cswap_deploy.errors import ArtifactError, BuildError, MissingDependencyError
from cswap_deploy.export.names import module_of
from cswap_deploy.records.engine import OnnxArtifact
from cswap_deploy.runtime.tensorrt_session import make_logger
from cswap_deploy.targets import BuildRequest
from cswap_deploy.targets.build_monitor import make_monitor, noticing_ctrl_c
from cswap_deploy.targets.tensorrt_flavours import COMPAT, Flavour, capability_name
from cswap_deploy.targets.timing_cache import TimingCache


class EngineBuilder:
    """One package's builder, for one engine; errors begin with ``name``.

    Raises:
        MissingDependencyError: The package makes no builder.
    """

    def __init__(self, trt: Any, *, name: str, flavour: Flavour) -> None:
        self._trt, self._name, self._flavour = trt, name, flavour
        self._log = make_logger(trt)
        try:
            self._builder = trt.Builder(self._log)
        except TypeError as err:  # how pybind11 reports that the library made none
            words = self._log.errors[0] if self._log.errors else str(err)
            raise MissingDependencyError(f"{name} makes no builder: {words}") from err
        flags = 0
        if flavour.strongly_typed_flag:
            flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        self._network = self._builder.create_network(flags)
        self._parser = trt.OnnxParser(self._network, self._log)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the library has warned of so far."""
        return tuple(self._log.warnings)

    def unsupported(self, onnx: Path) -> tuple[str, ...]:
        """The parser's errors on a graph, each with the node and its PyTorch module."""
        if self._parser.supports_model_v2(read_file(onnx)):
            return ()
        # Its list of subgraphs says less: what stands beside the culprit counts as unsupported too.
        errors = [_parser_words(error) for error in self._errors()]
        return tuple(dict.fromkeys(errors)) or ("not supported, no reason given",)

    def compile(self, request: BuildRequest, *, capability: str) -> tuple[bytes, dict[str, Any]]:
        """Build an engine; ``capability`` is this GPU's, empty where there is none.

        Returns:
            The engine, and what ``layers.json`` says of the network: inputs, outputs, profile and
            layers as parsed.

        Raises:
            ArtifactError: The graph cannot be read.
            BuildError: The parser or the builder refused the graph; ``err.log`` has its words.
            KeyboardInterrupt: Ctrl-C ended the build.
        """
        if not self._parser.parse(read_file(request.onnx.path)):
            self._refuse_graph(request.onnx)
        config = self._builder.create_builder_config()
        profile = self._builder.create_optimization_profile()
        tensor = self._network.get_input(0)
        sizes = (request.batch.min, request.batch.opt, request.batch.max)
        profile.set_shape(tensor.name, *((size, *tuple(tensor.shape)[1:]) for size in sizes))
        config.add_optimization_profile(profile)
        self._configure(config, request.options)
        config.progress_monitor = monitor = make_monitor(self._trt, request.progress)
        shapes = [list(shape) for shape in profile.get_shape(tensor.name)]
        layers = self._describe() | {"profile": shapes}
        cache = None
        if self._flavour.timing_cache:
            cache = TimingCache(f"trt{self._trt.__version__}-sm{capability}", request.store)
        plan = self._serialise(config, monitor, cache)
        if monitor.interrupted:
            raise KeyboardInterrupt
        if plan is None:
            self._refuse_build(request)
        return bytes(plan), layers

    def inspect(self, plan: bytes, *, version_compatible: bool) -> dict[str, Any]:
        """The engine's layers with the tactics chosen, as its inspector tells them.

        Empty for an engine that this GPU does not load, or without weights; loading says why.
        """
        runtime = self._trt.Runtime(self._log)
        if version_compatible:  # it brings code of its own, made here a moment ago
            runtime.engine_host_code_allowed = True
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            return {}
        inspector, kind = engine.create_engine_inspector(), self._trt.LayerInformationFormat.JSON
        return {"engine": json.loads(inspector.get_engine_information(kind))}

    def _describe(self) -> dict[str, Any]:
        """The network as parsed; an engine's own, fused layers are known only where it can run."""
        net = self._network
        layers = [
            {
                "name": layer.name,
                "type": layer.type.name.lower(),
                "outputs": [_tensor(layer.get_output(k)) for k in range(layer.num_outputs)],
            }
            for layer in map(net.get_layer, range(net.num_layers))
        ]
        return {
            "inputs": [_tensor(net.get_input(i)) for i in range(net.num_inputs)],
            "outputs": [_tensor(net.get_output(i)) for i in range(net.num_outputs)],
            "network": layers,
        }

    def _configure(self, config: Any, options: BuilderOptions) -> None:
        trt = self._trt
        # Names and types of the layers in the engine, which the report shows.
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if options.workspace_mib is not None:
            size = options.workspace_mib * 2**20
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, size)
        if options.optimization_level is not None:
            config.builder_optimization_level = options.optimization_level
        if options.hardware_compat != "none":
            level = COMPAT[options.hardware_compat]
            config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)
        for is_wanted, name in (
            (options.version_compatible, "VERSION_COMPATIBLE"),
            (options.strip_weights, "STRIP_PLAN"),
            (options.refit_engine, "REFIT"),
        ):
            if is_wanted:
                config.set_flag(getattr(trt.BuilderFlag, name))
        if options.compute_capability:
            config.num_compute_capabilities = len(options.compute_capability)
            for index, text in enumerate(options.compute_capability):
                wanted = getattr(trt.ComputeCapability, capability_name(text))
                config.set_compute_capability(wanted, index)

    def _serialise(self, config: Any, monitor: Any, cache: TimingCache | None) -> Any:
        """The engine, or ``None``; what its kernels took is kept for later builds."""
        with cache or nullcontext():
            # Refused where it was measured on another GPU of this compute capability.
            if cache is not None and not config.set_timing_cache(
                config.create_timing_cache(cache.read()), False
            ):
                config.set_timing_cache(config.create_timing_cache(b""), False)
            with noticing_ctrl_c(monitor):
                plan = self._builder.build_serialized_network(self._network, config)
            if cache is not None and plan is not None:
                cache.write(bytes(config.get_timing_cache().serialize()))
        return plan

    def _errors(self) -> list[Any]:
        return [self._parser.get_error(i) for i in range(self._parser.num_errors)]

    def _refuse_graph(self, onnx: OnnxArtifact) -> NoReturn:
        errors = self._errors()
        words = _parser_words(errors[0]) if errors else "no reason given"
        if len(errors) > 1:
            words += f" (and {len(errors) - 1} more)"
        fix = "export the network without this operator, or load the plugin that brings it"
        raise BuildError(
            f"the parser of {self._name} refused {onnx.path.name}: {words}",
            fix=fix if "plugin" in words.lower() else None,
            log=tuple(str(error) for error in errors),
        )

    def _refuse_build(self, request: BuildRequest) -> NoReturn:
        options, log = request.options, self._log
        words = log.errors[0] if log.errors else "no reason given"
        size = options.workspace_mib
        workspace = "" if size is None else f", workspace {size} MiB"
        raise BuildError(
            f"{self._name} built no engine from {request.onnx.path.name} (batch {request.batch}"
            f"{workspace}): {words}",
            fix=_build_fix(words, self._flavour, options),
            log=tuple(log.errors + log.warnings),
        )


def read_file(path: Path) -> bytes:
    """A file's content; :class:`ArtifactError` where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as err:
        raise ArtifactError(f"cannot read {path}: {err.strerror or err}") from err


def _parser_words(error: Any) -> str:
    """What the parser says, with the ONNX node and the PyTorch module it came from."""
    words = str(error.desc())
    if error.node() < 0:
        return words
    name = error.node_name()
    module = module_of(name)
    of = f", of the PyTorch module {module!r}" if module else ""
    return f"node {name!r} ({error.node_operator()}{of}): {words}"


def _tensor(tensor: Any) -> dict[str, Any]:
    """``shape`` has -1 where a dimension is free."""
    shape = list(tensor.shape)
    return {"name": tensor.name, "dtype": tensor.dtype.name.lower(), "shape": shape}


def _build_fix(words: str, flavour: Flavour, options: BuilderOptions) -> str | None:
    """What helps against a builder's refusal, where its words say."""
    low = words.lower()
    if "memory" in low or "workspace" in low or "no implementation" in low:
        return "raise --workspace-mib, lower the largest batch of --batch, or free GPU memory"
    refits = options.strip_weights or options.refit_engine
    if refits and not flavour.needs_gpu and "cuda_success" in low:
        return (
            "--strip-weights and --refit-engine need a GPU to build; leave them out, or build there"
        )
    return None
