"""How long measuring will take, from a few units timed on this machine."""

from __future__ import annotations

import time
from typing import Any

import torch

from cswap_deploy.causal.cost import loop_macs
from cswap_deploy.causal.scoring import measure
from cswap_deploy.data import ImageSet, normalised
from cswap_deploy.models.load import LoadedModel
from cswap_deploy.old_config import BuildConfig
from cswap_deploy.pruning.plan import Prepared, prepare, scoring

_GROUPS, _UNITS = 6, 8


def forecast_pruning(
    loaded: LoadedModel, calibration: ImageSet, config: BuildConfig
) -> dict[str, Any]:
    """What the prune stage would do.

    Args:
        loaded: The network.
        calibration: Its images.
        config: Ratio, rounds and so on.

    Returns:
        Plain data; times in seconds.

    Raises:
        PruneError: The ratio is out of reach.
    """
    pixels = normalised(calibration, loaded.spec.preprocessing)
    images = torch.from_numpy(pixels).contiguous(memory_format=torch.channels_last)
    prepared = prepare(
        loaded.module, images=images, ratio=config.ratio, ratio_of=config.ratio_of,
        round_to=config.round_to,
    )  # fmt: skip
    n, measuring, _ = scoring(config, prepared, len(images))
    macs = loop_macs(
        prepared.graph, prepared.groups, images=n, rounds=config.rounds,
        adaptive=measuring == "adaptive",
    )  # fmt: skip
    rate = _macs_per_second(prepared, images[: min(n, 16)], calibration.labels[: min(n, 16)])
    return {
        "groups": {g.name: f"{g.units} {g.kind}" for g in prepared.groups},
        "excluded": prepared.excluded,
        "units": prepared.sizes.units,
        "params": prepared.dense_size.params,
        "macs": prepared.dense_size.macs,
        "rounds": config.rounds,
        "scoring_images": n,
        "measuring": measuring,
        "scoring_macs": macs,
        "scoring_seconds": float(f"{macs / rate:.2g}"),
    }


def _macs_per_second(prepared: Prepared, images: torch.Tensor, labels: Any) -> float:
    """Speed of masked forwards, over a few groups from front to back."""
    graph, groups = prepared.graph, prepared.groups
    chosen = groups[:: max(1, len(groups) // _GROUPS)]
    macs, seconds = 0, 0.0
    for group in chosen:
        units = range(min(_UNITS, group.units))
        readers = [n for c in group.consumers for n in graph.readers(c.layer)]
        begun = time.perf_counter()
        measure(graph, {group: units}, images=images, labels=torch.from_numpy(labels), moments={})
        seconds += time.perf_counter() - begun
        macs += graph.macs(graph.suffix(readers).nodes) * len(units) * len(images)
    return macs / seconds
