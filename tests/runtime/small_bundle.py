"""A bundle with a real, small ONNX file, and engines that the fake GPU runs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from made_up_bundle import made_up_manifest
from PIL import Image
from small_onnx import CLASSES, SHAPE, small_onnx

from cswap_deploy.config import BuilderOptions
from cswap_deploy.records.engine import EngineArtifact, OnnxArtifact, TensorSpec
from cswap_deploy.records.files import list_files
from cswap_deploy.records.manifest import TargetResult
from cswap_deploy.records.model import ModelSpec, Preprocessing
from cswap_deploy.records.value import write_sealed
from cswap_deploy.settings import BatchRange

PRE = Preprocessing(
    input_size=SHAPE, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), resize_shorter=18
)
NAMES = ("cat", "dog", "owl", "carp")  # one fewer than classes


@dataclass(frozen=True)
class Engine:
    """What a bundle says of an engine, and the engine."""

    target: str
    content: bytes
    version: str = ""
    compute_capability: str = ""
    version_compatible: bool = False
    stripped: bool = False

    @property
    def path(self) -> str:
        return f"engine/{self.target}/model.plan"


def model_spec() -> ModelSpec:
    return ModelSpec(
        name="small", source="factory", weights="random", weights_sha256="0" * 64,
        num_classes=CLASSES, class_names=NAMES, preprocessing=PRE,
    )  # fmt: skip


def write_bundle(folder: Path, *engines: Engine, onnx: bytes | None = None) -> Path:
    """Fill a folder as a build does.

    Args:
        folder: Made here.
        engines: Beside ``model.onnx``, which ONNX Runtime runs.
        onnx: The graph; ``small_onnx`` unless said.
    """
    content = small_onnx() if onnx is None else onnx
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(content)
    (folder / "pruned.safetensors").write_bytes(b"weights")
    results = [_result("onnxruntime", "model.onnx", content, {"onnxruntime": "1.31.1"})]
    for engine in engines:
        (folder / engine.path).parent.mkdir(parents=True)
        (folder / engine.path).write_bytes(engine.content)
        options = BuilderOptions(version_compatible=engine.version_compatible)
        told = {"compute_capability": engine.compute_capability, "stripped": engine.stripped}
        versions = {engine.target: engine.version}
        more = told | {"batch": BatchRange(min=1, opt=4, max=8), "options": options}
        results.append(_result(engine.target, engine.path, engine.content, versions, **more))
    manifest = made_up_manifest(
        model=model_spec(),
        onnx=OnnxArtifact(
            path=Path("model.onnx"), sha256=hashlib.sha256(content).hexdigest(),
            size_bytes=len(content), opset=18, nodes=5,
            inputs=(TensorSpec(name="input", dtype="float32", shape=("batch", *SHAPE)),),
            outputs=(TensorSpec(name="logits", dtype="float32", shape=("batch", CLASSES)),),
        ),
        targets=tuple(results),
        files=list_files(folder),
    )  # fmt: skip
    write_sealed(folder / "manifest.json", manifest)
    return folder


def _result(
    target: str, path: str, content: bytes, versions: dict[str, str], **more: Any
) -> TargetResult:
    return TargetResult(
        engine=EngineArtifact(
            target=target, path=Path(path), sha256=hashlib.sha256(content).hexdigest(),
            size_bytes=len(content), build_seconds=1.0, precision="fp32", runnable=True,
            versions=versions, **more,
        )
    )  # fmt: skip


def picture(seed: int, size: tuple[int, int] = (24, 20), mode: str = "RGB") -> Image.Image:
    """Coarse noise: it survives being resized."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 6, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode)


def flip_a_byte(path: Path) -> None:
    """In the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
