"""What the user names as data, and what comes out of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cswap_deploy.config import DataConfig
from cswap_deploy.data import Samples, calibration_set, load_samples, normalised_batches
from cswap_deploy.data.labels import Classes, imagenet_classes
from cswap_deploy.errors import UsageError
from cswap_deploy.models import demos
from cswap_deploy.progress import Progress, Silent
from cswap_deploy.records.model import ModelSpec, Preprocessing

RNG = np.random.default_rng(0)


def spec(
    *,
    classes: int = 4,
    size: tuple[int, int, int] = (3, 16, 16),
    source: str = "factory",
    space: str | None = None,
    names: tuple[str, ...] = (),
) -> ModelSpec:
    mean = (0.5,) * size[0]
    pre = Preprocessing(input_size=size, mean=mean, std=mean, resize_shorter=size[1])
    return ModelSpec(
        name="net",
        source=source,
        weights="random",
        weights_sha256="0" * 64,
        num_classes=classes,
        label_space=space,
        class_names=names,
        preprocessing=pre,
    )


def draw(
    data: Path | str | None,
    model: ModelSpec,
    n: int = 4,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    **given: Any,
) -> Samples:
    settings = {"calibration_samples": n, "validation_samples": n, **given}
    config = DataConfig(data=None if data is None else str(data), **settings)
    return load_samples(config, model=model, seed=seed, progress=progress or Silent())


def picture(size: int = 20) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (size, size + 3, 3)).astype(np.uint8))


def folder(root: Path, names: list[str], each: int = 4) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(each):
            picture().save(root / name / f"{i}.png")
    return root


def npz(path: Path, count: int = 40, classes: int = 4, **arrays: np.ndarray) -> Path:
    images = RNG.integers(0, 256, (count, 16, 16, 3)).astype(np.uint8)
    labels = np.arange(count) % classes
    np.savez(path, **{"images": images, "labels": labels, **arrays})
    return path


# --- the embedded set ----------------------------------------------------------------------------


def demo() -> ModelSpec:
    return spec(
        classes=10,
        size=demos.INPUT_SIZE,
        source="demo",
        space="fashion-mnist",
        names=demos.CLASS_NAMES,
    )


def test_demo_data_ships_and_is_balanced() -> None:
    got = draw(None, demo(), 300, validation_samples=2000)
    assert np.bincount(got.calibration.labels).tolist() == [30] * 10
    assert np.bincount(got.calibration.labels[:100]).tolist() == [10] * 10  # so is any beginning
    assert np.bincount(got.validation.labels).tolist() == [200] * 10
    assert got.calibration.images.shape == (300, 28, 28, 1)
    assert got.calibration.spec.source == "fashion-mnist-calibration (embedded)"
    assert got.validation.spec.source == "fashion-mnist-test (embedded)"
    assert got.shared_images == 0


def test_seed_decides_and_nothing_else() -> None:
    first, again, other = (draw(None, demo(), 50, seed=s).calibration for s in (0, 0, 1))
    assert first.spec == again.spec
    assert first.spec.sha256 != other.spec.sha256
    assert draw(None, demo(), 51).calibration.spec.sha256 != first.spec.sha256


def test_digest_sees_labels(tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (40, 16, 16, 3)).astype(np.uint8)
    one = npz(tmp_path / "a.npz", images=images)
    two = npz(tmp_path / "b.npz", images=images, labels=(np.arange(40) + 1) % 4)
    digests = {draw(f, spec(), 20).calibration.spec.sha256 for f in (one, two)}
    assert len(digests) == 2


def test_batches_are_the_whole(tmp_path: Path) -> None:
    model = spec()
    got = draw(npz(tmp_path / "a.npz"), model, 10).validation
    parts = list(normalised_batches(got, model.preprocessing, batch=4))
    assert [len(y) for _, y in parts] == [4, 4, 2]
    whole = calibration_set(got, model.preprocessing)
    np.testing.assert_array_equal(np.concatenate([x for x, _ in parts]), whole.images)
    np.testing.assert_array_equal(np.concatenate([y for _, y in parts]), whole.labels)
    assert whole.images.shape == (10, 3, 16, 16)
    assert whole.images.is_contiguous(memory_format=torch.channels_last)


# --- folders and names ---------------------------------------------------------------------------


def test_folders_numbered_by_class_index(tmp_path: Path) -> None:
    got = draw(folder(tmp_path, ["0003", "1", "10"]), spec(classes=11))
    assert got.calibration.spec.class_indices == {"0003": 3, "1": 1, "10": 10}
    assert got.calibration.spec.mapping == "names are class indices"
    assert set(got.validation.labels.tolist()) == {1, 3, 10}


def test_synset_folders_are_never_numbered_in_order(tmp_path: Path) -> None:
    classes = imagenet_classes()
    chosen = {classes[i][0]: i for i in (999, 5, 401)}
    got = draw(folder(tmp_path, sorted(chosen)), spec(classes=1000, space="imagenet-1k"))
    assert got.calibration.spec.class_indices == chosen
    assert "ImageNet synsets" in got.calibration.spec.mapping


def test_folders_named_by_class(tmp_path: Path) -> None:
    root = folder(tmp_path / "a", ["T_shirt", "Ankle-Boot", "bag"])
    assert draw(root, demo()).calibration.spec.class_indices == {
        "Ankle-Boot": 9,
        "T_shirt": 0,
        "bag": 8,
    }
    names = ["tench", "goldfish, Carassius auratus", "great_white_shark"]
    got = draw(folder(tmp_path / "b", names), spec(classes=1000, space="imagenet-1k"))
    assert sorted(got.calibration.spec.class_indices.values()) == [0, 1, 2]


def test_class_label_order_is_taken_only_where_the_names_agree() -> None:
    model = spec(classes=1000, space="imagenet-1k")
    names = [names for _, names in imagenet_classes()]
    names[134], names[3] = "crane bird", "tiger shark of the data set"  # spelled in its own way
    got = Classes(model).map_ordered(names, where="it")
    assert (got.indices["crane bird"], got.indices[names[999]]) == (134, 999)
    assert "agrees with the model's on" in got.words
    with pytest.raises(UsageError, match="2 of 1000 class names in it are no classes of net"):
        Classes(model).map_ordered(names[::-1], where="it")
    got = Classes(demo()).map_ordered(["bag", "sandal"], where="it")
    assert got.indices == {"bag": 8, "sandal": 5}


def test_names_that_cannot_be_mapped(tmp_path: Path) -> None:
    imagenet = spec(classes=1000, space="imagenet-1k")
    with pytest.raises(
        UsageError, match=r"1 of 2 class names .* are no classes of net: unicorn"
    ) as e:
        draw(folder(tmp_path / "a", ["tench", "unicorn"]), imagenet)
    assert "--class-map FILE" in str(e.value)
    with pytest.raises(UsageError, match=r"more than one class of net: crane \(134, 517\)"):
        draw(folder(tmp_path / "b", ["tench", "crane"]), imagenet)
    with pytest.raises(UsageError, match="these look like splits: pass one with --data"):
        draw(folder(tmp_path / "c", ["train", "val"]), imagenet)
    with pytest.raises(UsageError, match=r"out of range in .*: 4, 77; net has 4 classes, 0\.\.3"):
        draw(folder(tmp_path / "d", ["0", "4", "77"]), spec())
    with pytest.raises(UsageError, match=r"has 2 classes \(cat, dog\) and net has 4 without names"):
        draw(folder(tmp_path / "e", ["cat", "dog"]), spec())


def test_sorted_names_only_when_all_classes_are_there(tmp_path: Path) -> None:
    got = draw(folder(tmp_path, ["dog", "ant", "cat"]), spec(classes=3)).calibration.spec
    assert got.class_indices == {"ant": 0, "cat": 1, "dog": 2}
    assert "torchvision's convention" in got.mapping


def test_class_map_wins(tmp_path: Path) -> None:
    root, file = folder(tmp_path / "data", ["0", "1"]), tmp_path / "map.json"
    file.write_text('{"0": 3, "1": 2, "unused": 0}')
    got = draw(root, spec(), class_map=file).calibration
    assert got.spec.class_indices == {"0": 3, "1": 2}
    assert got.spec.mapping == "class map given by the user"
    assert set(got.labels.tolist()) == {2, 3}
    for text, words in (
        ('{"0": 3}', "1 of 2 names .* are not in the class map: 1"),
        ('{"0": 3, "1": 4}', r"indices outside 0\.\.3, the classes of net: 1: 4"),
        ('{"0": "x"}', "not a JSON object of integers"),
        ('{"0": true, "1": 2}', "not a JSON object of integers"),
        ("{", "cannot read the class map"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError, match=words):
            draw(root, spec(), class_map=file)


def test_order_of_the_directory_does_not_matter(tmp_path: Path) -> None:
    one = folder(tmp_path / "a", ["0", "1"], each=9)
    two = tmp_path / "b"
    for file in sorted(one.rglob("*.png"), reverse=True):
        (two / file.relative_to(one)).parent.mkdir(parents=True, exist_ok=True)
        (two / file.relative_to(one)).write_bytes(file.read_bytes())
    assert draw(one, spec()).calibration.spec.sha256 == draw(two, spec()).calibration.spec.sha256


def test_pictures_of_every_mode_and_format(tmp_path: Path) -> None:
    root = folder(tmp_path, ["0", "1"], each=1)
    picture().convert("CMYK").save(root / "0" / "c.jpg")
    picture().convert("RGBA").save(root / "0" / "a.webp")
    picture().convert("L").save(root / "1" / "g.JPEG", "JPEG")
    (root / "1" / "deep").mkdir()
    picture().convert("P").save(root / "1" / "deep" / "p.gif")
    (root / "1" / "notes.txt").write_text("not a picture")
    got = draw(root, spec(), 3)
    assert got.calibration.spec.count + got.validation.spec.count == 6


def test_paths_that_are_no_data(tmp_path: Path) -> None:
    fix = r"pass --data DIR \(class folders\), --data FILE.npz"
    with pytest.raises(UsageError, match=f"nowhere does not exist\n  fix: {fix}"):
        draw(tmp_path / "nowhere", spec())
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(UsageError, match=r"is neither a folder nor an .npz file"):
        draw(tmp_path / "a.csv", spec())
    with pytest.raises(UsageError, match="holds no class folders with images"):
        draw(tmp_path, spec())
    picture().save(tmp_path / "a.png")
    with pytest.raises(UsageError, match="holds 1 images without class folders"):
        draw(tmp_path, spec())
    with pytest.raises(UsageError, match="net needs images: its classes are not known"):
        draw(None, spec())


# --- unreadable images ---------------------------------------------------------------------------


def spoil(file: Path, kind: str) -> None:
    if kind == "text":
        file.write_text("this is no picture")
    elif kind == "empty":
        file.write_bytes(b"")
    else:
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) * 2 // 3])


def test_unreadable_image_is_named_and_replaced(tmp_path: Path) -> None:
    root = folder(tmp_path, ["0", "1"], each=60)
    bad = root / "1" / "7.jpg"
    (root / "1" / "7.png").rename(bad)
    picture(64).save(bad)
    whole = bad.read_bytes()
    for kind in ("text", "empty", "truncated"):
        bad.write_bytes(whole)
        spoil(bad, kind)
        got = draw(root, spec(), 60)
        named = got.calibration.spec.unreadable + got.validation.spec.unreadable
        assert len(named) == 1
        assert named[0].startswith("1/7.jpg: ")
        assert got.calibration.spec.count + got.validation.spec.count == 119
    got = draw(root, spec(), 59)  # 118 of 120: the bad one is met, or is among the two left
    assert got.calibration.spec.count == got.validation.spec.count == 59


def test_more_than_one_percent_unreadable_is_an_error(tmp_path: Path) -> None:
    root = folder(tmp_path, ["0", "1"], each=75)
    for name in ("0/3.png", "1/4.png"):
        spoil(root / name, "truncated")
    with pytest.raises(
        UsageError, match=r"2 of 150 images read from .* are unreadable \(1.3%"
    ) as e:
        draw(root, spec(), 75)
    assert "0/3.png: " in str(e.value)
    assert "1/4.png: " in str(e.value)
    for file in root.rglob("*.png"):
        spoil(file, "text")
    with pytest.raises(UsageError, match="cannot identify image file: none of JPEG, PNG"):
        draw(root, spec(), 75)


# --- arrays --------------------------------------------------------------------------------------


def test_arrays_of_another_size_are_resized(tmp_path: Path) -> None:
    big = RNG.integers(0, 256, (20, 40, 30)).astype(np.uint8)
    got = draw(npz(tmp_path / "a.npz", count=20, images=big), spec())
    assert got.calibration.images.shape == (4, 16, 16, 3)


def test_arrays_of_the_right_size_are_untouched(tmp_path: Path) -> None:
    file = npz(tmp_path / "a.npz", count=40)
    with np.load(file) as archive:
        pixels = {image.tobytes() for image in archive["images"]}
    got = draw(file, spec(), 20)
    used = [i.tobytes() for s in (got.calibration, got.validation) for i in s.images]
    assert set(used) == pixels
    assert len(used) == 40


def test_arrays_labelled_by_name(tmp_path: Path) -> None:
    labels = np.array(["bag", "Sandal"] * 20)
    got = draw(npz(tmp_path / "a.npz", labels=labels), demo())
    assert got.calibration.spec.class_indices == {"Sandal": 5, "bag": 8}
    file = tmp_path / "map.json"
    file.write_text(json.dumps({"0": 9, "1": 8, "2": 7, "3": 6}))
    got = draw(npz(tmp_path / "b.npz"), demo(), class_map=file)
    assert set(got.calibration.labels.tolist()) == {6, 7, 8, 9}


def test_arrays_that_do_not_fit(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    for arrays, words in (
        ({"labels": np.arange(40)}, r"labels out of range in .*: 4, 5, 6, 7, 8 and 31 more; net"),
        ({"labels": np.full(40, -1)}, "labels out of range in .*: -1; net has 4 classes"),
        ({"labels": np.arange(39) % 4}, r"images \(40, 16, 16, 3\) and labels \(39,\)"),
        ({"labels": np.arange(40) / 4}, "labels are float64, integers are wanted"),
        ({"images": np.zeros((40, 16, 16, 3))}, "images are float64, uint8 pixels"),
        ({"images": np.zeros((40, 3, 16, 16), np.uint8)}, "the channels come last"),
        ({"images": np.zeros((40, 16), np.uint8)}, r"images have shape \(40, 16\)"),
        ({"images": np.array([None] * 40)}, "cannot read .*allow_pickle=False"),
    ):
        with pytest.raises(UsageError, match=words):
            draw(npz(file, **arrays), spec())
    np.savez(file, x=np.zeros(3))
    with pytest.raises(UsageError, match="has no array 'images' and no array 'labels'; it has x"):
        draw(file, spec())
    file.write_text("no archive")
    with pytest.raises(UsageError, match="cannot read"):
        draw(file, spec())


def test_other_numbers_of_channels_only_at_the_exact_size(tmp_path: Path) -> None:
    model = spec(size=(5, 16, 16))
    fitting = RNG.integers(0, 256, (40, 16, 16, 5)).astype(np.uint8)
    assert draw(npz(tmp_path / "a.npz", images=fitting), model).calibration.images.shape[3] == 5
    with pytest.raises(UsageError, match=r"or \(N, 16, 16, 5\) exactly"):
        draw(npz(tmp_path / "b.npz"), model)
    with pytest.raises(UsageError, match="takes 5 channels, which image files do not have"):
        draw(folder(tmp_path / "c", ["0", "1"]), model)


# --- two sets that share nothing -----------------------------------------------------------------


def test_short_source_is_divided(tmp_path: Path) -> None:
    got = draw(npz(tmp_path / "a.npz", count=40), spec(), 500)
    assert (got.calibration.spec.count, got.validation.spec.count) == (20, 20)
    words = "40 images where 500 + 500 were asked for: divided into 20 for calibration and 20"
    assert words in got.calibration.spec.mapping
    assert np.bincount(got.validation.labels).tolist() == [5] * 4


def test_copies_do_not_reach_validation(tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (20, 16, 16, 3)).astype(np.uint8)
    doubled = np.concatenate([images, images])
    got = draw(npz(tmp_path / "a.npz", images=doubled), spec(), 20)
    one, two = ({i.tobytes() for i in s.images} for s in (got.calibration, got.validation))
    assert not one & two
    assert got.shared_images == 0
    assert "copies of calibration images left out" in got.validation.spec.mapping


def test_sets_of_their_own_must_not_overlap(tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (40, 16, 16, 3)).astype(np.uint8)
    one = npz(tmp_path / "a.npz", images=images)
    fresh = RNG.integers(0, 256, (40, 16, 16, 3)).astype(np.uint8)
    fresh[[0, 1, 2]] = images[[0, 1, 2]]
    two = npz(tmp_path / "b.npz", images=fresh)
    with pytest.raises(UsageError, match=r"3 of 40 validation images from .*b.npz are also") as err:
        draw(one, spec(), 40, validation_data=str(two))
    assert "--allow-overlap" in str(err.value)
    got = draw(one, spec(), 40, validation_data=str(two), allow_overlap=True)
    assert got.shared_images == 3
    assert got.validation.spec.source == str(two)


def test_overlap_that_is_allowed_uses_every_image_twice(tmp_path: Path) -> None:
    got = draw(npz(tmp_path / "a.npz", count=40), spec(), 40, allow_overlap=True)
    assert (got.calibration.spec.count, got.validation.spec.count) == (40, 40)
    assert got.shared_images == 40


def test_calibration_needs_two_classes(tmp_path: Path) -> None:
    one_class = npz(tmp_path / "a.npz", labels=np.full(40, 2))
    with pytest.raises(UsageError, match="has 4 images, all of class 2: effects are compared"):
        draw(one_class, spec())
    with pytest.raises(UsageError, match=r"has 1 image, .*\n.*raise --calibration-samples"):
        draw(npz(tmp_path / "b.npz"), spec(), calibration_samples=1)
    empty = {"images": np.zeros((0, 16, 16, 3), np.uint8), "labels": np.zeros(0, np.int64)}
    with pytest.raises(UsageError, match="has 0 images, too few"):
        draw(npz(tmp_path / "c.npz", **empty), spec())
    with pytest.raises(UsageError, match="has no images for the calibration set"):
        draw(tmp_path / "c.npz", spec(), validation_data=str(tmp_path / "b.npz"))


class Told(Silent):
    """Remembers every phase: what, total, steps done."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, int, int]] = []
        self.now = ("", 0, 0)

    def begin(self, what: str, total: int) -> None:
        self.now = (what, total, 0)

    def advance(self, steps: int) -> None:
        what, total, done = self.now
        self.now = (what, total, done + steps)

    def end(self) -> None:
        self.phases.append(self.now)


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    root = folder(tmp_path, ["0", "1"], each=60)
    spoil(root / "1" / "7.png", "text")  # replaced, so the total holds
    told = Told()
    draw(root, spec(), 50, progress=told)
    assert told.phases == [
        ("decoding calibration images", 50, 50),
        ("decoding validation images", 50, 50),
    ]


# --- real photos ---------------------------------------------------------------------------------


@pytest.mark.data
def test_real_photos_are_labelled_by_their_class_index() -> None:
    root = Path(os.environ.get("CSWAP_DATA", "data")) / "imagenet-sample"
    if not root.is_dir():
        pytest.skip(f"{root} is absent (CSWAP_DATA)")
    got = draw(root, spec(classes=1000, size=(3, 64, 64), space="imagenet-1k"), 12)
    assert len(got.calibration.spec.class_indices) == 600
    for synset, index in got.calibration.spec.class_indices.items():
        assert (root / synset / f"{index:04d}.jpg").is_file()  # the stem is the class index
