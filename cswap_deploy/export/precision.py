"""The number formats of a graph. Only float32 so far."""

from __future__ import annotations

from pathlib import Path

from cswap_deploy.artifacts import OnnxArtifact
from cswap_deploy.errors import UsageError

PRECISIONS = ("fp32",)


def cast_precision(onnx: OnnxArtifact, *, precision: str, path: Path) -> OnnxArtifact:
    """Give a graph the dtypes that the engine will have.

    Args:
        onnx: A float32 graph.
        precision: ``fp32``.
        path: Where a cast graph goes; not written for ``fp32``.

    Returns:
        The same artefact: the graph has this precision already.

    Raises:
        UsageError: The precision is not supported, or the graph is not float32.
    """
    if precision not in PRECISIONS:
        raise UsageError(
            f"precision {precision!r} is not supported; supported: {', '.join(PRECISIONS)}",
            fix="--precision fp32",
        )
    if onnx.precision != precision:
        raise UsageError(f"{onnx.path} is {onnx.precision} already and is not cast to {precision}")
    return onnx
