"""Labelled images, from folders, arrays, loaders or the hub.

A ``Source`` decodes them one at a time; an :class:`ImageSet` holds those that were chosen, as uint8
pixels of the network's size; a :class:`Calibration` holds what the network takes, normalised
float32 tensors. What the caller has in memory becomes a :class:`Calibration` at once.
"""

from __future__ import annotations

from cswap_deploy.data.calibration import Calibration, calibration_from, calibration_set
from cswap_deploy.data.load import load_samples
from cswap_deploy.data.sets import ImageSet, Samples, normalised_batches

__all__ = [
    "Calibration", "ImageSet", "Samples", "calibration_from", "calibration_set", "load_samples",
    "normalised_batches",
]  # fmt: skip
