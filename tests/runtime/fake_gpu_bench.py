"""A FAKE GPU (see ``fake_gpu``) with one version's fake TensorRT on it, and a small bundle.

The fake knows one version's names only and queues work as streams do; how fast or how exactly a
real GPU computes, it cannot tell.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_gpu import Gpu, make_engine
from small_bundle import Engine, write_bundle
from small_onnx import SHAPE, small_onnx
from strict_bindings import packages

from cswap_deploy.runtime.bundle import EngineFile
from cswap_deploy.runtime.onnx_session import OnnxSession
from cswap_deploy.runtime.tensorrt_session import TensorRtSession

ONNX = small_onnx()
V10_3, V10, V11, RTX = packages()
every_package = pytest.mark.parametrize("package", packages())


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
        """Load an engine as a file of this version, bound to no GPU."""
        file = EngineFile(target=self.target, path="model.plan", version=self.version)
        return TensorRtSession(self.engine() if plan is None else plan, file, **settings)

    def engine(self, **settings: Any) -> bytes:
        return make_engine(ONNX, **{"version": self.version, **settings})

    def bundle(self, content: bytes | None = None, **claims: Any) -> Path:
        """With one engine; what its manifest claims can be other than what it is."""
        content = self.engine() if content is None else content
        claims = {"version": self.version, "compute_capability": "8.9"} | claims
        return write_bundle(self.folder / "bundle", Engine(self.target, content, **claims))


def images(count: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=(count, *SHAPE)).astype(np.float32)


def reference(batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return OnnxSession(ONNX, threads=1).run(batch)
