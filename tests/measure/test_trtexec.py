"""The command line of NVIDIA's tool, for each dialect of it. It cannot be run here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cswap_deploy.config import BuilderOptions
from cswap_deploy.measure.trtexec import trtexec_line
from cswap_deploy.records.engine import EngineArtifact
from cswap_deploy.records.measurements import Latency

SHAPE = "--shapes=input:8x3x224x224 --infStreams=1 --iterations=200 --duration=0 --warmUp=351"
REST = "--avgRuns=200 --percentile=50,90,99 --exposeDMA"


def line(
    target: str,
    version: str,
    *,
    path: str = "engine/model.plan",
    options: BuilderOptions | None = None,
    stripped: bool = False,
    **ways: Any,
) -> str:
    engine = EngineArtifact(
        target=target, path=Path(path), sha256="0" * 64, size_bytes=1, build_seconds=1.0,
        precision="fp16", runnable=True, versions={target: version},
        options=options, stripped=stripped,
    )  # fmt: skip
    settings = {
        "shape": [8, 3, 224, 224], "runs": 200, "warmup_ms": 350.2, "input": "input",
        "streams": 1, "cuda_graph": False, "transfers": True, "synchronisation": "automatic",
    }  # fmt: skip
    latency = Latency(
        batch=8, samples_ms=(1.0,), warmup=20, p50_ms=1, p90_ms=1, p99_ms=1, mean_ms=1, threads=1,
        provider="tensorrt", settings=settings | ways,
    )  # fmt: skip
    return trtexec_line(engine, latency)


@pytest.mark.parametrize(
    ("graph", "transfers", "end"),
    [
        (False, True, "--useSpinWait  # by default: data transfers, no CUDA graph"),
        (True, True, "--useSpinWait --useCudaGraph  # by default: data transfers"),
        (False, False, "--noDataTransfers --useSpinWait  # by default: no CUDA graph"),
        (True, False, "--noDataTransfers --useSpinWait --useCudaGraph"),
    ],
)
def test_tensorrt_10(graph: bool, transfers: bool, end: str) -> None:
    told = line("tensorrt", "10.16.1.11", cuda_graph=graph, transfers=transfers)
    assert told == f"trtexec --loadEngine=engine/model.plan {SHAPE} {REST} {end}"


@pytest.mark.parametrize(
    ("graph", "transfers", "end"),
    [
        (False, True, "--includeDataTransfers --noCudaGraph  # by default: spin wait"),
        (True, True, "--includeDataTransfers  # by default: spin wait, CUDA graph"),
        (False, False, "--noCudaGraph  # by default: no data transfers, spin wait"),
        (True, False, " # by default: no data transfers, spin wait, CUDA graph"),
    ],
)
def test_tensorrt_11_has_the_opposite_defaults(graph: bool, transfers: bool, end: str) -> None:
    told = line("tensorrt", "11.4.0.106", cuda_graph=graph, transfers=transfers)
    assert told == f"trtexec --loadEngine=engine/model.plan {SHAPE} {REST} {end}"


@pytest.mark.parametrize(
    ("graph", "transfers", "end"),
    [
        (
            False,
            True,
            "--includeDataTransfers --rtxCudaGraphStrategy=disable  # by default: spin wait",
        ),
        (
            True,
            True,
            "--includeDataTransfers --rtxCudaGraphStrategy=wholeGraph  # by default: spin wait",
        ),
        (
            False,
            False,
            "--rtxCudaGraphStrategy=disable  # by default: no data transfers, spin wait",
        ),
        (
            True,
            False,
            "--rtxCudaGraphStrategy=wholeGraph  # by default: no data transfers, spin wait",
        ),
    ],
)
def test_rtx_has_a_tool_of_its_own(graph: bool, transfers: bool, end: str) -> None:
    told = line("tensorrt-rtx", "1.7.1.116", cuda_graph=graph, transfers=transfers)
    assert told == f"tensorrt_rtx --loadEngine=engine/model.plan {SHAPE} {REST} {end}"


def test_older_rtx_has_the_older_options() -> None:
    assert line("tensorrt-rtx", "1.4.0.76", cuda_graph=True).endswith(
        "--useSpinWait --rtxCudaGraphStrategy=wholeGraph  # by default: data transfers"
    )
    assert line("tensorrt-rtx", "1.1.1.26", cuda_graph=True, transfers=False).endswith(
        "--noDataTransfers --useSpinWait --useCudaGraph"
    )


def test_a_session_that_blocks() -> None:
    ways = {"synchronisation": "blocking", "cuda_graph": True}
    assert line("tensorrt", "10.3.0", **ways).endswith(
        "--exposeDMA --useCudaGraph  # by default: data transfers, blocking wait"
    )
    assert line("tensorrt", "11.4.0.106", **ways).endswith(
        "--includeDataTransfers --noSpinWait  # by default: CUDA graph"
    )


def test_a_path_with_blanks_is_quoted() -> None:
    assert line("tensorrt", "10.3.0", path="my engine.plan").startswith(
        "trtexec '--loadEngine=my engine.plan' --shapes="
    )


def test_what_has_no_such_line() -> None:
    with pytest.raises(ValueError, match="onnxruntime has no trtexec"):
        line("onnxruntime", "1.31.1")
    engine = EngineArtifact(
        target="tensorrt", path=Path("a"), sha256="0" * 64, size_bytes=1, build_seconds=1.0,
        precision="fp32", runnable=True, versions={"tensorrt": "10.3.0"},
    )  # fmt: skip
    old = Latency(
        batch=1, samples_ms=(1.0,), warmup=1, p50_ms=1, p90_ms=1, p99_ms=1, mean_ms=1, threads=1,
        provider="tensorrt",
    )  # fmt: skip
    with pytest.raises(ValueError, match="does not say how it was measured"):
        trtexec_line(engine, old)


def test_an_engine_that_brings_its_own_runtime_is_let_run() -> None:
    lean = BuilderOptions(version_compatible=True)
    assert " --versionCompatible " in line("tensorrt", "11.4.0.106", options=lean)
    assert "--versionCompatible" not in line("tensorrt", "11.4.0.106", options=BuilderOptions())


def test_an_engine_without_weights_is_not_timed() -> None:
    with pytest.raises(ValueError, match="without its weights"):
        line("tensorrt", "11.4.0.106", stripped=True)
