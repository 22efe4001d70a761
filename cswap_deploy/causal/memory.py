"""Memory while effects are measured: how much may be used, and how it is kept from the system."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from cswap_deploy.data.memory import free_memory
from cswap_deploy.errors import StageError
from cswap_deploy.network.placing import HOST

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")
_SHARE = 3
"""One part in so many of the free memory may be used."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Numbers from glibc's ``malloc.h``."""
_VARIANT_BYTES = 32 << 20
"""Bytes of the largest value of one batch of variants; larger does not run faster
(benchmarks/LOG.md)."""
_LIVE = 8
"""Values of that size that are alive at once, about: a residual branch, its stream, what an
operation reads and writes, its workspace, and freed blocks that nothing fits into."""


@dataclass(slots=True)
class Budget:
    """What measuring may use beside the network and the images, in bytes."""

    total: int
    variant_bytes: int
    """Bytes of the largest value of one batch of variants; halved when memory runs out."""

    @classmethod
    def of(cls, total: int | None = None, device: torch.device = HOST) -> Budget:
        """A budget; a third of what is free, on the device, unless said."""
        if total is None:
            free = free_memory() if device.type != "cuda" else torch.cuda.mem_get_info(device)[0]
            total = free // _SHARE
        return cls(total, max(1, min(_VARIANT_BYTES, total // (2 * _LIVE))))

    @property
    def kept_bytes(self) -> int:
        """For values from before the cuts; more than the rest is for what runs behind them."""
        return self.total // 3

    def retrying(self, work: Callable[..., _Result]) -> _Result:
        """Call ``work(variant_bytes=...)``; halve the bytes as often as memory runs out.

        Raises:
            StageError: One variant of one image does not fit.
        """
        while True:
            try:
                return work(variant_bytes=self.variant_bytes)
            except (RuntimeError, MemoryError) as err:
                if not _out_of_memory(err):
                    raise
                words = str(err).strip().splitlines() or [type(err).__name__]
                if self.variant_bytes <= 1:
                    raise StageError(
                        f"memory ran out while one variant of one image was measured: {words[0]}",
                        fix="close other programs, pass a smaller --input-size, or use a machine "
                        "with more memory",
                    ) from err
            self.variant_bytes //= 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            mib = self.variant_bytes / 2**20
            _log.warning("memory ran out; going on with batches half the size (%.3g MiB)", mib)


def keep_freed_memory() -> bool:
    """Let freed blocks stay with the process from now on; whether the C library took the setting.

    By default glibc returns every large block to the system as soon as it is freed, and the next
    one costs a page fault for each 4 KiB: a third of the time of small networks' forwards
    (benchmarks/LOG.md).

    Source:
        mallopt(3), ``M_MMAP_THRESHOLD``, ``M_TRIM_THRESHOLD``.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, 2**30)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def _out_of_memory(err: BaseException) -> bool:
    """PyTorch's CPU allocator raises a plain ``RuntimeError``."""
    return isinstance(err, torch.OutOfMemoryError | MemoryError) or (
        "can't allocate memory" in str(err) or "not enough memory" in str(err)
    )
