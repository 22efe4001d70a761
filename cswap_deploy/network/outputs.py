"""Networks whose outputs are probabilities, made to give logits while they are pruned."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cswap_deploy.runtime.outputs import LEAST, Outputs, recognise

FEW = 32
"""Images that outputs are recognised on."""


def outputs_of(module: nn.Module, images: Tensor) -> Outputs:
    """What a network gives for images (N, C, H, W); see :func:`runtime.outputs.recognise`.

    What is not one (N, classes) tensor counts as logits.
    """
    with torch.inference_mode():
        found = module(images[:FEW].contiguous())
    return recognise(found.float().numpy()) if isinstance(found, Tensor) else "logits"


@contextmanager
def giving_logits(module: nn.Module, kind: Outputs) -> Iterator[None]:
    """Within, a network of probabilities gives their logarithms, and so do copies made of it.

    Those are logits of the same softmax: whatever compares predictions need not know. The network
    itself ends as it was; of a copy :func:`give_outputs` takes it back.
    """
    handle = module.register_forward_hook(_log) if kind == "probabilities" else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def give_logits(module: nn.Module, kind: Outputs) -> nn.Module:
    """The same for good, in place."""
    if kind == "probabilities":
        module.register_forward_hook(_log)
    return module


def give_outputs(module: nn.Module) -> nn.Module:
    """A copy from within :func:`giving_logits` gives its own outputs again; changed in place."""
    for key in [key for key, hook in module._forward_hooks.items() if hook is _log]:
        del module._forward_hooks[key]
    return module


def _log(module: nn.Module, inputs: Any, outputs: Tensor) -> Tensor:
    return outputs.clamp_min(LEAST).log()
