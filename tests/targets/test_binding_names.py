"""The names of the official bindings, version by version, and the code that uses them.

``binding_names.json`` holds every name of four packages (``read_binding_names.py`` writes it).
"""

from __future__ import annotations

import ast
import importlib
from importlib.metadata import PackageNotFoundError, version
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
from fake_bench import RTX, V10_3, every_package, flavour_of, has
from fake_builder import fake_builder
from read_binding_names import names_of
from strict_bindings import NAMES, packages

import cswap_deploy
from cswap_deploy.targets.tensorrt_flavours import COMPAT, FLAVOURS

SOURCES = Path(cswap_deploy.__file__).parent
USERS = (
    "targets/tensorrt_flavours.py", "targets/tensorrt_builder.py", "targets/build_monitor.py",
    "runtime/tensorrt_session.py", "runtime/tensorrt_times.py",
)  # fmt: skip
"""Files that use the bindings."""


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
        named = has(package, "HardwareCompatibilityLevel", COMPAT[level])
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
        if names[:2] == ["self", "_trt"]:
            names = names[1:]
        if len(names) > 1 and names[0] in ("trt", "_trt"):
            found.add(tuple(takewhile(lambda name: not name.startswith("__"), names[1:])))
    return found - {()}


ONLY_SOME = {"ComputeCapability", "CudaGraphStrategy", "EngineInvalidityDiagnostics"}
"""Of RTX alone; the code asks first."""


@pytest.mark.parametrize("source", USERS)
@every_package
def test_every_name_in_the_code_is_one_of_the_bindings(package: str, source: str) -> None:
    found = chains(SOURCES / source)
    assert found
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
