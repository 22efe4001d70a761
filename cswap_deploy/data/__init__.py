"""Calibration and validation images: from folders, arrays or the hub to labelled pixels."""

from __future__ import annotations

from cswap_deploy.data.load import load_samples
from cswap_deploy.data.sets import ImageSet, Samples, normalised, normalised_batches

__all__ = ["ImageSet", "Samples", "load_samples", "normalised", "normalised_batches"]
