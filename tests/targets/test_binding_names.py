"""The TensorRT adapter and the names of the official bindings, version by version.

``binding_names.json`` holds every name of four packages (``read_binding_names.py`` writes it). The
adapter builds here with stand-ins that have exactly these names; nothing of NVIDIA's is needed.
"""

from __future__ import annotations

import ast
import importlib
import json
import signal
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
from fake_builder import fake_builder, unpack
from filelock import FileLock, Timeout
from read_binding_names import names_of
from small_onnx import SHAPE, write_small_onnx
from strict_bindings import NAMES, packages

import cswap_deploy
from cswap_deploy.errors import (
    ArtifactError,
    BuildError,
    CswapError,
    MissingDependencyError,
    UsageError,
)
from cswap_deploy.progress import Silent
from cswap_deploy.records.engine import BatchRange, EngineArtifact, EngineOptions, OnnxArtifact
from cswap_deploy.targets import tensorrt as adapter
from cswap_deploy.targets.tensorrt import FLAVOURS, Flavour, TensorRt
from cswap_deploy.targets.tensorrt_rtx import TensorRtRtx

TARGETS = {"tensorrt": TensorRt, "tensorrt_rtx": TensorRtRtx}
V10_3, V10, V11, RTX = packages()
BATCH = BatchRange(min=2, opt=4, max=8)
SOURCES = Path(cswap_deploy.__file__).parent
every_package = pytest.mark.parametrize("package", packages())


def flavour_of(package: str) -> Flavour:
    name, _, number = package.partition(" ")
    return FLAVOURS[name, int(number.split(".")[0])]


def has(package: str, *path: str) -> bool:
    """Whether a version has a name: an enum's member, a class's member, or a class."""
    told = NAMES[package]
    members = {title.partition("(")[0]: text for title, text in told["classes"].items()}
    members |= told["enums"]
    if len(path) == 1:
        return path[0] in members or path[0] in told["functions"].split()
    names = [part.partition("=")[0].partition("(")[0] for part in members.get(path[0], "").split()]
    return path[1] in names


class Bench:
    """One version's stand-in, in the place of the package, on a machine with a GPU or without."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, package: str, out: Path) -> None:
        self.package, self.out = package, out
        self.name, _, self.version = package.partition(" ")
        self.trt = fake_builder(package)
        self.script = self.trt.script
        self.target = TARGETS[self.name]()
        monkeypatch.setitem(sys.modules, self.name, self.trt)
        self._patch = monkeypatch
        self.gpu("8.9")

    def gpu(self, capability: str, problem: str = "") -> None:
        """What GPU there is; none with a problem."""
        self.script.compute_capability = capability
        self._patch.setattr(adapter, "cuda_problem", lambda: problem)
        self._patch.setattr(adapter, "compute_capability", lambda: "" if problem else capability)
        name = "NVIDIA L4 (driver 580.65, 23034 MiB)"
        self._patch.setattr(adapter, "list_gpus", lambda: () if problem else (name,))

    def build(self, onnx: OnnxArtifact, progress: Any = None, **options: Any) -> EngineArtifact:
        return self.target.build(
            onnx, batch=BATCH, out_dir=self.out, options=EngineOptions(**options), progress=progress
        )

    @property
    def config(self) -> Any:
        """Of the latest build."""
        return self.script.configs[-1]

    @property
    def flags(self) -> set[str]:
        return {flag.name for flag in self.config._flags}

    @property
    def left(self) -> list[str]:
        """Names of what is in the output folder."""
        return sorted(path.name for path in self.out.iterdir())


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Bench]:
    out = tmp_path / "out"
    out.mkdir()
    return lambda package: Bench(monkeypatch, package, out)


@pytest.fixture(scope="session")
def onnx(tmp_path_factory: pytest.TempPathFactory) -> OnnxArtifact:
    return write_small_onnx(tmp_path_factory.mktemp("small") / "model.onnx")


# --- the names -----------------------------------------------------------------------------------


def test_every_row_of_the_table_was_checked_and_every_checked_version_has_a_row() -> None:
    recorded = {(p.split()[0], int(p.split()[1].split(".")[0])) for p in packages()}
    assert recorded == set(FLAVOURS)


@every_package
def test_the_table_claims_nothing_that_a_version_lacks(package: str) -> None:
    flavour = flavour_of(package)
    assert has(package, "ComputeCapability") == flavour.compute_capabilities
    assert has(package, "IBuilderConfig", "set_compute_capability") == flavour.compute_capabilities
    assert has(package, "NetworkDefinitionCreationFlag", "STRONGLY_TYPED")
    assert has(package, "NetworkDefinitionCreationFlag", "EXPLICIT_BATCH") == (
        flavour.strongly_typed_flag
    )
    if flavour.version_compatible:
        assert has(package, "BuilderFlag", "VERSION_COMPATIBLE")
    for level in flavour.hardware_compat:
        named = has(package, "HardwareCompatibilityLevel", adapter._COMPAT[level])
        assert named or (package, level) == (V10_3, "same-cc")  # asked of the binding, see below


GONE = {
    ("BuilderFlag", "FP16"), ("BuilderFlag", "BF16"), ("BuilderFlag", "INT8"),
    ("BuilderFlag", "FP8"), ("BuilderFlag", "OBEY_PRECISION_CONSTRAINTS"),
    ("IBuilderConfig", "int8_calibrator"), ("IInt8EntropyCalibrator2",),
    ("NetworkDefinitionCreationFlag", "EXPLICIT_BATCH"), ("Builder", "platform_has_fast_fp16"),
    ("ILayer", "precision"), ("OnnxParser", "supports_model"),
}  # fmt: skip
LONG_GONE = {
    ("IBuilderConfig", "max_workspace_size"), ("Builder", "build_engine"),
    ("Builder", "build_cuda_engine"), ("Builder", "max_batch_size"),
    ("IExecutionContext", "execute_async"), ("IExecutionContext", "execute_async_v2"),
    ("IExecutionContext", "set_binding_shape"), ("ICudaEngine", "get_binding_shape"),
    ("ICudaEngine", "num_bindings"), ("ICudaEngine", "max_batch_size"),
}  # fmt: skip


@every_package
def test_what_was_removed_is_not_there_to_be_used(package: str) -> None:
    """So the stand-ins refuse it, and a build that passes with them cannot have used it."""
    assert not [path for path in LONG_GONE if has(package, *path)]
    assert [path for path in GONE if has(package, *path)] == (
        [] if not package.startswith("tensorrt 10") else list(GONE)
    )


def chains(source: Path) -> set[tuple[str, ...]]:
    """Every ``trt.A`` and ``trt.A.B`` in a file."""
    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        parts: list[str] = []
        inner: ast.AST = node
        while isinstance(inner, ast.Attribute):
            parts.append(inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name):
            parts.append(inner.id)
        names = parts[::-1]
        if names[:1] == ["self"] and names[1:2] == ["_trt"]:
            names = names[1:]
        if len(names) > 1 and names[0] in ("trt", "_trt"):
            found.add(tuple(takewhile(lambda name: not name.startswith("__"), names[1:])))
    return found - {()}


ONLY_SOME = {"ComputeCapability", "CudaGraphStrategy", "EngineInvalidityDiagnostics"}
"""Of RTX alone; the code asks first."""


@pytest.mark.parametrize("source", ["targets/tensorrt.py", "runtime/tensorrt_session.py"])
@every_package
def test_every_name_in_the_code_is_one_of_the_bindings(package: str, source: str) -> None:
    found = chains(SOURCES / source)
    assert len(found) > 5
    missing = {chain for chain in found if not has(package, *_known(package, chain))}
    assert missing == {
        chain for chain in found if chain[0] in ONLY_SOME and flavour_of(package).needs_gpu
    }


def _known(package: str, chain: tuple[str, ...]) -> tuple[str, ...]:
    """A chain as ``has`` knows it: a class inside a class is one name."""
    if ".".join(chain[:2]) in NAMES[package]["enums"]:
        return (".".join(chain[:2]), *chain[2:])
    return chain


def test_the_installed_package_has_the_recorded_names() -> None:
    _, _, pinned = RTX.partition(" ")
    try:
        found = version("tensorrt-rtx-cu13-bindings")
    except PackageNotFoundError:
        pytest.skip("tensorrt-rtx-cu13-bindings is not installed")
    if found != pinned:
        pytest.skip(f"tensorrt-rtx-cu13-bindings is {found}, recorded is {pinned}")
    told = {key: NAMES[RTX][key] for key in ("enums", "ordered", "classes", "functions")}
    bindings = importlib.import_module("tensorrt_rtx_bindings")
    assert names_of(bindings) == told
    whole = importlib.import_module("tensorrt_rtx")
    assert whole.__version__ == pinned
    assert not [n for n in told["enums"] if "." not in n and not hasattr(whole, n)]


def test_the_record_names_the_wheels() -> None:
    for package, told in NAMES.items():
        assert package.partition(" ")[2] in told["wheel"]
        assert len(told["sha256"]) == 64


@every_package
def test_the_stand_ins_are_as_strict_as_pybind11(package: str) -> None:
    trt = fake_builder(package)

    class Log(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.words: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            self.words.append(message)

    class Careless(trt.ILogger):
        def __init__(self) -> None:
            pass

    builder = trt.Builder(Log())
    config = builder.create_builder_config()
    for name in ("max_workspace_size", "nonsense", "num_optimization_profiles", "set_flag"):
        with pytest.raises(AttributeError):
            setattr(config, name, 1)
    with pytest.raises(AttributeError, match="build_engine"):
        builder.build_engine(None, config)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = trt.nonsense
    with pytest.raises(TypeError, match="must be called when overriding __init__"):
        Careless()
    with pytest.raises(TypeError):
        builder.create_network(0, 0)
    with pytest.raises(NotImplementedError):
        builder.reset()
    with pytest.raises(TypeError):
        _ = trt.LayerType.CONVOLUTION < trt.LayerType.CAST


# --- building ------------------------------------------------------------------------------------


@every_package
def test_a_plain_build(bench: Callable[[str], Bench], onnx: OnnxArtifact, package: str) -> None:
    b = bench(package)
    b.script.warnings = ["a layer is slow"]
    engine = b.build(onnx)
    network, config = b.script.networks[-1], b.config
    flavour = flavour_of(package)
    # 10 must be told that networks are strongly typed; 11 and RTX know nothing else.
    assert network._flags == (2 if package.startswith("tensorrt 10") else 0)
    assert b.flags == set()
    assert config.profiling_verbosity is b.trt.ProfilingVerbosity.DETAILED
    assert config.builder_optimization_level is None
    assert config.hardware_compatibility_level is None
    assert config._pools == {}
    assert b.script.profiles[-1]._shapes == {"input": ((2, *SHAPE), (4, *SHAPE), (8, *SHAPE))}
    file = (
        f"nvidia-l4-sm89-trt{b.version}-fp32.plan" if flavour.needs_gpu else "model.engine"
    )  # fmt: skip
    assert b.left == sorted([file, "layers.json"])
    found = unpack(engine.path.read_bytes())
    assert found is not None
    assert found[1] == onnx.path.read_bytes()
    layers = json.loads((b.out / "layers.json").read_text())
    assert [layer["name"] for layer in layers["network"]] == [
        "stem/Conv", "stem/Relu", "pool/AveragePool", "Flatten", "blocks.0.attn/Gemm",
    ]  # fmt: skip
    assert layers["network"][0] == {
        "name": "stem/Conv", "type": "convolution",
        "outputs": [{"name": "stem/Conv_out0", "dtype": "float", "shape": [-1, 8]}],
    }  # fmt: skip
    assert layers["inputs"] == [{"name": "input", "dtype": "float", "shape": [-1, *SHAPE]}]
    assert layers["outputs"] == [{"name": "logits", "dtype": "float", "shape": [-1, 5]}]
    assert layers["profile"] == [[size, *SHAPE] for size in (2, 4, 8)]
    assert layers["engine"] == {"Layers": ["fused"]}
    assert engine.versions == {b.target.name: b.version}
    assert engine.runnable
    assert engine.compute_capability == ("8.9" if flavour.needs_gpu else "")
    assert engine.extra_files == ("layers.json",)
    assert engine.notes == (f"{b.target.name} warns: a layer is slow",)
    assert b.script.escaped == []


@every_package
def test_every_option_that_a_version_has(
    bench: Callable[[str], Bench], onnx: OnnxArtifact, package: str
) -> None:
    b, flavour = bench(package), flavour_of(package)
    options: dict[str, Any] = {
        "workspace_mib": 512, "optimization_level": 5, "strip_weights": True, "refit_engine": True,
    }  # fmt: skip
    if flavour.version_compatible:
        options["version_compatible"] = True
    if flavour.compute_capabilities:
        options["compute_capability"] = ("8.6", "12.0")
    levels = [
        level
        for level in flavour.hardware_compat
        if has(package, "HardwareCompatibilityLevel", adapter._COMPAT[level])
    ]
    for level in levels or ["none"]:
        engine = b.build(onnx, **options, hardware_compat=level)
        config = b.config
        assert config._pools == {"WORKSPACE": 512 * 2**20}
        assert config.builder_optimization_level == 5
        expected = {"STRIP_PLAN", "REFIT"}
        assert b.flags == expected | (
            {"VERSION_COMPATIBLE"} if flavour.version_compatible else set()
        )
        if level != "none":
            wanted = getattr(b.trt.HardwareCompatibilityLevel, adapter._COMPAT[level])
            assert config.hardware_compatibility_level is wanted
        capabilities = [capability.name for capability in config._capabilities]
        assert capabilities == (["SM86", "SM120"] if flavour.compute_capabilities else [])
        assert engine.options == EngineOptions(**options, hardware_compat=level)
        # An engine that brings code of its own is inspected too.
        assert "engine" in json.loads((b.out / "layers.json").read_text())
    assert levels == {
        V10_3: ["ampere+"], V10: ["ampere+", "same-cc"], V11: ["ampere+", "same-cc"], RTX: [],
    }[package]  # fmt: skip


@pytest.mark.parametrize(
    ("package", "options", "words", "fix"),
    [
        (V10_3, {"hardware_compat": "same-cc"}, "has no --hardware-compat same-cc", None),
        (V10, {"compute_capability": ("8.9",)}, "takes no --compute-capability", "ampere+"),
        (V11, {"compute_capability": ("8.9",)}, "takes no --compute-capability", "ampere+"),
        (RTX, {"hardware_compat": "ampere+"}, "has no --hardware-compat", "--compute-capability"),
        (RTX, {"version_compatible": True}, "has no --version-compatible", "build again for each"),
        (RTX, {"compute_capability": ("9.0",)}, "capability 9.0; known: 12.0, 12.1, 7.5", None),
    ],
)
def test_an_option_that_a_version_lacks_is_refused_before_anything_is_built(
    bench: Callable[[str], Bench],
    onnx: OnnxArtifact,
    package: str,
    options: dict[str, Any],
    words: str,
    fix: str | None,
) -> None:
    b = bench(package)
    with pytest.raises(UsageError) as caught:
        b.build(onnx, **options)
    assert caught.value.exit_code == 2
    assert str(caught.value).startswith(f"{b.target.name} {b.version} ")
    assert words in str(caught.value)
    assert (caught.value.fix is None) == (fix is None)
    assert (fix or "") in str(caught.value)
    assert b.trt.journal == []
    assert b.left == []


@pytest.mark.parametrize(("level", "bound"), [("none", "8.9"), ("same-cc", "8.9"), ("ampere+", "")])
def test_what_gpu_an_engine_is_bound_to(
    bench: Callable[[str], Bench], onnx: OnnxArtifact, level: str, bound: str
) -> None:
    assert bench(V11).build(onnx, hardware_compat=level).compute_capability == bound


@every_package
def test_an_engine_without_weights_is_not_loaded_without_its_graph(
    bench: Callable[[str], Bench], onnx: OnnxArtifact, package: str
) -> None:
    b = bench(package)
    engine = b.build(onnx, strip_weights=True)
    assert (engine.stripped, engine.runnable, engine.reason) == (True, True, "")
    with pytest.raises(ArtifactError, match="is without weights: its graph is needed too"):
        b.target.load(engine)


def test_without_a_gpu(bench: Callable[[str], Bench], onnx: OnnxArtifact) -> None:
    b = bench(V11)
    b.gpu("", "no NVIDIA driver: libcuda.so.1")
    with pytest.raises(MissingDependencyError) as caught:
        b.build(onnx)
    assert str(caught.value) == (
        "tensorrt 11.4.0.106 builds its engines on the GPU: no NVIDIA driver: libcuda.so.1\n"
        "  fix: build on the device, or use --target tensorrt-rtx, which needs no GPU"
    )
    assert caught.value.exit_code == 4
    assert (b.trt.journal, b.left) == ([], [])


def test_rtx_needs_no_gpu(bench: Callable[[str], Bench], onnx: OnnxArtifact) -> None:
    b = bench(RTX)
    b.gpu("", "no NVIDIA driver")
    engine = b.build(onnx)
    assert (engine.runnable, engine.reason) == (False, "no NVIDIA driver")
    assert engine.device.startswith("built ahead of time for compute capability 8.0, 8.6")
    assert "engine" not in json.loads((b.out / "layers.json").read_text())


def test_an_engine_for_other_gpus_is_built_and_not_run(
    bench: Callable[[str], Bench], onnx: OnnxArtifact
) -> None:
    b = bench(RTX)
    engine = b.build(onnx, compute_capability=("8.6", "12.0"))
    assert not engine.runnable
    assert engine.reason == "built for compute capability 8.6, 12.0, this GPU has 8.9"
    assert b.build(onnx, compute_capability=("8.6", "8.9")).runnable


@every_package
def test_the_gpu_is_in_the_key(bench: Callable[[str], Bench], package: str) -> None:
    b = bench(package)
    first = b.target.here()
    b.gpu("12.0")
    assert b.target.here() != first
    b.gpu("", "no NVIDIA driver")
    assert b.target.here()["problem"] == "no NVIDIA driver"


@pytest.mark.parametrize(
    ("package", "number", "known", "fix"),
    [
        (V11, "12.0.0.1", "10, 11", "pip install 'tensorrt==11.*'"),
        (V10, "8.6.1", "10, 11", "pip install 'tensorrt==11.*'"),
        (RTX, "2.0.0.5", "1", "pip install 'tensorrt-rtx==1.*'"),
    ],
)
def test_an_unknown_major_version(
    bench: Callable[[str], Bench],
    onnx: OnnxArtifact,
    package: str,
    number: str,
    known: str,
    fix: str,
) -> None:
    b = bench(package)
    b.trt.__version__ = number
    for ask in (lambda: b.build(onnx), lambda: b.target.check_ops(onnx.path)):
        with pytest.raises(MissingDependencyError) as caught:
            ask()
        assert str(caught.value) == (
            f"{b.name} {number} is not supported; supported major versions: {known}\n  fix: {fix}"
        )
        assert caught.value.exit_code == 4
    assert b.left == []


# --- the timing cache ----------------------------------------------------------------------------


@pytest.mark.parametrize("package", [V10_3, V10, V11])
def test_what_was_measured_is_kept_and_used_again(
    bench: Callable[[str], Bench], onnx: OnnxArtifact, package: str, tmp_path: Path
) -> None:
    b = bench(package)
    file = tmp_path / "store" / "timing" / f"trt{b.version}-sm8.9.cache"
    seen = []

    def watch() -> None:
        try:
            FileLock(file.with_suffix(".lock")).acquire(timeout=0)
        except Timeout:
            seen.append("locked")

    b.script.while_building = [watch]
    b.build(onnx)
    assert seen == ["locked"]
    assert file.read_bytes() == b"NVIDIA L4|measured"
    b.build(onnx)
    given = [arguments for _, name, arguments in b.trt.journal if name == "create_timing_cache"]
    assert given == [(b"",), (b"NVIDIA L4|measured",)]
    with FileLock(file.with_suffix(".lock")).acquire(timeout=0):
        pass


def test_figures_of_another_gpu_are_not_used(
    bench: Callable[[str], Bench], onnx: OnnxArtifact, tmp_path: Path
) -> None:
    """Two models of one compute capability share a file; TensorRT refuses the other's."""
    b = bench(V11)
    b.build(onnx)
    b.script.device = "NVIDIA L40S"
    b.build(onnx)
    (file,) = (tmp_path / "store" / "timing").glob("*.cache")
    assert file.read_bytes() == b"NVIDIA L40S|measured"


def test_the_cache_lies_in_the_store_that_was_asked_for(
    bench: Callable[[str], Bench], onnx: OnnxArtifact, tmp_path: Path
) -> None:
    b = bench(V11)
    b.target.build(onnx, batch=BATCH, out_dir=b.out, store=tmp_path / "mine")
    assert (tmp_path / "mine" / "timing" / f"trt{b.version}-sm8.9.cache").is_file()
    assert not (tmp_path / "store").exists()


def test_rtx_keeps_no_timing_cache(
    bench: Callable[[str], Bench], onnx: OnnxArtifact, tmp_path: Path
) -> None:
    b = bench(RTX)
    b.build(onnx)
    assert not [name for _, name, _ in b.trt.journal if "timing_cache" in name]
    assert not (tmp_path / "store" / "timing").exists()


def test_a_build_that_failed_leaves_the_cache_and_the_lock_alone(
    bench: Callable[[str], Bench], onnx: OnnxArtifact, tmp_path: Path
) -> None:
    b = bench(V11)
    b.build(onnx)
    (file,) = (tmp_path / "store" / "timing").glob("*.cache")
    before = file.read_bytes()
    b.script.build_errors = ["Error Code 9: API Usage Error"]
    with pytest.raises(BuildError):
        b.build(onnx)
    assert file.read_bytes() == before
    with FileLock(file.with_suffix(".lock")).acquire(timeout=0):
        pass


def test_a_cache_that_cannot_be_kept_costs_time_and_no_more(
    bench: Callable[[str], Bench],
    onnx: OnnxArtifact,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CSWAP_STORE", str(tmp_path / "file" / "store"))
    assert bench(V11).build(onnx).runnable


# --- progress and Ctrl-C -------------------------------------------------------------------------


class Told(Silent):
    """Keeps what it is told, and may be interrupted."""

    def __init__(self, interrupt: str = "") -> None:
        self.lines: list[str] = []
        self._interrupt = interrupt

    def _keep(self, name: str, *values: object) -> None:
        self.lines.append(" ".join(map(str, (name, *values))))
        if name == self._interrupt:
            raise KeyboardInterrupt

    def begin(self, what: str, total: int) -> None:
        self._keep("begin", what, total)

    def advance(self, steps: int) -> None:
        self._keep("advance", steps)

    def end(self) -> None:
        self._keep("end")


@every_package
def test_the_builders_steps_reach_progress(
    bench: Callable[[str], Bench], onnx: OnnxArtifact, package: str
) -> None:
    b, told = bench(package), Told()
    b.build(onnx, told)
    assert told.lines == ["begin timing tactics 4", *["advance 1"] * 4, "end"]
    assert b.script.escaped == []


@pytest.mark.parametrize("where", ["begin", "advance", "end"])
@every_package
def test_ctrl_c_while_progress_is_told(
    bench: Callable[[str], Bench], onnx: OnnxArtifact, package: str, where: str
) -> None:
    """The bindings print what leaves a callback and build on: nothing may leave one."""
    b = bench(package)
    with pytest.raises(KeyboardInterrupt):
        b.build(onnx, Told(interrupt=where))
    assert b.script.escaped == []
    assert b.left == []


@pytest.mark.parametrize("callback", ["log", "phase_start", "step_complete", "phase_finish"])
@every_package
def test_a_real_sigint_ends_the_build_whatever_callback_it_meets(
    bench: Callable[[str], Bench], onnx: OnnxArtifact, package: str, callback: str
) -> None:
    b = bench(package)
    b.script.ctrl_c_at = callback
    with pytest.raises(KeyboardInterrupt):
        b.build(onnx)
    assert b.script.escaped == []
    assert b.left == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert b.build(onnx).runnable


def test_a_sigint_handler_of_the_caller_stays(
    bench: Callable[[str], Bench], onnx: OnnxArtifact
) -> None:
    b, seen = bench(V11), []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append("mine"))
    try:
        b.script.ctrl_c_at = "log"
        b.build(onnx)
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == ["mine"]


# --- refusals ------------------------------------------------------------------------------------

OUT_OF_MEMORY = (
    "[virtualMemoryBuffer.cpp::resizePhysical::154] Error Code 2: OutOfMemory (Requested size was "
    "34359738368 bytes.)"
)
NO_TACTIC = (
    "[optimizer.cpp::computeCosts::4126] Error Code 10: Internal Error (Could not find any "
    "implementation for node {ForeignNode[stem/Conv + stem/Relu]}, insufficient workspace.)"
)


@pytest.mark.parametrize("words", [OUT_OF_MEMORY, NO_TACTIC], ids=["memory", "workspace"])
@every_package
def test_a_builder_without_memory(
    bench: Callable[[str], Bench], onnx: OnnxArtifact, package: str, words: str
) -> None:
    b = bench(package)
    b.script.build_errors = [words, "Error Code 4: something that follows"]
    b.script.warnings = ["tactics were skipped"]
    with pytest.raises(BuildError) as caught:
        b.build(onnx, workspace_mib=64)
    assert str(caught.value) == (
        f"{b.target.name} {b.version} built no engine from model.onnx (batch 2:4:8, workspace "
        f"64 MiB): {words}\n"
        "  fix: raise --workspace-mib, lower the largest batch of --batch, or free GPU memory"
    )
    assert caught.value.exit_code == 5
    assert caught.value.log == (
        words, "Error Code 4: something that follows", "tactics were skipped",
    )  # fmt: skip
    assert b.left == []


def test_another_refusal_has_no_made_up_fix(
    bench: Callable[[str], Bench], onnx: OnnxArtifact
) -> None:
    b = bench(V11)
    b.script.build_errors = ["Error Code 9: API Usage Error (Target GPU SM 61 is not supported)"]
    with pytest.raises(BuildError) as caught:
        b.build(onnx)
    assert caught.value.fix is None


def test_stripping_with_rtx_needs_a_gpu(bench: Callable[[str], Bench], onnx: OnnxArtifact) -> None:
    b = bench(RTX)
    b.gpu("", "no NVIDIA driver")
    b.script.build_errors = ["Error Code 2: Assertion status == CUDA_SUCCESS failed."]
    with pytest.raises(BuildError) as caught:
        b.build(onnx, strip_weights=True)
    assert caught.value.fix == (
        "--strip-weights and --refit-engine need a GPU to build; leave them out, or build there"
    )


GEMM = {
    "node": 4, "name": "blocks.0.attn/Gemm", "operator": "Gemm", "code": "UNSUPPORTED_NODE",
    "desc": "Assertion failed: alpha must be a scalar",
}  # fmt: skip
WOBBLE = {
    "node": 1, "name": "stem/Wobble", "operator": "Wobble",
    "desc": "Plugin not found, are the plugin name, version, and namespace correct?",
}  # fmt: skip
NO_GRAPH = {"desc": "Failed to parse the ONNX model.", "code": "MODEL_DESERIALIZE_FAILED"}


@pytest.mark.parametrize(
    ("errors", "words", "fix"),
    [
        (
            [GEMM],
            "node 'blocks.0.attn/Gemm' (Gemm, of the PyTorch module 'blocks.0.attn'): Assertion "
            "failed: alpha must be a scalar",
            None,
        ),
        (
            [WOBBLE, GEMM],
            "node 'stem/Wobble' (Wobble, of the PyTorch module 'stem'): Plugin not found, are the "
            "plugin name, version, and namespace correct? (and 1 more)",
            "export the network without this operator, or load the plugin that brings it",
        ),
        ([GEMM | {"name": "Gemm"}], "node 'Gemm' (Gemm): Assertion failed: alpha must", None),
        ([NO_GRAPH], "Failed to parse the ONNX model.", None),
    ],
    ids=["node", "plugin", "network-itself", "damaged"],
)
@every_package
def test_the_parsers_words_name_the_node_and_the_module(
    bench: Callable[[str], Bench],
    onnx: OnnxArtifact,
    package: str,
    errors: list[dict[str, Any]],
    words: str,
    fix: str | None,
) -> None:
    b = bench(package)
    b.script.parser_errors = errors
    with pytest.raises(BuildError) as caught:
        b.build(onnx)
    start = f"the parser of {b.target.name} {b.version} refused model.onnx: {words}"
    assert str(caught.value).startswith(start)
    assert caught.value.fix == fix
    assert caught.value.exit_code == 5
    assert len(caught.value.log) == len(errors)
    assert b.left == []


@every_package
def test_what_is_not_supported_is_told_without_a_gpu(
    bench: Callable[[str], Bench], onnx: OnnxArtifact, package: str
) -> None:
    b = bench(package)
    b.gpu("", "no NVIDIA driver")
    assert b.target.check_ops(onnx.path) == ()
    b.script.parser_errors = [WOBBLE, GEMM, WOBBLE]
    assert b.target.check_ops(onnx.path) == (
        "node 'stem/Wobble' (Wobble, of the PyTorch module 'stem'): Plugin not found, are the "
        "plugin name, version, and namespace correct?",
        "node 'blocks.0.attn/Gemm' (Gemm, of the PyTorch module 'blocks.0.attn'): Assertion "
        "failed: alpha must be a scalar",
    )


@every_package
def test_a_library_that_makes_no_builder(
    bench: Callable[[str], Bench], onnx: OnnxArtifact, package: str
) -> None:
    b = bench(package)
    b.script.makes_builder = False
    with pytest.raises(MissingDependencyError) as caught:
        b.build(onnx)
    assert str(caught.value) == (
        f"{b.target.name} {b.version} makes no builder: CUDA initialization failure: 35"
    )


def test_a_graph_that_is_gone(bench: Callable[[str], Bench], onnx: OnnxArtifact) -> None:
    gone = onnx.model_copy(update={"path": Path("/nowhere/model.onnx")})
    with pytest.raises(CswapError, match=r"cannot read /nowhere/model\.onnx: No such file") as told:
        bench(V11).build(gone)
    assert told.value.exit_code == 6


def test_the_options_are_those_that_this_file_tries() -> None:
    """A new option must be tried with every version too."""
    assert set(EngineOptions.model_fields) == {
        "workspace_mib", "optimization_level", "hardware_compat", "version_compatible",
        "compute_capability", "strip_weights", "refit_engine",
    }  # fmt: skip
