"""The user's own figure: a function of a network's outputs and the labels."""

from __future__ import annotations

import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from cswap_deploy.errors import UsageError
from cswap_deploy.models.factory import code_of_the_user
from cswap_deploy.records.value import sha256_text
from cswap_deploy.runtime.session import Outputs

Metric = Callable[[Any, Any], Any]
MOST_BYTES = 2 << 30
"""A metric sees all outputs at once: so much memory they may take."""
_FIX = "--metric package.module:function, importable from the working directory or installed"


def load_metric(name: str) -> Metric:
    """Import ``package.module:function``.

    Raises:
        UsageError: It cannot be imported, or is no function.
    """
    module_name, colon, attribute = name.partition(":")
    if not (colon and module_name and attribute):
        raise UsageError(f"--metric {name!r} names no function", fix=_FIX)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    with code_of_the_user(f"--metric {name}: {module_name} does not import:", _FIX):
        module = importlib.import_module(module_name)
    found = getattr(module, attribute, None)
    if not callable(found):
        raise UsageError(f"--metric {name}: {module_name} has no function {attribute!r}", fix=_FIX)
    return found  # type: ignore[no-any-return]


def metric_digest(name: str) -> str:
    """sha256 of the function's module, so that another version of it is measured again."""
    module = inspect.getmodule(load_metric(name))
    try:
        return sha256_text(inspect.getsource(module)) if module is not None else ""
    except (OSError, TypeError):  # compiled, or made by hand
        return ""


def measure_metric(
    name: str,
    batches: Iterable[Outputs],
    labels: npt.NDArray[Any] | None,
    *,
    images: int,
    what: str,
) -> float:
    """Call the function once, on the outputs of all images.

    Args:
        name: ``package.module:function``. It gets ``outputs``, the array of a network of one
            output, else a dictionary of arrays by name, one row an image; and ``labels``.
        batches: Outputs by name, a batch at a time.
        labels: One row an image, as the data has them; ``None`` where it has none.
        images: How many there are.
        what: The network, for messages.

    Raises:
        UsageError: The outputs do not fit in memory, or the function fails or returns no finite
            number.
    """
    parts: dict[str, list[npt.NDArray[Any]]] = {}
    seen = 0
    for batch in batches:
        count = max(len(value) for value in batch.values() if value.ndim)
        size = sum(value.nbytes for value in batch.values())
        if seen == 0 and size * images / count > MOST_BYTES:
            fit = int(MOST_BYTES * count / size)
            raise UsageError(
                f"--metric {name} sees all outputs at once, and those of {images} images take "
                f"{size * images / count / 2**30:.1f} GiB; {MOST_BYTES / 2**30:.0f} GiB are the "
                "most",
                fix=f"--validation-samples {max(fit, 1)}",
            )
        for key, value in batch.items():
            if value.ndim and len(value) == count:
                parts.setdefault(key, []).append(value)
        seen += count
    outputs: Any = {key: np.concatenate(values) for key, values in parts.items()}
    if len(outputs) == 1:
        (outputs,) = outputs.values()
    metric = load_metric(name)
    with code_of_the_user(f"--metric {name}, on {what}, raised"):
        found = metric(outputs, labels)
    try:
        figure = float(found)
    except (TypeError, ValueError):
        figure = math.nan
    if not math.isfinite(figure):
        raise UsageError(
            f"--metric {name} returned {str(found)[:100]!r} on {what}",
            fix="return a finite number: (outputs, labels) -> float",
        )
    return figure
