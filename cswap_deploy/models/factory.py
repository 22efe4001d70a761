"""The user's own network: ``package.module:factory``."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cswap_deploy.errors import UsageError

_FIX = "name it package.module:factory, importable from the working directory or installed"


def call(name: str) -> nn.Module:
    """Import the module, call the factory without arguments.

    Raises:
        UsageError: It cannot be imported, raises, or returns no ``nn.Module``.
    """
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as err:  # the user's code may raise anything
        absent = err.name if isinstance(err, ModuleNotFoundError) else None
        if absent and f"{module_name}.".startswith(f"{absent}."):
            raise UsageError(f"there is no module {absent}, for {name}", fix=_FIX) from err
        raise UsageError(f"{module_name} does not import: {_last_line(err)}") from err
    factory = getattr(module, attribute, None)
    if not callable(factory):
        what = "has no" if factory is None else "does not call"
        raise UsageError(f"{module_name} {what} {attribute!r}, for {name}", fix=_FIX)
    try:
        made = factory()
    except Exception as err:
        raise UsageError(f"{name}() raised {_last_line(err)}") from err
    if not isinstance(made, nn.Module):
        raise UsageError(f"{name}() returned a {type(made).__name__}, not an nn.Module")
    return made


def count_classes(module: nn.Module, input_size: Sequence[int], *, name: str) -> int:
    """The classes of a classifier, from the shape of what it returns for one image.

    Raises:
        UsageError: It does not take such an image, or does not return (1, classes).
    """
    try:
        with torch.inference_mode():
            out = module(torch.zeros(1, *input_size))
    except Exception as err:
        raise UsageError(
            f"{name} does not take an image of --input-size {tuple(input_size)}: {_last_line(err)}"
        ) from err
    if not isinstance(out, Tensor) or out.ndim != 2 or out.shape[1] < 2:
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise UsageError(f"{name} returns {got} for one image, logits (1, classes) are wanted")
    return int(out.shape[1])


def _last_line(err: Exception) -> str:
    """The exception, and the line of the user's file that raised it."""
    words = f"{type(err).__name__}: {' '.join(str(err).split())[:500]}"
    frames = traceback.extract_tb(err.__traceback__)
    own = [f for f in frames if "importlib" not in f.filename and f.filename != __file__]
    return f"{words} ({own[-1].filename}:{own[-1].lineno})" if own else words
