"""What callers of ``fanout`` meet on a GPU: here CPU tensors that go to the kernel's host build."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fanout_cases import LAYOUTS, Layout, check, make_case

from cswap_deploy.causal import fanout, fanout_library
from cswap_deploy.causal.fanout import fanout_backend, masked_fanout
from cswap_deploy.causal.fanout_library import DTYPES, Library


def test_a_fallback_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(fanout_library.SWITCH, "off")
    fanout_library.library_of.cache_clear()
    try:
        assert fanout_backend("cuda:0") == "reference"
        assert fanout_backend("cuda:0", torch.float16) == "reference"
    finally:
        fanout_library.library_of.cache_clear()
    assert [r.getMessage() for r in caplog.records] == [
        "masked_fanout runs on torch, not on its CUDA kernel: CSWAP_KERNELS=off"
    ]


def test_every_reason_for_a_fallback_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    monkeypatch.setattr(fanout_library, "import_module", _raise(ImportError("no")))
    monkeypatch.setattr(fanout_library, "find_nvcc", lambda: None)
    monkeypatch.setattr(fanout_library.platformdirs, "user_cache_path", lambda _: tmp_path)
    found = fanout_library.find_library(0)
    assert found == (
        "cswap_kernels is not installed (pip install ./kernels); "
        "nvcc was found neither in CUDA_HOME, on PATH nor in /usr/local/cuda"
    )


def _raise(error: Exception) -> Callable[[str], object]:
    def function(_: str) -> object:
        raise error

    return function


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch, host: Library) -> None:
    """CPU tensors take the way of CUDA tensors, to the host build."""
    monkeypatch.setattr(fanout, "fanout_backend", lambda *_: "cuda")
    monkeypatch.setattr(fanout_library, "cuda_library", lambda _: host)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))


@pytest.mark.usefixtures("pretend")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_library_is_called_with_everything(layout: Layout) -> None:
    case = make_case(layout, torch.float32, constant=True)
    check(masked_fanout(case), case)


@pytest.mark.usefixtures("pretend")
@pytest.mark.parametrize(("variants", "images"), [(0, 2), (3, 0)])
def test_the_library_is_not_called_for_nothing(variants: int, images: int) -> None:
    case = make_case("tokens", torch.float32, variants=variants, images=images)
    assert masked_fanout(case).shape == (0, 9, 5)


@pytest.mark.usefixtures("pretend")
def test_gradients_come_from_the_reference() -> None:
    case = make_case("nchw", torch.float32)
    r = case.r.clone().requires_grad_()
    masked_fanout(replace(case, r=r)).sum().backward()
    assert r.grad is not None
    with torch.no_grad():
        assert not masked_fanout(replace(case, r=r)).requires_grad


@pytest.mark.usefixtures("pretend")
def test_a_launch_that_fails_says_with_which_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DTYPES, torch.float32, 9)
    case = make_case("nchw", torch.float32)
    words = r"masked_fanout did not start: error 1 \(z \(2, 5, 9, 7\), r \(3, 2, 1, 9, 7\)"
    with pytest.raises(RuntimeError, match=words):
        masked_fanout(case)


def test_float64_is_the_references() -> None:
    assert fanout_backend("cuda:0", torch.float64) == "reference"
