"""The folders that users bring: what is odd in them is said, once."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_data import draw, folder, npz, picture, spec

from cswap_deploy.data.labels import Classes, imagenet_classes
from cswap_deploy.errors import UsageError

RNG = np.random.default_rng(3)


def notes(root: Path, classes: int = 4, **more: Any) -> tuple[str, ...]:
    return draw(root, spec(classes=classes, **more), 8).calibration.spec.notes


def refused(root: Path, classes: int, **more: Any) -> UsageError:
    with pytest.raises(UsageError) as err:
        draw(root, spec(classes=classes), 8, **more)
    return err.value


# --- the order of names --------------------------------------------------------------------------


def test_names_whose_order_depends_on_how_they_are_sorted(tmp_path: Path) -> None:
    names = [f"class_{n}" for n in range(1, 11)]
    root = folder(tmp_path / "my photos", names, each=3)
    (root / "__MACOSX").mkdir()
    err = refused(root, 10)
    said = str(err)
    assert f"the class index of 9 of 10 names in {root} depends on how they are sorted" in said
    assert "net does not name its classes" in said
    for line in (
        "class_10: 1 as text, 9 by number", "class_2: 2 as text, 1 by number",
        "class_5: 5 as text, 4 by number", "and 4 more",
    ):  # fmt: skip
        assert f"\n    {line}\n" in said
    assert str(err.fix).startswith("pass --class-map FILE")
    # Each of the two commands of the fix makes a class map that works.
    as_text, by_number = (
        f"({part} > classes.txt" for part in shell_parts(str(err.fix), end=" > FILE")
    )
    for line, order in ((as_text, sorted(names)), (by_number, names)):
        subprocess.run(line, shell=True, cwd=tmp_path, check=True)
        got = draw(root, spec(classes=10), 8, class_map=tmp_path / "classes.txt")
        assert got.calibration.spec.class_indices == {n: i for i, n in enumerate(order)}


def shell_parts(text: str, *, end: str) -> list[str]:
    return [part.rpartition(": (")[2] for part in text.split(end)[:-1] if ": (" in part]


def test_names_in_an_array_have_no_folder_to_list(tmp_path: Path) -> None:
    labels = np.array(["a2", "a10", "b", "a10"] * 10)
    file = npz(tmp_path / "a.npz", labels=labels)
    fix = str(refused(file, 3).fix)
    for order in (["a10", "a2", "b"], ["a2", "a10", "b"]):
        assert json.dumps(order) in fix
        (tmp_path / "map").write_text(json.dumps(order))
        got = draw(file, spec(classes=3), 8, class_map=tmp_path / "map").calibration.spec
        assert got.class_indices == {name: i for i, name in enumerate(order)}


@pytest.mark.parametrize(
    "names",
    [["a2", "a10", "b"], ["img-9x", "img-10x", "z"], ["v1.5", "v1.10", "x"], ["2nd", "10th", "a"]],
)
def test_other_names_with_numbers_are_refused_too(tmp_path: Path, names: list[str]) -> None:
    assert "depends on how they are sorted" in str(refused(folder(tmp_path, names), 3))


@pytest.mark.parametrize(
    "names",
    [["class_01", "class_02", "class_10"], ["a1", "a2", "b"], ["x²", "x³", "y"], ["B", "a", "é"]],
)
def test_names_with_one_order_are_numbered(tmp_path: Path, names: list[str]) -> None:
    got = draw(folder(tmp_path, names), spec(classes=3)).calibration.spec
    assert got.class_indices == {name: i for i, name in enumerate(sorted(names))}


def test_known_names_and_class_maps_have_no_order(tmp_path: Path) -> None:
    names = ("type 9", "type 10", "other")
    root = folder(tmp_path / "a", list(names))
    assert draw(root, spec(classes=3, names=names)).calibration.spec.class_indices["type 10"] == 1
    file = tmp_path / "map.json"
    file.write_text(json.dumps(names))
    assert draw(root, spec(classes=3), class_map=file).calibration.spec.class_indices == {
        "type 9": 0, "type 10": 1, "other": 2,
    }  # fmt: skip


# --- numbers that are no class indices -----------------------------------------------------------


def test_folders_that_count_from_one(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", [str(n) for n in range(1, 11)], each=3)
    err = refused(root, 10)
    assert "labels out of range in" in str(err)
    assert "if they count from 1, pass --class-map FILE with this JSON: {" in str(err.fix)
    given = json.loads("{" + str(err.fix).partition("{")[2].partition("}")[0] + "}")
    file = tmp_path / "map.json"
    file.write_text(json.dumps(given))
    got = draw(root, spec(classes=10), 8, class_map=file).calibration.spec.class_indices
    assert got == {str(n): n - 1 for n in range(1, 11)}


def test_many_labels_that_count_from_one(tmp_path: Path) -> None:
    file = npz(tmp_path / "a.npz", count=90, labels=np.arange(90) % 30 + 1)
    err = refused(file, 30)
    assert "a text of the numbers, one a line: seq 1 30 > FILE" in str(err.fix)
    some = npz(tmp_path / "c.npz", count=40, labels=np.arange(40) % 20 + 11)  # 11 to 30
    assert "if they count from 1" in str(refused(some, 30).fix)
    (tmp_path / "map").write_text("\n".join(map(str, range(1, 31))))
    got = draw(file, spec(classes=30), 40, class_map=tmp_path / "map")
    assert sorted(set(got.calibration.labels.tolist())) == list(range(30))
    other = refused(npz(tmp_path / "b.npz", labels=np.arange(40)), 30)
    assert "count from 1" not in str(other)
    assert "pass --class-map FILE, a JSON object" in str(other.fix)


# --- class maps ----------------------------------------------------------------------------------


def test_a_class_map_of_names_in_order(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", ["dog", "cat"])
    for text in ("dog\ncat\n", "dog/\r\n\r\ncat/\r\n", '["dog", "cat"]', "\ufeffdog\ncat"):
        (tmp_path / "map").write_text(text, encoding="utf-8")
        got = draw(root, spec(), class_map=tmp_path / "map").calibration.spec
        assert got.class_indices == {"cat": 1, "dog": 0}
    for text, words in (
        ("cat\ncat\ndog", "has names twice: cat"),
        ("a\nb\nc\nd\ncat\ndog", r"indices outside 0\.\.3, the classes of net: cat: 4, dog: 5"),
        ("cat\ncow", "1 of 2 names in .* are not in the class map: dog"),
        ('["cat", 3]', "is not a JSON object of integers, nor a list of names"),
    ):
        (tmp_path / "map").write_text(text)
        with pytest.raises(UsageError, match=words) as err:
            draw(root, spec(), class_map=tmp_path / "map")
        assert err.value.fix


# --- classes without images ----------------------------------------------------------------------


def test_an_empty_class_folder_is_said_and_keeps_its_number(tmp_path: Path) -> None:
    root = folder(tmp_path, ["ant", "cat", "dog"])
    (root / "bee").mkdir()
    got = draw(root, spec(classes=4)).calibration.spec
    assert got.class_indices == {"ant": 0, "cat": 2, "dog": 3}
    assert "1 of 4 class folders has no pictures: bee" in got.notes
    assert "1 of the 4 classes of net have no images: 1" in got.notes
    (root / "docs").mkdir()
    (root / "bee" / "a.png").write_bytes((root / "ant" / "0.png").read_bytes())
    got = draw(root, spec(classes=4)).calibration.spec
    assert got.class_indices == {"ant": 0, "bee": 1, "cat": 2, "dog": 3}
    assert "1 of 5 class folders has no pictures: docs" in got.notes
    assert "1 of the 4 classes of net have one image only: 1 (bee)" in got.notes


def test_what_the_model_has_and_the_data_lacks_is_one_line(tmp_path: Path) -> None:
    chosen = [imagenet_classes()[i][0] for i in (3, 5)]
    found = draw(folder(tmp_path, chosen), spec(classes=1000, space="imagenet-1k"), 8)
    (note,) = found.calibration.spec.notes
    assert note.startswith("998 of the 1,000 classes of net have no images: 0 (tench), 1 (gold")
    assert note.endswith(" and 993 more")
    assert found.notes().count(f"{tmp_path}: {note}") == 1  # both sets have it


def test_arrays_are_counted_too(tmp_path: Path) -> None:
    labels = np.array([0] * 20 + [1] * 19 + [3])
    got = draw(npz(tmp_path / "a.npz", labels=labels), spec(classes=5), 8).calibration.spec
    assert got.notes == (
        "2 of the 5 classes of net have no images: 2, 4",
        "1 of the 5 classes of net have one image only: 3",
    )
    assert draw(npz(tmp_path / "b.npz"), spec()).calibration.spec.notes == ()


# --- files and folders of every kind -------------------------------------------------------------


def test_what_systems_leave_is_passed_over(tmp_path: Path) -> None:
    root = folder(tmp_path, ["0", "1", "2", "3"])
    for name in ("__MACOSX/0/._0.png", "@eaDir/x.png", ".git/y.png", "0/.ipynb_checkpoints/0.png",
                 "1/Thumbs.db", "1/.DS_Store", "desktop.ini", "2/._0.png"):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture().save(root / name, "PNG")
    got = draw(root, spec(), 100)
    assert got.calibration.spec.count + got.validation.spec.count == 16
    assert [note for note in got.notes() if "divided into" not in note] == []


def test_what_is_left_out_is_named(tmp_path: Path) -> None:
    root = folder(tmp_path, ["0", "1", "2", "3"])
    picture().save(root / "loose.png")
    (root / "0" / "a.heic").write_bytes(b"x")
    (root / "labels.csv").write_text("x")
    (root / "1" / "gone.png").symlink_to(root / "nothing.png")
    assert notes(root) == (
        "4 files left out, as no pictures by their names, not in a class folder, or broken links: "
        "labels.csv, loose.png, 0/a.heic, 1/gone.png",
    )


def test_nothing_but_strange_files(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.heic").write_bytes(b"x")
    err = refused(tmp_path, 4)
    assert "holds no class folders with images; files that are no pictures by their names: " in str(
        err
    )
    assert "cat/a.heic" in str(err)
    assert "put the images of each class in a folder" in str(err.fix)


def test_pictures_without_suffix_and_through_links(tmp_path: Path) -> None:
    root = folder(tmp_path / "real", ["0", "1", "2"])
    for file in root.rglob("*.png"):
        file.rename(file.with_suffix(""))
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("0", "1"):
        (linked / name).symlink_to(root / name)
    (linked / "2").mkdir()
    (linked / "2" / "inner").symlink_to(root / "2")
    (linked / "2" / "back").symlink_to(linked / "2")
    got = draw(linked, spec(classes=3), 100)
    assert got.calibration.spec.count + got.validation.spec.count == 12


def test_folders_within_class_folders_are_said(tmp_path: Path) -> None:
    root = folder(tmp_path, ["0", "1", "2", "3/young", "3/old"])
    assert notes(root) == (
        "pictures of folders within class folders are of the outer class: 3/old, 3/young",
    )


def test_a_folder_around_the_class_folders(tmp_path: Path) -> None:
    folder(tmp_path / "my photos", ["cats/0", "cats/1", "cats/2"])
    err = refused(tmp_path / "my photos", 3)
    assert "holds the single folder cats, with the folders 0, 1, 2" in str(err)
    assert err.fix == f"pass {tmp_path / 'my photos' / 'cats'}"
    assert draw(tmp_path / "my photos" / "cats", spec(classes=3)).calibration.spec.count


def test_a_folder_of_splits(tmp_path: Path) -> None:
    folder(tmp_path, ["val/a", "val/b", "train/a", "train/b"])
    err = refused(tmp_path, 2)
    assert f"pass --data {tmp_path}/train --validation-data {tmp_path}/val" in str(err.fix)
    given = shlex.split(str(err.fix))
    got = draw(Path(given[2]), spec(classes=2), 8, validation_data=given[4])
    assert got.validation.spec.count == 8


def test_names_of_every_spelling(tmp_path: Path) -> None:
    composed, taken_apart = "caf\u00e9", "cafe\u0301"
    root = folder(tmp_path / "data", [taken_apart, "日本 語", "b ö s"], each=6)
    (root / composed).mkdir()
    picture().save(root / composed / "ü.PNG")
    file = tmp_path / "map.json"
    file.write_text(json.dumps({composed: 2, "日本 語": 0, "b o\u0308 s": 1}, ensure_ascii=False))
    got = draw(root, spec(classes=3), 100, class_map=file)
    assert np.bincount(got.calibration.labels).sum() + len(got.validation.labels) == 19
    assert got.calibration.spec.class_indices == {composed: 2, "日本 語": 0, "b ö s": 1}


def test_labels_of_every_spelling(tmp_path: Path) -> None:
    file = npz(tmp_path / "a.npz", labels=np.array(["cafe\u0301", "tea"] * 20))
    assert draw(file, spec(classes=2, names=("caf\u00e9", "tea"))).calibration.spec.classes == 2
    (tmp_path / "map").write_text("tea\ncafe\u0301\n")
    got = draw(file, spec(classes=2), class_map=tmp_path / "map").calibration.spec
    assert sorted(got.class_indices.values()) == [0, 1]


def test_names_that_are_no_text(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", ["a", "b"], each=3)
    for name in (b"caf\xe8", b"caf\xe9"):
        os.rename(root / "ab"[name[-1] & 1], os.fsencode(root) + b"/" + name)
    with open(os.fsencode(root) + b"/caf\xe8/\xff.png", "w"):
        pass  # a file that does not decode, whose name is no text either
    got = draw(root, spec(classes=2), 100)
    assert got.calibration.spec.class_indices == {r"caf\udce8": 0, r"caf\udce9": 1}
    told = got.calibration.spec.unreadable + got.validation.spec.unreadable
    assert told
    for made in (got.calibration.spec, got.validation.spec):
        assert json.loads(made.model_dump_json())["classes"] == 2


def test_a_path_that_is_no_text_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    root = os.fsencode(folder(tmp_path / "data", ["0", "1"]))
    os.rename(root, root + b"\xff")
    name = os.fsdecode(root + b"\xff")
    with pytest.raises(
        UsageError, match=r"data\\udcff is no UTF-8.*\n  fix: rename the folder, or"
    ):
        draw(name, spec())
    (tmp_path / "link").symlink_to(name)
    assert draw(tmp_path / "link", spec()).calibration.spec.count == 4


def test_a_zero_byte_picture_is_called_that(tmp_path: Path) -> None:
    root = folder(tmp_path, ["0", "1"], each=60)
    (root / "1" / "7.png").write_bytes(b"")
    got = draw(root, spec(), 60)
    (told,) = got.calibration.spec.unreadable + got.validation.spec.unreadable
    assert told == "1/7.png: the file is empty"


# --- odd pictures --------------------------------------------------------------------------------


def test_odd_pictures_are_counted_once_for_each_set(tmp_path: Path) -> None:
    root = folder(tmp_path, ["0", "1", "2", "3"], each=4)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in "0123":
        for i in range(4):
            picture().save(root / name / f"{i}.png", exif=exif)
    deep = Image.fromarray(RNG.integers(0, 65536, (20, 20)).astype(np.uint16))
    deep.save(root / "0" / "0.png")
    got = draw(root, spec(), 8)
    odd = (*got.calibration.spec.notes, *got.validation.spec.notes)
    depth = [note for note in odd if "16-bit" in note]
    (turned, also_turned) = (note for note in odd if "EXIF" in note)
    assert len(depth) == 1
    assert {turned.split(" images ")[0], also_turned.split(" images ")[0]} == {
        "8 of 8 calibration", "7 of 8 validation",
    } or {turned.split(" images ")[0], also_turned.split(" images ")[0]} == {
        "7 of 8 calibration", "8 of 8 validation",
    }  # fmt: skip
    assert "--exif-rotate" in turned


def test_coverage_of_classes_with_names() -> None:
    classes = Classes(spec(classes=3, names=("cat", "dog", "owl")))
    from cswap_deploy.data.labels import PLAIN

    assert classes.coverage(np.array([0, 0, 2]), PLAIN) == [
        "1 of the 3 classes of net have no images: 1 (dog)",
        "1 of the 3 classes of net have one image only: 2 (owl)",
    ]
