"""Whole residual branches: found, masked, counted, deleted for real, and replayed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from random_weights import counted_macs, lively, shorten
from safetensors.torch import save_file
from torch import Tensor, nn

from cswap_deploy.config import PruneConfig
from cswap_deploy.data import Calibration
from cswap_deploy.export.onnx import export_onnx
from cswap_deploy.models.torchvision_shim import import_timm
from cswap_deploy.network.deletion import contiguous_state, load_pruned
from cswap_deploy.network.graph import trace
from cswap_deploy.network.residual import find_branches, find_structure, silence
from cswap_deploy.progress import Silent
from cswap_deploy.pruning.prepare import prepare
from cswap_deploy.pruning.prune import Pruned, prune
from cswap_deploy.runtime.onnx_session import OnnxSession

IMAGES = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(3))
LABELS = torch.arange(24) % 3


class Block(nn.Module):
    """A residual block in the style of its family."""

    def __init__(self, width: int, style: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(2 * width)
        self.conv2 = nn.Conv2d(2 * width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.style = style

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        if self.style == "in place":
            y += x
            return y.relu_()
        if self.style == "linear":
            return x + y
        if self.style == "gelu behind":
            return nn.functional.gelu(x + y)
        if self.style == "looks twice":
            return x + y * y.mean()
        return (x + y).relu()


class Net(nn.Module):
    def __init__(self, style: str = "plain", blocks: int = 4, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.blocks = nn.Sequential(*(Block(width, style) for _ in range(blocks)))
        self.classifier = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.stem(x)).mean((2, 3)))


def small(style: str = "plain", blocks: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return lively(Net(style, blocks).eval(), IMAGES)


def names(module: nn.Module, images: Tensor = IMAGES) -> list[str]:
    return [g.name for g in find_branches(trace(copy.deepcopy(module), images[:2]))]


def outputs(module: nn.Module, images: Tensor = IMAGES) -> Tensor:
    with torch.no_grad():
        return module(images)


@pytest.mark.parametrize("style", ["plain", "in place", "linear"])
def test_every_identity_shaped_block_is_one(style: str) -> None:
    assert names(small(style)) == [f"blocks.{i}" for i in range(4)]


def test_where_the_sum_is_bent_the_layers_before_it_go_and_the_block_stays() -> None:
    prepared = prepare(small("gelu behind"), IMAGES, PruneConfig(ratio=0.3))
    first = next(g for g in prepared.groups if g.kind == "branch")
    assert first.name == "blocks.0.conv2 and before"
    assert {e.module: e.nothing for e in first.emptied} == {
        "blocks.0.conv1": False, "blocks.0.bn1": False,
        "blocks.0.conv2": True, "blocks.0.bn2": False,
    }  # fmt: skip


def test_a_branch_that_something_else_reads_stays() -> None:
    assert names(small("looks twice")) == []


MODELS = {
    "resnet18": {"channels": (8, 16, 24, 32)}, "mobilenetv2_050": {},
    "convnext_atto": {"depths": (1, 3, 1, 1), "dims": (8, 16, 24, 32)},
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "depth": 3},
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_useless_branches_go_first_and_the_plan_is_replayed(name: str, tmp_path: Path) -> None:
    """Two branches that add nothing are planted: they go, and nothing else, and for real."""
    timm = import_timm()

    def make() -> nn.Module:
        made = timm.create_model(name, pretrained=False, num_classes=3, **MODELS[name])
        if name == "mobilenetv2_050":
            shorten(made.blocks[1:], (2, 3, 2, 1, 1, 1))  # four branches of ten
        return made.eval()

    torch.manual_seed(1)
    module = lively(make(), IMAGES)
    planted = find_branches(trace(copy.deepcopy(module), IMAGES[:2]))[1:3]
    for branch in planted:
        silence(module, branch)
    dense = outputs(module)
    sizes = prepare(module, IMAGES, asked(ratio=0.3)).sizes
    total = sizes.size().params
    for branch in planted:
        sizes.remove(branch.name, [0])
    result = run(module, ratio=1 - sizes.size().params / total)
    assert gone(result) == [branch.name for branch in planted]
    assert result.plan.pruned.params == sum(p.numel() for p in result.module.parameters())
    assert result.plan.pruned.macs == counted_macs(result.module, IMAGES)
    for branch in planted:
        for path, _ in branch.emptied:
            left = [k for k in result.module.state_dict() if k.startswith(f"{path}.")]
            assert not left, "its weights are deleted for real"
    torch.testing.assert_close(outputs(result.module), dense, rtol=1e-3, atol=1e-3)

    weights, graph = tmp_path / "pruned.safetensors", tmp_path / "model.onnx"
    save_file(contiguous_state(result.module), weights)
    again = load_pruned(weights, result.plan, make(), IMAGES[:2])
    torch.testing.assert_close(outputs(again), outputs(result.module), rtol=0, atol=1e-5)
    export_onnx(again, input_size=(3, 32, 32), path=graph)
    said = OnnxSession(graph, threads=1).run(IMAGES.numpy())
    torch.testing.assert_close(torch.from_numpy(said), outputs(again), rtol=1e-4, atol=1e-4)


def test_units_inside_a_branch_that_goes_are_neither_counted_nor_replayed(tmp_path: Path) -> None:
    module = small()
    silence(module, find_branches(trace(copy.deepcopy(module), IMAGES[:2]))[2])
    result = run(module, ratio=0.5, rounds=2)
    assert "blocks.2" in gone(result)
    inner = next(g for g in result.plan.groups if g.name == "blocks.2.conv1")
    assert inner.kept == ()
    save_file(contiguous_state(result.module), tmp_path / "w.safetensors")
    again = load_pruned(tmp_path / "w.safetensors", result.plan, Net().eval(), IMAGES[:2])
    torch.testing.assert_close(outputs(again), outputs(result.module), rtol=0, atol=1e-5)


def test_an_essential_branch_stays() -> None:
    """All that the classifier can go by is what one branch adds."""
    module = small()
    with torch.no_grad():
        module.blocks[1].bn2.weight *= 30
        for block in (module.blocks[0], module.blocks[2], module.blocks[3]):
            block.bn2.weight *= 0.01
            block.bn2.bias *= 0.01
    result = run(module, ratio=0.7, rounds=2)
    assert "blocks.1" not in gone(result)
    assert gone(result), "others go"


def test_no_branches_keeps_depth() -> None:
    module = small()
    for branch in find_branches(trace(copy.deepcopy(module), IMAGES[:2])):
        silence(module, branch)
    result = run(module, ratio=0.3, branches=False)
    assert not [g for g in result.plan.groups if g.kind == "branch"]


def asked(**settings: Any) -> PruneConfig:
    return PruneConfig(**({"rounds": 1, "scoring_samples": 6, "measuring": "exact"} | settings))


def run(module: nn.Module, **settings: Any) -> Pruned:
    images = Calibration(IMAGES, LABELS)
    return prune(module, images, config=asked(**settings), progress=Silent())


def gone(result: Pruned) -> list[str]:
    return [g.name for g in result.plan.groups if g.kind == "branch" and not g.kept]


def test_streams_are_told_from_what_gates_and_depthwise_layers_share() -> None:
    module = import_timm().create_model("mobilenetv3_small_050", num_classes=10).eval()
    groups = find_structure(trace(module, torch.randn(2, 3, 64, 64))).groups
    streams = {group.name for group in groups if group.stream}
    assert streams == {f"blocks.{stage}.0.conv_pwl" for stage in (1, 2, 4)}
