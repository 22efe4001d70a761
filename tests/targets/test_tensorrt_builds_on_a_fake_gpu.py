"""What the TensorRT adapters build and record, with a FAKE builder and a FAKE GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from fake_bench import (
    NO_DRIVER,
    RTX,
    V10,
    V10_3,
    V11,
    Bench,
    every_package,
    flavour_of,
    has,
)
from fake_builder import unpack
from small_onnx import SHAPE

from cswap_deploy.config import BuilderOptions
from cswap_deploy.errors import ArtifactError, MissingDependencyError, UsageError
from cswap_deploy.records.engine import OnnxArtifact
from cswap_deploy.targets.tensorrt_flavours import COMPAT


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
        if has(package, "HardwareCompatibilityLevel", COMPAT[level])
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
            wanted = getattr(b.trt.HardwareCompatibilityLevel, COMPAT[level])
            assert config.hardware_compatibility_level is wanted
        capabilities = [capability.name for capability in config._capabilities]
        assert capabilities == (["SM86", "SM120"] if flavour.compute_capabilities else [])
        assert engine.options == BuilderOptions(**options, hardware_compat=level)
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
    b.gpu("")
    with pytest.raises(MissingDependencyError) as caught:
        b.build(onnx)
    assert str(caught.value) == (
        f"tensorrt 11.4.0.106 builds its engines on the GPU: {NO_DRIVER}\n"
        "  fix: build on the device, or use --target tensorrt-rtx, which needs no GPU"
    )
    assert caught.value.exit_code == 4
    assert (b.trt.journal, b.left) == ([], [])


def test_rtx_needs_no_gpu(bench: Callable[[str], Bench], onnx: OnnxArtifact) -> None:
    b = bench(RTX)
    b.gpu("")
    engine = b.build(onnx)
    assert (engine.runnable, engine.reason) == (False, NO_DRIVER)
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
    first = b.target.fingerprint()
    b.gpu("12.0")
    assert b.target.fingerprint() != first
    b.gpu("")
    assert b.target.fingerprint()["problem"] == NO_DRIVER


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


def test_the_options_are_those_that_this_file_tries() -> None:
    """A new option must be tried with every version too."""
    assert set(BuilderOptions.model_fields) == {
        "workspace_mib", "optimization_level", "hardware_compat", "version_compatible",
        "compute_capability", "strip_weights", "refit_engine",
    }  # fmt: skip
