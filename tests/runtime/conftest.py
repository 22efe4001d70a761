"""The strict stand-ins for TensorRT are shared with the tests of the targets."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from fake_gpu_bench import Bench

sys.path.append(str(Path(__file__).parent.parent / "targets"))


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    """Makes a fake GPU; at the end no context may be left current on it."""
    from fake_gpu import Gpu, fake_cdll, fake_pycuda, fake_tensorrt
    from fake_gpu_bench import V11, Bench

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
