"""What picture files of every kind become, and what is said of them."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from cswap_deploy.models.torchvision_shim import import_timm
from cswap_deploy.records.model import Preprocessing
from cswap_deploy.runtime.preprocess import (
    FORMATS,
    find_pictures,
    oddities,
    open_picture,
    resize_and_crop,
)

SIDE = 16
RAMP = np.arange(SIDE * SIDE).reshape(SIDE, SIDE)
"""0..255, each once."""


def steps(channels: int = 1, size: tuple[int, int] = (SIDE, SIDE), **more: Any) -> Preprocessing:
    half = (0.5,) * channels
    return Preprocessing(
        input_size=(channels, *size), mean=half, std=half, resize_shorter=min(size), **more
    )


def saved(image: Image.Image, format: str, **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, format, **options)
    file.seek(0)
    return file


def read(file: io.BytesIO | Path, pre: Preprocessing | None = None) -> np.ndarray:
    with open_picture(file) as image:
        return resize_and_crop(image, pre or steps())[..., 0]


def said(file: io.BytesIO, pre: Preprocessing | None = None) -> tuple[str, ...]:
    file.seek(0)
    with open_picture(file) as image:
        return oddities(image, pre or steps())


# --- more than eight bits ------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_keep_their_upper_byte(format: str) -> None:
    file = saved(Image.fromarray((RAMP * 256 + 77).astype(np.uint16)), format)
    np.testing.assert_allclose(read(file), RAMP, atol=1 if format == "PPM" else 0)
    assert said(file) == ("have 16-bit (or 12-bit) greys, of which the upper eight bits are taken",)


def test_twelve_bits_of_a_tiff_are_no_darker() -> None:
    packed = (RAMP * 16 + 5).astype(np.uint16).reshape(-1, 2)
    body = np.stack(
        [packed[:, 0] >> 4, (packed[:, 0] & 15) << 4 | packed[:, 1] >> 8, packed[:, 1] & 255],
        axis=1,
    ).astype(np.uint8)
    head = ImageFileDirectory_v2()
    for tag, value in {
        256: SIDE, 257: SIDE, 258: 12, 259: 1, 262: 1, 273: 0, 277: 1, 278: SIDE, 279: body.size,
    }.items():  # fmt: skip
        head[tag] = value
    file = io.BytesIO(b"II\x2a\x00\x08\x00\x00\x00" + head.tobytes(8) + body.tobytes())
    np.testing.assert_array_equal(read(file), RAMP)


def test_twelve_bits_of_a_pgm_are_no_darker() -> None:
    file = io.BytesIO(b"P5 16 16 4095\n" + (RAMP * 16).astype(">u2").tobytes())
    np.testing.assert_allclose(read(file), RAMP, atol=1)


def test_floats_from_zero_to_one_are_scaled() -> None:
    file = saved(Image.fromarray((RAMP / 255).astype(np.float32)), "TIFF")
    np.testing.assert_array_equal(read(file), RAMP)
    assert said(file) == ("are floating-point: 0 becomes black, 1 white",)
    almost = saved(Image.fromarray((RAMP / 255 * 1.0005).astype(np.float32)), "TIFF")
    assert read(almost).max() == 255


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (RAMP.astype(np.float32), r"floating-point pixels from 0 to 255; 0 \(black\) to 1 \(wh"),
        (RAMP.astype(np.float32) / 100 - 1, "floating-point pixels from -1 to 1.55"),
        (np.where(RAMP == 3, np.nan, RAMP / 255).astype(np.float32), "pixels from nan to nan"),
        (RAMP.astype(np.int32), "32-bit integer pixels have no known scale; save it with 8 or 16"),
        ((RAMP * 2**20).astype(np.int32), "32-bit integer pixels have no known scale"),
    ],
)
def test_what_has_no_known_scale_is_refused(values: np.ndarray, words: str) -> None:
    image = Image.fromarray(values)
    for picture in (image, open_picture(saved(image, "TIFF"))):
        with pytest.raises(ValueError, match=words):
            resize_and_crop(picture, steps())


# --- other modes ---------------------------------------------------------------------------------


def colours() -> Image.Image:
    return Image.fromarray(np.stack([RAMP, RAMP.T, 255 - RAMP], axis=2).astype(np.uint8))


def test_transparency_is_dropped_as_timm_does_and_said_where_there_is_some() -> None:
    transform = import_timm().data.create_transform(
        (3, SIDE, SIDE), crop_pct=1.0, interpolation="bicubic", normalize=False
    )
    alpha = Image.fromarray((255 * (RAMP > 99)).astype(np.uint8))
    clear = colours()
    clear.putalpha(alpha)
    palette = colours().quantize(64)
    opaque = colours().convert("RGBA")
    grey = colours().convert("LA")
    grey.putalpha(alpha)
    for image, options, told in (
        (clear, {}, True), (palette, {"transparency": 3}, True), (grey, {}, True),
        (opaque, {}, False), (palette, {}, False),
    ):  # fmt: skip
        file = saved(image, "PNG", **options)
        with open_picture(file) as opened:
            got = resize_and_crop(opened, steps(3))
            wanted = transform(opened.convert("RGBA").convert("RGB")).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(got, wanted)
        assert bool(said(file)) is told
        assert not told or "transparent in places" in said(file)[0]


def test_cmyk_and_one_bit_are_those_of_timm() -> None:
    transform = import_timm().data.create_transform(
        (3, SIDE, SIDE), crop_pct=1.0, interpolation="bicubic", normalize=False
    )
    for mode, format in (("CMYK", "JPEG"), ("CMYK", "TIFF"), ("1", "PNG"), ("1", "PPM")):
        file = saved(colours().convert(mode), format)
        with open_picture(file) as opened:
            got = resize_and_crop(opened, steps(3))
            wanted = transform(opened.convert("RGB")).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(got, wanted)
        assert said(file) == ()


@pytest.mark.parametrize("format", ["GIF", "WEBP", "TIFF", "PNG"])
def test_the_first_of_several_frames_is_taken(format: str) -> None:
    frames = [Image.fromarray(np.full((SIDE, SIDE), v, np.uint8)) for v in (200, 10, 90)]
    options = {"lossless": True} if format == "WEBP" else {}
    file = saved(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert set(read(file).ravel().tolist()) == {200}
    assert said(file) == ("have several frames, of which the first is taken",)


def test_a_photo_with_a_second_picture_beside_it_is_a_photo() -> None:
    file = saved(colours(), "MPO", save_all=True, append_images=[colours()])
    assert read(file, steps(3)).shape == (SIDE, SIDE)
    assert said(file) == ()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM"])
def test_half_a_file_is_never_a_picture(format: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    whole = saved(Image.fromarray(noise), format).getvalue()
    for share in (0.02, 0.5, 0.9):
        half = io.BytesIO(whole[: int(len(whole) * share)])
        with pytest.raises((OSError, SyntaxError, ValueError, EOFError, IndexError)):
            read(half)


def test_only_picture_formats_are_opened(tmp_path: Path) -> None:
    assert "EPS" not in FORMATS
    file = tmp_path / "photo.jpg"
    file.write_bytes(saved(colours(), "EPS").getvalue())
    with pytest.raises(
        OSError, match="cannot identify image file: none of JPEG, PNG, BMP, WEBP, GIF"
    ):
        open_picture(file)
    file.write_bytes(b"")
    with pytest.raises(OSError, match="the file is empty"):
        open_picture(file)


def test_a_thread_of_pixels_is_refused() -> None:
    thread = Image.fromarray(np.zeros((1, 20_000), np.uint8))
    with pytest.raises(ValueError, match="20000 x 1 pixels are too long and thin"):
        resize_and_crop(thread, steps(size=(256, 256)))


# --- EXIF orientation ----------------------------------------------------------------------------


def turned(format: str, orientation: int) -> io.BytesIO:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(RAMP[:8].astype(np.uint8))  # 16 x 8
    options = {"lossless": True} if format == "WEBP" else {}
    return saved(image, format, exif=exif, **options)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_orientation_is_obeyed_only_where_it_is_asked_for(format: str, orientation: int) -> None:
    file = turned(format, orientation)
    stored = steps(size=(8, 16))
    np.testing.assert_array_equal(read(file, stored), RAMP[:8])
    told = said(file)
    assert bool(told) is (orientation != 1)
    if told:
        assert (
            "as stored, as timm and torchvision do; build with --exif-rotate to turn them"
            in told[0]
        )
    pixels = RAMP[:8]
    upright = {
        1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1], 5: pixels.T,
        6: np.rot90(pixels, -1), 7: pixels[::-1, ::-1].T, 8: np.rot90(pixels),
    }[orientation]  # fmt: skip
    file.seek(0)
    turning = steps(size=upright.shape, exif_rotate=True)
    np.testing.assert_array_equal(read(file, turning), upright)
    assert all("were turned by it" in words for words in said(file, turning))


def test_pillow_turns_a_tiff_itself_and_it_is_not_turned_twice() -> None:
    for rotate in (False, True):
        pre = steps(size=(16, 8), exif_rotate=rotate)
        np.testing.assert_array_equal(read(turned("TIFF", 6), pre), np.rot90(RAMP[:8], -1))
        assert said(turned("TIFF", 6), pre) == ()


@pytest.mark.parametrize("exif", [b"Exif\x00\x00garbage", b"Exif\x00\x00II*\x00\xff\xff\xff\xff"])
def test_damaged_exif_does_not_lose_the_picture(exif: bytes) -> None:
    file = saved(colours(), "JPEG", exif=exif)
    assert read(file, steps(3, exif_rotate=True)).shape == (SIDE, SIDE)
    assert said(file) == ()


# --- files in folders ----------------------------------------------------------------------------


def test_what_is_found_in_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "cat"
    (folder / "deep").mkdir(parents=True)
    picture = saved(colours(), "PNG").getvalue()
    pictures = ("a.JPG", "b.jfif", "deep/c.Png", "without", "ünï ço.tiff", "empty.png")
    for name in pictures:
        (folder / name).write_bytes(b"" if name == "empty.png" else picture)
    others = ("notes.txt", "README", "d.heic", "nothing")
    for name in others:
        (folder / name).write_bytes(b"words" if name != "nothing" else b"")
    for name in (".hidden.png", "Thumbs.db", "desktop.ini", "__MACOSX/._a.png",
                 "@eaDir/t.jpg", ".ipynb_checkpoints/a.png", "._a.JPG"):  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(picture)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "e.png").write_bytes(picture)
    (folder / "linked").symlink_to(elsewhere)
    (folder / "link.png").symlink_to(elsewhere / "e.png")
    (folder / "loop").symlink_to(folder)
    (folder / "broken.png").symlink_to(tmp_path / "gone.png")
    os.mkfifo(folder / "pipe.png")
    found, left = find_pictures(folder)
    names = [path.relative_to(folder).as_posix() for path in found]
    assert sorted(names) == sorted([*pictures, "linked/e.png", "link.png"])
    assert sorted(path.name for path in left) == sorted([*others, "broken.png", "pipe.png"])
