"""The two networks that ship inside the package, and the images to prune and test them on.

Both were trained by ``benchmarks/train_demo_models.py`` on Fashion-MNIST (Xiao et al. 2017, MIT
licence), so that the whole pipeline runs on real weights and real images with no download.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

_ZOO = Path(__file__).resolve().parent / "zoo"
IMAGES = {
    "calibration": _ZOO / "fashion-mnist-calibration.npz",
    "validation": _ZOO / "fashion-mnist-test.npz",
}
"""Arrays ``images`` (N, 28, 28, 1) uint8 and ``labels`` (N,): part -> file."""

CLASS_NAMES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
    "ankle-boot",
)  # fmt: skip
MEAN = (0.2860,)
STD = (0.3530,)
INPUT_SIZE = (1, 28, 28)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2015, figure 2)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            convolution = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DemoResNet(nn.Module):
    """ResNet-20 for 28x28 grey images (He et al. 2015, section 4.2); 0.27 M parameters.

    Shortcuts that change shape are 1x1 convolutions (option B).
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, stride=1)
        self.layer2 = _stage(16, 32, stride=2)
        self.layer3 = _stage(32, 64, stride=2)
        self.linear = nn.Linear(64, len(CLASS_NAMES))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, H, W) -> logits (N, 10)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


def _stage(inputs: int, outputs: int, *, stride: int) -> nn.Sequential:
    return nn.Sequential(
        BasicBlock(inputs, outputs, stride),
        BasicBlock(outputs, outputs, 1),
        BasicBlock(outputs, outputs, 1),
    )


def demo_vit() -> nn.Module:
    """A ViT of 6 layers, width 128, 4 heads, 7x7 patches (16 tokens); 1.2 M parameters."""
    from cswap_deploy.models.torchvision_shim import import_timm

    import_timm()
    from timm.models.vision_transformer import VisionTransformer

    module: nn.Module = VisionTransformer(
        img_size=28, patch_size=7, in_chans=1, num_classes=len(CLASS_NAMES), embed_dim=128,
        depth=6, num_heads=4, class_token=False, global_pool="avg",
    )  # fmt: skip
    return module


DEMOS: dict[str, Callable[[], nn.Module]] = {"demo-resnet": DemoResNet, "demo-vit": demo_vit}


def weights_file(name: str) -> Path:
    """Where the trained weights of a demo are, a safetensors file."""
    return _ZOO / f"{name}.safetensors"
