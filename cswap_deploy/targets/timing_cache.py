"""What TensorRT measured about its kernels, kept from one build to the next."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from filelock import FileLock

from cswap_deploy.errors import CswapError
from cswap_deploy.records.files import write_atomic
from cswap_deploy.records.store import Store


class TimingCache:
    """One file for each version of TensorRT and each compute capability, locked while in use.

    Where it cannot be kept (a read-only home, a full disk) it costs time and no more.

    It saves time and changes no key: builds are not deterministic with it either, so an engine is
    shipped with its digest and never rebuilt to the same bytes.

    Args:
        name: Of the version and the capability.
        store: Root of the store that it is kept in; the user's unless said.

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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        err: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
