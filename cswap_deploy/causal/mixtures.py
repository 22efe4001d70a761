"""Images that a network does not know by heart, made of those it does.

Calibration images are mostly training images. The network is certain of them, right or wrong, so
most units seem to change nothing there, and the few images that react decide everything. Lightly
mixed with another image, each still shows what it showed, but the prediction is open. On such
images the effects of sets of units agree much better with those on new images
(benchmarks/LOG.md).

Source: mixed images: Zhang et al. 2018, "mixup: Beyond Empirical Risk Minimization"
(arXiv:1710.09412); here nothing is trained on them, and the larger part keeps its label.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cswap_deploy.network.placing import placed

_LEAST = 0.5
"""Smallest weight of an image in its mixture."""


def lightly_mixed(images: Tensor, *, seed: int = 0) -> Tensor:
    """Each image with at most as much of another one.

        mixed[n] = a * images[n] + (1 - a) * images[other(n)],    a uniform in [0.5, 1]

    Args:
        images: (N, C, H, W) float32; any prefix balanced by class mixes about as the whole does.
        seed: Same seed, same images.

    Returns:
        (N, C, H, W), in the same memory format.
    """
    generator = torch.Generator().manual_seed(seed)
    other = torch.randperm(len(images), generator=generator)
    own = _LEAST + (1 - _LEAST) * torch.rand(len(images), 1, 1, 1, generator=generator)
    other, own = (placed(drawn, images.device) for drawn in (other, own))
    return torch.lerp(images[other], images, own)


def half_mixed(images: Tensor, *, seed: int) -> Tensor:
    """The first half as they are, the others lightly mixed with any of them."""
    half = len(images) // 2
    return torch.cat([images[:half], lightly_mixed(images, seed=seed)[half:]])
