"""Parity, accuracy and latency: raw samples first, statistics after."""

from __future__ import annotations
