"""Each image stays the larger part of its mixture."""

from __future__ import annotations

import torch
from small_networks import pictures

from cswap_deploy.causal.mixtures import lightly_mixed

IMAGES = pictures(40, 8)[0]


def test_every_mixture_is_of_its_own_image_and_one_other() -> None:
    mixed = lightly_mixed(IMAGES, seed=3)
    parts = []
    for n, image in enumerate(mixed):
        fits = []
        for other in IMAGES:
            away = (other - IMAGES[n]).flatten()
            part = float((image - IMAGES[n]).flatten() @ away / (away @ away).clamp_min(1e-9))
            rest = (image - IMAGES[n] - part * (other - IMAGES[n])).abs().max()
            if rest < 1e-5:
                fits.append(part)
        assert fits, "no two images explain it"
        assert min(fits) >= -1e-6
        assert max(fits) <= 0.5 + 1e-6
        parts.append(max(fits))
    assert max(parts) > 0.3
    assert min(parts) < 0.2


def test_seed_decides_and_nothing_is_changed_in_place() -> None:
    before = IMAGES.clone()
    first = lightly_mixed(IMAGES, seed=1)
    assert torch.equal(first, lightly_mixed(IMAGES, seed=1))
    assert not torch.equal(first, lightly_mixed(IMAGES, seed=2))
    assert torch.equal(IMAGES, before)


def test_one_image_and_channels_last() -> None:
    torch.testing.assert_close(lightly_mixed(IMAGES[:1]), IMAGES[:1])
    last = IMAGES.contiguous(memory_format=torch.channels_last)
    mixed = lightly_mixed(last, seed=3)
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(mixed, lightly_mixed(IMAGES, seed=3))
