"""The arithmetic that effects are measured in: IEEE float32, on every device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

_Value = TypeVar("_Value")


@contextmanager
def ieee_float32() -> Iterator[None]:
    """Multiply float32 in full; no TF32 on GPUs, no bfloat16 behind a CPU's matrix products.

    PyTorch's defaults let convolutions on a GPU round their inputs to ten bits. What the process
    had set comes back at the end, after an exception too.

    Source:
        PyTorch documentation, "CUDA semantics", "TensorFloat-32 (TF32) on Ampere (and later)".
    """
    backends: Any = torch.backends
    cudnn, mkldnn = backends.cudnn, backends.mkldnn
    operations = (backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv)
    settings = [operation.fp32_precision for operation in operations]
    # The older switches are kept beside these settings, and PyTorch stops where the two disagree.
    matmul = _agreed(torch.get_float32_matmul_precision)
    convolution = _agreed(lambda: bool(cudnn.allow_tf32))
    try:
        if matmul is not None:
            torch.set_float32_matmul_precision("highest")
        if convolution is not None:
            cudnn.allow_tf32 = False
        for operation in operations:
            operation.fp32_precision = "ieee"
        yield
    finally:
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        if convolution is not None:
            cudnn.allow_tf32 = convolution
        for operation, setting in zip(operations, settings, strict=True):
            operation.fp32_precision = setting


def measured_on(device: torch.device) -> dict[str, str]:
    """What of the hardware decides effects to the last bit: part of a measurement's key.

    Returns:
        ``device``: ``cpu``, or the GPU's name; ``arithmetic``: how float32 is multiplied. Of a
        CPU also how sums are split: over how many threads, and into how wide vectors.
    """
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "arithmetic": "IEEE float32"}
    return {
        "device": device.type, "arithmetic": "IEEE float32",
        "threads": str(torch.get_num_threads()),
        "vectors": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip


def _agreed(read: Callable[[], _Value]) -> _Value | None:
    """An older switch; ``None`` where it disagrees with the newer settings already."""
    try:
        return read()
    except RuntimeError:
        return None
