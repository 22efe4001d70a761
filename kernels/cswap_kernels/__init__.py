"""The compiled CUDA kernels of cswap-deploy; ``pip install ./kernels`` builds them."""

from __future__ import annotations

from pathlib import Path

__version__ = "0.1.0"


def library_path() -> Path:
    """The shared library; its C interface is in masked_fanout.h."""
    return Path(__file__).parent / "libmasked_fanout.so"
