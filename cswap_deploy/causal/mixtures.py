"""Images that a network does not know by heart, made of those it does.

Calibration images are mostly training images. The network is certain of them, right or wrong, so
most units seem to change nothing there, and the few images that react decide everything. Lightly
mixed with another image, each still shows what it showed, but the prediction is open. On such
images the effects of sets of units agree much better with those on new images
(benchmarks/LOG.md).

Where there are few images, parts of two side by side make more of them (:func:`mosaics`): what
networks of a thousand classes tell apart shows in more places and next to other things.

Source: mixed images: Zhang et al. 2018, "mixup: Beyond Empirical Risk Minimization"
(arXiv:1710.09412); here nothing is trained on them, and the larger part keeps its label. Parts of
images: Yun et al. 2019, "CutMix" (arXiv:1905.04899); random crops: Szegedy et al. 2015, "Going
Deeper with Convolutions" (arXiv:1409.4842), section 6.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cswap_deploy.network.placing import placed

_LEAST = 0.5
"""Smallest weight of an image in its mixture."""
_CROP = 0.25
"""Smallest part of an image that a mosaic shows of it, in area, before it is cut."""
_STRETCH = 1.3
"""Most that its height grows against its width, or the other way round."""
_CUT = 0.25
"""The cut of a mosaic is at least so far from either edge, as a part of the side."""


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


def mosaics(images: Tensor, count: int, *, seed: int) -> Tensor:
    """Random crops of two images, each cut, side by side or one above the other.

    Args:
        images: (N, C, H, W) float32.
        count: How many to make. Each image comes up about as often as any other.
        seed: Same seed, same mosaics.

    Returns:
        (count, C, H, W), channels last.
    """
    generator = torch.Generator().manual_seed(seed)
    size, number = images.shape, len(images)
    turns = [torch.randperm(number, generator=generator) for _ in range(-(-2 * count // number))]
    chosen = torch.cat(turns)[: 2 * count].tolist()
    drawn = torch.rand(2 * count, 5, generator=generator).tolist()
    made = images.new_empty((count, *size[1:])).contiguous(memory_format=torch.channels_last)
    for at in range(count):
        one, other = (_view(images[chosen[n]], drawn[n]) for n in (2 * at, 2 * at + 1))
        dim = 1 + (drawn[2 * at][4] < 0.5)
        cut = round(size[dim + 1] * (_CUT + (1 - 2 * _CUT) * drawn[2 * at + 1][4]))
        made[at] = one
        made[at].narrow(dim, cut, size[dim + 1] - cut).copy_(
            other.narrow(dim, cut, size[dim + 1] - cut)
        )
    return made


def _view(image: Tensor, drawn: list[float]) -> Tensor:
    """A crop of (C, H, W) at its full size, mirrored half of the time; five numbers in [0, 1)."""
    high, wide = image.shape[1:]
    side = (_CROP + (1 - _CROP) * drawn[0]) ** 0.5
    stretch = _STRETCH ** (2 * drawn[1] - 1)
    rows = min(high, max(1, round(high * side * stretch)))
    columns = min(wide, max(1, round(wide * side / stretch)))
    top, left = int(drawn[2] * (high - rows + 1)), int(drawn[3] * (wide - columns + 1))
    crop = image[None, :, top : top + rows, left : left + columns]
    crop = F.interpolate(crop, (high, wide), mode="bilinear", align_corners=False, antialias=True)
    return crop[0].flip(2) if drawn[0] * 64 % 1 < 0.5 else crop[0]
