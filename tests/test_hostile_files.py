"""Files that are made to harm: refused with a clear word, before memory is spent on them."""

from __future__ import annotations

import ast
import io
import os
import struct
import subprocess
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import small_models
import torch
from apart import apart
from PIL import Image
from torch import nn

from cswap_deploy.config import DataConfig, ModelConfig, load_config
from cswap_deploy.data import calibration_from, load_samples
from cswap_deploy.data.labels import Classes, read_class_map
from cswap_deploy.data.sources import decode, open_npz
from cswap_deploy.errors import ArtifactError, CswapError, UsageError
from cswap_deploy.export.onnx import describe_onnx
from cswap_deploy.gate.budgets import read_budgets
from cswap_deploy.measure.accuracy import read_predictions
from cswap_deploy.measure.metric import load_metric
from cswap_deploy.models.checkpoints import read_checkpoint
from cswap_deploy.models.load import load_model
from cswap_deploy.progress import Silent
from cswap_deploy.records.model import ModelSpec, Preprocessing
from cswap_deploy.runtime.preprocess import FORMATS
from cswap_deploy.settings import MOST_TEXT_BYTES, read_toml

if TYPE_CHECKING:
    from conftest import Ran

PACKAGE = Path(__file__).parents[1] / "cswap_deploy"
PRE = Preprocessing(
    input_size=small_models.INPUT_SIZE, mean=small_models.MEAN, std=small_models.STD,
    resize_shorter=18,
)  # fmt: skip
SPEC = ModelSpec(
    name="net", source="factory", weights="random", weights_sha256="0" * 64,
    num_classes=small_models.CLASSES, preprocessing=PRE,
)  # fmt: skip
LONG = "x" * 300
MIB = 1 << 20


# --- pictures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["EPS", "PCX", "TGA", "ICO", "SGI", "IM", "MSP", "DDS"])
def test_nothing_but_pictures_is_opened_whatever_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    """Pillow goes by the content, and hands PostScript to Ghostscript."""

    def started(*_: object, **__: object) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", started)
    monkeypatch.setattr(os, "system", started)
    image = Image.new("1" if format == "MSP" else "RGB", (24, 24))
    image.save(tmp_path / "a.png", format)
    found = decode(tmp_path / "a.png", PRE)
    assert found == f"cannot identify image file: none of {', '.join(FORMATS)}"


def test_pictures_are_opened_in_one_place() -> None:
    calls = [
        (file.relative_to(PACKAGE).as_posix(), [keyword.arg for keyword in node.keywords])
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Image.open"
    ]
    assert calls == [("runtime/preprocess.py", ["formats"])]


def png(width: int, height: int, bits: int = 1) -> bytes:
    """A grey PNG of zeros, whatever its size, in a few bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(
            ">I", zlib.crc32(kind + body)
        )  # fmt: skip

    pack, row = zlib.compressobj(9), bytes(1 + (width * bits + 7) // 8)
    rows = b"".join(pack.compress(row) for _ in range(height)) + pack.flush()
    head = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def grown_by(content: bytes, resize: int, side: int) -> tuple[str, float]:
    """What is said of a picture, and how many MiB this process grew by."""
    import resource

    pre = PRE.model_copy(update={"input_size": (3, side, side), "resize_shorter": resize})
    decode(io.BytesIO(png(8, 8)), PRE)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = decode(io.BytesIO(content), pre)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if isinstance(found, str) else "decoded", (after - before) / 1024


@pytest.mark.parametrize(
    ("size", "resize", "side", "words"),
    [
        ((100_000, 1), 256, 224, "are too long and thin"),
        ((1, 100_000), 256, 224, "are too long and thin"),
        ((16, 16), 60_000, 224, "are too long and thin"),
        ((40_000, 40_000), 256, 224, "exceeds limit"),
    ],
)
def test_a_picture_of_a_few_bytes_takes_little_memory(
    size: tuple[int, int], resize: int, side: int, words: str
) -> None:
    content = png(*size)
    assert len(content) < 300_000
    said, mib = apart(grown_by, content, resize, side, limit_s=60)
    assert words in said
    assert mib < 64


def test_large_pictures_are_decoded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from cswap_deploy.data import sources

    held = []
    large = sources._LARGE
    ordinary = sources.resize_and_crop

    def seen(image: Image.Image, pre: Preprocessing) -> Any:
        held.append(large.locked())
        return ordinary(image, pre)

    monkeypatch.setattr(sources, "resize_and_crop", seen)
    monkeypatch.setattr(sources, "_MANY_PIXELS", 32 * 32)
    for side in (32, 33):
        assert not isinstance(decode(io.BytesIO(png(side, side)), PRE), str)
    assert held == [False, True]
    assert not large.locked()


# --- arrays --------------------------------------------------------------------------------------


def npy(shape: str, dtype: str = "|u1", body: bytes = b"") -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body


def archive(compression: int = zipfile.ZIP_STORED, **members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as made:
        for name, content in members.items():
            made.writestr(f"{name}.npy", content)
    return file.getvalue()


LABELS = npy("(2,)", "<i8", struct.pack("<qq", 0, 1))
RIGHT = archive(images=npy("(2, 16, 16, 3)", body=bytes(range(256)) * 6), labels=LABELS)


def encrypted(content: bytes) -> bytes:
    """Says so of its first member, in both of its headers."""
    found = bytearray(content)
    found[6] |= 1
    found[found.index(b"PK\x01\x02") + 8] |= 1
    return bytes(found)


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]


NOISE = np.random.default_rng(0).integers(0, 256, 1536).astype(np.uint8).tobytes()
PACKED = {
    kind: archive(kind, images=npy("(2, 16, 16, 3)", body=NOISE), labels=LABELS)
    for kind in (zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2)
}
ARRAYS: dict[str, tuple[bytes, str]] = {
    "10^12 images": (
        archive(images=npy("(1000000000000, 16, 16, 3)"), labels=LABELS), "it has 0",
    ),
    "10^6 images": (archive(images=npy("(1000000, 16, 16, 3)"), labels=LABELS), "it has 0"),
    "labels": (archive(images=npy("(0, 4, 4, 3)"), labels=npy("(99999999999,)", "<i8")), "has 0"),
    "a negative size": (archive(images=npy("(-1, 16, 16, 3)"), labels=LABELS), "has shape (-1,"),
    "more than 64 bits": (archive(images=npy(f"({10**30},)"), labels=LABELS), "it has 0"),
    "no pixels": (archive(images=npy("(2, 0, 16, 3)"), labels=LABELS), "no pixels"),
    "nothing": (archive(images=b"", labels=LABELS), "cannot read"),
    "no array": (archive(images=b"hello", labels=LABELS), "cannot read"),
    "an unclosed header": (
        archive(images=b"\x93NUMPY\x01\x00" + struct.pack("<H", 99) + b"(" * 98 + b"\n"),
        "no array 'labels'",
    ),
    "a header of brackets": (
        archive(images=b"\x93NUMPY\x01\x00" + struct.pack("<H", 99) + b"(" * 98 + b"\n",
                labels=LABELS), "cannot read",
    ),
    "objects": (archive(images=npy("(2,)", "|O", b"\x80\x04N.N."), labels=LABELS), "cannot read"),
    "encrypted": (encrypted(RIGHT), "encrypted"),
    "of another method": (RIGHT.replace(b"PK\x03\x04\x14\0\0\0\0\0", b"PK\x03\x04\x14\0\0\0c\0")
                          .replace(b"\x14\x03\x14\0\0\0\0\0", b"\x14\x03\x14\0\0\0c\0"),
                          "cannot read"),
    "damaged": (flipped(RIGHT, 300), "Bad CRC-32"),
    "damaged, deflated": (flipped(PACKED[zipfile.ZIP_DEFLATED], 60), "cannot read"),
    "damaged, LZMA": (flipped(PACKED[zipfile.ZIP_LZMA], 60), "cannot read"),
    "damaged, bzip2": (flipped(PACKED[zipfile.ZIP_BZIP2], 60), "cannot read"),
    "one array": (npy("(2,)", "<i8", bytes(16)), "not a zip file"),
    "letters that are none": (
        archive(images=npy("(1, 16, 16, 3)", body=bytes(768)),
                labels=npy("(1,)", "<U1", b"\xff\xff\xff\x7f")), "labels.npy is no text",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_that_are_made_to_harm_are_refused(tmp_path: Path, kind: str) -> None:
    content, words = ARRAYS[kind]
    file = tmp_path / "d.npz"
    file.write_bytes(content)
    with pytest.raises(UsageError) as err:
        open_npz(file, Classes(SPEC))
    assert words in str(err.value)
    assert str(file) in str(err.value)
    if kind != "no pixels":  # predictions are of any shape
        with pytest.raises(ArtifactError, match="holds no predictions"):
            read_predictions(file)


def test_the_same_arrays_are_read_where_they_are_right(tmp_path: Path) -> None:
    file = tmp_path / "d.npz"
    for content in (RIGHT, *PACKED.values()):
        file.write_bytes(content)
        source = open_npz(file, Classes(SPEC))
        assert source.labels.tolist() == [0, 1]
        with np.load(file) as arrays:
            first = source.read(0)
            assert not isinstance(first, str)
            np.testing.assert_array_equal(first.pixels, arrays["images"][0])


def test_arrays_larger_than_the_memory_are_refused_by_their_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousandth of their size in zeros packs them."""
    monkeypatch.setattr("cswap_deploy.data.archives.free_memory", lambda: 20 * MIB)
    body = npy("(30000, 28, 28, 1)", body=bytes(30_000 * 784))
    labels = npy("(30000,)", "|u1", bytes(30_000))
    file = tmp_path / "d.npz"
    file.write_bytes(archive(zipfile.ZIP_DEFLATED, images=body, labels=labels))
    assert file.stat().st_size < MIB
    with pytest.raises(UsageError, match=r"the arrays images, labels take 0.0 GiB, 0.0 GiB of mem"):
        open_npz(file, Classes(SPEC))


def test_an_image_in_arrays_that_cannot_be_resized_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "d.npz"
    images = np.zeros((4, 1, 100_000, 1), np.uint8)
    np.savez_compressed(file, images=images, labels=np.arange(4))
    large = PRE.model_copy(update={"input_size": (3, 224, 224), "resize_shorter": 256})
    source = open_npz(file, Classes(SPEC.model_copy(update={"preprocessing": large})))
    assert "are too long and thin" in str(source.read(0))
    with pytest.raises(UsageError, match=r"of 4 images read from .* are unreadable"):
        load_samples(
            DataConfig(data=str(file), calibration_samples=2, validation_samples=2),
            model=SPEC.model_copy(update={"preprocessing": large}), seed=0, progress=Silent(),
        )  # fmt: skip


# --- what people write ---------------------------------------------------------------------------

TOML = {
    "lists in lists": ("a = " + "[" * 3000 + "]" * 3000, "nested over 8 deep"),
    "tables in tables": ("a = " + "{a=" * 3000 + "1" + "}" * 3000, "nested over 8 deep"),
    "a name of 5,000 parts": (".".join("a" * 5000) + " = 1", "nested over 8 deep"),
    "nine deep": ("a = " + "[" * 9 + "]" * 9, "nested over 8 deep"),
    "5,000 digits": ("a = " + "9" * 5000, "Exceeds the limit (4300 digits)"),
    "20,000 bits": ("a = 0x" + "f" * 5000, "an integer of 20000 bits; 63 are the most"),
    "a NUL": ('a = "x\\u0000y"', "holds a NUL, which is no text"),
    "a NUL in a name": ('"x\\u0000y" = 1', "holds a NUL, which is no text"),
    "bytes that are no text": (b"a = '\xff'", "'utf-8' codec can't decode"),
    "too much of it": ("a = 1 #" + "x" * MOST_TEXT_BYTES, "is longer than 1,048,576 bytes"),
}


@pytest.mark.parametrize("read", [read_toml, read_budgets])
@pytest.mark.parametrize("kind", TOML)
def test_toml_that_is_made_to_harm(tmp_path: Path, read: Callable[..., Any], kind: str) -> None:
    text, words = TOML[kind]
    file = tmp_path / "a.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=r"cannot read the (configuration|budgets)") as err:
        read(file)
    assert words in str(err.value)
    assert len(str(err.value)) < 1000


@pytest.mark.parametrize("path", [Path("a\0b"), Path(LONG), Path(__file__).parent])
@pytest.mark.parametrize("read", [
    read_toml, read_budgets, read_checkpoint, describe_onnx, lambda path: read_class_map(path, SPEC)
])  # fmt: skip
def test_paths_that_no_file_has(read: Callable[..., Any], path: Path) -> None:
    with pytest.raises(CswapError) as err:
        read(path)
    assert err.value.exit_code in (2, 6)


CLASS_MAPS = {
    "lists in lists": ("[" * 100_000, "it is nested too deep"),
    "objects in objects": ('{"a":' * 100_000, "it is nested too deep"),
    "a name twice": ('{"cat": 0, "dog": 1, "cat": 2}', "has names twice: cat"),
    "a name twice, in two spellings": ('{"caf\u00e9": 0, "cafe\u0301": 1}', "has names twice: caf"),
    "a list with one": ('["caf\u00e9", "cafe\u0301"]', "has names twice: caf"),
    "an object in it": ('{"cat": {"cat": 0}}', "is not a JSON object of integers"),
    "a list of objects": ('[{"cat": 0}]', "is not a JSON object of integers"),
    "an infinity": ('{"cat": Infinity}', "is not a JSON object of integers"),
    "5,000 digits": ('{"cat": ' + "9" * 5000 + "}", "cannot read the class map"),
    "a large index": ('{"cat": ' + "9" * 4000 + "}", "has indices outside 0..4"),
}


@pytest.mark.parametrize("kind", CLASS_MAPS)
def test_class_maps_that_are_made_to_harm(tmp_path: Path, kind: str) -> None:
    text, words = CLASS_MAPS[kind]
    file = tmp_path / "classes.json"
    file.write_text(text)
    with pytest.raises(UsageError) as err:
        read_class_map(file, SPEC)
    assert words in str(err.value)
    assert len(str(err.value)) < 1000


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"seed": -1}, "--seed: Input should be greater than or equal to 0"),
        ({"seed": 10**30}, "--seed: Value error, is an integer of 100 bits; 63 are the most"),
        ({"mean": (0, 0, 0), "std": (1, float("nan"), 1)}, "--std: Input should be a finite"),
        ({"mean": (float("inf"),), "std": (1,)}, "--mean: Input should be a finite number"),
        ({"parity_tolerance": "inf"}, "--parity-tolerance: Input should be a finite number"),
        ({"min_effect": float("inf")}, "--min-effect: Input should be a finite number"),
        ({"recover": "nan"}, "--recover: Input should be a finite number"),
        ({"max_latency": "inf"}, "--max-latency: Input should be a finite number"),
        ({"speedup": 1e300}, "--speedup: Input should be less than or equal to 1000000"),
        ({"speedup": [2]}, "--speedup: Input should be a valid number"),
        ({"ratio": 10**400}, "--ratio: Input should be a valid number"),
        ({"memory_budget": 10**5000}, "--memory-budget: Value error, is an integer of 16610 bits"),
        ({"memory_budget": "9" * 5000}, "--memory-budget: Value error, is no amount of memory"),
        ({"rounds": 10**9}, "--rounds: Input should be less than or equal to 10000"),
        ({"workers": "9" * 30}, "--workers: Value error, must be a number above zero"),
        ({"batch": f"1:1:{10**9}"}, "--batch: Input should be less than or equal to 1048576"),
        ({"store": "a\0b"}, "--store: Value error, holds a NUL"),
        ({"exclude": ("a\0b",)}, "--exclude: Value error, holds a NUL"),
        ({"output": f"a/{LONG}/b"}, "is a name of 300 bytes; file systems take 255"),
        ({"checkpoint": "é" * 128}, "is a name of 256 bytes; file systems take 255"),
        ({"data": LONG}, "--data: Value error, xxx"),
        ({"model": LONG}, "--model: Value error, is a name of 300 letters; 200 are the most"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_settings_that_are_beyond_all_bounds(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as err:
        load_config(**({"model": "demo-resnet"} | given))
    assert words in str(err.value)
    assert len(str(err.value)) < 1000


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"std": (1e-300, 1, 1)}, "no pixels in [0, 1] are of such a scale"),
        ({"std": (1e30, 1, 1)}, "no pixels in [0, 1] are of such a scale"),
        ({"mean": (-1e30, 0, 0)}, "no pixels in [0, 1] are of such a scale"),
        ({"input_size": (3, 99_999, 99_999)}, "values an image; 134,217,728 are the most"),
    ],
)
def test_preprocessing_that_float32_cannot_hold(given: dict[str, Any], words: str) -> None:
    usual = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.25,) * 3}
    with pytest.raises(UsageError) as err:
        load_model(ModelConfig(model="small_models:small", **(usual | given)))
    assert words in str(err.value)


@pytest.mark.parametrize("command_", [
    ("inspect", LONG), ("check", LONG, "--budget", "b.toml"), ("bench", LONG), ("engine", LONG),
    ("explain", LONG), ("compare", LONG, "b"), ("history", "show", LONG),
    ("build", "demo-resnet", "--config", LONG),
])  # fmt: skip
def test_long_names_on_every_command(
    command: Callable[..., Ran], command_: tuple[str, ...]
) -> None:
    done = command(*command_)
    assert done.code == 2
    assert "is a name of 300 bytes; file systems take 255" in done.err


@pytest.mark.parametrize("command_", [
    ("compare", "a", "b", "--min-effect", "inf"), ("compare", "a", "b", "--max-drop", "nan"),
    ("bench", "a", "--batch", "inf"), ("bench", "a", "--for", "9" * 400),
    ("sweep", "demo-resnet", "--ratios", "nan,0.5"), ("sweep", "demo-resnet", "--speedups", "inf"),
])  # fmt: skip
def test_numbers_that_are_not_finite_on_every_command(
    command: Callable[..., Ran], command_: tuple[str, ...]
) -> None:
    done = command(*command_)
    assert done.code == 2
    assert "Traceback" not in done.err


# --- checkpoints and graphs ----------------------------------------------------------------------

W = torch.ones(8, 8)
TENSORS: dict[str, tuple[Callable[[], Any], str]] = {
    "sparse": (W.to_sparse, "is sparse"),
    "sparse by rows": (W.to_sparse_csr, "is sparse"),
    "float8": (lambda: W.to(torch.float8_e4m3fn), "is of type float8_e4m3fn"),
    "float8 of exponents": (lambda: W.to(torch.float8_e8m0fnu), "is of type float8_e8m0fnu"),
    "without values": (lambda: W.to("meta"), "is without values (on the device meta)"),
    "quantised": (lambda: torch.quantize_per_tensor(W, 0.1, 0, torch.qint8), "is quantised"),
    "nested": (lambda: torch.nested.nested_tensor([W[0], W[0, :3]]), "is nested"),
    "repeated": (lambda: torch.ones(1).expand(10**12), "more than the file holds"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_are_no_plain_numbers(tmp_path: Path, kind: str) -> None:
    tensor, words = TENSORS[kind]
    torch.save({"fine": W, "odd": tensor()}, tmp_path / "c.pt")
    with pytest.raises(UsageError) as err:
        read_checkpoint(tmp_path / "c.pt")
    assert words in str(err.value)
    assert "the tensor odd" in str(err.value)
    assert "fix: save the state_dict of the network in float32" in str(err.value)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool, torch.int8])
def test_numbers_of_another_kind_are_not_converted(tmp_path: Path, dtype: torch.dtype) -> None:
    state = small_models.small().state_dict()
    torch.save(state | {"conv1.weight": state["conv1.weight"].to(dtype)}, tmp_path / "c.pt")
    config = ModelConfig(
        model="small_models:small", input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.25,) * 3,
        checkpoint=tmp_path / "c.pt",
    )  # fmt: skip
    words = rf"\({str(dtype)[6:]} for float32\): conv1.weight"
    with pytest.raises(UsageError, match=words):
        load_model(config)


def test_a_checkpoint_that_holds_itself(tmp_path: Path) -> None:
    file, state = tmp_path / "c.pt", {"a.weight": W}
    for name in ("self", ""):
        around: dict[str, Any] = {"epoch": 3, "loss": 0.5, "state_dict": state}
        around[name] = around
        torch.save(around, file)
        assert read_checkpoint(file).keys() == state.keys()
    lists: list[Any] = []
    lists.append(lists)
    torch.save({"lists": lists}, file)
    with pytest.raises(UsageError, match="holds no weights: a dict with lists"):
        read_checkpoint(file)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "pickled", [b"cos\n%s\n." % (b"a" * MIB), b"X\x00\x00\x10\x00%s)R." % (b"a" * MIB)],
    ids=["name", "text that is called"],
)  # fmt: skip
def test_torch_is_spared_a_text_that_takes_it_hours_to_complain_of(
    tmp_path: Path, pickled: bytes, zipped: bool
) -> None:
    file = tmp_path / "c.pt"
    file.write_bytes(b"\x80\x02" + pickled)
    if zipped:
        with zipfile.ZipFile(file, "w") as made:
            made.writestr("c/data.pkl", b"\x80\x02" + pickled)
            made.writestr("c/version", b"3\n")
    with pytest.raises(UsageError, match="more than 16,384 letters without a blank"):
        read_checkpoint(file)


def test_a_checkpoint_that_claims_more_than_it_has(tmp_path: Path) -> None:
    """A thousandth of its size in zeros packs it; what torch saves is not packed."""
    whole, packed = io.BytesIO(), tmp_path / "c.pt"
    torch.save({"a": torch.zeros(MIB)}, whole)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(UsageError, match=r"claims 4,\d+,\d+ bytes of tensors in \d"):
        read_checkpoint(packed)
    header = b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'
    for content in (len(header).to_bytes(8, "little") + header, (1 << 60).to_bytes(8, "little")):
        (tmp_path / "c.safetensors").write_bytes(content + b"{")
        with pytest.raises(UsageError, match="is not a whole safetensors file"):
            read_checkpoint(tmp_path / "c.safetensors")


def test_a_json_file_that_is_nested_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "c.pt").write_text("[" * 16_000)
    with pytest.raises(UsageError, match="is a JSON file, not the weights"):
        read_checkpoint(tmp_path / "c.pt")


def graph(kind: int = 1, *, sequence: bool = False) -> bytes:
    """One ReLU; ``kind`` is the type of its values."""
    from onnx import helper

    given, made = (
        helper.make_tensor_value_info(name, kind, ["batch", 3, 4, 4]) for name in ("in", "out")
    )
    if sequence:
        given = helper.make_tensor_sequence_value_info("in", 1, [1])
    node = helper.make_node("Relu", ["in"], ["out"])
    content: bytes = helper.make_model(
        helper.make_graph([node], "g", [given], [made])
    ).SerializeToString()
    return content


GRAPHS = {
    "a type that is none": (lambda: graph(99), "'in' is a tensor_type of type 99"),
    "a sequence": (lambda: graph(sequence=True), "'in' is a sequence_type"),
    "a name that is no text": (
        lambda: graph().replace(b"\x02in", b"\x02\xff\xfe"), "is no UTF-8",
    ),
    "a dimension that is no text": (
        lambda: graph().replace(b"batch", b"b\xff\xfech"), "is no UTF-8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", GRAPHS)
def test_graphs_that_are_made_to_harm(tmp_path: Path, kind: str) -> None:
    content, words = GRAPHS[kind]
    (tmp_path / "m.onnx").write_bytes(content())
    with pytest.raises(ArtifactError, match=r"m\.onnx is not valid ONNX") as err:
        describe_onnx(tmp_path / "m.onnx")
    assert words in str(err.value)


# --- code of the user's --------------------------------------------------------------------------

OWN = """
import asyncio
import sys
from torch import nn

def leaves():
    sys.exit()

def cancelled():
    raise asyncio.CancelledError

class Leaving(nn.Module):
    def forward(self, x):
        raise SystemExit(0)

def metric(outputs, labels):
    raise GeneratorExit
"""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sys:exit", r"sys:exit\(\) raised SystemExit"),
        ("own_that_leave:leaves", r"leaves\(\) raised SystemExit: .*own_that_leave\.py:7"),
        ("own_that_leave:cancelled", r"cancelled\(\) raised CancelledError"),
        ("own_that_leave:Leaving", "does not take an image of --input-size .*: SystemExit"),
        ("own_that_leaves_at_once:f", "own_that_leaves_at_once does not import: SystemExit"),
    ],
)
def test_code_of_the_user_that_leaves_the_program(
    command: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str,
    words: str,
) -> None:  # fmt: skip
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_that_leave.py").write_text(OWN)
    (tmp_path / "own_that_leaves_at_once.py").write_text("raise SystemExit(0)")
    with pytest.raises(UsageError, match=words):
        load_model(
            ModelConfig(model=name, input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.25,) * 3)
        )
    done = command("prune", name, *small_models.FLAGS, "-o", tmp_path / "out")
    assert done.code == 2
    assert "SystemExit" in done.err or "CancelledError" in done.err
    assert not (tmp_path / "out").exists()


def test_a_metric_that_leaves_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "metric_that_leaves.py").write_text("import sys\nsys.exit(0)")
    with pytest.raises(UsageError, match="metric_that_leaves does not import: SystemExit"):
        load_metric("metric_that_leaves:f")


def test_ctrl_c_in_code_of_the_user_is_still_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_interrupted.py").write_text("def f(): raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        load_model(
            ModelConfig(
                model="own_interrupted:f", input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.25,) * 3
            )
        )


# --- images without content ----------------------------------------------------------------------


def test_calibration_images_that_are_all_alike_are_refused_first(
    command: Callable[..., Ran], tmp_path: Path
) -> None:
    images = np.full((60, 16, 16, 3), 127, np.uint8)
    np.savez_compressed(tmp_path / "d.npz", images=images, labels=np.arange(60) % 5)
    done = command(
        "prune", "small_models:small", *small_models.FLAGS, "--data", tmp_path / "d.npz",
        "--calibration-samples", 30, "--validation-samples", 30, "--allow-overlap",
        "--allow-chance", "-o", tmp_path / "out",
    )  # fmt: skip
    assert done.code == 2
    assert "has 30 images, all alike: nothing that a unit does shows on them" in done.err
    assert "fix: pass photos of what the network is for" in done.err
    assert not (tmp_path / "out").exists()


def test_photos_without_labels_that_are_all_alike_are_refused_too(tmp_path: Path) -> None:
    for at in range(6):
        Image.new("RGB", (20, 20), (9, 9, 9)).save(tmp_path / f"{at}.png")
    config = DataConfig(
        calibration_data=str(tmp_path), calibration_samples=3, validation_samples=3,
        allow_overlap=True,
    )  # fmt: skip
    with pytest.raises(UsageError, match="has 3 images, all alike"):
        load_samples(config, model=SPEC, seed=0, progress=Silent())


def test_images_in_memory_that_are_all_alike_are_refused_too() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    images, labels = torch.zeros(12, 3, 8, 8), torch.arange(12) % 4
    with pytest.raises(UsageError, match="that was passed has 12 images, all alike"):
        calibration_from(
            (images, labels), module, model=ModelConfig(model="mine"), config=DataConfig(), seed=0,
            progress=Silent(),
        )  # fmt: skip
