"""Networks whose outputs differ from run to run are found before anything else is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cswap_deploy.errors import ExportError, StageError
from cswap_deploy.models.outputs import named_outputs
from cswap_deploy.network.graph import trace
from cswap_deploy.network.operations import said

_FIX = (
    "switch it off in evaluation mode, for example F.dropout(x, training=self.training), or draw "
    "its random numbers once, when the network is made"
)


def require_steady(module: nn.Module, images: Tensor) -> None:
    """Run a network twice; refuse one that does not answer alike.

    Args:
        module: In eval mode; not changed.
        images: (N, C, H, W), N >= 2.

    Raises:
        StageError: The outputs differ; names the first operation whose value does.
    """
    few = images[:2].contiguous()
    with torch.no_grad():
        once, again = (named_outputs(module(few)).values() for _ in range(2))
    if all(_alike(*pair) for pair in zip(once, again, strict=True)):
        return
    found = _first_difference(module, few)
    raise StageError(
        f"{type(module).__name__} gives other outputs each time it runs on the same images"
        + (f": {found} is random" if found else ""),
        fix=_FIX,
    )


def _alike(once: Tensor, again: Tensor) -> bool:
    if once.shape != again.shape:
        return False
    if not once.is_floating_point():
        return torch.equal(once, again)
    return torch.allclose(once, again, rtol=1e-4, atol=1e-6, equal_nan=True)


def _first_difference(module: nn.Module, images: Tensor) -> str:
    """The first operation whose value differs; empty where the network cannot be traced."""
    try:
        graph = trace(module, images)
    except ExportError:
        return ""
    with torch.inference_mode():
        for (node, env), (_, again) in zip(graph.step(images), graph.step(images), strict=True):
            values = graph.execute(node, env, batch=2), graph.execute(node, again, batch=2)
            if isinstance(values[0], Tensor) and not torch.equal(*values):
                return said(node)
    return ""
