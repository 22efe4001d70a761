"""Effects are measured in IEEE float32, whatever the process has set; seen without a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from small_networks import pictures, small_cnn, traced

from cswap_deploy.causal.arithmetic import ieee_float32, measured_on
from cswap_deploy.causal.experiment import Experiment
from cswap_deploy.causal.measurement import LocalMeasurement
from cswap_deploy.errors import MissingDependencyError
from cswap_deploy.network.graph import Graph
from cswap_deploy.network.placing import HOST, device_named

IMAGES, LABELS = pictures(4)
IEEE = ("highest", False, "ieee", "ieee", "ieee")


def settings() -> tuple:
    """What decides whether a GPU uses TF32, and a CPU bfloat16, by both of PyTorch's interfaces."""
    b = torch.backends
    return (
        torch.get_float32_matmul_precision(), b.cudnn.allow_tf32, b.cuda.matmul.fp32_precision,
        b.cudnn.conv.fp32_precision, b.mkldnn.matmul.fp32_precision,
    )  # fmt: skip


@pytest.fixture(params=["default", "high", "medium"])
def chosen(request: pytest.FixtureRequest) -> Iterator[tuple]:
    """PyTorch's default (TF32 in a GPU's convolutions), and what training scripts set."""
    before = settings()
    if request.param != "default":
        torch.set_float32_matmul_precision(request.param)
        torch.backends.cudnn.allow_tf32 = True
    yield settings()
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


class Watched(Graph):
    """Notes the settings under which it runs."""

    def run(self, images, **kwargs):
        self.seen = settings()
        return super().run(images, **kwargs)


def test_measuring_uses_no_tf32_and_leaves_the_setting(chosen) -> None:
    shared, groups = traced(small_cnn)
    graph = Watched(shared.program, shared.module)
    assert settings() == chosen
    LocalMeasurement(Experiment(graph, IMAGES, LABELS)).effects({groups["out.0"]: [0]})
    assert graph.seen == IEEE
    assert settings() == chosen


def test_the_setting_comes_back_after_an_error(chosen) -> None:
    with contextlib.suppress(KeyError), ieee_float32():
        assert settings() == IEEE
        raise KeyError
    assert settings() == chosen


def test_who_sets_one_operation_by_the_newer_interface_finds_it_again() -> None:
    convolution = torch.backends.cudnn.conv
    before = convolution.fp32_precision
    try:
        convolution.fp32_precision = "ieee"  # PyTorch refuses to read the older switch now
        with ieee_float32():
            assert convolution.fp32_precision == "ieee"
        assert convolution.fp32_precision == "ieee"
    finally:
        convolution.fp32_precision = before


def test_the_key_names_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    host = measured_on(torch.device("cpu"))
    assert host["device"] == "cpu"
    assert host["arithmetic"] == "IEEE float32"
    assert measured_on(torch.device("cuda")) == {
        "device": "NVIDIA L4",
        "arithmetic": "IEEE float32",
    }


def test_the_key_of_a_cpu_names_what_splits_its_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        keys.append(measured_on(torch.device("cpu")))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "ZVECTOR")
    keys.append(measured_on(torch.device("cpu")))
    assert len({str(key) for key in keys}) == 3


def test_a_gpu_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingDependencyError, match="--device cuda: PyTorch") as e:
        device_named("cuda")
    assert "finds no GPU it can use" in str(e.value)
    assert "leave the flag out" in e.value.fix


def test_a_device_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_named("auto") == torch.device("cuda")
    assert device_named("cuda:1") == torch.device("cuda:1")
    assert device_named("cpu") == HOST
    with pytest.raises(MissingDependencyError, match=r"cuda:2: PyTorch \S+ finds 2 GPUs") as e:
        device_named("cuda:2")
    assert e.value.fix == "pass cuda:0 to cuda:1, or leave the flag out"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_named("auto") == HOST
