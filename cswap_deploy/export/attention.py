"""Attention of any number of dimensions, as the four that torch's exporter takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_ATTENTION = torch.nn.functional.scaled_dot_product_attention


class FourDimensions(TorchFunctionMode):
    """Within it, ``scaled_dot_product_attention`` sees (N, heads, tokens, width) alone.

    It takes (N, tokens, width) and (N, heads, windows, tokens, width) as well, which
    ``torch.onnx.export`` refuses. What lies between images and tokens becomes heads.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        kwargs = kwargs or {}
        return (_attention if func is _ATTENTION else func)(*args, **kwargs)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any,
    **kwargs: Any,
) -> Tensor:  # fmt: skip
    if query.ndim in (2, 4):
        return _ATTENTION(query, key, value, attn_mask, *args, **kwargs)
    if attn_mask is not None and attn_mask.ndim > 2:  # (tokens, tokens) holds for all anyway
        attn_mask = _as_heads(attn_mask.expand(*query.shape[:-2], *attn_mask.shape[-2:]))
    q, k, v = map(_as_heads, (query, key, value))
    out = _ATTENTION(q, k, v, attn_mask, *args, **kwargs)
    return out.reshape(*query.shape[:-1], value.shape[-1])


def _as_heads(x: Tensor) -> Tensor:
    """(N, ..., tokens, width) -> (N, heads, tokens, width)."""
    return x.unsqueeze(1) if x.ndim == 3 else x.flatten(1, -3)
