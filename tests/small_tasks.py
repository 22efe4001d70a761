"""Small networks whose outputs are not class scores; factories for ``small_tasks:NAME``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import small_models
import torch
import torch.nn.functional as F
from small_models import SmallNet, small
from torch import Tensor, nn


class Headless(SmallNet):
    """A backbone: one feature vector an image."""

    num_classes = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)


class OneLogit(SmallNet):
    """Yes or no."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))[:, :1]


class Maps(SmallNet):
    """A class for each pixel, and an auxiliary map, as torchvision's networks return them."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Conv2d(16, 4, 1)
        self.auxiliary = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = F.relu(self.norm(self.stem(x)))
        z = F.relu(y + self.conv2(F.relu(self.conv1(y))))
        up = {"size": x.shape[2:], "mode": "bilinear"}
        return {
            "out": F.interpolate(self.score(z), **up),
            "aux": F.interpolate(self.auxiliary(y), **up),
        }


class Detector(SmallNet):
    """An SSD-like head: lists of boxes and scores, one of each scale."""

    def __init__(self) -> None:
        super().__init__()
        self.boxes = nn.ModuleList([nn.Conv2d(16, 8, 3, 1, 1), nn.Conv2d(32, 8, 3, 1, 1)])
        self.scores = nn.ModuleList([nn.Conv2d(16, 6, 3, 1, 1), nn.Conv2d(32, 6, 3, 1, 1)])

    def forward(self, x: Tensor) -> Any:
        y = F.relu(self.norm(self.stem(x)))
        y = F.relu(y + self.conv2(F.relu(self.conv1(y))))
        maps = (y, F.relu(self.conv3(y)))

        def flat(heads: nn.ModuleList, last: int) -> Tensor:
            parts = [head(m).permute(0, 2, 3, 1) for head, m in zip(heads, maps, strict=True)]
            return torch.cat([p.reshape(p.shape[0], -1, last) for p in parts], 1)

        return [flat(self.boxes, 4), flat(self.scores, 3)]


@dataclass
class Found:
    """What ``Fields`` returns; unknown to PyTorch."""

    embedding: Tensor
    logits: Tensor
    best: Tensor
    anchors: Tensor
    scale: float = 1.0


class Fields(SmallNet):
    """A dataclass of what has a size, what has none, and what is the same for every image."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("anchors", torch.arange(6.0).view(3, 2))

    def forward(self, x: Tensor) -> Found:
        y = self.features(x)
        logits = self.head(y)
        return Found(y, logits, logits.argmax(1), self.anchors)


class Probabilities(SmallNet):
    """Ends in a sigmoid, and gives one number an image."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.head(self.features(x))[:, :1]).squeeze(1)


class Twice(SmallNet):
    """One tensor under two names, another that is read again inside, and an odd name."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.features(x)
        z = self.head(y)
        return {"linear": z, "again": z, "stem.weight": y.square()}


class Selecting(SmallNet):
    """Returns as many rows as it finds."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.features(x))
        return y[y[:, 0] > 0]


def _made(kind: type[SmallNet]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        module = kind().eval()
    module.load_state_dict(small().state_dict(), strict=False)
    return module


def headless() -> nn.Module:
    return _made(Headless)


def one_logit() -> nn.Module:
    return _made(OneLogit)


def maps() -> nn.Module:
    return _made(Maps)


def detector() -> nn.Module:
    return _made(Detector)


def fields() -> nn.Module:
    return _made(Fields)


def probabilities() -> nn.Module:
    return _made(Probabilities)


def twice() -> nn.Module:
    return _made(Twice)


def selecting() -> nn.Module:
    return _made(Selecting)


def dino(classes: int = 0) -> nn.Module:
    """DINOv2's architecture, small: scaled branches, a class token, tokens normalised, no head."""
    from small_networks import lively

    from cswap_deploy.models.torchvision_shim import import_timm

    with torch.random.fork_rng():
        torch.manual_seed(3)
        module = import_timm().models.vision_transformer.VisionTransformer(
            img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, mlp_ratio=2,
            init_values=0.5, num_classes=classes,
        )  # fmt: skip
        lively(module)
    return module


def dino_with_a_head() -> nn.Module:
    return dino(small_models.CLASSES)


def _segmentation() -> Any:
    from cswap_deploy.models.torchvision_shim import import_timm

    import_timm()  # torchvision beside a CPU torch
    from torchvision.models import segmentation

    return segmentation


def lraspp() -> nn.Module:
    return _segmentation().lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=5
    )


def fcn(layers: tuple[int, ...] = (1, 1, 1, 1), width: int = 8) -> nn.Module:
    """torchvision's FCN with its auxiliary map, on a shallow ResNet of bottlenecks."""
    made = _segmentation().fcn._fcn_resnet
    from torchvision.models.resnet import Bottleneck, ResNet

    dilated = [False, True, True]
    backbone = ResNet(
        Bottleneck, list(layers), width_per_group=width, replace_stride_with_dilation=dilated
    )
    return made(backbone, 5, True)


def fcn_resnet50() -> nn.Module:
    return _segmentation().fcn_resnet50(
        weights=None, weights_backbone=None, num_classes=5, aux_loss=True
    )


def share_right(outputs: Any, labels: Any) -> float:
    """A metric of the user's: top-1."""
    return float((outputs.argmax(1) == labels).mean())


def mean_of_outputs(outputs: Any, labels: Any) -> float:
    """A metric that needs no labels."""
    assert labels is None
    values = outputs.values() if isinstance(outputs, dict) else [outputs]
    return float(sum(value.mean() for value in values))


def no_number(outputs: Any, labels: Any) -> str:
    """Not a metric."""
    return "good"


def shares_right(outputs: Any, labels: Any) -> float:
    """Of yes-or-no outputs."""
    return float(((outputs > 0) == labels).mean())


def outputs_of(module: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """For the tests."""
    from cswap_deploy.models.outputs import named_outputs

    with torch.no_grad():
        return named_outputs(module(images))
