"""What can be removed from a network, as plain data for ``inspect --groups``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cswap_deploy.models.plain import copied
from cswap_deploy.network.deletion import exact_groups
from cswap_deploy.network.graph import trace
from cswap_deploy.network.residual import find_structure
from cswap_deploy.network.selection import producers


def describe_groups(module: nn.Module, example: Tensor) -> dict[str, Any]:
    """Groups, the layers that each ties together, and what stays whole and why.

    Args:
        module: In eval mode; not changed.
        example: (2, C, H, W), any values.

    Raises:
        ExportError: The network cannot be traced.
    """
    graph = trace(copied(module), example)
    structure = find_structure(graph)
    groups, inexact = exact_groups(module, torch.randn_like(example), structure.groups)
    return {
        "groups": [
            {
                "group": group.name,
                "units": f"{group.units} {group.kind}",
                "made_by": producers(graph, group),
                "read_by": [reader.layer for reader in group.consumers],
                "counted_by": [a.path for a in group.attributes],
            }
            for group in groups
        ],
        "whole": structure.excluded | inexact,
    }
