"""The user's own network: ``package.module:factory``."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from cswap_deploy.config import Task
from cswap_deploy.errors import CswapError, UsageError
from cswap_deploy.models.outputs import LOGITS, SCORED, check_task, named_outputs, recognise

_FIX = "name it package.module:factory, importable from the working directory or installed"


def call(name: str) -> nn.Module:
    """Import the module, call the factory without arguments.

    Raises:
        UsageError: It cannot be imported, raises, or returns no ``nn.Module``.
    """
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    with code_of_the_user(f"{module_name} does not import:"):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as err:
            if err.name and f"{module_name}.".startswith(f"{err.name}."):
                raise UsageError(f"there is no module {err.name}, for {name}", fix=_FIX) from err
            raise
    factory = getattr(module, attribute, None)
    if not callable(factory):
        what = "has no" if factory is None else "does not call"
        raise UsageError(f"{module_name} {what} {attribute!r}, for {name}", fix=_FIX)
    with code_of_the_user(f"{name}() raised"):
        made = factory()
    if not isinstance(made, nn.Module):
        raise UsageError(f"{name}() returned a {type(made).__name__}, not an nn.Module")
    return made


@dataclass(frozen=True, slots=True)
class Returned:
    """What a network returns, and what that is."""

    task: Task
    names: tuple[str, ...]
    """Of its tensors, in order."""
    num_classes: int
    """0 where the outputs are not scores of classes."""


def examine(
    module: nn.Module, input_size: Sequence[int], *, name: str, task: Task | Literal["auto"]
) -> Returned:
    """Run a network on one image, and say what it returns.

    Args:
        module: In evaluation mode, on the CPU.
        input_size: (C, H, W).
        name: Of the network, for messages.
        task: What the user says that it is; ``auto``: recognised.

    Raises:
        UsageError: It does not take such an image, or what it returns is not of the task.
    """
    size = tuple(input_size)
    with (
        code_of_the_user(f"{name} does not take an image of --input-size {size}:"),
        torch.inference_mode(),
    ):
        out = module(torch.zeros(1, *size))
    outputs = named_outputs(out)
    if task == "auto":
        task = recognise(module, out, input_size=tuple(input_size))
    elif task == "classify" and [v.numel() for v in outputs.values()] == [1]:
        task = "binary"  # a classifier of two classes with one logit
    check_task(task, out, name=name)
    single = isinstance(out, Tensor) and task in SCORED
    names = (LOGITS,) if single else tuple(outputs)
    classes = int(next(iter(outputs.values())).shape[1]) if task == "classify" else 0
    return Returned(task, names, classes)


@contextmanager
def code_of_the_user(what: str, fix: str | None = None) -> Iterator[None]:
    """Run code that may raise anything; ``SystemExit`` is no end of this program's.

    Raises:
        UsageError: It did; ``what`` begins the message.
    """
    try:
        yield
    except (CswapError, KeyboardInterrupt):
        raise
    except BaseException as err:
        raise UsageError(f"{what} {last_line(err)}", fix=fix) from err


def last_line(err: BaseException) -> str:
    """The exception, and the line of the user's file that raised it."""
    words = f"{type(err).__name__}: {' '.join(str(err).split())[:500]}"
    frames = traceback.extract_tb(err.__traceback__)
    others = ("importlib", contextlib.__file__, str(Path(__file__).parents[1]))
    own = [f for f in frames if not any(other in f.filename for other in others)]
    return f"{words} ({own[-1].filename}:{own[-1].lineno})" if own else words
