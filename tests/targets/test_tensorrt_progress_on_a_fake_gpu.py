"""The builder's timing cache, progress and Ctrl-C, with a FAKE builder and a FAKE GPU."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_bench import RTX, V10, V10_3, V11, Bench, every_package
from filelock import FileLock, Timeout

from cswap_deploy.errors import BuildError
from cswap_deploy.progress import Silent
from cswap_deploy.records.engine import OnnxArtifact

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
    b.target.build(b.request(onnx, store=tmp_path / "mine"))
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
    b.target.build(b.request(onnx, progress=told))
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
        b.target.build(b.request(onnx, progress=Told(interrupt=where)))
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
