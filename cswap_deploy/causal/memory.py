"""Memory while effects are measured: how much may be used, and how it is kept from the system."""

from __future__ import annotations

import ctypes
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from cswap_deploy.errors import StageError, UsageError

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")
_SHARE = 3
"""One part in so many of the free memory may be used."""
_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_CGROUP = Path("/sys/fs/cgroup")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of glibc's ``malloc.h``."""
_VARIANT_BYTES = 32 << 20
"""Of the largest value of one batch of variants; larger does not run faster
(benchmarks/LOG.md)."""
_LIVE = 8
"""Values of that size that are alive at once, about: a residual branch, its stream, what an
operation reads and writes, its workspace, and freed blocks that nothing fits into."""


@dataclass(slots=True)
class Budget:
    """What measuring may use beside the network and the images, in bytes."""

    total: int
    variant_bytes: int
    """Of the largest value of one batch of variants; halved when memory runs out."""

    @classmethod
    def of(cls, total: int | None = None) -> Budget:
        """A budget; a third of what is free unless said."""
        if total is None:
            total = free_memory() // _SHARE
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
                words = str(err).strip().splitlines()
                if self.variant_bytes <= 1:
                    raise StageError(
                        "memory ran out while one variant of one image was measured: "
                        f"{words[0] if words else type(err).__name__}",
                        fix="close other programs, pass a smaller --input-size, or use a machine "
                        "with more memory",
                    ) from err
            self.variant_bytes //= 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            _log.warning(
                "memory ran out; going on with batches half the size (%.3g MiB)",
                self.variant_bytes / 2**20,
            )


def parse_size(text: str) -> int:
    """Bytes of ``512MiB``, ``2G``, ``1073741824``; units are powers of 1,024.

    Raises:
        UsageError: It is no size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", text.lower())
    size = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if size <= 0:
        raise UsageError(f"{text!r} is no amount of memory", fix="write 512MiB, 2GiB or bytes")
    return size


def free_memory() -> int:
    """Bytes that can be had without swapping; within the limits of a container."""
    import psutil

    free = int(psutil.virtual_memory().available)
    for limit, used in (
        ("memory.max", "memory.current"),  # cgroup v2, v1
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            free = min(free, int((_CGROUP / limit).read_text()) - int((_CGROUP / used).read_text()))
        except (OSError, ValueError):  # no such controller, or "max"
            continue
    return max(free, 0)


def resident_mib() -> float:
    """Memory of this process that is in use now, in MiB."""
    import psutil

    return float(psutil.Process().memory_info().rss) / 2**20


def keep_freed_memory() -> bool:
    """Let freed blocks stay with the process, for all of it, from now on.

    By default glibc returns every large block to the system as soon as it is freed, and the next
    one costs a page fault for each 4 KiB: a third of the time of small networks' forwards
    (benchmarks/LOG.md).

    Returns:
        Whether the C library took the setting; others than glibc have none.

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
