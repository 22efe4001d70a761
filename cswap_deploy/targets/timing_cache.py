"""TensorRT's timings of its kernels, kept from one build to the next."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Self

from filelock import FileLock

from cswap_deploy.errors import CswapError
from cswap_deploy.records.files import write_atomic
from cswap_deploy.records.store import Store


class TimingCache:
    """One file for each version of TensorRT and each compute capability, locked while in use.

    Where it cannot be kept (a read-only home, a full disk) later builds take longer; nothing fails.
    It is in no cache key: builds are not deterministic with or without it.

    Source:
        TensorRT documentation, "Timing Cache".
    """

    def __init__(self, name: str, store: Path | None = None) -> None:
        self.path: Path = Store(store).root / "timing" / f"{name}.cache"
        self._lock = FileLock(self.path.with_suffix(".lock"))

    def __enter__(self) -> Self:
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def read(self) -> bytes:
        """What earlier builds left; empty where there is nothing."""
        try:
            return self.path.read_bytes()
        except OSError:
            return b""

    def write(self, content: bytes) -> None:
        """Replace it, whole or not at all."""
        with suppress(CswapError, OSError):
            write_atomic(self.path, content)
