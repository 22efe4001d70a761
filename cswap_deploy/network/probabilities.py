"""Networks whose outputs are probabilities, made to give logits while they are pruned."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cswap_deploy.config import Task
from cswap_deploy.data import Samples
from cswap_deploy.errors import UsageError
from cswap_deploy.models.load import LoadedModel
from cswap_deploy.models.outputs import named_outputs
from cswap_deploy.runtime.preprocess import normalise
from cswap_deploy.runtime.probabilities import LEAST, OutputKind, note, recognise

FEW = 32
"""Images that outputs are recognised on."""


def output_kind(module: nn.Module, images: Tensor, task: Task) -> OutputKind:
    """What a network gives for images (N, C, H, W); see :func:`runtime.probabilities.recognise`.

    What is not one (N, classes) tensor of scores of classes counts as logits.
    """
    if task != "classify":
        return "logits"
    with torch.inference_mode():
        found = list(named_outputs(module(images[:FEW].contiguous())).values())
    return recognise(found[0].float().numpy()) if len(found) == 1 else "logits"


def with_output_kind(loaded: LoadedModel, samples: Samples) -> LoadedModel:
    """Say what a classifier gives on real images, and note it where that is not logits.

    Raises:
        UsageError: The network fails on them.
    """
    spec = loaded.spec
    pixels = samples.calibration.images[:FEW]
    images = torch.from_numpy(normalise(pixels, spec.preprocessing))
    try:
        kind = output_kind(loaded.module, images, spec.task)
    except Exception as err:  # the user's code may raise anything
        raise UsageError(
            f"{spec.name} does not run on images {tuple(images.shape)}: {err}"
        ) from err
    notes = (*loaded.notes, note(kind)) if kind != "logits" else loaded.notes
    return replace(loaded, spec=spec.model_copy(update={"output_kind": kind}), notes=notes)


@contextmanager
def giving_logits(module: nn.Module, kind: OutputKind) -> Iterator[None]:
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


def give_logits(module: nn.Module, kind: OutputKind) -> nn.Module:
    """The same for good, in place."""
    if kind == "probabilities":
        module.register_forward_hook(_log)
    return module


def give_outputs(module: nn.Module) -> nn.Module:
    """A copy from within :func:`giving_logits` gives its own outputs again; changed in place."""
    for key in [key for key, hook in module._forward_hooks.items() if hook is _log]:
        del module._forward_hooks[key]
    return module


def _log(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    found = {n: value.clamp_min(LEAST).log() for n, value in named_outputs(outputs).items()}
    return next(iter(found.values())) if isinstance(outputs, Tensor) else found
