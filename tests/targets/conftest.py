from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from small_onnx import write_small_onnx
from torch import nn

from cswap_deploy.export.onnx import describe_onnx, export_onnx
from cswap_deploy.records.engine import OnnxArtifact

if TYPE_CHECKING:
    from fake_bench import Bench

sys.path.append(str(Path(__file__).parent.parent / "runtime"))  # the fake GPU lives there


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Bench]:
    """A fake GPU with a fake builder of one version."""
    from fake_bench import Bench

    return lambda package: Bench(monkeypatch, package, tmp_path)


@pytest.fixture(scope="session")
def onnx(tmp_path_factory: pytest.TempPathFactory) -> OnnxArtifact:
    """A graph of five nodes."""
    return write_small_onnx(tmp_path_factory.mktemp("small") / "model.onnx")


@pytest.fixture(scope="session")
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    ).eval()


@pytest.fixture(scope="session")
def graph(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> OnnxArtifact:
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    return export_onnx(network, input_size=(3, 16, 16), path=path)


@pytest.fixture
def unknown_operator(graph: OnnxArtifact, tmp_path: Path) -> OnnxArtifact:
    """The graph with its Relu made an operator that no runtime has."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load(graph.path)
    relu = next(node for node in model.graph.node if node.op_type == "Relu")
    relu.op_type, relu.domain, relu.name = "Wobble", "my.ops", "the_wobble"
    model.opset_import.append(onnx.helper.make_opsetid("my.ops", 1))
    path = tmp_path / "unknown.onnx"
    onnx.save(model, path)
    return describe_onnx(path)
