"""What a network returns: its tensors by name, and what they are.

A network may return a tensor, or tuples, lists, dictionaries and dataclasses of them. All later
stages see named tensors: a dictionary's keys and a dataclass's fields are names; what has none is
``output``, or ``output_0``, ``output_1``, … where there are several.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from cswap_deploy.config import Task
from cswap_deploy.errors import UsageError

INPUT, LOGITS, OUTPUT = "input", "logits", "output"
"""Names in the graph: its input, one output of scores, one of anything else."""
SCORED: tuple[Task, ...] = ("classify", "binary")
"""Tasks of one (N, K) output of logits."""
_FIX = "return a tensor, or a tuple, list, dict or dataclass of tensors"


def named_outputs(returned: Any) -> dict[str, Tensor]:
    """The tensors of what a network returned, by name; numbers, texts and ``None`` are left out.

    Raises:
        UsageError: It holds something else, or no tensor.
    """
    found: dict[str, Tensor] = {}
    for path, value in _leaves(returned):
        name = "_".join(path) if path and not path[0].isdigit() else "_".join([OUTPUT, *path])
        while name in found:  # {"a": [x], "a_0": y}
            name += "_"
        found[name] = value
    if not found:
        raise UsageError(f"the network returns no tensor but a {type(returned).__name__}", fix=_FIX)
    return found


@contextmanager
def tensors_alone(module: nn.Module) -> Iterator[list[str]]:
    """Within, a network that returns more than a tensor returns the tuple of its tensors.

    Exporters take those only. The list holds the names, once the network was called.
    """
    names: list[str] = []

    def replace(_: nn.Module, __: Any, returned: Any) -> Any:
        found = named_outputs(returned)
        names[:] = found
        return None if isinstance(returned, Tensor) else tuple(found.values())

    handle = module.register_forward_hook(replace)
    try:
        yield names
    finally:
        handle.remove()


def recognise(module: nn.Module, returned: Any, *, input_size: tuple[int, ...]) -> Task:
    """The task of a network, from what it returns for one image of ``input_size``, (C, H, W).

    ``features`` where the network says that it has no classes, ``classify`` for (1, K) and
    ``binary`` for (1, 1); ``dense`` for maps of the input's height and width with a channel for
    each class; ``detect`` where an output is named after boxes; else ``any``.
    """
    outputs = named_outputs(returned)
    shapes = [tuple(value.shape) for value in outputs.values()]
    if len(shapes) == 1 and len(shapes[0]) == 2:
        if getattr(module, "num_classes", None) == 0:
            return "features"
        return "classify" if shapes[0][1] > 1 else "binary"
    if any("box" in key.lower() for key in outputs):
        return "detect"
    maps = all(len(s) == 4 and s[1] > 1 and s[2:] == tuple(input_size[1:]) for s in shapes)
    return "dense" if maps else "any"


def check_task(task: Task, returned: Any, *, name: str) -> None:
    """Refuse a task that a network's outputs for one image do not have.

    Raises:
        UsageError: Says what it returns, and which ``--task`` takes that; or an output has the
            name of the graph's input.
    """
    outputs = named_outputs(returned)
    shapes = {key: tuple(value.shape) for key, value in outputs.items()}
    told = ", ".join(f"{key} {shape}" for key, shape in shapes.items())
    if len(shapes) == 1 and not isinstance(returned, Mapping):
        told = str(next(iter(shapes.values())))
    if INPUT in shapes:
        raise UsageError(
            f"{name} returns {told}: an output cannot be named {INPUT!r}, as the graph's input is",
            fix="give it another key in what forward returns",
        )
    if not any(value.is_floating_point() for value in outputs.values()):
        raise UsageError(
            f"{name} returns {told} and no floating-point number: nothing says how far it moves",
            fix="return what the classes or indices are chosen from, too",
        )
    one = len(shapes) == 1 and all(len(s) == 2 and s[1] > 1 for s in shapes.values())
    flat = all(len(s) in (1, 2) for s in shapes.values())
    if (task == "classify" and not one) or (task == "binary" and not flat):
        wanted = "logits (1, classes)" if task == "classify" else "logits (1, K) of yes or no"
        raise UsageError(
            f"{name} returns {told} for one image, {wanted} are wanted",
            fix="pass --task features, dense, detect or any",
        )
    if task == "dense" and not any(len(s) == 4 and s[1] > 1 for s in shapes.values()):
        raise UsageError(
            f"{name} returns {told} for one image; --task dense takes maps (1, classes, H, W)",
            fix="pass --task any",
        )


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Path and tensor, in order."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, (*path, str(key)))
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for key, inner in zip(value._fields, value, strict=True):
            yield from _leaves(inner, (*path, str(key)))
    elif isinstance(value, tuple | list):
        for at, inner in enumerate(value):
            yield from _leaves(inner, (*path, str(at)))
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _leaves(getattr(value, field.name), (*path, field.name))
    elif value is not None and not isinstance(value, int | float | str):
        raise UsageError(f"the network returns a {type(value).__name__}", fix=_FIX)
