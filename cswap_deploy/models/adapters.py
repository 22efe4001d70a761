"""Model families whose layers do not show what can be removed: attention heads.

An attention layer may only lose whole heads: removing part of a head's dimension changes the scale
of its softmax. An adapter says where a module's heads lie, and sets what its forward reads after
some of them are gone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, slots=True)
class Heads:
    """The attention heads of one module; layer names are relative to it."""

    qkv: str
    """Linear layer whose outputs are query, key and value, each (heads, head_dim) in order."""
    projection: str
    """Linear layer that reads the concatenated heads."""
    count: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class Adapter:
    """Finds and removes the heads of one kind of attention module."""

    matches: Callable[[nn.Module], bool]
    heads: Callable[[nn.Module], Heads]
    shrink: Callable[[nn.Module, int], None]
    """Make the module's forward expect this many heads."""


def _is_timm_attention(module: nn.Module) -> bool:
    # By what its forward reads, not by class: timm has several classes with this layout.
    names = ("qkv", "proj", "num_heads", "head_dim", "attn_dim")
    plain: Any = module
    return (
        all(hasattr(module, n) for n in names)
        and isinstance(plain.qkv, nn.Linear)
        and isinstance(plain.proj, nn.Linear)
        and plain.qkv.out_features == 3 * plain.num_heads * plain.head_dim
        and isinstance(getattr(plain, "norm", None), nn.Identity | None)
        and getattr(plain, "gate", None) is None
    )


def _timm_heads(module: Any) -> Heads:
    return Heads("qkv", "proj", module.num_heads, module.head_dim)


def _timm_shrink(module: Any, heads: int) -> None:
    module.num_heads = heads
    module.attn_dim = heads * module.head_dim


ADAPTERS: dict[str, Adapter] = {
    "timm-attention": Adapter(_is_timm_attention, _timm_heads, _timm_shrink),
}


def find_heads(module: nn.Module) -> tuple[Adapter, Heads] | None:
    """The adapter for an attention module, and its heads; ``None`` where none fits."""
    fitting = (adapter for adapter in ADAPTERS.values() if adapter.matches(module))
    return next(((adapter, adapter.heads(module)) for adapter in fitting), None)
