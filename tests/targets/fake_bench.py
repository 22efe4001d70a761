"""The TensorRT adapters on a FAKE builder and a FAKE GPU: what the tests of builds share."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_builder import fake_builder
from fake_gpu import Gpu, fake_cdll
from strict_bindings import NAMES, packages

from cswap_deploy.config import BuilderOptions
from cswap_deploy.records.engine import EngineArtifact, OnnxArtifact
from cswap_deploy.settings import BatchRange
from cswap_deploy.targets import BuildRequest, get_target
from cswap_deploy.targets.tensorrt_flavours import FLAVOURS, Flavour

V10_3, V10, V11, RTX = packages()
BATCH = BatchRange(min=2, opt=4, max=8)
NO_DRIVER = (
    "no NVIDIA driver: libcuda.so.1: cannot open shared object file: No such file or directory"
)
every_package = pytest.mark.parametrize("package", packages())


def flavour_of(package: str) -> Flavour:
    name, _, number = package.partition(" ")
    return FLAVOURS[name, int(number.split(".")[0])]


def has(package: str, *path: str) -> bool:
    """Whether a version has a name: an enum's member, a class's member, or a class."""
    told = NAMES[package]
    members = {title.partition("(")[0]: text for title, text in told["classes"].items()}
    members |= told["enums"]
    if len(path) == 1:
        return path[0] in members or path[0] in told["functions"].split()
    names = [part.partition("=")[0].partition("(")[0] for part in members.get(path[0], "").split()]
    return path[1] in names


class Bench:
    """One version's stand-in, in the place of the package, on a machine with a GPU or without."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, package: str, folder: Path) -> None:
        self.package, self.out = package, folder / "out"
        self.out.mkdir(exist_ok=True)
        self.name, _, self.version = package.partition(" ")
        self.trt = fake_builder(package)
        self.script = self.trt.script
        self.target = get_target(self.name.replace("_", "-"))
        monkeypatch.setitem(sys.modules, self.name, self.trt)
        self._gpu, self._smi = Gpu(), folder / "bin" / "nvidia-smi"
        self._smi.parent.mkdir(exist_ok=True)
        monkeypatch.setenv("PATH", str(self._smi.parent))
        monkeypatch.setattr(ctypes, "CDLL", fake_cdll(self._gpu))
        self.gpu("8.9")

    def gpu(self, capability: str) -> None:
        """What GPU there is; empty for none."""
        self.script.compute_capability = capability
        self._gpu.driver, self._gpu.capability = bool(capability), capability
        answer = "echo 'NVIDIA L4, 580.65, 23034 MiB'" if capability else "exit 9"
        self._smi.write_text(f"#!/bin/sh\n{answer}\n")
        self._smi.chmod(0o755)

    def request(self, onnx: OnnxArtifact, **more: Any) -> BuildRequest:
        return BuildRequest(onnx, batch=BATCH, out_dir=self.out, **more)

    def build(self, onnx: OnnxArtifact, **options: Any) -> EngineArtifact:
        return self.target.build(self.request(onnx, options=BuilderOptions(**options)))

    @property
    def config(self) -> Any:
        """Of the latest build."""
        return self.script.configs[-1]

    @property
    def flags(self) -> set[str]:
        return {flag.name for flag in self.config._flags}

    @property
    def left(self) -> list[str]:
        """Names of what is in the output folder."""
        return sorted(path.name for path in self.out.iterdir())
