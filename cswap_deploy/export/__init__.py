"""From a network to an ONNX graph: one pass per module, each checked by ``measure.parity``."""

from __future__ import annotations
