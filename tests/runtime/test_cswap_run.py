"""``cswap-run`` from its first import to its exit code, on a bundle with a real, small graph."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up_bundle import reseal
from small_bundle import NAMES, PRE, Engine, flip_a_byte, picture, write_bundle
from small_onnx import CLASSES

from cswap_deploy.errors import ArtifactError, UsageError
from cswap_deploy.runtime.bundle import DeviceBundle
from cswap_deploy.runtime.classifier import Classifier
from cswap_deploy.runtime.cli import main
from cswap_deploy.runtime.onnx_session import OnnxSession
from cswap_deploy.runtime.preprocess import normalise, resize_and_crop

pytest.importorskip("onnxruntime")
NOTE = "small on CPUExecutionProvider\n"


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    def json(self) -> Any:
        """The whole of stdout is one object."""
        return json.loads(self.out)


def cswap_run(*arguments: object, cwd: Path, **settings: Any) -> Ran:
    """In a process of its own, its output buffered as a pipe's is."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    done = subprocess.run(
        [sys.executable, "-m", "cswap_deploy.runtime.cli", *map(str, arguments)],
        cwd=cwd, env=environment, text=True, timeout=120, check=False, **(pipes | settings),
    )  # fmt: skip
    return Ran(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle and pictures; nobody writes into it."""
    folder = tmp_path_factory.mktemp("device")
    write_bundle(folder / "bundle")
    for number, name in enumerate(
        ("b.png", "a.JPG", "deep/er/c.bmp", "deep/d.tif", "grey.pgm", ".hidden.png", "._a.JPG")
    ):
        path = folder / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).convert("L" if "grey" in name else "RGB").save(path)
    (folder / "pictures" / "._a.JPG").write_bytes(b"what macOS leaves beside pictures")
    (folder / "pictures" / "notes.txt").write_text("no picture")
    (folder / "pictures" / "folder.png").mkdir()
    return folder


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """One to damage, with a picture beside it."""
    picture(0).save(tmp_path / "a.png")
    return write_bundle(tmp_path / "bundle")


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """The same in this process."""

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Ran(code, *capsys.readouterr())

    return run


FOUND = ["a.JPG", "b.png", "deep/d.tif", "deep/er/c.bmp", "grey.pgm"]
"""Of the folder, in the order of their names."""


def expected(files: list[Path]) -> np.ndarray[Any, Any]:
    """(N, classes) probabilities, worked out beside the command."""
    from PIL import Image

    pixels = np.stack([resize_and_crop(Image.open(file), PRE) for file in files])
    graph = files[0].parents[0]
    while not (graph / "bundle").is_dir():
        graph = graph.parent
    logits = OnnxSession(graph / "bundle" / "model.onnx", threads=1).run(normalise(pixels, PRE))
    exponents = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    found: np.ndarray[Any, Any] = exponents / exponents.sum(1, keepdims=True)
    return found


# --- results -------------------------------------------------------------------------------------


def test_a_folder_as_text(kept: Path) -> None:
    ran = cswap_run("bundle", "pictures", "--top", "2", "--threads", "1", cwd=kept)
    assert (ran.code, ran.err) == (0, NOTE)
    p = expected([kept / "pictures" / name for name in FOUND])
    lines = []
    for name, row in zip(FOUND, p, strict=True):
        lines.append(f"pictures/{name}")
        for index in np.argsort(-row)[:2]:
            words = NAMES[index] if index < len(NAMES) else f"class {index}"
            lines.append(f"  {100 * row[index]:6.2f} %  {words}")
    assert ran.out.splitlines() == lines
    assert "class 4" in ran.out  # the network has a class more than names


def test_the_same_as_json(
    kept: Path, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(kept)
    ran = run("bundle", "pictures/b.png", "pictures/deep", "--json")
    assert (ran.code, ran.err) == (0, NOTE)
    told = ran.json()
    assert {key: told[key] for key in told if key != "images"} == {
        "target": "onnxruntime", "provider": "CPUExecutionProvider", "unreadable": [],
    }  # fmt: skip
    names = ["pictures/b.png", "pictures/deep/d.tif", "pictures/deep/er/c.bmp"]
    assert [image["image"] for image in told["images"]] == names
    p = expected([kept / name for name in names])
    for image, row in zip(told["images"], p, strict=True):
        order = np.argsort(-row)
        assert [guess["class"] for guess in image["top"]] == order.tolist()
        assert [guess["probability"] for guess in image["top"]] == pytest.approx(row[order])
        assert image["top"][0].keys() == {"class", "name", "probability"}


def test_pictures_that_cannot_be_read_are_told_and_the_others_done(
    kept: Path, tmp_path: Path, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = (kept / "pictures" / "b.png").read_bytes()
    damaged = bytearray(whole)
    damaged[whole.index(b"IDAT") + 8] ^= 0xFF
    cut = whole[: len(whole) // 2]
    headless = whole.replace(b"IHDR", b"IHDX")
    for name, content in {
        "1.png": damaged, "2.png": whole, "3.png": cut, "4.jpg": b"no picture", "5.png": headless,
        "6.png": b"", "7.gif": whole,
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    ran = run(kept / "bundle", ".", "--json", "--batch", "3")
    assert ran.code == 2
    told = ran.json()
    assert [image["image"] for image in told["images"]] == ["2.png", "7.gif"]
    assert told["images"][0]["top"] == told["images"][1]["top"]
    assert told["unreadable"] == ["1.png", "3.png", "4.jpg", "5.png", "6.png"]
    assert ran.err.count("error: cannot read ") == 5
    assert "error: cannot read 3.png: image file is truncated" in ran.err
    assert "error: cannot read 4.jpg: cannot identify image file" in ran.err
    assert "Traceback" not in ran.err


def test_batches_and_the_saved_input(
    kept: Path, tmp_path: Path, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    classify = Classifier.classify

    def watched(self: Classifier, pixels: Any, *, top: int) -> Any:
        sizes.append(len(pixels))
        return classify(self, pixels, top=top)

    monkeypatch.setattr(Classifier, "classify", watched)
    one = run(kept / "bundle", kept / "pictures", "--json").json()["images"]
    assert sizes == [1] * 5
    sizes.clear()
    saved = tmp_path / "input.npy"
    three = run(
        kept / "bundle", kept / "pictures", "--json", "--batch", "3", "--save-input", saved
    ).json()["images"]
    assert sizes == [3, 2]
    for first, second in zip(one, three, strict=True):
        assert first["image"] == second["image"]
        assert [g["class"] for g in first["top"]] == [g["class"] for g in second["top"]]
        assert [g["probability"] for g in first["top"]] == pytest.approx(
            [g["probability"] for g in second["top"]]
        )
    from PIL import Image

    pixels = [resize_and_crop(Image.open(kept / "pictures" / name), PRE) for name in FOUND]
    np.testing.assert_array_equal(np.load(saved), normalise(np.stack(pixels), PRE))


@pytest.mark.parametrize("top", [1, 5, 99])
def test_no_more_classes_than_there_are(kept: Path, run: Callable[..., Ran], top: int) -> None:
    ran = run(kept / "bundle", kept / "pictures" / "b.png", "--json", "--top", top)
    (image,) = ran.json()["images"]
    assert len(image["top"]) == min(top, CLASSES)


def test_a_reader_that_leaves_and_a_full_disk(kept: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    ran = cswap_run("bundle", "pictures", cwd=kept, stdout=write)
    os.close(write)
    assert (ran.code, ran.err) == (0, NOTE)
    if Path("/dev/full").exists():
        with Path("/dev/full").open("w") as full:
            ran = cswap_run("bundle", "pictures", cwd=kept, stdout=full)
        assert ran.code == 4
        assert ran.err == NOTE + "error: cannot write the results: No space left on device\n"


def test_ctrl_c(kept: Path, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Classifier, "prepare", interrupted)
    ran = run(kept / "bundle", kept / "pictures")
    assert (ran.code, ran.out, ran.err) == (130, "", NOTE + "error: interrupted\n")


# --- refusals ------------------------------------------------------------------------------------


def refused(ran: Ran, code: int, *words: str) -> None:
    """The exit code, and the error in words without a traceback."""
    assert ran.code == code, ran
    assert ran.err.startswith("error: ")
    assert "Traceback" not in ran.err
    for part in words:
        assert part in ran.err


def test_one_flipped_byte_in_the_graph(
    bundle: Path, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    flip_a_byte(bundle / "model.onnx")
    monkeypatch.chdir(bundle.parent)
    for more in ((), ("--target", "onnxruntime")):
        ran = run("bundle", "a.png", *more)
        refused(ran, 6, "error: bundle/model.onnx is not the file that was built: sha256 ")
        assert ran.out == ""
        assert ran.err.endswith("  fix: copy the bundle again, or build it again\n")


def test_errors_in_json_too(bundle: Path) -> None:
    """In a process of its own, whose exit code and output a script sees."""
    (bundle / "model.onnx").unlink()
    ran = cswap_run("bundle", "a.png", "--json", cwd=bundle.parent)
    refused(ran, 6, "cannot read bundle/model.onnx: No such file or directory")
    assert ran.json() == {
        "error": "cannot read bundle/model.onnx: No such file or directory\n"
        "  fix: copy the bundle again",
        "exit_code": 6,
    }


def test_a_target_that_the_bundle_does_not_have(bundle: Path, run: Callable[..., Ran]) -> None:
    for name in ("tensorrt", "openvino", "nonsense"):
        ran = run(bundle, bundle.parent / "a.png", "--target", name)
        words = f"the bundle has no {name} engine; the bundle runs here with onnxruntime"
        refused(ran, 2, words)


def test_an_engine_that_is_not_run_here(tmp_path: Path, run: Callable[..., Ran]) -> None:
    picture(0).save(tmp_path / "a.png")
    bundle = write_bundle(tmp_path / "bundle", Engine("openvino", b"<xml>", "2026.4.1"))
    ran = run(bundle, tmp_path / "a.png", "--target", "openvino")
    words = "openvino engines are run by `cswap-deploy validate` alone; the bundle runs here with "
    refused(ran, 2, words + "onnxruntime, onnxruntime-cuda")
    assert run(bundle, tmp_path / "a.png").code == 0, "unasked, model.onnx runs"


def test_why_the_engine_was_passed_over_is_told_when_the_graph_does_not_run_either(
    tmp_path: Path, run: Callable[..., Ran]
) -> None:
    """As in a bundle of bf16, which ONNX Runtime does not compute on CPUs."""
    picture(0).save(tmp_path / "a.png")
    engine = Engine("tensorrt", b"plan", "11.4.0.106")
    bundle = write_bundle(tmp_path / "bundle", engine, onnx=b"no graph")
    ran = run(bundle, tmp_path / "a.png")
    refused(ran, 6, "tensorrt engine passed over: ")
    refused(ran, 6, f"; onnxruntime does not load {bundle}/model.onnx: ")
    manifest = bundle / "manifest.json"
    told = json.loads(manifest.read_text())
    told["onnx"]["precision"] = "bf16"
    reseal(manifest, told)
    words = "; onnxruntime has no bf16 on CPUs: the graph runs in a TensorRT engine alone"
    refused(run(bundle, tmp_path / "a.png"), 6, words)


def test_cuda_where_onnxruntime_has_none(bundle: Path, run: Callable[..., Ran]) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has it")
    ran = run(bundle, bundle.parent / "a.png", "--target", "onnxruntime-cuda")
    words = f"onnxruntime {onnxruntime.__version__} has no CUDAExecutionProvider: this build of it"
    refused(ran, 4, words, "fix: pip uninstall onnxruntime")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "is not a bundle: it has no manifest.json\n  fix: name the folder that"),
        (b"{", "cannot read {bundle}/manifest.json: Expecting property name"),
        (b"\xff\xfe\x00", "cannot read {bundle}/manifest.json: "),
        (b"[]", "cannot read {bundle}/manifest.json: an object is wanted"),
        (b"{}", "cannot read {bundle}/manifest.json: schema_version is None"),
        (b'{"schema_version": 6}', "manifest.json: it was changed: it has no seal in schema"),
        (b'{"schema_version": 2}', "not a manifest of schema version 5: the document: there is no"),
        (b'{"schema_version": 1}', "version 5: it does not say what was asked\n  fix: build the"),
    ],
)
def test_a_manifest_that_is_absent_or_damaged(
    bundle: Path, run: Callable[..., Ran], content: bytes | None, words: str
) -> None:
    manifest = bundle / "manifest.json"
    manifest.unlink() if content is None else manifest.write_bytes(content)
    refused(run(bundle, bundle.parent / "a.png"), 6, words.replace("{bundle}", str(bundle)))


def opening(bundle: Path) -> str:
    try:
        DeviceBundle.open(bundle)
    except ArtifactError as err:
        return str(err)
    return ""


def test_no_value_in_a_manifest_is_a_bug(bundle: Path) -> None:
    """Whatever stands where something else belongs is told, not stumbled over."""
    told = json.loads((bundle / "manifest.json").read_text())
    needed = [
        ("schema_version",), ("model",), ("model", "preprocessing"),
        ("model", "preprocessing", "input_size"), ("onnx",), ("targets",), ("targets", 0),
        ("targets", 0, "engine"), ("targets", 0, "engine", "versions"), ("files",), ("files", 0),
    ]  # fmt: skip
    for path in needed:
        for other in (None, 3, [], "text", [None], {}):
            changed = json.loads(json.dumps(told))
            inner: Any = changed
            for step in path[:-1]:
                inner = inner[step]
            inner[path[-1]] = other
            reseal(bundle / "manifest.json", changed)
            words = opening(bundle)
            told_so = (
                "is not a manifest of schema version 5", "schema_version is ", "is damaged",
                "it has a seal in schema version",
            )  # fmt: skip
            assert words == "" or any(part in words for part in told_so)


def test_a_manifest_that_names_files_outside_the_bundle(
    bundle: Path, run: Callable[..., Ran]
) -> None:
    manifest = bundle / "manifest.json"
    (bundle.parent / "model.onnx").write_bytes((bundle / "model.onnx").read_bytes())
    for outside in ("../model.onnx", str(bundle.parent / "model.onnx")):
        told = json.loads(manifest.read_text())
        told["onnx"]["path"] = outside
        next(ref for ref in told["files"] if "model.onnx" in ref["path"])["path"] = outside
        reseal(manifest, told)
        words = f"manifest.json names files outside the bundle: {outside}"
        refused(run(bundle, bundle.parent / "a.png"), 6, words)


def test_a_graph_that_onnxruntime_does_not_load(tmp_path: Path, run: Callable[..., Ran]) -> None:
    picture(0).save(tmp_path / "a.png")
    ran = run(write_bundle(tmp_path / "bundle", onnx=b"no graph"), tmp_path / "a.png")
    refused(ran, 6, f"onnxruntime does not load {tmp_path}/bundle/model.onnx: ")


def test_paths_that_are_not_there(bundle: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    refused(run(bundle, "gone.png"), 2, "gone.png does not exist")
    (tmp_path / "empty").mkdir()
    refused(run(bundle, tmp_path / "empty"), 2, f"{tmp_path}/empty holds no pictures (.bmp, .gif,")
    refused(run(tmp_path / "gone", tmp_path / "a.png"), 6, "gone is not a bundle: it has no")
    refused(run(tmp_path / "a.png", tmp_path / "a.png"), 6, "cannot read ", "Not a directory")
    ran = run(bundle, tmp_path / "a.png", "--save-input", tmp_path / "gone" / "x.npy")
    assert ran.code == 2
    assert f"error: cannot write {tmp_path}/gone/x.npy: No such file or directory\n" in ran.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "the following arguments are required: bundle"),
        (("bundle",), "the following arguments are required: IMAGE|DIR"),
        (("bundle", "a.png", "--top", "0"), "argument --top: '0' is not a number above zero"),
        (("bundle", "a.png", "--batch", "x"), "argument --batch: 'x' is not a number above zero"),
        (("bundle", "a.png", "--nonsense"), "unrecognized arguments: --nonsense"),
    ],
)
def test_arguments_that_do_not_fit(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_a_picture_that_is_no_picture_from_python(bundle: Path) -> None:
    classifier = Classifier.open(bundle, threads=1)
    (bundle.parent / "b.png").write_bytes(b"no picture")
    with pytest.raises(UsageError, match=r"cannot read .*b\.png: cannot identify image file"):
        list(classifier.predict([bundle.parent / "b.png"]))
    same = classifier.predict([picture(0), bundle.parent / "a.png"], top=3, batch=2)
    first, second = same
    assert first == second
    assert list(classifier.predict([])) == []


# --- odd names and odd pictures ------------------------------------------------------------------


def test_names_that_are_no_text_are_printed_as_they_are(bundle: Path, tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/caf\xe9.png"
    os.rename(tmp_path / "a.png", name)
    done = subprocess.run(
        [sys.executable, "-m", "cswap_deploy.runtime.cli", bundle, name],
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"}, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(name + b"\n")


def test_a_class_s_name_does_not_speak_to_the_terminal(
    bundle: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    """Who made the bundle wrote the names; JSON has them as they are."""
    told = json.loads((bundle / "manifest.json").read_text())
    names = [f"\x1b[2J\x1b]0;{name}\x07 \u202ecaf\xe9" for name in NAMES]
    told["model"]["class_names"] = names
    reseal(bundle / "manifest.json", told)
    shown = run(bundle, tmp_path / "a.png", "--top", CLASSES).out
    assert f"\\x1b[2J\\x1b]0;{NAMES[0]}\\x07 \\u202ecaf\xe9" in shown
    assert shown.replace("\n", "").isprintable()
    [image] = json.loads(run(bundle, tmp_path / "a.png", "--json", "--top", CLASSES).out)["images"]
    assert {guess["name"] for guess in image["top"]} >= set(names)


def test_odd_pictures_are_prepared_by_the_bundle_and_said_once(
    run: Callable[..., Ran], bundle: Path, tmp_path: Path
) -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a", "b"):
        picture(1).save(tmp_path / f"{name}.png", exif=exif)
    Image.fromarray(np.zeros((20, 24), np.int32)).save(tmp_path / "c.tif")
    files = [tmp_path / name for name in ("a.png", "b.png", "c.tif")]
    seen = []
    for rotate, how in ((None, "are taken as stored"), (False, "stored"), (True, "were turned")):
        manifest = json.loads((bundle / "manifest.json").read_text())
        steps = manifest["model"]["preprocessing"]
        steps["exif_rotate"] = rotate
        if rotate is None:
            del steps["exif_rotate"]  # a bundle of an earlier version
        reseal(bundle / "manifest.json", manifest)
        ran = run(bundle, *files, "--save-input", tmp_path / "seen.npy")
        assert ran.code == 2
        assert "c.tif: 32-bit integer pixels have no known scale" in ran.err
        assert ran.err.count("note: 2 of 3 pictures carry an EXIF orientation other than 1") == 1
        assert how in ran.err
        seen.append(np.load(tmp_path / "seen.npy")[0])
    np.testing.assert_array_equal(seen[0], seen[1])
    upright = picture(1).transpose(Image.Transpose.ROTATE_270)
    np.testing.assert_array_equal(seen[2], normalise(resize_and_crop(upright, PRE)[None], PRE)[0])
