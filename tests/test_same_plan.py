"""``cswap_deploy.prune`` on a module and the command on its factory come to the same plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ordinary_networks import NETWORKS
from torch import nn

import cswap_deploy
from cswap_deploy.records.bundle import read_plan

NAMES = ("view_by_batch", "shuffle_net", "multihead_attention", "weight_norm", "tied_weights")
SETTINGS: dict[str, Any] = {
    "ratio": 0.1, "rounds": 1, "measuring": "adaptive", "scoring_samples": 4, "round_to": 1,
    "input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.25,) * 3,
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Factories by name, for ``test_same_plan:NAME``."""
    if name in NETWORKS:
        return NETWORKS[name].make
    raise AttributeError(name)


@pytest.mark.parametrize("name", NAMES)
def test_command_and_call_come_to_the_same_plan(name: str, tmp_path: Path) -> None:
    from cswap_deploy.config import load_config
    from cswap_deploy.pipeline import build

    rng = np.random.default_rng(0)
    data = tmp_path / "images.npz"
    images = rng.integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
    np.savez(data, images=images, labels=np.arange(64) % 10)
    config = load_config(
        model=f"{__name__}:{name}", data=str(data), output=tmp_path / "out",
        store=tmp_path / "store", calibration_samples=32, allow_chance=True, **SETTINGS,
    )  # fmt: skip
    build(config, until="prune")
    by_command = read_plan(tmp_path / "out")

    module: nn.Module = NETWORKS[name].make()
    called = cswap_deploy.prune(
        module, str(data), calibration_samples=32, validation_samples=32, **SETTINGS
    ).plan
    seconds = {"rounds": {"__all__": {"seconds"}}}
    assert by_command.model_dump(exclude=seconds) == called.model_dump(exclude=seconds)  # type: ignore[arg-type]
