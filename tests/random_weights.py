"""Random weights that count: without them a wrong deletion could go unnoticed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cswap_deploy.models.listing import TESTED

MATRIX = TESTED
"""The models that must build."""


def lively(module: nn.Module, images: Tensor) -> nn.Module:
    """Give a fresh network weights under which every branch shapes the output.

    timm starts residual branches at or near nothing (a last batch norm of zero, a layer scale of
    1e-6) and every batch norm as the identity. Here scales are near one, statistics are those of
    the images and then shaken, so that each channel has its own.
    """
    g = torch.Generator().manual_seed(5)

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        tensor.data.copy_(low + (high - low) * torch.rand(tensor.shape, generator=g))

    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    for name, parameter in module.named_parameters():
        if name.endswith("gamma"):  # layer scale
            uniform(parameter, 0.5, 1.5)
        elif name.endswith(("bias", "pos_embed", "cls_token")):
            uniform(parameter, -0.3, 0.4)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d | nn.LayerNorm):
            uniform(layer.weight, 0.5, 1.5)
        elif isinstance(layer, nn.Linear | nn.Conv2d):
            fan_in = layer.weight[0].numel()
            layer.weight.data.normal_(0.0, (1.5 / fan_in) ** 0.5, generator=g)
    for norm in norms:
        norm.momentum = None  # the plain mean over what it sees
        norm.reset_running_stats()
    if norms:
        for layer in norms:
            layer.train()
        with torch.no_grad():
            module(images)
    module.eval()
    for norm in norms:
        norm.momentum = 0.1
        # A channel that is nearly constant on these images must not explode on others.
        norm.running_var.clamp_(min=0.1 * float(norm.running_var.mean()))
        spread = norm.running_var.sqrt()
        norm.running_mean += 0.2 * spread * torch.randn(spread.shape, generator=g)
        norm.running_var *= 0.7 + 0.6 * torch.rand(spread.shape, generator=g)
    last = [m for m in module.modules() if isinstance(m, nn.Linear)][-1]
    with torch.no_grad():  # no prediction is certain
        last.weight *= 4.0 / (module(images) - last.bias).abs().max()
    return module
