"""What users get wrong: the exit code, a message that names the fix, and nothing half-written."""

from __future__ import annotations

import os
import pickle
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pytest
import small_models
import torch
from PIL import Image
from safetensors.torch import save_file

from cswap_deploy.targets import TARGETS

if TYPE_CHECKING:
    from conftest import Made, Ran


class Refused(Protocol):
    def __call__(self, code: int, *arguments: object, model: str = ...) -> str: ...


@pytest.fixture
def refused(command: Callable[..., Ran], tmp_path: Path, settings: dict[str, object]) -> Refused:
    """Runs a build that must fail with a code; what it said, after nothing was left behind."""

    def run(code: int, *arguments: object, model: str = "small_models:small") -> str:
        own = model.startswith("small_models:") and "--input-size" not in arguments
        data = ("--data", settings["data"], "--validation-data", settings["validation_data"])
        quick = ("--calibration-samples", 60, "--validation-samples", 60, "--rounds", 1)
        done = command(
            "build", model, *(small_models.FLAGS if own else ()), *(data if own else ()), *quick,
            "--scoring-samples", 10, "--latency-runs", 10, "-o", tmp_path / "out", "--store",
            tmp_path / "store", *arguments,
        )  # fmt: skip
        assert done.code == code, done.err
        assert done.out == ""
        assert "Traceback" not in done.err
        assert not (tmp_path / "out").exists()
        hidden = [p.name for p in tmp_path.rglob(".*partial*")]
        assert hidden == []
        start = done.err.index("error: ")
        return done.err[start:]

    return run


# --- the model -----------------------------------------------------------------------------------


def test_unknown_model(refused: Refused) -> None:
    said = refused(2, model="resnet51")
    assert "resnet51" in said
    assert "resnet50" in said, "close matches"


def test_unknown_target(refused: Refused) -> None:
    said = refused(2, "--target", "tensort")
    assert f"unknown target 'tensort'; known: {', '.join(TARGETS)}" in said


def test_unknown_criterion(refused: Refused) -> None:
    said = refused(2, "--criterion", "magic")
    assert "unknown criterion 'magic'" in said
    assert "fix: one of: cswap, lamp, magnitude, magnitude-l1, random" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_measuring_on_a_gpu_that_is_not_there(refused: Refused) -> None:
    said = refused(4, "--device", "cuda")
    assert "finds no GPU it can use" in said
    assert "or leave the flag out" in said


@pytest.mark.parametrize("where", ["0", "-2", "many", "ray://", "http://host:1"])
def test_workers_that_are_no_place(refused: Refused, where: str) -> None:
    said = refused(2, f"--workers={where}")
    assert "--workers: Value error, must be a number above zero, or ray://HOST:PORT" in said


def test_a_memory_budget_that_is_no_size(refused: Refused) -> None:
    said = refused(2, "--memory-budget", "plenty")
    assert (
        "--memory-budget: Value error, is no amount of memory; write 512MiB, 2GiB or bytes" in said
    )
    assert "(got 'plenty')" in said


def test_a_checkpoint_that_does_not_fit(refused: Refused, tmp_path: Path) -> None:
    state = small_models.small().state_dict()
    del state["conv1.weight"], state["conv1.bias"]
    state |= {"extra.weight": torch.zeros(3), "head.bias": torch.zeros(7)}
    save_file(state, tmp_path / "wrong.safetensors")
    said = refused(2, "--checkpoint", tmp_path / "wrong.safetensors")
    assert "wrong.safetensors does not fit small_models:small" in said
    assert "2 missing: conv1.weight, conv1.bias" in said
    assert "1 unexpected: extra.weight" in said
    assert "1 of another shape: head.bias (7,), wanted (5,)" in said
    assert "fix: pass the MODEL that the checkpoint was trained as" in said


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_wants_to_run_code(refused: Refused, tmp_path: Path, zipped: bool) -> None:
    file, trace = tmp_path / "evil.pth", tmp_path / "it-was-run"
    torch.save({"w": torch.zeros(1), "x": Payload(trace)}, file,
               _use_new_zipfile_serialization=zipped)  # fmt: skip
    said = refused(2, "--checkpoint", file)
    assert "is a pickle that holds more than tensors; nothing of it was run" in said
    assert "mkdir" in said
    assert "fix: where you trust it, save its state_dict with safetensors" in said
    assert not trace.exists()
    torch.load(file, weights_only=False)
    assert trace.is_dir(), "the same file does run code where that is allowed"


def test_a_bare_pickle_that_wants_to_run_code(refused: Refused, tmp_path: Path) -> None:
    trace = tmp_path / "it-was-run"
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Payload(trace)))
    assert "evil.pkl" in refused(2, "--checkpoint", tmp_path / "evil.pkl")
    assert not trace.exists()


def test_a_checkpoint_that_is_absent(refused: Refused, tmp_path: Path) -> None:
    said = refused(2, "--checkpoint", tmp_path / "none.pth")
    assert f"the checkpoint {tmp_path / 'none.pth'} does not exist" in said


def test_a_factory_without_its_preprocessing(
    refused: Refused, command: Callable[..., Ran], tmp_path: Path
) -> None:
    done = command("build", "small_models:small", "-o", tmp_path / "out")
    assert done.code == 2
    assert "small_models:small does not say how its pictures are prepared" in done.err
    assert "fix: pass --input-size C,H,W --mean R,G,B --std R,G,B" in done.err
    done = command("build", "small_models:small", "--input-size", "3,16,16")
    assert done.code == 2
    assert "fix: pass --mean R,G,B --std R,G,B" in done.err


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("small_models:nothing", "small_models has no 'nothing'"),
        ("no_such_module:factory", "there is no module no_such_module"),
        ("small_models:no_module", "small_models:no_module() returned a str, not an nn.Module"),
        ("small_models:SIZE", "small_models does not call 'SIZE'"),
    ],
)
def test_a_factory_that_gives_no_network(refused: Refused, model: str, words: str) -> None:
    said = refused(2, *small_models.FLAGS, model=model)
    assert words in said


def test_weights_that_are_not_finite(refused: Refused) -> None:
    said = refused(5, model="small_models:not_finite")
    assert "small_models:not_finite has values that are not finite in 1 of 14 tensors" in said
    assert "conv2.weight" in said


def test_a_network_that_cannot_be_a_graph(refused: Refused) -> None:
    said = refused(5, "--allow-chance", model="small_models:branching")
    assert "cannot trace Branching with a dynamic batch" in said
    assert "fix: keep Python control flow on tensor values" in said


def test_a_network_without_anything_to_remove(refused: Refused) -> None:
    said = refused(5, "--allow-chance", model="small_models:rigid")
    assert "Sequential has no structure that can be removed" in said
    assert "fix: pass --ratio 0 to export the dense model" in said


def test_a_precision_that_is_not_there(refused: Refused) -> None:
    said = refused(2, "--precision", "fp64")
    assert "--precision: Input should be 'fp32', 'fp16', 'bf16', 'int8' or 'mixed'" in said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "3x16x16",
            "numbers with commas between them are wanted, for example 3,224,224 (got '3x16x16')",
        ),
        ("3,16", "--input-size: Field required"),
        ("3,0,16", "--input-size is (3, 0, 16); C,H,W above zero are wanted"),
        ("5,16,16", "--mean has 3 values and --input-size 5 channels"),
    ],
)
def test_an_input_size_that_is_none(refused: Refused, text: str, words: str) -> None:
    said = refused(2, "--input-size", text, *small_models.FLAGS[2:])
    assert words in said


# --- the ratio -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", ["-0.1", "1", "1.5", "nan"])
def test_a_ratio_out_of_range(refused: Refused, ratio: str) -> None:
    said = refused(2, "--ratio", ratio)
    assert "--ratio: Input should be" in said
    assert f"(got {ratio!r})" in said


def test_a_ratio_out_of_reach(refused: Refused) -> None:
    said = refused(5, "--ratio", "0.995")
    assert "--ratio 0.995 of the parameters cannot be met: this network can lose" in said
    assert " of its 14,533 parameters" in said
    assert "fix: pass a ratio from " in said
    assert "or 0 to export the dense model" in said


def test_a_ratio_that_would_remove_nothing(refused: Refused) -> None:
    said = refused(5, "--ratio", "0.0001", "--round-to", "1")
    assert "--ratio 0.0001 of the parameters cannot be met: this network can lose" in said


# --- the images ----------------------------------------------------------------------------------


def photos(folder: Path, *, count: int, bad: int) -> Path:
    """Class folders 0 and 1 with some files that are no images."""
    rng = np.random.default_rng(0)
    for i in range(count):
        file = folder / str(i % 2) / f"{i:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        if i < bad:
            file.write_bytes(b"\x89PNG\r\n\x1a\n but not really")
        else:
            Image.fromarray(rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)).save(file)
    return folder


def arrays(path: Path, labels: np.ndarray) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (len(labels), 16, 16, 3)).astype(np.uint8)
    np.savez(path, images=images, labels=labels)
    return path


def only(path: Path) -> tuple[str, ...]:
    return (*small_models.FLAGS, "--data", str(path))


def test_many_unreadable_images(refused: Refused, tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", count=120, bad=4)
    said = refused(2, *only(folder))
    assert f"of 120 images read from {folder} are unreadable" in said
    assert "up to 1 % are left out" in said
    assert "0/000.png" in said or "1/001.png" in said
    assert "fix: remove or replace these files" in said


def test_one_unreadable_image_is_left_out_and_named(
    command: Callable[..., Ran], tmp_path: Path
) -> None:
    folder = photos(tmp_path / "photos", count=121, bad=1)
    output = tmp_path / "out"
    done = command(
        "prune", "small_models:small", *only(folder), "-o", output, "--criterion", "magnitude",
        "--calibration-samples", 60, "--validation-samples", 60, "--allow-chance",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert f"{folder}: unreadable, left out: 0/000.png" in done.err


def test_labels_out_of_range(refused: Refused, tmp_path: Path) -> None:
    file = arrays(tmp_path / "d.npz", np.arange(200) % 6)
    said = refused(2, *only(file))
    assert f"labels out of range in {file}: 5; small_models:small has 5 classes, 0..4" in said
    assert "fix: pass --class-map FILE" in said


def test_one_class_only(refused: Refused, tmp_path: Path) -> None:
    file = arrays(tmp_path / "d.npz", np.full(200, 3))
    said = refused(2, *only(file))
    assert f"the calibration set from {file} has 60 images, all of class 3" in said
    assert "at least two are needed" in said
    assert "fix: pass --data DIR" in said


def test_no_images(refused: Refused, tmp_path: Path) -> None:
    said = refused(2, *only(arrays(tmp_path / "d.npz", np.zeros(0, np.int64))))
    assert "d.npz" in said
    (tmp_path / "empty").mkdir()
    said = refused(2, *only(tmp_path / "empty"))
    assert "holds no class folders with images" in said
    assert "fix: put the images of each class in a folder" in said


def test_data_that_is_not_there(refused: Refused, tmp_path: Path) -> None:
    said = refused(2, *only(tmp_path / "none"))
    assert f"{tmp_path / 'none'} does not exist" in said
    assert "fix: pass --data DIR (class folders), --data FILE.npz" in said


def test_a_network_of_ones_own_without_data(refused: Refused) -> None:
    said = refused(2, *small_models.FLAGS)
    assert "small_models:small needs images: its classes are not known" in said
    assert "fix: pass --data DIR" in said


# --- the disk ------------------------------------------------------------------------------------


def test_an_output_that_holds_other_files(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    said = refused(2, "-o", tmp_path / "mine")
    assert "is not empty and is not a bundle (it has no manifest.json)" in said
    assert "fix: choose another folder with -o" in said
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    said = refused(2, "-o", tmp_path / "mine" / "thesis.txt")
    assert "is a file; a bundle is a folder" in said


def test_an_output_that_cannot_be_written(refused: Refused, locked_disk: Path) -> None:
    said = refused(2, "-o", locked_disk / "bundle")
    assert f"cannot use {locked_disk}: Read-only file system" in said
    assert "fix: choose a folder that you may write, with -o" in said
    said = refused(2, "--store", locked_disk / "store")
    assert "Read-only file system" in said
    assert "with --store" in said


def test_an_output_without_permission(refused: Refused, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked").chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert "Permission denied" in refused(2, "-o", tmp_path / "locked" / "bundle")


def test_a_full_disk(command: Callable[..., Ran], made: Made, store: Path, tiny_disk: Path) -> None:
    done = command("build", *made.flags, "--store", store, "-o", tiny_disk / "bundle")
    assert (done.code, done.out) == (4, ""), done.err
    assert f"the disk that holds {tiny_disk} is full" in done.err
    assert "fix: free some space, or choose a folder on another disk with -o" in done.err
    assert list(tiny_disk.iterdir()) == []


def test_a_full_store(command: Callable[..., Ran], made: Made, tiny_disk: Path) -> None:
    output = tiny_disk.parent / "out"
    done = command("build", *made.flags, "--store", tiny_disk / "store", "-o", output)
    assert (done.code, done.out) == (4, ""), done.err
    assert "is full" in done.err
    assert "with --store" in done.err
    assert not output.exists()
    assert not list(tiny_disk.rglob(".partial-*"))


# --- packages that are not there -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("package", "target", "extra"),
    [("onnxruntime", "onnxruntime", ""), ("tensorrt_rtx", "tensorrt-rtx", "trt-rtx"),
     ("tensorrt", "tensorrt", "trt")],
)  # fmt: skip
def test_a_runtime_that_is_not_installed(
    command: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, made: Made, store: Path,
    tmp_path: Path, package: str, target: str, extra: str,
) -> None:  # fmt: skip
    """Simulated: the package is hidden from the import system."""
    monkeypatch.setitem(sys.modules, package, None)
    # Of an option that is given twice the last one counts; targets add up, so they go first.
    flags = list(made.flags)
    for other in made.settings["target"]:
        at = flags.index(other)
        del flags[at - 1 : at + 1]
    done = command("build", *flags, "--target", target, "--store", store, "-o", tmp_path / "out")
    assert (done.code, done.out) == (4, ""), done.err
    assert f"error: {package} is not installed" in done.err
    wanted = f"'cswap-deploy[{extra}]'" if extra else package
    assert f"fix: pip install {wanted}" in done.err
    assert not (tmp_path / "out").exists()
    assert "load" not in done.err, "it is said before minutes of work"
    assert not [p for p in store.iterdir() if p.name.startswith(".")]
