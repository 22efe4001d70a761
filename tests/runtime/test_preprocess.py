"""Pixels before the network: exactly timm's."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from cswap_deploy.models.torchvision_shim import import_timm
from cswap_deploy.records.model import Preprocessing
from cswap_deploy.runtime.preprocess import normalise, resize_and_crop


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def preprocessing(
    size: tuple[int, int, int], resize: int, filter: str = "bicubic"
) -> Preprocessing:
    mean = (0.485, 0.456, 0.406)[: size[0]]
    return Preprocessing(
        input_size=size,
        mean=mean,
        std=(0.229, 0.224, 0.225)[: size[0]],
        resize_shorter=resize,
        interpolation=filter,
    )


@pytest.mark.parametrize("shape", [(97, 64), (64, 97), (80, 80), (301, 200), (33, 40), (30, 91)])
@pytest.mark.parametrize("filter", ["bicubic", "bilinear"])
@pytest.mark.parametrize("crop_pct", [0.875, 0.95, 1.0, 0.9])
def test_pixels_are_those_of_timm(shape: tuple[int, int], filter: str, crop_pct: float) -> None:
    timm = import_timm()
    image = picture(*shape)
    transform = timm.data.create_transform(
        (3, 64, 64), crop_pct=crop_pct, interpolation=filter, normalize=False
    )
    expected = transform(image).permute(1, 2, 0).numpy()
    got = resize_and_crop(image, preprocessing((3, 64, 64), int(64 / crop_pct), filter))
    np.testing.assert_array_equal(got, expected)


def test_target_that_is_not_square_is_that_of_timm() -> None:
    timm = import_timm()
    image = picture(150, 90)
    transform = timm.data.create_transform(
        (3, 48, 64), crop_pct=0.875, interpolation="bicubic", normalize=False
    )
    expected = transform(image).permute(1, 2, 0).numpy()
    got = resize_and_crop(image, preprocessing((3, 48, 64), int(48 / 0.875)))
    np.testing.assert_array_equal(got, expected)


def test_normalised_values_are_those_of_timm() -> None:
    timm = import_timm()
    image, pre = picture(90, 70), preprocessing((3, 64, 64), 73)
    transform = timm.data.create_transform(
        (3, 64, 64), crop_pct=0.875, interpolation="bicubic", mean=pre.mean, std=pre.std
    )
    got = normalise(resize_and_crop(image, pre)[None], pre)
    assert got.dtype == np.float32
    assert got.flags.c_contiguous
    np.testing.assert_allclose(got[0], transform(image).numpy(), atol=2e-7)


def test_normalise_by_hand() -> None:
    pre = Preprocessing(input_size=(1, 1, 2), mean=(0.5,), std=(0.25,), resize_shorter=1)
    got = normalise(np.array([[[[0], [255]]]], dtype=np.uint8), pre)
    np.testing.assert_array_equal(got, np.array([[[[-2.0, 2.0]]]], dtype=np.float32))


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1", "LA"])
def test_every_kind_of_picture_becomes_rgb(mode: str) -> None:
    got = resize_and_crop(picture(70, 60, mode), preprocessing((3, 32, 32), 36))
    assert got.shape == (32, 32, 3)
    assert got.dtype == np.uint8
    assert got.std() > 10


def test_sixteen_bit_greys_are_scaled_not_clipped() -> None:
    grey = Image.fromarray(np.full((40, 40), 0x8000, dtype=np.uint16))
    got = resize_and_crop(grey, preprocessing((3, 32, 32), 32))
    assert set(got.reshape(-1).tolist()) == {0x80}


def test_one_channel_is_grey_and_others_are_refused() -> None:
    assert resize_and_crop(picture(40, 40), preprocessing((1, 28, 28), 28)).shape == (28, 28, 1)
    with pytest.raises(ValueError, match="1 or 3 channels, the network wants 2"):
        resize_and_crop(picture(40, 40), preprocessing((2, 28, 28), 28))


def test_picture_of_the_right_size_is_untouched() -> None:
    image = picture(28, 28)
    got = resize_and_crop(image, preprocessing((3, 28, 28), 28))
    np.testing.assert_array_equal(got, np.asarray(image))
