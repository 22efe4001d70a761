"""How long pruning will take, from operation counts and forward passes timed on this machine."""

from __future__ import annotations

import time
from typing import Any

from torch import nn

from cswap_deploy.config import PruneConfig
from cswap_deploy.data.calibration import Calibration
from cswap_deploy.network.placing import device_for
from cswap_deploy.network.probabilities import giving_logits, output_kind
from cswap_deploy.network.steadiness import require_steady
from cswap_deploy.pruning.importance import importance_of
from cswap_deploy.pruning.job import Job
from cswap_deploy.pruning.pace import expected_costs, macs_per_second
from cswap_deploy.pruning.prepare import prepare


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
    phases = {kind: sum(each) / forward for kind, each in costs.items()}
    return {
        "groups": {g.name: f"{g.units} {g.kind}" for g in prepared.groups},
        "excluded": prepared.excluded,
        "units": prepared.dense_size.units,
        "params": prepared.dense_size.params,
        "macs": prepared.dense_size.macs,
        "rounds": config.rounds,
        "scoring_images": resolved.scoring_samples,
        "measuring": resolved.measuring,
        "scoring_seconds": _rounded(phases["measuring"] + phases.get("estimating", 0)),
        "prune_seconds": _rounded(preparing + sum(phases.values())),
        "pass_seconds": _rounded(prepared.graph.macs(prepared.graph.nodes) * len(images) / forward),
        "tracing_seconds": _rounded(preparing),
    }


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.2g}")
