"""Networks of timm as graphs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from cswap_deploy.export.simplify import simplify_onnx
from cswap_deploy.records.engine import OnnxArtifact


@dataclass(frozen=True)
class Exported:
    module: nn.Module
    graph: OnnxArtifact
    folder: Path

    def names(self) -> list[str]:
        """Of the simplified graph's nodes."""
        onnx = pytest.importorskip("onnx")
        pytest.importorskip("onnxsim")
        simple = simplify_onnx(self.graph, path=self.folder / "simple.onnx")
        return [node.name for node in onnx.load(simple.path).graph.node]


def randomise_norms(module: nn.Module) -> None:
    """Fresh BatchNorms are the identity, and folding them wrongly would not show."""
    generator = torch.Generator().manual_seed(1)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.weight.data, layer.running_var):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            for tensor in (layer.bias.data, layer.running_mean):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
