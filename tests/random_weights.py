"""Random weights that count: without them a wrong deletion could go unnoticed."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cswap_deploy.models.listing import TESTED
from cswap_deploy.models.torchvision_shim import import_timm

SAME_NETWORK = {"deit_tiny_patch16_224": "vit_tiny_patch16_224"}
"""Other weights in the same layers."""
MATRIX = [name for name in TESTED if name not in SAME_NETWORK]
"""The models that must build."""
_SMALLER: dict[str, dict[str, Any]] = {
    "resnet18": {"layers": (2, 1, 1, 1), "channels": (32, 48, 64, 96)},
    "resnet50": {"layers": (2, 1, 1, 1), "channels": (16, 24, 32, 48)},
    "convnext_atto": {"depths": (2, 1, 1, 1)},
    "densenet121": {"block_config": (2, 2, 2, 2)},
    # Its two 4,096-wide layers are 90 % of its 130 million parameters.
    "vgg11_bn": {
        "cfg": (32, "M", 48, "M", 64, 64, "M", 96, 96, "M", 96, 96, "M"),
        "mlp_ratio": 0.05,
    },
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 2},
}


def matrix_network(name: str) -> nn.Module:
    """A model of the matrix for ten classes on 32x32 images, with every kind of block it has.

    Repetitions of blocks go: tracing and exporting cost by the node, and a refit by the width.
    """
    torch.manual_seed(0)
    timm, arguments = import_timm(), {"num_classes": 10} | _SMALLER.get(name, {})
    if name == "vgg11_bn":
        return timm.models.VGG(norm_layer=nn.BatchNorm2d, **arguments).eval()
    # Half as wide, and otherwise the same.
    made = {"mobilenetv2_100": "mobilenetv2_050"}.get(name, name)
    module = timm.create_model(made, **arguments)
    if name not in _SMALLER:  # timm does not let us set these depths
        regnet = name.startswith("regnet")
        stages = [module.s2, module.s3, module.s4] if regnet else module.blocks[1:]
        shorten(stages, (2, 1, 1, 1, 1, 1))
    return module.eval()


def shorten(stages: Iterable[nn.Module], depths: Iterable[int]) -> None:
    """Keep the first blocks of each stage."""
    for stage, depth in zip(stages, depths, strict=False):
        for block in [child for child, _ in stage.named_children()][depth:]:
            delattr(stage, block)


_MIXERS = (
    nn.Linear, nn.Bilinear, nn.Embedding, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase,
    nn.modules.conv._ConvNd,
)  # fmt: skip
_NORMS = (
    nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm,
)  # fmt: skip
_SCALE = re.compile(r"(gamma|scale|weight|temperature|alpha)[_\d]*$")
"""Of a parameter with a value for each channel: it multiplies."""


def lively(module: nn.Module, images: Tensor) -> nn.Module:
    """Give a fresh network weights under which every branch shapes the output.

    timm starts residual branches at or near nothing (a last batch norm of zero, a layer scale of
    1e-6) and every batch norm as the identity. Here scales are near one, statistics are those of
    the images, shaken so that each channel has its own. What a parametrisation computes is left
    alone, and so is a network that is not in float32.
    """
    g = torch.Generator().manual_seed(5)
    owners = {id(p): owner for owner in module.modules() for p in owner.parameters(recurse=False)}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "parametrizations" not in name and not name.endswith(("_orig", "_g", "_v")):
                _enliven(name, parameter, owners[id(parameter)], g)
    module.eval()
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    seen: set[nn.Module] = set()
    hooks = [
        norm.register_forward_pre_hook(partial(_settle, seen=seen, g=g))
        for norm in norms
        if norm.track_running_stats
    ]
    with torch.no_grad():
        module(images)
    for hook in hooks:
        hook.remove()
    _calm(module, images)
    return module


def counted_macs(module: nn.Module, images: Tensor) -> int:
    """PyTorch's own count, for one image."""
    module = copy.deepcopy(module)
    for layer in module.modules():
        if hasattr(layer, "fused_attn"):  # the counter does not know the fused kernel of the CPU
            layer.fused_attn = False
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(images[:1])
    return counter.get_total_flops() // 2


def _settle(
    norm: nn.modules.batchnorm._NormBase, args: tuple[Tensor], *, seen: set[nn.Module],
    g: torch.Generator,
) -> None:  # fmt: skip
    """Take a norm's statistics from its first input, and shake them.

    In the order of execution, so that a later norm has those of what is shaken already: else the
    shifts grow from layer to layer, gates saturate, and rounding alone changes the outputs.
    """
    if norm in seen:
        return
    seen.add(norm)
    (x,) = args
    var, mean = torch.var_mean(x, [d for d in range(x.ndim) if d != 1])
    # A channel that is nearly constant on these images must not explode on others.
    var = var.clamp(min=max(0.1 * float(var.mean()), norm.eps))
    norm.running_mean.copy_(mean + 0.2 * var.sqrt() * torch.randn(var.shape, generator=g))
    norm.running_var.copy_(var * (0.7 + 0.6 * torch.rand(var.shape, generator=g)))


def _enliven(name: str, parameter: Tensor, owner: nn.Module, g: torch.Generator) -> None:
    """Draw one parameter, by what it is for."""
    last, ones = name.rpartition(".")[2], max(parameter.shape, default=1) == parameter.numel()
    if last.startswith("bias") or last.endswith(("bias", "biases", "bias_table", "token", "embed")):
        low, high = -0.3, 0.4
    elif isinstance(owner, _NORMS) or (ones and _SCALE.search(last)):
        low, high = 0.5, 1.5
    elif isinstance(owner, _MIXERS) or not ones:
        sources = parameter[0].numel()
        if isinstance(owner, nn.modules.conv._ConvTransposeNd):
            sources = parameter[:, 0].numel() // owner.groups // math.prod(owner.stride)
        parameter.normal_(0.0, (1.5 / max(sources, 1)) ** 0.5, generator=g)
        return
    else:
        low, high = -0.3, 0.4
    parameter.copy_(low + (high - low) * torch.rand(parameter.shape, generator=g))


def _calm(module: nn.Module, images: Tensor) -> None:
    """Scale the last layer so that no prediction is certain."""
    with torch.no_grad():
        logits = module(images)
        linear = [m for m in module.modules() if isinstance(m, nn.Linear)]
        heads = [m for m in linear if m.out_features == logits.shape[1]]  # two where distilled
        if not heads:
            last = [m for m in module.modules() if isinstance(m, nn.Conv2d)][-1:]
            heads = [m for m in last if m.out_channels == logits.shape[1]]
        for head in heads:
            if not nn.utils.parametrize.is_parametrized(head):
                constant = head.bias if len(heads) == 1 and head.bias is not None else 0.0
                head.weight *= 4.0 / (logits - constant).abs().max()
