"""Engines that do not fit, and devices that do not suffice, on a FAKE GPU (see ``fake_gpu``)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_gpu_bench import RTX, V10, V10_3, V11, Bench, every_package, images, reference
from small_bundle import flip_a_byte, picture
from small_onnx import small_onnx

from cswap_deploy.errors import ArtifactError, MissingDependencyError
from cswap_deploy.runtime.classifier import Classifier

pytest.importorskip("onnxruntime")


def assert_same_predictions(classifier: Classifier, bundle: Path) -> None:
    """As the bundle's graph in ONNX Runtime."""
    pixels = np.stack([classifier.prepare(picture(seed)) for seed in range(3)])
    expected = Classifier.open(bundle, target="onnxruntime", threads=1).logits(pixels)
    np.testing.assert_allclose(classifier.logits(pixels), expected, rtol=1e-6)


def still_runs(bundle: Path, words: str) -> None:
    """The bundle's graph runs where its engine does not: asked for, and unasked with a note."""
    asked = Classifier.open(bundle, target="onnxruntime", threads=1)
    assert (asked.target, asked.notes) == ("onnxruntime", ())
    unasked = Classifier.open(bundle, threads=1)
    assert unasked.target == "onnxruntime"
    (note,) = unasked.notes
    assert " engine passed over: " in note
    assert words in note
    assert "\n" not in note
    shown = [picture(seed) for seed in range(3)]
    assert list(asked.predict(shown)) == list(unasked.predict(shown))


# --- engines that do not fit ---------------------------------------------------------------------


def refused(bundle: Path, target: str, kind: type[Exception], code: int, *words: str) -> Exception:
    """Asked for, the engine is refused in these words; the graph runs all the same."""
    with pytest.raises(kind) as caught:
        Classifier.open(bundle, target=target)
    assert caught.value.exit_code == code  # type: ignore[attr-defined]
    for part in words:
        assert part in str(caught.value)
    first = str(caught.value).splitlines()[0]
    assert words[0] in first
    still_runs(bundle, words[0])
    return caught.value


@every_package
def test_an_engine_for_another_gpu(bench: Callable[..., Bench], package: str) -> None:
    b = bench(package, capability="8.7")
    refused(
        b.bundle(b.engine(capability="8.9")), b.target, ArtifactError, 6,
        "the engine was built on a GPU of compute capability 8.9, this one has 8.7",
        "fix: build on this device, or with --hardware-compat ampere+; the bundle's model.onnx ",
    )  # fmt: skip
    assert "deserialize" not in b.gpu.calls


@pytest.mark.parametrize(("package", "built"), [(V10_3, "10.16.1.11"), (RTX, "1.6.0.1")])
def test_an_engine_of_another_version(
    bench: Callable[..., Bench], package: str, built: str
) -> None:
    b = bench(package)
    refused(
        b.bundle(b.engine(version=built), version=built), b.target, ArtifactError, 6,
        f"the engine was built with {b.target} {built}, this device has {b.version}",
        f"fix: pip install '{b.target}=={built}', or build the bundle again; its model.onnx runs",
    )  # fmt: skip
    assert "deserialize" not in b.gpu.calls


@pytest.mark.parametrize("package", [V10, V11])
def test_a_version_compatible_engine(bench: Callable[..., Bench], package: str) -> None:
    b = bench(package)
    plan = b.engine(version="10.1.0", version_compatible=True, capability="")
    bundle = b.bundle(plan, version="10.1.0", version_compatible=True, compute_capability="")
    classifier = Classifier.open(bundle)
    assert (classifier.target, classifier.notes) == ("tensorrt", ())
    assert_same_predictions(classifier, bundle)


@every_package
def test_one_flipped_byte_is_found_before_the_engine_is_touched(
    bench: Callable[..., Bench], package: str
) -> None:
    b = bench(package)
    bundle = b.bundle()
    flip_a_byte(bundle / "engine" / b.target / "model.plan")
    refused(
        bundle, b.target, ArtifactError, 6,
        f"{bundle}/engine/{b.target}/model.plan is not the file that was built: sha256 ",
        "fix: copy the bundle again, or build it again",
    )  # fmt: skip
    assert b.gpu.calls == []  # deserialising runs native code


@every_package
def test_an_engine_that_does_not_load(bench: Callable[..., Bench], package: str) -> None:
    b = bench(package)
    words = f"{b.target} {b.version} does not load the engine: Error Code 1: Serialization"
    error = refused(
        b.bundle(b"this is no engine"), b.target, ArtifactError, 6, words,
        "fix: build the bundle again on this device; its model.onnx runs as it is",
    )  # fmt: skip
    assert isinstance(error, ArtifactError)
    assert error.log == (
        "Error Code 1: Serialization (Serialization assertion magicTagRead failed.)",
    )
    # RTX tells more when asked, but only then: it calls engines invalid that it runs.
    assert ("(invalid, malformed engine)" in str(error)) == (package == RTX)


def test_rtx_says_why_an_engine_is_not_for_this_gpu(bench: Callable[..., Bench]) -> None:
    b = bench(RTX, capability="7.5")
    refused(
        b.bundle(b.engine(capability="8.9"), compute_capability=""), b.target, ArtifactError, 6,
        "does not load the engine: ", "(invalid, unsupported cc)",
    )  # fmt: skip


def test_what_rtx_thinks_of_an_engine_that_it_runs_is_not_asked(
    bench: Callable[..., Bench],
) -> None:
    b = bench(RTX)
    b.gpu.trouble["validity"] = "2"
    np.testing.assert_allclose(b.session().run(images(1)), reference(images(1)), rtol=1e-6)


# --- devices that do not suffice -----------------------------------------------------------------


def test_no_memory_for_the_batch(bench: Callable[..., Bench]) -> None:
    b = bench(memory=20_000)
    error = refused(
        b.bundle(), "tensorrt", MissingDependencyError, 4,
        "the GPU has no memory for a batch of 8: cuMemAlloc failed: out of memory",
        "fix: free GPU memory, or build with a smaller largest batch (--batch)",
    )  # fmt: skip
    assert b.gpu.stack == []  # while the error still holds on to what was half made
    del error


def test_no_memory_for_the_context_of_the_engine(bench: Callable[..., Bench]) -> None:
    b = bench()
    b.gpu.trouble["create_execution_context"] = "Error Code 2: OutOfMemory"
    refused(
        b.bundle(), "tensorrt", MissingDependencyError, 4,
        f"tensorrt {b.version} made no execution context: Error Code 2: OutOfMemory",
        "fix: free GPU memory",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("trouble", "words", "fix"),
    [
        ("out of memory", "the GPU has no memory left: ", "free GPU memory"),
        ("invalid device ordinal", "the GPU cannot be used: ", "run the bundle's model.onnx"),
    ],
)
def test_no_context_on_the_gpu(
    bench: Callable[..., Bench], trouble: str, words: str, fix: str
) -> None:
    b = bench()
    b.gpu.trouble["cuDevicePrimaryCtxRetain"] = trouble
    refused(
        b.bundle(), "tensorrt", MissingDependencyError, 4,
        f"{words}cuDevicePrimaryCtxRetain failed: {trouble}", f"fix: {fix}",
    )  # fmt: skip


def test_no_pycuda(bench: Callable[..., Bench]) -> None:
    b = bench(pycuda=False)
    refused(
        b.bundle(), "tensorrt", MissingDependencyError, 4, "pycuda is ",
        "fix: pip install pycuda, with CUDA's bin folder on PATH",
    )  # fmt: skip


def test_a_pycuda_that_is_absent_and_one_that_does_not_load(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    b = bench()
    for name in ("pycuda", "pycuda.driver"):
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MissingDependencyError, match=r"^pycuda is not installed\n"):
        b.session()
    (tmp_path / "pycuda").mkdir()
    (tmp_path / "pycuda" / "__init__.py").touch()
    (tmp_path / "pycuda" / "driver.py").write_text("raise ImportError('libcurand.so.12: no such')")
    monkeypatch.syspath_prepend(tmp_path)
    words = r"^pycuda is installed but does not load: libcurand\.so\.12: no such\n"
    with pytest.raises(MissingDependencyError, match=words):
        b.session()
    monkeypatch.delitem(sys.modules, "pycuda", raising=False)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"driver": False}, "no NVIDIA driver: libcuda.so.1: cannot open shared object file"),
        ({"status": 802}, "the NVIDIA driver does not start: system not yet initialized (802)"),
        ({"count": 0}, "the NVIDIA driver finds no GPU"),
    ],
    ids=["absent", "does-not-start", "no-gpu"],
)
def test_no_driver(bench: Callable[..., Bench], state: dict[str, Any], words: str) -> None:
    b = bench()
    for name, value in state.items():
        setattr(b.gpu, name, value)
    refused(
        b.bundle(), "tensorrt", MissingDependencyError, 4,
        f"tensorrt engines run on an NVIDIA GPU: {words}",
        "fix: run the bundle's model.onnx: --target onnxruntime",
    )  # fmt: skip


def test_a_driver_that_is_too_old_for_tensorrt(bench: Callable[..., Bench]) -> None:
    """pybind11 says TypeError where the library makes no object."""
    b = bench()
    b.gpu.trouble["Runtime"] = "CUDA initialization failure with error: 35"
    refused(
        b.bundle(), "tensorrt", MissingDependencyError, 4,
        f"tensorrt {b.version} does not start: CUDA initialization failure with error: 35",
        "fix: a newer NVIDIA driver may be needed",
    )  # fmt: skip


@pytest.mark.parametrize("broken", [False, True], ids=["absent", "does-not-load"])
def test_no_tensorrt(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, broken: bool
) -> None:
    b = bench()
    monkeypatch.delitem(sys.modules, "tensorrt")
    if broken:
        (tmp_path / "tensorrt.py").write_text("import ctypes; ctypes.CDLL('libnvinfer-none.so.9')")
        monkeypatch.syspath_prepend(tmp_path)
    words = "installed but does not load: libnvinfer-none" if broken else "not installed"
    refused(b.bundle(), "tensorrt", MissingDependencyError, 4, f"tensorrt is {words}")


def test_neither_engine_nor_onnxruntime(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why the engine was passed over must not be lost."""
    b = bench(V10_3, capability="8.7")
    bundle = b.bundle()
    for name in [n for n in sys.modules if n.partition(".")[0] == "onnxruntime"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError) as caught:
        Classifier.open(bundle)
    assert str(caught.value) == (
        "tensorrt engine passed over: the engine was built on a GPU of compute capability 8.9, "
        "this one has 8.7; onnxruntime is not installed\n  fix: pip install onnxruntime"
    )
    assert caught.value.exit_code == 4


# --- engines without weights ---------------------------------------------------------------------


@every_package
def test_an_engine_without_weights_takes_those_of_the_graph(
    bench: Callable[..., Bench], package: str
) -> None:
    b = bench(package)
    bundle = b.bundle(b.engine(stripped=True), stripped=True)
    classifier = Classifier.open(bundle)
    assert (classifier.target, classifier.notes) == (b.target, ())
    assert b.gpu.calls == ["deserialize", "refit"]
    assert_same_predictions(classifier, bundle)


def test_an_engine_without_weights_wants_the_graph_unaltered(bench: Callable[..., Bench]) -> None:
    b = bench()
    bundle = b.bundle(b.engine(stripped=True), stripped=True)
    (bundle / "model.onnx").write_bytes(small_onnx(seed=1))
    words = r"model\.onnx is not the file that was built: sha256 "
    for target in ("tensorrt", "onnxruntime", None):
        with pytest.raises(ArtifactError, match=words) as caught:
            Classifier.open(bundle, target=target)
        assert caught.value.exit_code == 6
    assert b.gpu.calls == []


def test_weights_of_another_network_are_refused(bench: Callable[..., Bench]) -> None:
    b = bench()
    with pytest.raises(ArtifactError) as caught:
        b.session(b.engine(stripped=True), weights=small_onnx(width=9))
    assert str(caught.value) == (
        f"tensorrt {b.version} cannot put the weights of model.onnx into the engine: Error Code 4: "
        "Refit weights of stem.weight have another shape\n"
        "  fix: use the model.onnx of the same bundle"
    )
