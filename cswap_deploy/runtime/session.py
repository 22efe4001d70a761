"""What every loaded engine offers, and how long the parts of one call took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Outputs = Mapping[str, npt.NDArray[Any]]
"""Every output of a network by name."""
NO_SETTINGS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class CallTimes:
    """One call, by CUDA events on its stream (milliseconds)."""

    host_to_device: float
    compute: float
    device_to_host: float


class Session(Protocol):
    """An engine that is loaded and ready to run; by default on a CPU, with any batch."""

    provider: str
    """What really executes, asked of the runtime."""
    threads: int
    """Threads of the CPU runtime; 1 on a GPU."""
    batch_min: int = 1
    batch_max: int | None = None
    """``None`` where any batch runs."""
    on_gpu: bool = False
    settings: Mapping[str, Any] = NO_SETTINGS
    """How a call is made; stored with a latency."""

    def run(self, images: Floats) -> Floats:
        """(N, C, H, W) float32 -> the first output, as logits (N, classes) float32.

        Raises:
            StageError: The runtime refused the batch.
        """
        ...

    def named(self, images: Floats) -> Outputs:
        """As :meth:`run`, every output by its name in the graph; the caller's own."""
        ...

    def timed(self, images: Floats) -> tuple[Floats, CallTimes | None]:
        """As :meth:`run`, with the times on the device; ``None`` where the runtime has none."""
        return self.run(images), None

    def close(self) -> None:
        """Give the device back; more than once does no harm."""
        return
