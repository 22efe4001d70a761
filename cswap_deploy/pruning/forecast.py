"""How long pruning will take, from a few units and forward passes timed on this machine."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from torch import nn

from cswap_deploy.causal.cost import loop_macs
from cswap_deploy.causal.experiment import Experiment
from cswap_deploy.causal.measurement import LocalMeasurement
from cswap_deploy.config import PruneConfig
from cswap_deploy.data.calibration import Calibration
from cswap_deploy.network.placing import device_for
from cswap_deploy.network.probabilities import giving_logits, output_kind
from cswap_deploy.network.steadiness import require_steady
from cswap_deploy.pruning.importance import importance_of
from cswap_deploy.pruning.job import Job
from cswap_deploy.pruning.pace import expected_costs, macs_per_second
from cswap_deploy.pruning.prepare import Prepared, prepare

_GROUPS, _UNITS, _IMAGES = 6, 8, 16


def forecast_pruning(
    module: nn.Module, calibration: Calibration, config: PruneConfig
) -> dict[str, Any]:
    """What pruning would do, as plain data; times in seconds.

    Args:
        module: In eval mode, float32; not changed.
        calibration: Images of the network's size.
        config: How.

    Raises:
        PruneError: The ratio is out of reach.
    """
    images = calibration.images
    require_steady(module, images)
    begun = time.perf_counter()
    with giving_logits(module, output_kind(module, images, calibration.task)):
        prepared = prepare(module, images, config).to(device_for(config))
    preparing = time.perf_counter() - begun
    job = Job(prepared, calibration, config, importance_of(config.criterion))
    resolved, costs = job.resolved, expected_costs(job)
    forward = macs_per_second(prepared.graph, images)
    count = resolved.scoring_samples
    macs = loop_macs(
        prepared.graph, prepared.groups, images=count, rounds=config.rounds,
        adaptive=resolved.measuring == "adaptive",
    )  # fmt: skip
    few = min(count, _IMAGES)
    part = replace(calibration, images=images[:few], labels=calibration.labels[:few])
    rate = _masked_macs_per_second(prepared, part)
    return {
        "groups": {g.name: f"{g.units} {g.kind}" for g in prepared.groups},
        "excluded": prepared.excluded,
        "units": prepared.sizes.units,
        "params": prepared.dense_size.params,
        "macs": prepared.dense_size.macs,
        "rounds": config.rounds,
        "scoring_images": count,
        "measuring": resolved.measuring,
        "scoring_macs": macs,
        "scoring_seconds": _rounded(macs / rate),
        "prune_seconds": _rounded(preparing + sum(map(sum, costs.values())) / forward),
        "pass_seconds": _rounded(prepared.graph.macs(prepared.graph.nodes) * len(images) / forward),
        "tracing_seconds": _rounded(preparing),
    }


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.2g}")


def _masked_macs_per_second(prepared: Prepared, few: Calibration) -> float:
    """Speed of masked forwards, over a few groups from front to back."""
    graph, groups = prepared.graph, prepared.groups
    macs, seconds = 0, 0.0
    for group in groups[:: max(1, len(groups) // _GROUPS)]:
        units = range(min(_UNITS, group.units))
        readers = [n for c in group.consumers for n in graph.readers(c.layer)]
        experiment = Experiment(graph, few.images, few.labels, task=few.task)
        measurement = LocalMeasurement(experiment, together=prepared.together)
        begun = time.perf_counter()
        measurement.effects({group: units})
        seconds += time.perf_counter() - begun
        macs += graph.macs(graph.suffix(readers).nodes) * len(units) * len(few.images)
    return macs / seconds
