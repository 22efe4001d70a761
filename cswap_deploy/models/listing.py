"""What ``cswap-deploy models`` lists."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Literal

from cswap_deploy.models.demos import DEMOS, INPUT_SIZE
from cswap_deploy.models.torchvision_shim import import_timm

TESTED = (
    "resnet18", "resnet50", "mobilenetv2_100", "efficientnet_lite0", "convnext_atto",
    "regnety_004", "vgg11_bn", "densenet121", "vit_tiny_patch16_224", "deit_tiny_patch16_224",
)  # fmt: skip
"""One of each family that the tests build end to end; DeiT is ViT's network."""


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One name that can be built."""

    name: str
    kind: Literal["demo", "timm"]
    family: str
    """timm's module, for example ``resnet``."""
    tested: bool
    """Whether a model of the same family is in the test matrix."""
    input_size: tuple[int, int, int] | None
    pretrained: bool


def list_models(pattern: str | None = None) -> tuple[ModelEntry, ...]:
    """The demos and timm's classifiers whose name matches a shell pattern.

    Args:
        pattern: For example ``*vit_tiny*``; a word without wildcards matches anywhere. Without a
            pattern: the demos and the models of the test matrix.
    """
    timm = import_timm()
    families = {
        name: timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
        for name in timm.list_models()
    }
    tested = {families[name] for name in TESTED}

    def entry(name: str) -> ModelEntry:
        cfg = timm.models.get_pretrained_cfg(name)
        size = None if cfg is None or len(cfg.input_size) != 3 else tuple(cfg.input_size)
        pretrained = bool(cfg is not None and cfg.has_weights)
        return ModelEntry(name, "timm", families[name], families[name] in tested, size, pretrained)

    shown, names = list(DEMOS), list(TESTED)
    if pattern is not None:
        shape = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
        shown, names = fnmatch.filter(DEMOS, shape), timm.list_models(shape)
    demos = (ModelEntry(name, "demo", "demo", True, INPUT_SIZE, True) for name in shown)
    return (*demos, *map(entry, names))
