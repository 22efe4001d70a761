"""Modules that a network is given plain ones for, so that their units can be removed.

A weight that is computed from others at each forward cannot lose a row, and some forwards insist on
the sizes that they were made with. Each adapter puts what computes the same in the place of one
kind of module; weights keep their names where they are still parameters.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune


@dataclass(frozen=True, slots=True)
class Adapter:
    """What one kind of module needs."""

    matches: Callable[[nn.Module], bool]
    make_plain: Callable[[Any], None]
    """In place."""
    words: str
    """What was done, for people."""


class Attention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` in plain operations, which does not insist on its number of heads.

    The same weights under the same names. ``num_heads`` may be less than the embedding has room
    for: the rows of ``in_proj_weight`` and the columns of ``out_proj`` are those of the heads left.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See ``nn.MultiheadAttention``."""
        if query is key and key is value:
            q, k, v = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            weights = self.in_proj_weight.chunk(3)
            biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            inputs = zip((query, key, value), weights, biases, strict=True)
            q, k, v = (F.linear(x, w, b) for x, w, b in inputs)
        q, k, v = (self._heads(x) for x in (q, k, v))
        mask = _mask(attn_mask, key_padding_mask, q)
        y = F.scaled_dot_product_attention(q, k, v, mask)
        y = y.movedim(-3, -2).flatten(-2)
        y = self.out_proj(y)
        y = y if self.batch_first or y.ndim == 2 else y.transpose(0, 1)
        if not need_weights:
            return y, None
        scores = q @ k.transpose(-1, -2) * self.head_dim**-0.5
        weights = (scores if mask is None else scores + mask).softmax(-1)
        return y, weights.mean(-3) if average_attn_weights else weights

    def _heads(self, x: Tensor) -> Tensor:
        """(N, T, heads * head_dim), or the other way round, to (N, heads, T, head_dim)."""
        x = x if self.batch_first or x.ndim == 2 else x.transpose(0, 1)
        return x.reshape(*x.shape[:-1], self.num_heads, self.head_dim).movedim(-2, -3)


def _mask(attn_mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
    """Both masks as one that is added to the scores (N, heads, T, S)."""
    parts = []
    if attn_mask is not None:
        added = _added(attn_mask, q)
        each = added.ndim == 3  # (N * heads, T, S)
        parts.append(added.reshape(-1, q.shape[-3], *added.shape[1:]) if each else added)
    if padding is not None:
        parts.append(_added(padding, q)[..., None, None, :])
    return sum(parts[1:], parts[0]) if parts else None


def _added(mask: Tensor, q: Tensor) -> Tensor:
    """A mask of what must not be looked at as numbers to add."""
    if mask.dtype is not torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, float("-inf"))


def _heads_are_even(module: nn.Module) -> bool:
    plain: Any = module
    return (
        type(module) is nn.MultiheadAttention
        and plain._qkv_same_embed_dim
        and plain.bias_k is None
        and not plain.add_zero_attn
    )


def _plain_attention(module: Any) -> None:
    module.__class__ = Attention
    module._qkv_same_embed_dim = False  # keeps nn.TransformerEncoder off its fused kernel


def _unparametrize(module: nn.Module) -> None:
    for name in list(module.parametrizations):  # type: ignore[arg-type]
        value = getattr(module, str(name)).detach().clone()
        parametrize.remove_parametrizations(module, str(name), leave_parametrized=True)
        delattr(module, str(name))
        setattr(module, str(name), nn.Parameter(value))


def _hooks(module: nn.Module) -> list[Any]:
    from torch.nn.utils.prune import BasePruningMethod
    from torch.nn.utils.spectral_norm import SpectralNorm
    from torch.nn.utils.weight_norm import WeightNorm

    found = module._forward_pre_hooks.values()
    return [h for h in found if isinstance(h, SpectralNorm | WeightNorm | BasePruningMethod)]


def _unhook(module: nn.Module) -> None:
    for hook in _hooks(module):
        if hasattr(hook, "_tensor_name"):
            prune.remove(module, hook._tensor_name)  # type: ignore[no-untyped-call]
        elif type(hook).__name__ == "WeightNorm":
            nn.utils.remove_weight_norm(module, hook.name)
        else:
            nn.utils.remove_spectral_norm(module, hook.name)
            for key, loads in list(module._load_state_dict_pre_hooks.items()):
                if "SpectralNorm" in type(getattr(loads, "hook", loads)).__name__:
                    del module._load_state_dict_pre_hooks[key]  # torch forgets it


def _standardised(module: nn.Module) -> bool:
    std_conv = sys.modules.get("timm.layers.std_conv")
    return isinstance(module, nn.Conv2d) and type(module).__module__ == getattr(
        std_conv, "__name__", ""
    )


def _fold_standardised(module: Any) -> None:
    scale = None
    if "gain" in module._parameters:
        scale = (module.gain * module.scale).view(-1)
    weight = F.batch_norm(
        module.weight.reshape(1, module.out_channels, -1), None, None,
        weight=scale, training=True, momentum=0.0, eps=module.eps,
    ).reshape_as(module.weight)  # fmt: skip
    module.weight = nn.Parameter(weight.detach())
    if "gain" in module._parameters:
        del module.gain
    same = getattr(module, "same_pad", type(module).__name__ == "StdConv2dSame")
    module.__class__ = sys.modules["timm.layers.conv2d_same"].Conv2dSame if same else nn.Conv2d


ADAPTERS: dict[str, Adapter] = {
    "parametrized": Adapter(
        parametrize.is_parametrized, _unparametrize, "parametrizations were removed"
    ),
    "weight-norm": Adapter(
        lambda m: bool(_hooks(m)), _unhook, "what a hook computes weights from was folded"
    ),
    "weight-standardised": Adapter(
        _standardised, _fold_standardised, "standardised weights were folded"
    ),
    "attention": Adapter(
        _heads_are_even, _plain_attention, "nn.MultiheadAttention was given plain operations"
    ),
}
