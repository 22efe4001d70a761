"""``--exclude`` and ``--include``: what they matched is said, what matches nothing is refused."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from small_networks import small_cnn, small_vit

from cswap_deploy.config import PruneConfig
from cswap_deploy.errors import UsageError
from cswap_deploy.pruning.prepare import Prepared, prepare

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@cache
def cnn(**patterns: Any) -> Prepared:
    return prepare(small_cnn(), IMAGES, PruneConfig(ratio=0.02, round_to=1, **patterns))


def names(prepared: Prepared) -> set[str]:
    return {g.name for g in prepared.groups}


def test_excluded_layers_keep_their_outputs() -> None:
    every, left = names(cnn()), cnn(exclude=("down*", "squeeze"))
    assert every - names(left) == {"down.0", "squeeze"}
    assert left.excluded["squeeze"] == "--exclude 'squeeze'"
    assert left.notes == (
        "--exclude 'down*' matched 1 group: down.0",
        "--exclude 'squeeze' matched 1 group: squeeze",
    )


def test_a_pattern_finds_a_group_by_any_layer_that_makes_its_units() -> None:
    """The shortcut's outputs are added to those of another layer: both stay."""
    left = cnn(exclude=("shortcut.0",))
    assert names(cnn()) - names(left) == {"out.0"}


def test_included_layers_alone_lose_outputs() -> None:
    only = cnn(include=("squeeze", "expand*"), exclude=("expand.0",))
    assert names(only) == {"squeeze"}
    assert only.excluded["down.0"] == "not in --include"
    assert only.excluded["expand.0"] == "--exclude 'expand.0'"


def test_a_pattern_without_a_group_says_so() -> None:
    found = prepare(
        small_vit(), IMAGES, PruneConfig(ratio=0.1, round_to=1, exclude=("patch_embed.proj",))
    )
    assert found.notes == ("--exclude 'patch_embed.proj' matched no group",)


def test_a_pattern_without_a_layer_is_refused_with_close_ones() -> None:
    with pytest.raises(
        UsageError, match=r"--exclude 'sqeeze' matches no layer of SmallCNN\n  fix: .*'squeeze'"
    ):
        cnn(exclude=("sqeeze",))
