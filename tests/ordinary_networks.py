"""The table of small networks with what people's own networks bring: name -> case.

Each is a class whose docstring says what it brings; the files of ``ordinary`` have them by kind.
"""

from __future__ import annotations

from ordinary import attention, channels, shapes, weights
from ordinary.base import NETWORKS, Case

KINDS = (shapes, channels, attention, weights)

__all__ = ["KINDS", "NETWORKS", "Case"]
