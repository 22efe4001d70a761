"""TensorRT 10, TensorRT 11 and TensorRT for RTX: three packages with nearly one API.

Where they differ stands in one table, :data:`FLAVOURS`. Nothing here names a type, a flag or a
method that one of them lacks without asking the table first; the tests hold every name that is
used against the official bindings' own.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from cswap_deploy.errors import (
    ArtifactError,
    BuildError,
    MissingDependencyError,
    UsageError,
)
from cswap_deploy.export.names import module_of
from cswap_deploy.measure.device import list_gpus
from cswap_deploy.progress import Progress, Silent
from cswap_deploy.records.engine import BatchRange, EngineArtifact, EngineOptions, OnnxArtifact
from cswap_deploy.records.value import sha256_file
from cswap_deploy.runtime.host import compute_capability, cuda_problem
from cswap_deploy.runtime.tensorrt_session import (
    TensorRtSession,
    import_tensorrt,
    make_logger,
)
from cswap_deploy.targets import Int8, Session, check_digest
from cswap_deploy.targets.build_monitor import make_monitor, noticing_ctrl_c
from cswap_deploy.targets.timing_cache import TimingCache

_COMPAT = {"ampere+": "AMPERE_PLUS", "same-cc": "SAME_COMPUTE_CAPABILITY"}
LAYERS = "layers.json"


@dataclass(frozen=True, slots=True)
class Flavour:
    """What one package has, and what the others have instead."""

    strongly_typed_flag: bool
    """Networks are strongly typed only if asked; 11 knows nothing else."""
    hardware_compat: tuple[str, ...]
    """Levels of ``EngineOptions.hardware_compat`` beside ``none``."""
    version_compatible: bool
    compute_capabilities: bool
    """Engines are built ahead of time, for GPUs that are named."""
    timing_cache: bool
    needs_gpu: bool
    """To build."""


FLAVOURS: dict[tuple[str, int], Flavour] = {
    ("tensorrt", 10): Flavour(
        strongly_typed_flag=True, hardware_compat=("ampere+", "same-cc"), version_compatible=True,
        compute_capabilities=False, timing_cache=True, needs_gpu=True,
    ),
    ("tensorrt", 11): Flavour(
        strongly_typed_flag=False, hardware_compat=("ampere+", "same-cc"), version_compatible=True,
        compute_capabilities=False, timing_cache=True, needs_gpu=True,
    ),
    # Timing caches are no-ops since 1.2; a level of hardware compatibility is met with a warning;
    # version compatibility wants a lean runtime that the package does not bring.
    ("tensorrt_rtx", 1): Flavour(
        strongly_typed_flag=False, hardware_compat=(), version_compatible=False,
        compute_capabilities=True, timing_cache=False, needs_gpu=False,
    ),
}  # fmt: skip
"""(package, major version) -> its ways. Checked with the bindings of 10.3 (JetPack 6), 10.16, 11.4
and RTX 1.7."""


class TensorRt:
    """An engine for the GPU of the machine that builds it. TensorRT 10 and 11."""

    name = "tensorrt"
    module = "tensorrt"
    extra = "trt"
    own_int8 = False

    def check(self, options: EngineOptions, *, int8: bool) -> None:
        """See :meth:`cswap_deploy.targets.Target.check`."""
        trt = self._import()
        flavour = self.flavour(trt)
        self._check_options(trt, flavour, options)
        problem = cuda_problem()
        if problem and flavour.needs_gpu:
            raise MissingDependencyError(
                f"{self.name} {trt.__version__} builds its engines on the GPU: {problem}",
                fix="build on the device, or use --target tensorrt-rtx, which needs no GPU",
            )

    def here(self) -> dict[str, str]:
        """The GPU; an engine that is built ahead of time runs on some and not on others."""
        return {
            "problem": cuda_problem(),
            "compute_capability": compute_capability(),
            "gpus": ", ".join(list_gpus()),
        }

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
        """Compile the graph; the dtypes in the graph are the dtypes of the engine.

        Args:
            onnx: Simplified graph with a dynamic batch axis.
            batch: Smallest, tuned-for and largest batch (samples): one optimisation profile.
            out_dir: Existing folder; the engine and ``layers.json`` are written there.
            options: For the builder. Beside the engine, ``layers.json`` holds its inputs, outputs,
                profile and layers.
            int8: Not used: int8 is in the graph, as Q/DQ nodes.
            progress: Told of the builder's steps; Ctrl-C ends the build at the next one.
            store: Root of the store, which keeps the timing cache.

        Returns:
            The engine; runnable where a GPU is there.

        Raises:
            UsageError: This package does not have one of the options.
            MissingDependencyError: The package is absent or does not load, or there is no GPU and
                the builder needs one.
            BuildError: The parser or the builder refused the graph; ``err.log`` has its words.

        Source:
            TensorRT documentation, "Python API"; "Working with Dynamic Shapes"; "Strongly Typed
            Networks".
        """
        options = options if options is not None else EngineOptions()
        self.check(options, int8=False)
        trt = self._import()
        flavour = self.flavour(trt)
        problem, capability = cuda_problem(), compute_capability()
        named = options.compute_capability
        reason = problem
        if not problem and named and capability not in named:
            reason = f"built for compute capability {', '.join(named)}, this GPU has {capability}"
        logger = make_logger(trt)
        start = time.perf_counter()
        plan, layers = self._compile(
            trt, flavour, logger, onnx, batch, options, progress or Silent(), capability, store
        )
        seconds = time.perf_counter() - start
        path = out_dir / self._file_name(trt, flavour, onnx, capability)
        path.write_bytes(plan)
        if not problem:
            layers |= _inspect(trt, logger, plan, options)
        (out_dir / LAYERS).write_text(json.dumps(layers, indent=1))
        bound = not flavour.compute_capabilities and options.hardware_compat != "ampere+"
        return EngineArtifact(
            target=self.name,
            path=path,
            sha256=sha256_file(path),
            size_bytes=path.stat().st_size,
            build_seconds=seconds,
            precision=onnx.precision,
            runnable=not reason,
            reason=reason,
            versions=self.versions(),
            device=self._device(flavour, options),
            batch=batch,
            options=options,
            compute_capability=capability if bound else "",
            stripped=options.strip_weights,
            extra_files=(LAYERS,),
            notes=tuple(f"{self.name} warns: {words}" for words in logger.warnings),
        )

    def load(
        self, engine: EngineArtifact, *, threads: int | None = None, onnx: Path | None = None
    ) -> Session:
        """Deserialise the engine on this machine's GPU.

        Args:
            engine: What ``build`` returned.
            threads: Not used.
            onnx: The graph that it was built from; needed where the engine is stripped.

        Returns:
            A session that copies in, runs and copies out.

        Raises:
            MissingDependencyError: There is no GPU, no driver, or no pycuda.
            ArtifactError: The engine's file is absent or altered, or is for another version or GPU,
                or it is stripped and the graph is not there or is another one.
        """
        check_digest(engine)
        weights = None
        if engine.stripped:
            if onnx is None:
                raise ArtifactError(f"{engine.path} is without weights: its graph is needed too")
            weights = _read(onnx)
        return TensorRtSession(
            engine.path.read_bytes(),
            target=self.name,
            version=engine.versions[self.name],
            compute_capability=engine.compute_capability,
            version_compatible=engine.options is not None and engine.options.version_compatible,
            weights=weights,
        )

    def versions(self) -> dict[str, str]:
        """The package's version.

        Raises:
            MissingDependencyError: The package is absent or does not load.
        """
        return {self.name: str(self._import().__version__)}

    def check_ops(self, onnx: Path) -> tuple[str, ...]:
        """Ask the parser whether it supports a graph; nothing is built and no GPU is needed.

        Args:
            onnx: An ONNX file.

        Returns:
            The parser's errors, each with the node and its PyTorch module; empty where all is
            supported.

        Raises:
            MissingDependencyError: The package is absent or does not load.
            ArtifactError: The file cannot be read.
        """
        trt = self._import()
        logger = make_logger(trt)
        builder = self._builder(trt, logger)
        network = builder.create_network(self._creation_flags(trt, self.flavour(trt)))
        parser = trt.OnnxParser(network, logger)
        graph = _read(onnx)
        if parser.supports_model_v2(graph):
            return ()
        # Its list of subgraphs says less: what stands beside the culprit counts as unsupported too.
        errors = [_parser_words(parser.get_error(i)) for i in range(parser.num_errors)]
        return tuple(dict.fromkeys(errors)) or ("not supported, no reason given",)

    def flavour(self, trt: Any) -> Flavour:
        """This package's row of the table.

        Raises:
            MissingDependencyError: It is a version that this project does not know.
        """
        major = int(str(trt.__version__).partition(".")[0])
        found = FLAVOURS.get((self.module, major))
        if found is None:
            known = ", ".join(str(m) for name, m in FLAVOURS if name == self.module)
            raise MissingDependencyError(
                f"{self.module} {trt.__version__} is not supported; supported major versions: "
                f"{known}",
                fix=f"pip install '{self.module.replace('_', '-')}=={known.split(', ')[-1]}.*'",
            )
        return found

    def _check_options(self, trt: Any, flavour: Flavour, options: EngineOptions) -> None:
        """Refuse what this package does not have, rather than leave it out silently."""
        what = f"{self.name} {trt.__version__}"
        level = options.hardware_compat
        if level != "none" and (
            level not in flavour.hardware_compat
            or not hasattr(trt.HardwareCompatibilityLevel, _COMPAT[level])
        ):
            fix = "--compute-capability" if flavour.compute_capabilities else None
            raise UsageError(f"{what} has no --hardware-compat {level}", fix=fix)
        if options.version_compatible and not flavour.version_compatible:
            raise UsageError(
                f"{what} has no --version-compatible: its engines run with its own version",
                fix="build again for each version of the runtime",
            )
        if options.compute_capability and not flavour.compute_capabilities:
            raise UsageError(
                f"{what} builds for the GPU at hand and takes no --compute-capability",
                fix="--hardware-compat ampere+, or --target tensorrt-rtx",
            )
        for capability in options.compute_capability:
            self._capability(trt, capability)

    def _capability(self, trt: Any, text: str) -> Any:
        name = f"SM{text.replace('.', '')}"
        if not hasattr(trt.ComputeCapability, name):
            known = sorted(n[2:] for n in vars(trt.ComputeCapability) if n.startswith("SM"))
            raise UsageError(
                f"{self.name} {trt.__version__} does not build for compute capability {text}; "
                f"known: {', '.join(f'{n[:-1]}.{n[-1]}' for n in known)}"
            )
        return getattr(trt.ComputeCapability, name)

    def _device(self, flavour: Flavour, options: EngineOptions) -> str:
        if not flavour.compute_capabilities:
            return ", ".join(list_gpus())
        wanted = ", ".join(options.compute_capability) or "8.0, 8.6, 8.9, 12.0 and later"
        return f"built ahead of time for compute capability {wanted}"

    def _file_name(self, trt: Any, flavour: Flavour, onnx: OnnxArtifact, capability: str) -> str:
        if flavour.compute_capabilities:
            return "model.engine"
        gpus = list_gpus()
        gpu = gpus[0].partition(" (")[0].replace(" ", "-").lower() if gpus else "gpu"
        return f"{gpu}-sm{capability.replace('.', '')}-trt{trt.__version__}-{onnx.precision}.plan"

    def _import(self) -> Any:
        return import_tensorrt(self.module, self.extra)

    def _builder(self, trt: Any, logger: Any) -> Any:
        try:
            return trt.Builder(logger)
        except TypeError as err:  # how pybind11 reports that the library made none
            words = logger.errors[0] if logger.errors else str(err)
            raise MissingDependencyError(
                f"{self.name} {trt.__version__} makes no builder: {words}"
            ) from err

    @staticmethod
    def _creation_flags(trt: Any, flavour: Flavour) -> int:
        if not flavour.strongly_typed_flag:
            return 0
        return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)

    def _compile(
        self,
        trt: Any,
        flavour: Flavour,
        logger: Any,
        onnx: OnnxArtifact,
        batch: BatchRange,
        options: EngineOptions,
        progress: Progress,
        capability: str,
        store: Path | None,
    ) -> tuple[bytes, dict[str, Any]]:
        builder = self._builder(trt, logger)
        network = builder.create_network(self._creation_flags(trt, flavour))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse(_read(onnx.path)):
            self._refuse_graph(trt, onnx, [parser.get_error(i) for i in range(parser.num_errors)])
        config = builder.create_builder_config()
        profile = builder.create_optimization_profile()
        tensor = network.get_input(0)
        rest = tuple(tensor.shape)[1:]
        shapes = [(size, *rest) for size in (batch.min, batch.opt, batch.max)]
        profile.set_shape(tensor.name, *shapes)
        config.add_optimization_profile(profile)
        self._configure(trt, flavour, config, options)
        monitor = make_monitor(trt, progress)
        config.progress_monitor = monitor
        layers = {
            "inputs": [_tensor(network.get_input(i)) for i in range(network.num_inputs)],
            "outputs": [_tensor(network.get_output(i)) for i in range(network.num_outputs)],
            "profile": [list(shape) for shape in profile.get_shape(tensor.name)],
            "network": _network_layers(network),
        }
        if flavour.timing_cache:
            with TimingCache(f"trt{trt.__version__}-sm{capability}", store) as cache:
                # Refused where it was measured on another GPU of this compute capability.
                if not config.set_timing_cache(config.create_timing_cache(cache.read()), False):
                    config.set_timing_cache(config.create_timing_cache(b""), False)
                with noticing_ctrl_c(monitor):
                    plan = builder.build_serialized_network(network, config)
                if plan is not None:
                    cache.write(bytes(config.get_timing_cache().serialize()))
        else:
            with noticing_ctrl_c(monitor):
                plan = builder.build_serialized_network(network, config)
        if monitor.interrupted:
            raise KeyboardInterrupt
        if plan is None:
            words = logger.errors[0] if logger.errors else "no reason given"
            raise BuildError(
                f"{self.name} {trt.__version__} built no engine from {onnx.path.name} "
                f"(batch {batch}{_workspace(options)}): {words}",
                fix=_build_fix(words, flavour, options),
                log=tuple(logger.errors + logger.warnings),
            )
        return bytes(plan), layers

    def _configure(self, trt: Any, flavour: Flavour, config: Any, options: EngineOptions) -> None:
        flag = trt.BuilderFlag
        # Names and types of the layers in the engine, which the report shows.
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if options.workspace_mib is not None:
            config.set_memory_pool_limit(
                trt.MemoryPoolType.WORKSPACE, options.workspace_mib * 2**20
            )
        if options.optimization_level is not None:
            config.builder_optimization_level = options.optimization_level
        if options.hardware_compat != "none":
            config.hardware_compatibility_level = getattr(
                trt.HardwareCompatibilityLevel, _COMPAT[options.hardware_compat]
            )
        for wanted, name in (
            (options.version_compatible, "VERSION_COMPATIBLE"),
            (options.strip_weights, "STRIP_PLAN"),
            (options.refit_engine, "REFIT"),
        ):
            if wanted:
                config.set_flag(getattr(flag, name))
        if options.compute_capability:
            config.num_compute_capabilities = len(options.compute_capability)
            for index, text in enumerate(options.compute_capability):
                config.set_compute_capability(self._capability(trt, text), index)

    def _refuse_graph(self, trt: Any, onnx: OnnxArtifact, errors: list[Any]) -> NoReturn:
        words = _parser_words(errors[0]) if errors else "no reason given"
        if len(errors) > 1:
            words += f" (and {len(errors) - 1} more)"
        plugin = "plugin" in words.lower()
        raise BuildError(
            f"the parser of {self.name} {trt.__version__} refused {onnx.path.name}: {words}",
            fix="export the network without this operator, or load the plugin that brings it"
            if plugin
            else None,
            log=tuple(str(error) for error in errors),
        )


def _parser_words(error: Any) -> str:
    """What the parser says, with the ONNX node and the PyTorch module it came from."""
    at = ""
    if error.node() >= 0:
        name = error.node_name()
        module = module_of(name)
        at = f"node {name!r} ({error.node_operator()}"
        at += f", of the PyTorch module {module!r}): " if module else "): "
    return at + str(error.desc())


def _network_layers(network: Any) -> list[dict[str, Any]]:
    """The layers as parsed; an engine's own, fused ones are known only where it can run."""
    layers = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        outputs = [layer.get_output(k) for k in range(layer.num_outputs)]
        layers.append(
            {
                "name": layer.name,
                "type": layer.type.name.lower(),
                "outputs": [_tensor(output) for output in outputs],
            }
        )
    return layers


def _tensor(tensor: Any) -> dict[str, Any]:
    """``shape`` has -1 where a dimension is free."""
    return {
        "name": tensor.name, "dtype": tensor.dtype.name.lower(), "shape": list(tensor.shape)
    }  # fmt: skip


def _inspect(trt: Any, logger: Any, plan: bytes, options: EngineOptions) -> dict[str, Any]:
    """The engine's layers with the tactics chosen, as its inspector tells them."""
    runtime = trt.Runtime(logger)
    if options.version_compatible:  # it brings code of its own, made here a moment ago
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:  # for another GPU, or stripped; loading it says why
        return {}
    told = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return {"engine": json.loads(told)}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as err:
        raise ArtifactError(f"cannot read {path}: {err.strerror or err}") from err


def _workspace(options: EngineOptions) -> str:
    return "" if options.workspace_mib is None else f", workspace {options.workspace_mib} MiB"


def _build_fix(words: str, flavour: Flavour, options: EngineOptions) -> str | None:
    """What helps against a builder's refusal, where its words say."""
    low = words.lower()
    if "memory" in low or "workspace" in low or "no implementation" in low:
        return "raise --workspace-mib, lower the largest batch of --batch, or free GPU memory"
    if (
        not flavour.needs_gpu
        and "cuda_success" in low
        and (options.strip_weights or options.refit_engine)
    ):
        return (
            "--strip-weights and --refit-engine need a GPU to build; leave them out, or build there"
        )
    return None
