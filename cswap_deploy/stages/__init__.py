"""One function for each stage: find its result in the store, or make it there.

A stage's key is over everything that shapes its result (see ``store``), so a second run of the
same build only reads, and a changed input, weight, setting or tool version does not.
"""

from __future__ import annotations

from cswap_deploy.stages.engine import engine_stage
from cswap_deploy.stages.export import export_stage
from cswap_deploy.stages.precision import precision_stage
from cswap_deploy.stages.prune import prune_stage, read_record, take_pruned
from cswap_deploy.stages.run import BUILD, MODEL, WEIGHTS, BuildRecord, Run, State
from cswap_deploy.stages.validate import validate_stage

__all__ = [
    "BUILD",
    "MODEL",
    "WEIGHTS",
    "BuildRecord",
    "Run",
    "State",
    "engine_stage",
    "export_stage",
    "precision_stage",
    "prune_stage",
    "read_record",
    "take_pruned",
    "validate_stage",
]
