"""What the report says of a latency that was taken on a GPU. The figures are made up."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from made_up_bundle import latency, made_up_manifest, made_up_plan, made_up_targets

from cswap_deploy.records.manifest import Manifest, TargetResult
from cswap_deploy.records.measurements import DeviceTimes, GpuState, Latency, Spread
from cswap_deploy.report.pages import render_markdown

STATE = GpuState(
    name="NVIDIA L4",
    pci_bus_id="0000:3B:00.0",
    driver="570.124.06",
    samples=9,
    sm_clock_mhz=Spread(min=1605, median=1740, max=2040),
    sm_clock_max_mhz=2040,
    memory_clock_mhz=Spread(min=6251, median=6251, max=6251),
    power_w=Spread(min=60, median=70.4, max=72),
    power_limit_w=72,
    temperature_c=Spread(min=58, median=61, max=64),
    throttling={"power cap (software)": 7},
)


def on_gpu(p50: float, **changes: Any) -> Latency:
    device = DeviceTimes(
        host_to_device_ms=(0.11,) * 200, compute_ms=(p50 - 0.3,) * 200,
        device_to_host_ms=(0.013,) * 200, p50_ms=p50 - 0.3, p90_ms=p50 - 0.2, p99_ms=p50 - 0.1,
        mean_ms=p50 - 0.3, host_to_device_p50_ms=0.11, device_to_host_p50_ms=0.013,
    )  # fmt: skip
    settings = {
        "shape": [8, 3, 224, 224], "runs": 200, "warmup_ms": 350.2, "input": "input",
        "streams": 1, "cuda_graph": False, "transfers": True, "synchronisation": "automatic",
    }  # fmt: skip
    provider = "tensorrt 11.4.0.106, NVIDIA L4 (sm 8.9)"
    update = {"device": device, "gpu": STATE, "settings": settings, "provider": provider}
    return latency(p50, seed=3, batch=8).model_copy(update=update | changes)


def with_tensorrt(**changes: Any) -> Manifest:
    ran, not_run = made_up_targets()
    engine = not_run.engine.model_copy(
        update={
            "target": "tensorrt", "path": Path("engine/tensorrt/l4.plan"), "runnable": True,
            "reason": "", "versions": {"tensorrt": "11.4.0.106"},
        }
    )  # fmt: skip
    result = TargetResult(
        engine=engine, latency=on_gpu(1.0, **changes), dense_latency=on_gpu(1.5, **changes)
    )
    return made_up_manifest(targets=(ran, result))


def test_the_parts_on_the_gpu_stand_apart_from_the_wall_clock() -> None:
    markdown = render_markdown(with_tensorrt(), made_up_plan())
    assert (
        "| target | network | clock | CUDA graph | compute p50 | p90 | p99 | copied in, p50 | "
        "copied out, p50 |" in markdown
    )
    assert (
        "| tensorrt | pruned | CUDA events | no | 0.700 ms | 0.800 ms | 0.900 ms | 0.110 ms | "
        "0.013 ms |" in markdown
    )
    assert "| tensorrt | dense | CUDA events | no | 1.20 ms | 1.30 ms | 1.40 ms |" in markdown
    assert re.search(
        r"\| tensorrt \| pruned \| tensorrt 11.4.0.106, NVIDIA L4 .* \| 1.03 ms", markdown
    )
    assert "The wall clock also holds the host's share." in markdown


def test_the_gpus_state_is_told() -> None:
    markdown = render_markdown(with_tensorrt(), made_up_plan())
    assert (
        "| tensorrt | NVIDIA L4 | 570.124.06 | power cap (software) (7 of 9) | "
        "1,740 MHz (1,605 to 2,040, at most 2,040) | 6,251 MHz (6,251 to 6,251) | "
        "70 W (60 to 72, at most 72) | 61 °C (58 to 64) | 9 |" in markdown
    )
    free = STATE.model_copy(update={"throttling": {}, "temperature_c": None})
    assert "| nothing |" in render_markdown(with_tensorrt(gpu=free), made_up_plan())
    silent = STATE.model_copy(update={"throttling": None})
    assert "| not known |" in render_markdown(with_tensorrt(gpu=silent), made_up_plan())


def test_the_command_of_nvidias_tool_is_below() -> None:
    markdown = render_markdown(with_tensorrt(), made_up_plan())
    command = "trtexec --loadEngine=engine/tensorrt/l4.plan --shapes=input:8x3x224x224"
    assert markdown.index("compute p50") < markdown.index(command)
    assert "--includeDataTransfers --noCudaGraph" in markdown


def test_what_nvml_did_not_tell_is_said() -> None:
    nothing = GpuState(notes=("GPU state not known: pynvml is not installed",))
    markdown = render_markdown(with_tensorrt(gpu=nothing), made_up_plan())
    assert "tensorrt: GPU state not known: pynvml is not installed." in markdown
    assert "held down by" not in markdown


def test_onnxruntime_on_cuda_has_the_hosts_clock_only() -> None:
    ran, _ = made_up_targets()
    engine = ran.engine.model_copy(update={"target": "onnxruntime-cuda"})
    timed = latency(0.4, seed=1).model_copy(update={"gpu": STATE})
    result = ran.model_copy(update={"engine": engine, "latency": timed})
    markdown = render_markdown(made_up_manifest(targets=(result,)), made_up_plan())
    assert (
        "onnxruntime-cuda has the host's wall clock only: ONNX Runtime records no CUDA events."
        in markdown
    )
    assert "compute p50" not in markdown
    assert "| onnxruntime-cuda | NVIDIA L4 |" in markdown


def test_a_cpu_target_is_shown_as_before() -> None:
    markdown = render_markdown(made_up_manifest(), made_up_plan())
    for word in ("CUDA", "trtexec", "compute p50", "NVML"):
        assert word not in markdown


def test_a_manifest_of_an_older_version_still_reads() -> None:
    told = json.loads(with_tensorrt().canonical_json())
    for result in told["targets"]:
        for name in ("latency", "dense_latency"):
            for field in ("clock", "device", "gpu", "settings"):
                del result[name][field]
    manifest = Manifest.model_validate_json(json.dumps(told))
    assert "trtexec" not in render_markdown(manifest, made_up_plan())
