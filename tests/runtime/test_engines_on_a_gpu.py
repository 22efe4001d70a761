"""Engines on the device, with a FAKE GPU (see ``fake_gpu``): what is copied, run, checked, refused.

The fake knows one version's names only and queues work as streams do; how fast or how exactly a
real GPU computes, these tests cannot tell.
"""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_gpu import Gpu, fake_cdll, fake_pycuda, fake_tensorrt, make_engine
from small_bundle import Engine, flip_a_byte, picture, write_bundle
from small_onnx import CLASSES, SHAPE, small_onnx
from strict_bindings import packages

from cswap_deploy.errors import ArtifactError, MissingDependencyError, StageError, UsageError
from cswap_deploy.records.engine import BatchRange, EngineArtifact, EngineOptions
from cswap_deploy.runtime.classifier import Classifier
from cswap_deploy.runtime.cli import main
from cswap_deploy.runtime.onnx_session import OnnxSession
from cswap_deploy.runtime.tensorrt_session import TensorRtSession
from cswap_deploy.targets.tensorrt import TensorRt

pytest.importorskip("onnxruntime")
ONNX = small_onnx()
V10_3, V10, V11, RTX = packages()
every_package = pytest.mark.parametrize("package", packages())
HERE = Path(__file__).parent


@dataclass
class Bench:
    """A fake GPU with one version's fake TensorRT on it."""

    gpu: Gpu
    package: str
    trt: Any
    folder: Path
    target: str = field(init=False)
    version: str = field(init=False)

    def __post_init__(self) -> None:
        name, _, self.version = self.package.partition(" ")
        self.target = name.replace("_", "-")

    def session(self, plan: bytes | None = None, **settings: Any) -> TensorRtSession:
        settings = {"target": self.target, "version": self.version} | settings
        return TensorRtSession(self.engine() if plan is None else plan, **settings)

    def engine(self, **settings: Any) -> bytes:
        return make_engine(ONNX, **{"version": self.version, **settings})

    def bundle(self, content: bytes | None = None, **claims: Any) -> Path:
        """With one engine; what its manifest claims can be other than what it is."""
        content = self.engine() if content is None else content
        claims = {"version": self.version, "compute_capability": "8.9"} | claims
        return write_bundle(self.folder / "bundle", Engine(self.target, content, **claims))


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(package: str = V11, *, pycuda: bool = True, **gpu: Any) -> Bench:
        one = Gpu(**gpu)
        trt = fake_tensorrt(one, package)
        monkeypatch.setitem(sys.modules, package.partition(" ")[0], trt)
        monkeypatch.setattr(ctypes, "CDLL", fake_cdll(one))
        names = dict(zip(("pycuda", "pycuda.driver"), fake_pycuda(one), strict=True))
        for name, module in names.items():
            monkeypatch.setitem(sys.modules, name, module if pycuda else None)
        made.append(Bench(one, package, trt, tmp_path))
        return made[-1]

    yield make
    gc.collect()
    for one in made:
        assert one.gpu.stack == [], "pycuda would abort the process: a context is still current"


def images(count: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=(count, *SHAPE)).astype(np.float32)


def reference(batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return OnnxSession(ONNX, threads=1).run(batch)


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


# --- runs ----------------------------------------------------------------------------------------


@every_package
def test_logits_are_those_of_the_graph_at_every_batch(
    bench: Callable[..., Bench], package: str
) -> None:
    b = bench(package)
    session = b.session(compute_capability="8.9")
    assert (session.batch_min, session.batch_max, session.classes) == (1, 8, CLASSES)
    assert session.provider == f"{b.target} {b.version}, Fake L4 (sm 8.9)"
    expected = {size: reference(images(size, seed=size)) for size in range(1, 9)}
    # Up and down: what a larger batch left in the buffers must not be seen.
    for size in (*range(1, 9), *range(8, 0, -1), 3, 3):
        found = session.run(images(size, seed=size))
        np.testing.assert_allclose(found, expected[size], rtol=1e-6)
        assert (found.dtype, found.shape) == (np.float32, (size, CLASSES))


def test_the_callers_logits_stay_as_they_were(bench: Callable[..., Bench]) -> None:
    session = bench().session()
    first = session.run(images(2, seed=0))
    kept = first.copy()
    session.run(images(2, seed=1))
    np.testing.assert_array_equal(first, kept)


def test_images_may_lie_in_memory_as_they_like(bench: Callable[..., Bench]) -> None:
    """pycuda copies contiguous buffers only: what it is given are the session's own."""
    session, batch = bench().session(), images(4)
    strided = np.asfortranarray(batch)[::-1]
    np.testing.assert_allclose(session.run(strided), reference(batch[::-1]), rtol=1e-6)


def test_times_of_the_three_parts(bench: Callable[..., Bench]) -> None:
    """The fake's clock: 0.25 ms there, 2 ms of computing, 0.125 ms back."""
    session = bench().session()
    for size in (3, 8, 3):
        logits, times = session.timed(images(size))
        np.testing.assert_allclose(logits, reference(images(size)), rtol=1e-6)
        assert (times.host_to_device, times.compute, times.device_to_host) == (0.25, 2.0, 0.125)


def test_two_sessions_side_by_side(bench: Callable[..., Bench]) -> None:
    b = bench()
    other = small_onnx(1)
    first, second = b.session(), b.session(make_engine(other, version=b.version))
    assert len(b.gpu.stack) == 2
    for _ in range(2):
        np.testing.assert_allclose(first.run(images(2)), reference(images(2)), rtol=1e-6)
        expected = OnnxSession(other, threads=1).run(images(2))
        np.testing.assert_allclose(second.run(images(2)), expected, rtol=1e-6)
    first.close()
    np.testing.assert_allclose(second.run(images(2)), expected, rtol=1e-6)
    first.close()  # more than once does no harm
    assert len(b.gpu.stack) == 1
    del second
    gc.collect()
    assert b.gpu.stack == []


def test_a_session_that_goes_gives_its_memory_back(bench: Callable[..., Bench]) -> None:
    b = bench()
    session = b.session()
    assert b.gpu.used() == 8 * 4 * (int(np.prod(SHAPE)) + CLASSES)
    del session
    gc.collect()
    assert (b.gpu.used(), b.gpu.stack) == (0, [])


# --- batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 9])
def test_a_batch_outside_the_profile(bench: Callable[..., Bench], size: int) -> None:
    b = bench()
    session = b.session(b.engine(batch=(2, 4, 8)))
    with pytest.raises(StageError) as caught:
        session.run(images(size))
    low, high = min(size, 2), max(size, 8)
    assert str(caught.value) == (
        f"a batch of {size} is outside the engine's profile, 2 to 8\n"
        f"  fix: build with --batch {low}:2:{high}"
    )
    assert caught.value.exit_code == 5
    assert not [call for call in b.gpu.calls if call.startswith("execute")]


@pytest.mark.parametrize(
    "batch",
    [
        np.zeros((1, 3, 16, 15), np.float32),
        np.zeros((1, 16, 16, 3), np.float32),
        np.zeros((1, *SHAPE), np.float64),
    ],
)
def test_images_of_another_shape_or_type(bench: Callable[..., Bench], batch: Any) -> None:
    with pytest.raises(StageError, match=r"the engine takes \(batch, 3, 16, 16\) float32, not \(1"):
        bench().session().run(batch)


@pytest.mark.parametrize(
    ("batch", "pictures", "fix"),
    [
        (1, 5, "--batch 2, or build with --batch 1:2:8"),
        (9, 20, "--batch 8, or build with --batch 2:2:9"),
    ],
)
def test_a_batch_that_the_profile_excludes_is_refused_first(
    bench: Callable[..., Bench], batch: int, pictures: int, fix: str
) -> None:
    b = bench()
    classifier = Classifier.open(b.bundle(b.engine(batch=(2, 4, 8))))
    assert classifier.target == "tensorrt"
    with pytest.raises(UsageError) as caught:
        classifier.check_batch(batch, pictures=pictures)
    assert str(caught.value) == (
        f"a batch of {batch} is outside the profile of the tensorrt engine, 2 to 8\n  fix: {fix}"
    )
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(("batch", "pictures"), [(2, 1), (2, 5), (8, 20), (64, 3)])
def test_few_pictures_fit_any_profile(
    bench: Callable[..., Bench], batch: int, pictures: int
) -> None:
    """The last batch is filled up; a batch that no number of pictures fills is no harm."""
    b = bench()
    Classifier.open(b.bundle(b.engine(batch=(2, 4, 8)))).check_batch(batch, pictures=pictures)


@pytest.mark.parametrize("count", [1, 4, 5, 7])
def test_a_short_last_batch_is_filled_up(bench: Callable[..., Bench], count: int) -> None:
    b = bench()
    bundle = b.bundle(b.engine(batch=(3, 3, 4)))
    shown = [picture(seed) for seed in range(count)]
    expected = list(Classifier.open(bundle, target="onnxruntime", threads=1).predict(shown))
    found = list(Classifier.open(bundle).predict(shown, batch=3))
    assert len(found) == count
    for one, other in zip(found, expected, strict=True):
        assert [guess.index for guess in one] == [guess.index for guess in other]
        assert [g.probability for g in one] == pytest.approx([g.probability for g in other])
    sizes = [call for call in b.gpu.calls if call.startswith("execute")]
    assert sizes == ["execute 3"] * -(-count // 3)


# --- CUDA graphs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("package", [V10_3, V10, V11])
def test_a_cuda_graph_is_recorded_once_and_replayed(
    bench: Callable[..., Bench], package: str
) -> None:
    b = bench(package)
    session = b.session(cuda_graph=True)
    assert session.provider.endswith("(sm 8.9), CUDA graph")
    b.gpu.calls.clear()
    for seed in range(4):
        found, times = session.timed(images(4, seed))
        np.testing.assert_allclose(found, reference(images(4, seed)), rtol=1e-6)
        assert times.compute == 2.0
    # Run once, which settles what happens once for a shape; then recorded, then replayed.
    assert b.gpu.calls == [
        "execute 4",
        "cuStreamBeginCapture_v2",
        "execute 4",
        "cuStreamEndCapture",
        "cuGraphInstantiateWithFlags",
        *["cuGraphLaunch"] * 3,
    ]


def test_a_graph_ends_with_its_shape(bench: Callable[..., Bench]) -> None:
    """It is of the execution context as it was: replayed after another shape it may be wrong."""
    b = bench()
    session = b.session(cuda_graph=True)
    for size in (4, 4, 1, 4, 4, 8):
        found = session.run(images(size, seed=size))
        np.testing.assert_allclose(found, reference(images(size, seed=size)), rtol=1e-6)
    assert b.gpu.calls.count("cuStreamBeginCapture_v2") == 4
    assert b.gpu.calls.count("cuGraphLaunch") == 2
    assert len(b.gpu.graphs) == 2  # the last one, and what it was made from


@pytest.mark.parametrize(
    ("function", "status"),
    [
        ("cuStreamBeginCapture_v2", 900),
        ("cuStreamEndCapture", 901),
        ("cuGraphInstantiateWithFlags", 801),
    ],
)
def test_a_graph_that_cannot_be_made(
    bench: Callable[..., Bench], function: str, status: int
) -> None:
    b = bench()
    b.gpu.trouble[function] = str(status)
    session = b.session(cuda_graph=True)
    with pytest.raises(StageError) as caught:
        session.run(images(2))
    assert str(caught.value) == (
        f"CUDA graph: {function} failed with {status}\n  fix: leave out --cuda-graph"
    )
    assert caught.value.exit_code == 5
    assert b.gpu.recording is None
    b.gpu.trouble.clear()
    np.testing.assert_allclose(session.run(images(3)), reference(images(3)), rtol=1e-6)


def test_rtx_records_graphs_by_itself(bench: Callable[..., Bench]) -> None:
    b = bench(RTX)
    session = b.session(cuda_graph=True)
    for size in (2, 2, 5):
        found = session.run(images(size))
        np.testing.assert_allclose(found, reference(images(size)), rtol=1e-6)
    assert b.gpu.calls == [
        "deserialize", "strategy WHOLE_GRAPH_CAPTURE", "execute 2", "execute 2", "execute 5",
    ]  # fmt: skip
    assert session.provider.endswith(", CUDA graph")


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
    np.testing.assert_allclose(classifier._session.run(images(2)), reference(images(2)), rtol=1e-6)


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


# --- runs that fail ------------------------------------------------------------------------------


def test_an_engine_that_refuses_a_batch(bench: Callable[..., Bench]) -> None:
    b = bench()
    session = b.session()
    b.gpu.trouble["execute_async_v3"] = "Error Code 2: OutOfMemory (no scratch memory)"
    with pytest.raises(StageError) as caught:
        session.run(images(2))
    assert str(caught.value) == (
        f"tensorrt {b.version} refused a batch of 2: Error Code 2: OutOfMemory (no scratch memory)"
    )
    assert caught.value.log == ("Error Code 2: OutOfMemory (no scratch memory)",)
    b.gpu.trouble.clear()
    np.testing.assert_allclose(session.run(images(2)), reference(images(2)), rtol=1e-6)


@pytest.mark.parametrize(
    "function", ["cuEventRecord", "cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync", "cuStreamSynchronize"]
)
def test_a_kernel_that_fails_shows_up_in_any_later_call(
    bench: Callable[..., Bench], function: str
) -> None:
    b = bench()
    session = b.session()
    b.gpu.trouble[function] = "an illegal memory access was encountered"
    with pytest.raises(StageError) as caught:
        session.run(images(2))
    assert str(caught.value) == (
        f"tensorrt {b.version} failed on a batch of 2: {function} failed: an illegal memory access "
        "was encountered"
    )


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
    found = classifier._session.run(images(3))
    np.testing.assert_allclose(found, reference(images(3)), rtol=1e-6)


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


# --- what a build loads --------------------------------------------------------------------------


def built(folder: Path, plan: bytes, **more: Any) -> EngineArtifact:
    import hashlib

    path = folder / "model.plan"
    path.write_bytes(plan)
    return EngineArtifact(
        target="tensorrt", path=path, sha256=hashlib.sha256(plan).hexdigest(),
        size_bytes=len(plan), build_seconds=1.0, precision="fp32", runnable=True,
        versions={"tensorrt": V11.partition(" ")[2]}, batch=BatchRange(), **more,
    )  # fmt: skip


def test_a_build_loads_its_engines_the_same_way(
    bench: Callable[..., Bench], tmp_path: Path
) -> None:
    b = bench()
    session = TensorRt().load(built(tmp_path, b.engine(), compute_capability="8.9"))
    np.testing.assert_allclose(session.run(images(2)), reference(images(2)), rtol=1e-6)
    code = b.engine(version_compatible=True)
    options = EngineOptions(version_compatible=True)
    session = TensorRt().load(built(tmp_path, code, options=options))
    np.testing.assert_allclose(session.run(images(2)), reference(images(2)), rtol=1e-6)
    graph = tmp_path / "model.onnx"
    graph.write_bytes(ONNX)
    session = TensorRt().load(built(tmp_path, b.engine(stripped=True), stripped=True), onnx=graph)
    np.testing.assert_allclose(session.run(images(2)), reference(images(2)), rtol=1e-6)


# --- the command ---------------------------------------------------------------------------------


def test_the_command_prefers_the_engine(
    bench: Callable[..., Bench], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    b = bench()
    bundle = b.bundle(b.engine(batch=(2, 2, 4)))
    picture(0).save(tmp_path / "a.png")
    assert main([str(bundle), str(tmp_path / "a.png"), "--batch", "2", "--cuda-graph"]) == 0
    out, err = capsys.readouterr()
    assert err == f"small on tensorrt {b.version}, Fake L4 (sm 8.9), CUDA graph\n"
    assert out.startswith(f"{tmp_path}/a.png\n  ")
    assert main([str(bundle), str(tmp_path / "a.png")]) == 2
    assert (
        "a batch of 1 is outside the profile of the tensorrt engine, 2 to 4\n  fix: --batch 2"
        in (capsys.readouterr().err)
    )


IN_A_PROCESS = """
import atexit, os, sys
atexit.register(lambda: os.abort() if gpu.stack else None)  # as pycuda; registered first: last
sys.path[:0] = sys.argv[1].split(os.pathsep)
from fake_gpu import Gpu, install
gpu = Gpu()
install(gpu, sys.argv[2])
from cswap_deploy.runtime.cli import main
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.parametrize("damaged", [False, True])
def test_the_process_ends_in_peace(
    bench: Callable[..., Bench], tmp_path: Path, damaged: bool
) -> None:
    """pycuda aborts a process that ends with a context on its stack."""
    b = bench()
    bundle = b.bundle(b"this is no engine" if damaged else None)
    picture(0).save(tmp_path / "a.png")
    paths = os.pathsep.join([str(HERE), str(HERE.parent / "targets")])
    done = subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS, paths, b.package, bundle, tmp_path / "a.png",
         "--target", "tensorrt"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == (6 if damaged else 0), done.stderr
    assert done.stderr.startswith("error: " if damaged else "small on tensorrt 11")
