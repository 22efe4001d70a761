"""Engines on a FAKE GPU (see ``fake_gpu``): what is copied, run and replayed."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_gpu import make_engine
from fake_gpu_bench import ONNX, RTX, V10, V10_3, V11, Bench, every_package, images, reference
from small_bundle import picture
from small_onnx import CLASSES, SHAPE, small_onnx

from cswap_deploy.config import BuilderOptions
from cswap_deploy.errors import StageError, UsageError
from cswap_deploy.records.engine import EngineArtifact
from cswap_deploy.runtime.classifier import Classifier
from cswap_deploy.runtime.cli import main
from cswap_deploy.runtime.onnx_session import OnnxSession
from cswap_deploy.settings import BatchRange
from cswap_deploy.targets.tensorrt import TensorRt

pytest.importorskip("onnxruntime")
HERE = Path(__file__).parent


# --- runs ----------------------------------------------------------------------------------------


@every_package
def test_logits_are_those_of_the_graph_at_every_batch(
    bench: Callable[..., Bench], package: str
) -> None:
    b = bench(package)
    session = b.session()
    assert (session.batch_min, session.batch_max) == (1, 8)
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
    options = BuilderOptions(version_compatible=True)
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


@every_package
def test_every_output_comes_by_its_name(bench: Callable[..., Bench], package: str) -> None:
    """A second output, of another rank and inside the graph."""
    import onnx
    from onnx import TensorProto, helper

    model = onnx.load_model_from_string(ONNX)
    inner = helper.make_tensor_value_info("c", TensorProto.FLOAT, ["batch", 8, 2, 2])
    model.graph.output.append(inner)
    two = model.SerializeToString()
    b = bench(package)
    session = b.session(make_engine(two, version=b.version))
    expected = OnnxSession(two, threads=1)
    for size in (1, 8, 3):
        batch = images(size, seed=size)
        found, wanted = session.named(batch), expected.named(batch)
        assert set(found) == {"logits", "c"}
        for name, value in wanted.items():
            np.testing.assert_allclose(found[name], value, atol=1e-6)
    session.close()
