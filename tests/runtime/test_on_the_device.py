"""What a device has: the build's pixels without the build's packages, on Python 3.10 too."""

from __future__ import annotations

import ast
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up_bundle import reseal
from PIL import Image
from small_bundle import model_spec, picture, write_bundle

import cswap_deploy
from cswap_deploy.config import DataConfig
from cswap_deploy.data import load_samples
from cswap_deploy.progress import Silent
from cswap_deploy.records.model import Preprocessing
from cswap_deploy.runtime.bundle import Transform
from cswap_deploy.runtime.classifier import Classifier
from cswap_deploy.runtime.preprocess import normalise

pytest.importorskip("onnxruntime")
PACKAGE = Path(cswap_deploy.__file__).parent
SOURCES = [*sorted((PACKAGE / "runtime").glob("*.py")), PACKAGE / "errors.py"]

# --- the build's pixels --------------------------------------------------------------------------

SIZES = [(24, 20), (16, 16), (18, 18), (19, 37), (301, 7), (15, 16), (5, 5), (18, 200), (333, 334)]


def save_every_kind(folder: Path) -> int:
    """Pictures of every mode, format and awkward size, in two class folders."""
    count = 0

    def put(image: Image.Image, suffix: str, **how: Any) -> None:
        nonlocal count
        place = folder / str(count % 2)
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{count:03}.{suffix}", **how)
        count += 1

    for seed, size in enumerate(SIZES):
        put(picture(seed, size), "png")
        put(picture(100 + seed, size, "L"), "png")
    for seed, mode in enumerate(("RGBA", "LA", "P", "1", "L"), start=200):
        put(picture(seed, (31, 22), mode), "png")
    put(picture(300, (31, 22), "CMYK"), "jpg", quality=90)
    put(picture(301, (31, 22), "CMYK"), "tif")
    put(picture(302, (31, 22)), "jpg", quality=40)
    put(picture(303, (31, 22)), "webp", lossless=True)
    put(picture(304, (31, 22), "P"), "gif", transparency=3)
    put(picture(305, (31, 22), "P"), "png", transparency=7)
    put(picture(306, (31, 22), "L"), "pgm")
    deep = np.random.default_rng(9).integers(0, 65536, (2, 22, 31)).astype(np.uint16)
    put(Image.fromarray(deep[0]), "png")
    put(Image.fromarray(deep[1]), "tif")
    turned = Image.Exif()
    turned[0x0112] = 6  # "rotate me"
    put(picture(307, (31, 22)), "jpg", exif=turned)
    return count


@pytest.fixture(scope="session")
def every_kind(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    folder = tmp_path_factory.mktemp("every-kind")
    return folder, save_every_kind(folder)


@pytest.mark.parametrize(
    ("channels", "filter", "height"),
    [(3, "bicubic", 16), (1, "bilinear", 16), (3, "bilinear", 24), (1, "bicubic", 24),
     (3, "nearest", 16), (1, "nearest", 24)],
)  # fmt: skip
def test_pixels_are_those_of_the_build(
    every_kind: tuple[Path, int], tmp_path: Path, channels: int, filter: str, height: int
) -> None:
    """The same files through ``--data DIR`` of a build and through the bundle on the device."""
    folder, count = every_kind
    pre = Preprocessing(
        input_size=(channels, height, 16), mean=(0.485, 0.456, 0.406)[:channels],
        std=(0.229, 0.224, 0.225)[:channels], resize_shorter=18, interpolation=filter,  # type: ignore[arg-type]
    )  # fmt: skip
    model = model_spec().model_copy(update={"preprocessing": pre})
    data = DataConfig(
        data=str(folder), calibration_samples=count // 2, validation_samples=count - count // 2
    )
    samples = load_samples(data, model=model, seed=3, progress=Silent())
    built = [*samples.calibration.images, *samples.validation.images]
    bundle = write_bundle(tmp_path / "bundle")
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["model"]["preprocessing"] = pre.model_dump(mode="json")
    reseal(bundle / "manifest.json", manifest)
    classifier = Classifier.open(bundle, target="onnxruntime", threads=1)
    device = [classifier.prepare(path) for path in sorted(folder.rglob("*.*"))]
    assert len(built) == len(device) == count
    assert sorted(image.tobytes() for image in built) == sorted(i.tobytes() for i in device)
    assert len({image.tobytes() for image in device}) == count
    both = np.stack(samples.calibration.images)
    steps = classifier.bundle.transform
    assert isinstance(steps, Transform)
    np.testing.assert_array_equal(
        normalise(both, steps), normalise(samples.calibration.images, pre)
    )


# --- without the build's packages ----------------------------------------------------------------

WITHOUT = """
import json, sys

def tops():
    return {name.partition(".")[0] for name in sys.modules}

before = tops()

class Absent:
    names = set(sys.argv[1].split(","))

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from cswap_deploy.runtime.cli import main

code = main(sys.argv[2:])
print(json.dumps(sorted(tops() - before - sys.stdlib_module_names)), file=sys.stderr)
sys.exit(code)
"""
ABSENT = (
    "torch,torchvision,timm,onnx,onnxscript,safetensors,pydantic,typer,rich,scipy,"
    "matplotlib,platformdirs,filelock,psutil,jinja2,datasets,tensorrt,tensorrt_rtx,pycuda"
)


def test_it_classifies_with_numpy_pillow_and_onnxruntime_alone(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    for seed in range(3):
        picture(seed).save(tmp_path / f"{seed}.png")
    files = [str(tmp_path / f"{seed}.png") for seed in range(3)]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, ABSENT, bundle, *files, "--json", "--batch", "2"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    expected = Classifier.open(bundle, threads=1).predict(files)
    for image, guesses in zip(told["images"], expected, strict=True):
        assert [guess["class"] for guess in image["top"]] == [guess.index for guess in guesses]
    imported = json.loads(done.stderr.splitlines()[-1])
    public = {name for name in imported if not name.startswith("_")}
    assert public == {"cswap_deploy", "numpy", "PIL", "onnxruntime"}


@pytest.mark.parametrize("absent", ["numpy", "PIL", "onnxruntime"])
def test_what_is_missing_is_named(tmp_path: Path, absent: str) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    picture(0).save(tmp_path / "a.png")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, absent, bundle, tmp_path / "a.png"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    words = {
        "numpy": "error: No module named 'numpy'\n  fix: pip install numpy pillow\n",
        "PIL": "error: No module named 'PIL'\n  fix: pip install numpy pillow\n",
        "onnxruntime": "error: onnxruntime is not installed\n  fix: pip install onnxruntime\n",
    }
    assert done.stderr.startswith(words[absent])


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    modules = ("bundle", "classifier", "cli", "host", "tensorrt_session")
    code = (
        f"import sys, {', '.join(f'cswap_deploy.runtime.{module}' for module in modules)};"
        "print(*(n for n in ('torch', 'onnxruntime', 'tensorrt', 'pydantic') if n in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == ""


# --- Python 3.10, which JetPack 6 has ------------------------------------------------------------

LATER = {
    "tomllib", "typing.Self", "typing.Never", "typing.LiteralString", "typing.assert_never",
    "typing.assert_type", "typing.reveal_type", "typing.override", "typing.Required",
    "typing.NotRequired", "typing.Unpack", "typing.TypeVarTuple", "typing.TypeAliasType",
    "typing.dataclass_transform", "typing.get_overloads", "enum.StrEnum", "enum.ReprEnum",
    "enum.verify", "enum.member", "enum.nonmember", "datetime.UTC", "hashlib.file_digest",
    "contextlib.chdir", "itertools.batched", "asyncio.timeout", "asyncio.TaskGroup",
    "asyncio.Runner", "math.cbrt", "math.exp2", "operator.call", "logging.getLevelNamesMapping",
    "collections.abc.Buffer", "calendar.Month", "copy.replace", "sys.exception",
    "warnings.deprecated", "shutil.ignore_errors", "threading.setprofile_all_threads",
}  # fmt: skip
"""What the standard library has gained in 3.11 and later, as far as such code is tempted by it."""
LATER_BUILT_IN = {"ExceptionGroup", "BaseExceptionGroup", "PythonFinalizationError"}
LATER_METHODS = {"walk", "add_note", "file_digest", "is_junction", "full_match", "from_uri"}
"""Of paths, exceptions and others."""


def standard_names(source: Path) -> set[str]:
    """``module.name`` of everything that a file takes from the standard library."""
    tree = ast.parse(source.read_text(), feature_version=(3, 10))
    modules: dict[str, str] = {}
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                modules[alias.asname or alias.name.partition(".")[0]] = alias.name
                found.add(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.add(f"{modules.get(node.value.id, '?')}.{node.attr}")
        elif isinstance(node, ast.Name):
            found.add(f"builtins.{node.id}")
    return {
        name for name in found
        if name.partition(".")[0] in sys.stdlib_module_names | {"?"} - {"__future__"}
    }  # fmt: skip


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_source_is_that_of_python_3_10(source: Path) -> None:
    found = standard_names(source)  # refuses later syntax
    assert not found & LATER
    assert not {f"builtins.{name}" for name in LATER_BUILT_IN} & found
    assert not {f"?.{name}" for name in LATER_METHODS} & found
    later_types = "from __future__ import annotations" in source.read_text()
    assert later_types or source.stem == "__init__"


@functools.cache
def python_3_10() -> str:
    """One that runs; empty where there is none."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = [shutil.which("python3.10"), *sorted(root.glob("versions/3.10.*/bin/python3.10"))]
    for path in filter(None, found):
        if subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode == 0:
            return str(path)
    return ""


RESOLVE = """
import builtins, importlib, json, sys
from unittest.mock import MagicMock

for name in ("numpy", "numpy.typing", "PIL", "PIL.Image"):
    sys.modules[name] = MagicMock(name=name)
sys.modules["PIL"].Image.Image = type("Image", (), {})
sys.modules["PIL"].Image.DecompressionBombError = type("DecompressionBombError", (Exception,), {})
names, folder, modules = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3:]
absent = []
for name in names:
    module, _, attribute = name.rpartition(".")
    try:
        importlib.import_module(name)
    except ImportError:
        try:
            getattr(importlib.import_module(module), attribute)
        except (AttributeError, ImportError, ValueError):
            absent.append(name)
sys.path.insert(0, folder)
for module in modules:
    importlib.import_module(module)
from cswap_deploy.runtime.cli import main
try:
    main(["--help"])
except SystemExit as stop:
    assert stop.code == 0
print(json.dumps(absent))
"""


def test_a_real_python_3_10_imports_it_and_knows_the_names() -> None:
    """With NumPy and Pillow made up: that interpreter may have none."""
    python = python_3_10()
    if not python:
        pytest.skip("no Python 3.10 runs here")
    names = sorted(
        name
        for source in SOURCES
        for name in standard_names(source)
        if not name.startswith(("?", "builtins"))
    )
    modules = [
        ".".join(("cswap_deploy", *source.relative_to(PACKAGE).with_suffix("").parts))
        for source in SOURCES
        if source.stem != "__init__"
    ]
    done = subprocess.run(
        [python, "-c", RESOLVE, json.dumps(names), str(PACKAGE.parent), *modules],
        capture_output=True, text=True, timeout=60, check=False,
        env={"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
    assert "usage: cswap-run" in done.stdout
