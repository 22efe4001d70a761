"""The C++ example runs bundles, and refuses what it must not run.

It is built with a stand-in for TensorRT and CUDA (``nvinfer_stand_in``) and run; and compiled with
NVIDIA's own headers and linked with the real TensorRT for RTX, where those are installed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from made_up_bundle import made_up_manifest
from numpy.typing import NDArray

from cswap_deploy.records.engine import EngineArtifact
from cswap_deploy.records.manifest import TargetResult
from cswap_deploy.records.model import Preprocessing
from cswap_deploy.records.value import sha256_file
from cswap_deploy.runtime.preprocess import normalise

STAND_IN = Path(__file__).parent / "nvinfer_stand_in"
SOURCE = Path(__file__).parents[2] / "kernels" / "cswap_run"
STRICT = ("-O0", "-Wall", "-Wextra", "-Wpedantic", "-Werror")
SHAPE = (3, 4, 6)
CLASSES = 7
NAMES = ("cat", "dog", "owl", "carp", "newt")
VERSION = "10.14.1.48"
GPU = "Stand-in GPU"
PRE = Preprocessing(
    input_size=SHAPE, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), resize_shorter=5
)


# --- what is installed ---------------------------------------------------------------------------


def compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "")) or shutil.which("c++") or shutil.which("g++")
    if found is None:
        pytest.skip("no C++ compiler (c++, g++ or $CXX)")
    return found


def package_folder(name: str) -> Path | None:
    """Where an installed package lies; it is not imported."""
    spec = find_spec(name)
    places = spec.submodule_search_locations if spec else None
    return Path(next(iter(places))) if places else None


def first_with(file: str, *folders: Path | None) -> Path | None:
    return next((folder for folder in folders if folder and (folder / file).is_file()), None)


def json_headers() -> Path:
    package = package_folder("nlohmann_json")
    found = first_with(
        "nlohmann/json.hpp",
        package and package / "include",
        Path("/usr/local/include"),
        Path("/usr/include"),
    )
    if found is None:
        pytest.skip("no nlohmann/json.hpp (pip install nlohmann-json, or nlohmann-json3-dev)")
    return found


def openssl_headers() -> None:
    probe = [compiler(), "-E", "-x", "c++", "-include", "openssl/evp.h", os.devnull]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("no openssl/evp.h (libssl-dev)")


def tensorrt_headers() -> Path:
    """NVIDIA's own: of an unpacked SDK, or as the package kernel-lens carries them."""
    sdk, package = os.environ.get("TENSORRT_ROOT"), package_folder("kernel_lens")
    found = first_with(
        "NvInfer.h",
        Path(sdk, "include") if sdk else None,
        package and package / "include" / "tensorrt",
    )
    if found is None:
        pytest.skip("no NvInfer.h (pip install --no-deps kernel-lens, or $TENSORRT_ROOT)")
    return found


def cuda_headers() -> Path:
    home, nvcc, package = (
        os.environ.get("CUDA_HOME"),
        shutil.which("nvcc"),
        package_folder("nvidia"),
    )
    found = first_with(
        "crt/host_defines.h",
        Path(home, "include") if home else None,
        package and package / "cu13" / "include",
        Path(nvcc).resolve().parents[1] / "include" if nvcc else None,
        Path("/usr/local/cuda/include"),
    )
    if found is None or not (found / "cuda_runtime_api.h").is_file():
        pytest.skip("no cuda_runtime_api.h (pip install nvidia-cuda-runtime nvidia-cuda-crt)")
    return found


def shared_library(name: str, *folders: Path | None) -> Path:
    for folder in folders:
        found = sorted(folder.glob(f"{name}.so*")) if folder else []
        if found:
            return found[0]
    pytest.skip(f"no {name}.so")


# --- building ------------------------------------------------------------------------------------


def run(*command: str | Path) -> str:
    ran = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, timeout=120
    )
    assert ran.returncode == 0, f"{command}\n{ran.stdout}{ran.stderr}"
    return ran.stdout + ran.stderr


def build(folder: Path, **paths: Path) -> None:
    """What the example's README.md says, with every library named."""
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("no cmake")
    openssl_headers()
    places = {"NLOHMANN_JSON_INCLUDE_DIR": json_headers(), **paths}
    run(
        cmake,
        *("-S", SOURCE, "-B", folder, "-DCMAKE_BUILD_TYPE=None"),
        f"-DCMAKE_CXX_COMPILER={compiler()}",
        f"-DCMAKE_CXX_FLAGS={' '.join(STRICT)}",
        *(f"-D{name}={path}" for name, path in places.items()),
    )
    run(cmake, "--build", folder)


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], Any]], Path]:
    """A folder that one of all test processes fills."""

    def once(name: str, fill: Callable[[Path], Any]) -> Path:
        root = tmp_path_factory.getbasetemp()
        root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
        folder, done = root / name, root / f"{name}.done"
        with FileLock(root / f"{name}.lock"):
            if not done.exists():
                folder.mkdir(exist_ok=True)
                fill(folder)
                done.touch()
        return folder

    return once


@pytest.fixture(scope="session")
def stand_in_program(once: Callable[..., Path]) -> Path:
    def fill(folder: Path) -> None:
        library = folder / "libnvinfer.so"
        sources = ("-shared", "-fPIC", STAND_IN / "stand_in.cpp", "-o", library)
        run(compiler(), "-std=c++17", *STRICT, *sources)
        build(
            folder / "build",
            TENSORRT_INCLUDE_DIR=STAND_IN,
            TENSORRT_LIBRARY=library,
            CUDART_INCLUDE_DIR=STAND_IN,
            CUDART_LIBRARY=library,
        )

    return once("stand_in", fill) / "build" / "cswap_run"


# --- running -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ran:
    code: int
    out: str
    err: str
    calls: tuple[str, ...]
    """What reached the stand-in, in order."""

    def top(self) -> dict[str, list[tuple[float, int, str]]]:
        """Input -> (probability, class, name) from the most probable on."""
        found: dict[str, list[tuple[float, int, str]]] = {}
        name = ""
        for line in self.out.splitlines():
            row = re.fullmatch(r" +([\d.]+) % +(\d+)  (.*)", line)
            if row:
                found[name].append((float(row[1]) / 100, int(row[2]), row[3]))
            else:
                name = line
                found[name] = []
        return found


Runner = Callable[..., Ran]


@pytest.fixture
def cswap_run(stand_in_program: Path, tmp_path: Path) -> Runner:
    def cswap_run(*arguments: str | Path, **machine: str) -> Ran:
        log = tmp_path / "calls.log"
        log.unlink(missing_ok=True)
        play = {f"STAND_IN_{name.upper()}": value for name, value in machine.items()}
        ran = subprocess.run(
            [stand_in_program, *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            cwd=tmp_path,
            env=os.environ | play | {"STAND_IN_LOG": str(log)},
        )
        calls = tuple(log.read_text().splitlines())
        assert calls[-1] == "never released: 0"
        return Ran(ran.returncode, ran.stdout, ran.stderr, calls[:-1])

    return cswap_run


def write_bundle(folder: Path, target: str = "tensorrt", **changes: Any) -> Path:
    """A bundle whose engine is the stand-in's text."""
    path = Path("engine", target, "model.plan")
    (folder / path).parent.mkdir(parents=True)
    (folder / path).write_text(f"stand-in {' '.join(map(str, SHAPE))} {CLASSES} 4")
    fields: dict[str, Any] = {
        "target": target,
        "path": path,
        "sha256": sha256_file(folder / path),
        "size_bytes": (folder / path).stat().st_size,
        "build_seconds": 1.0,
        "precision": "fp32",
        "runnable": True,
        "versions": {target: VERSION},
        "device": f"{GPU} (driver 580.95.05, 81559 MiB)",
    }
    manifest = made_up_manifest()
    other = manifest.targets[0]
    engine = TargetResult(engine=EngineArtifact(**(fields | changes)))
    model = manifest.model.model_copy(
        update={"preprocessing": PRE, "num_classes": CLASSES, "class_names": NAMES}
    )
    manifest = manifest.model_copy(update={"model": model, "targets": (other, engine)})
    (folder / "manifest.json").write_text(manifest.canonical_json())
    return folder


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


def pixels(seed: int, shape: tuple[int, ...] = (*SHAPE[1:], SHAPE[0])) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_ppm(path: Path, picture: NDArray[np.uint8], header: str | None = None) -> Path:
    magic = "P6" if picture.shape[2] == 3 else "P5"
    header = header or f"{magic}\n{picture.shape[1]} {picture.shape[0]}\n255\n"
    path.write_bytes(header.encode() + picture.tobytes())
    return path


def outputs(inputs: NDArray[np.float32]) -> NDArray[np.float64]:
    """(N, classes): the stand-in's linear function."""
    k, i = np.meshgrid(np.arange(CLASSES), np.arange(np.prod(SHAPE)), indexing="ij")
    weight = ((31 * k + 7 * i + k * i) % 11 - 5) / 16
    return inputs.reshape(len(inputs), -1).astype(np.float64) @ weight.T


def expected(inputs: NDArray[np.float32]) -> NDArray[np.float64]:
    """(N, classes) probabilities of logits."""
    logits = outputs(inputs)
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def agree(top: list[tuple[float, int, str]], p: NDArray[np.float64]) -> None:
    order = np.argsort(-p, kind="stable")[: len(top)]
    assert [index for _, index, _ in top] == order.tolist()
    assert [value for value, _, _ in top] == pytest.approx(p[order], abs=1e-6)
    assert [name for _, _, name in top] == [NAMES[i] if i < len(NAMES) else "" for i in order]


# --- answers -------------------------------------------------------------------------------------


def test_a_picture_is_normalised_and_classified(
    cswap_run: Runner, bundle: Path, tmp_path: Path
) -> None:
    picture = pixels(0)
    ran = cswap_run(bundle, write_ppm(tmp_path / "a.ppm", picture), "--top", "3")
    assert (ran.code, ran.err) == (0, "")
    (top,) = ran.top().values()
    assert len(top) == 3
    agree(top, expected(normalise(picture[None], PRE))[0])
    assert ran.calls == (f"deserialize {len('stand-in 3 4 6 7 4')} bytes", "enqueue batch 1")


def test_a_network_that_gives_probabilities_gets_no_second_softmax(
    cswap_run: Runner, bundle: Path, tmp_path: Path
) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["model"]["output_kind"] = "probabilities"
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    np.save(tmp_path / "a.npy", np.random.default_rng(3).random((1, *SHAPE), dtype=np.float32))
    ran = cswap_run(bundle, "a.npy", "--top", "2")
    assert ran.code == 0, ran.err
    (top,) = ran.top().values()
    agree(top, outputs(np.load(tmp_path / "a.npy"))[0])


def test_all_inputs_are_one_batch(cswap_run: Runner, bundle: Path, tmp_path: Path) -> None:
    colour, grey = pixels(1), pixels(2, (*SHAPE[1:], 1))
    tensors = np.random.default_rng(3).standard_normal((2, *SHAPE)).astype(np.float32)
    write_ppm(tmp_path / "colour.ppm", colour, "P6 # made\n# by hand\n6\t4 #x\n255\n")
    write_ppm(tmp_path / "grey.pgm", grey)
    np.save(tmp_path / "two.npy", tensors)
    ran = cswap_run(bundle, "colour.ppm", "two.npy", "grey.pgm", "--top", "99")
    assert ran.code == 0, ran.err
    assert ran.calls[1:] == ("enqueue batch 4",)
    top = ran.top()
    assert list(top) == ["colour.ppm", "two.npy[0]", "two.npy[1]", "grey.pgm"]
    pictures = normalise(np.stack([colour, np.repeat(grey, 3, axis=2)]), PRE)
    p = expected(np.concatenate([pictures[:1], tensors, pictures[1:]]))
    for rows, of in zip(top.values(), p, strict=True):
        assert len(rows) == CLASSES
        agree(rows, of)


def test_a_single_tensor_and_an_npy_of_version_2(
    cswap_run: Runner, bundle: Path, tmp_path: Path
) -> None:
    tensor = np.random.default_rng(4).standard_normal(SHAPE).astype(np.float32)
    with (tmp_path / "one.npy").open("wb") as file:
        np.lib.format.write_array(file, tensor, version=(2, 0))
    ran = cswap_run(bundle, "one.npy")
    assert list(ran.top()) == ["one.npy"]
    agree(ran.top()["one.npy"], expected(tensor[None])[0])


def test_a_graph_gives_the_same_answers(cswap_run: Runner, bundle: Path, tmp_path: Path) -> None:
    write_ppm(tmp_path / "a.ppm", pixels(5))
    plain = cswap_run(bundle, "a.ppm")
    graph = cswap_run(bundle, "a.ppm", "--graph", "--repeat", "3")
    assert graph.code == 0, graph.err
    *answers, timing = graph.out.splitlines()
    assert answers == plain.out.splitlines()
    assert re.fullmatch(r"3 calls of batch 1, median [\d.]+ ms, copies included", timing)
    assert graph.calls[1:] == ("enqueue batch 1",) * 2 + ("launch graph",) * 4


def test_help(cswap_run: Runner) -> None:
    ran = cswap_run("--help")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("usage: cswap_run BUNDLE INPUT...")


# --- refusals: the bundle ------------------------------------------------------------------------


def refused(ran: Ran, code: int, *words: str) -> None:
    """Ended with the code, in these words, before anything was deserialised."""
    assert (ran.code, ran.out, ran.calls) == (code, "", ()), ran
    assert ran.err.startswith("error: ")
    for word in words:
        assert word in ran.err


def test_an_altered_engine_is_never_deserialised(
    cswap_run: Runner, bundle: Path, tmp_path: Path
) -> None:
    engine = bundle / "engine" / "tensorrt" / "model.plan"
    altered = bytearray(engine.read_bytes())
    altered[-1] ^= 1
    engine.write_bytes(altered)
    write_ppm(tmp_path / "a.ppm", pixels(0))
    ran = cswap_run(bundle, "a.ppm")
    refused(ran, 6, "model.plan is not the file that manifest.json lists", "\n  fix: copy the")


@pytest.mark.parametrize("here", ["10.14.1.49", "10.13.1.48", "11.4.0.106"])
def test_another_version_of_tensorrt(
    cswap_run: Runner, bundle: Path, tmp_path: Path, here: str
) -> None:
    write_ppm(tmp_path / "a.ppm", pixels(0))
    ran = cswap_run(bundle, "a.ppm", version=here)
    refused(ran, 6, f"built with tensorrt {VERSION}, this program runs with {here}", "\n  fix: ")


def test_a_version_may_be_longer_or_shorter(cswap_run: Runner, tmp_path: Path) -> None:
    write_ppm(tmp_path / "a.ppm", pixels(0))
    codes = {}
    for version_ in ("10.14.1.48.post1", "10.14", "10.1", "10.14.1.4"):
        folder = write_bundle(tmp_path / version_, versions={"tensorrt": version_})
        codes[version_] = cswap_run(folder, "a.ppm").code
    assert codes == {"10.14.1.48.post1": 0, "10.14": 0, "10.1": 6, "10.14.1.4": 6}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"versions": {}}, "of an unknown version"),
        ({"stripped": True}, "the engine is without weights, which this program does not put back"),
        ({"path": "../model.plan"}, "an engine outside the bundle: ../model.plan"),
        ({"path": "/model.plan"}, "an engine outside the bundle: /model.plan"),
        ({"path": "engine/tensorrt/none.plan"}, "there is no file "),
        ({"target": "tensorrt-rtx"}, "no tensorrt engine; it has onnxruntime, tensorrt-rtx"),
    ],
)
def test_a_bundle_that_does_not_fit(
    cswap_run: Runner, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    write_ppm(tmp_path / "a.ppm", pixels(0))
    ran = cswap_run(write_bundle(tmp_path / "bundle", **changes), "a.ppm")
    refused(ran, 6, words)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            '"schema_version":5',
            '"schema_version":6',
            "schema version 6, this program reads 1 to 5",
        ),
        ('"input_size":[3,', '"input_size":[0,', "no sound input size, mean and std"),
        ('"sha256"', '"sha"', "manifest.json is damaged"),
        ("{", "", "manifest.json is damaged"),
    ],
)
def test_a_manifest_that_does_not_read(
    cswap_run: Runner, bundle: Path, tmp_path: Path, old: str, new: str, words: str
) -> None:
    manifest = bundle / "manifest.json"
    manifest.write_text(manifest.read_text().replace(old, new))
    refused(cswap_run(bundle, write_ppm(tmp_path / "a.ppm", pixels(0))), 6, words)


def test_a_network_that_does_not_classify(cswap_run: Runner, bundle: Path, tmp_path: Path) -> None:
    manifest = bundle / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"classify"', '"features"'))
    ran = cswap_run(bundle, write_ppm(tmp_path / "a.ppm", pixels(0)))
    refused(ran, 2, "the bundle is of task features, this program prints classes", "cswap-run with")


def test_a_folder_that_is_no_bundle(cswap_run: Runner, tmp_path: Path) -> None:
    refused(cswap_run(tmp_path, "a.ppm"), 6, "manifest.json", "\n  fix: name the folder that")


def test_fields_of_later_versions_are_ignored(
    cswap_run: Runner, bundle: Path, tmp_path: Path
) -> None:
    manifest = bundle / "manifest.json"
    text = manifest.read_text().replace('"precision":', '"later":{"x":[1]},"precision":')
    manifest.write_text(text.replace('"schema_version":5', '"later":1,"schema_version":5'))
    assert cswap_run(bundle, write_ppm(tmp_path / "a.ppm", pixels(0))).code == 0


# --- refusals: the device ------------------------------------------------------------------------


def test_no_device(cswap_run: Runner, bundle: Path, tmp_path: Path) -> None:
    ran = cswap_run(bundle, write_ppm(tmp_path / "a.ppm", pixels(0)), devices="0")
    refused(ran, 4, "no CUDA device: no CUDA-capable device is detected", "\n  fix: run this where")


def test_another_device(cswap_run: Runner, bundle: Path, tmp_path: Path) -> None:
    ran = cswap_run(bundle, write_ppm(tmp_path / "a.ppm", pixels(0)), gpu="Other GPU")
    refused(ran, 6, f"built for {GPU} (driver", "this is Other GPU", "\n  fix: build the bundle on")


def test_an_engine_that_does_not_load(cswap_run: Runner, bundle: Path, tmp_path: Path) -> None:
    engine, manifest = bundle / "engine" / "tensorrt" / "model.plan", bundle / "manifest.json"
    before = sha256_file(engine)
    engine.write_text("something else")
    manifest.write_text(manifest.read_text().replace(before, sha256_file(engine)))
    ran = cswap_run(bundle, write_ppm(tmp_path / "a.ppm", pixels(0)))
    assert ran.code == 6
    assert "model.plan does not load: this is no stand-in engine\n  fix: " in ran.err


def test_an_engine_of_other_shapes(cswap_run: Runner, bundle: Path, tmp_path: Path) -> None:
    engine, manifest = bundle / "engine" / "tensorrt" / "model.plan", bundle / "manifest.json"
    before = sha256_file(engine)
    engine.write_text("stand-in 3 6 4 7 4")
    manifest.write_text(manifest.read_text().replace(before, sha256_file(engine)))
    ran = cswap_run(bundle, write_ppm(tmp_path / "a.ppm", pixels(0)))
    assert (ran.code, ran.calls[1:]) == (6, ())
    assert "the engine's shapes are not those of manifest.json" in ran.err


# --- refusals: the inputs ------------------------------------------------------------------------


def test_a_picture_of_another_size(cswap_run: Runner, bundle: Path, tmp_path: Path) -> None:
    write_ppm(tmp_path / "wide.ppm", pixels(0, (4, 8, 3)))
    ran = cswap_run(bundle, "wide.ppm")
    refused(
        ran,
        2,
        "wide.ppm is 8 x 4 with 3 channels, the network takes 6 x 4 with 3 channels",
        "\n  fix: convert wide.ppm -resize '6x4^' -gravity center -extent 6x4 -depth 8 "
        "wide-6x4.ppm,",
        "cswap-run BUNDLE wide.ppm --save-input wide.npy",
    )
    told = json.loads((bundle / "manifest.json").read_text())
    told["model"]["preprocessing"]["exif_rotate"] = True
    (bundle / "manifest.json").write_text(json.dumps(told))
    refused(cswap_run(bundle, "wide.ppm"), 2, "fix: convert wide.ppm -auto-orient -resize '6x4^'")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xd8\xff\xe0 JFIF", "is neither a binary PPM, a binary PGM nor an .npy\n  fix: "),
        (b"", "is neither a binary PPM"),
        (b"P6 6 4 65535\n" + bytes(144), "its largest value is 65535, not 255\n  fix: convert "),
        (b"P6 6 4 255\n" + bytes(71), "ends before its last pixel"),
        (b"P6 6 4 255", "ends before its last pixel"),
        (b"P6 6 4", "is not an 8-bit picture"),
        (b"P6", "is not an 8-bit picture"),
        (b"P6 99999999999999999999 4 255\n", "is 0 x 4 with 3 channels"),
        (b"\x93NUMPY", "has dtype  and shape ()"),
        (b"\x93NUMPY\x01\x00\xff\xff{'descr': '<f4'", "has dtype <f4 and shape ()"),
    ],
)
def test_a_file_that_is_no_input(
    cswap_run: Runner, bundle: Path, tmp_path: Path, content: bytes, words: str
) -> None:
    (tmp_path / "input").write_bytes(content)
    refused(cswap_run(bundle, "input"), 2, words)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros(SHAPE, np.float64), "has dtype <f8 and shape (3, 4, 6)"),
        (np.zeros((1, *SHAPE), np.uint8), "has dtype |u1"),
        (
            np.zeros((4, 6, 3), np.float32),
            "shape (4, 6, 3); the network takes float32 (N, 3, 4, 6)",
        ),
        (np.zeros((13, 4, 6), np.float32), "shape (13, 4, 6)"),
        (np.zeros((2, 5, *SHAPE), np.float32), "shape (2, 5, 3, 4, 6)"),
        (np.zeros((0, *SHAPE), np.float32), "shape (0, 3, 4, 6)"),
        (np.asfortranarray(np.ones(SHAPE, np.float32)), "has dtype <f4, column-major"),
    ],
)
def test_an_npy_that_does_not_fit(
    cswap_run: Runner, bundle: Path, tmp_path: Path, array: NDArray[Any], words: str
) -> None:
    np.save(tmp_path / "x.npy", array)
    refused(cswap_run(bundle, "x.npy"), 2, words, "\n  fix: write float32", "--save-input x.npy")


def test_an_npy_that_ends_early(cswap_run: Runner, bundle: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((3, *SHAPE), np.float32))
    whole = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "x.npy").write_bytes(whole[:-1])
    refused(cswap_run(bundle, "x.npy"), 2, "x.npy ends before its last number")


def test_more_inputs_than_the_engine_takes(cswap_run: Runner, bundle: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((5, *SHAPE), np.float32))
    ran = cswap_run(bundle, "x.npy")
    assert (ran.code, ran.calls[1:]) == (2, ())
    assert "5 inputs; the engine takes batches of 1 to 4\n  fix: " in ran.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "a bundle and an input are needed"),
        (("bundle",), "a bundle and an input are needed"),
        (("bundle", "absent.ppm"), "there is no file absent.ppm"),
        (("bundle", "a.ppm", "--topk", "3"), "there is no flag --topk"),
        (("bundle", "a.ppm", "--top"), "--top takes a whole number above 0, not ''"),
        (("bundle", "a.ppm", "--repeat", "1e3"), "--repeat takes a whole number above 0"),
    ],
)
def test_arguments_that_do_not_fit(
    cswap_run: Runner, bundle: Path, arguments: tuple[str, ...], words: str
) -> None:
    refused(cswap_run(*arguments), 2, words)


# --- NVIDIA's own --------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def compiled(once: Callable[..., Path]) -> Path:
    """The example compiled with the headers of TensorRT and CUDA, not linked."""
    openssl_headers()
    folders = [tensorrt_headers(), cuda_headers(), json_headers()]
    system = [f"-isystem{folder}" for folder in folders if folder != Path("/usr/include")]

    def fill(folder: Path) -> None:
        source, made = SOURCE / "cswap_run.cpp", folder / "cswap_run.o"
        run(compiler(), "-std=c++17", *STRICT, *system, "-c", source, "-o", made)

    return once("compiled", fill) / "cswap_run.o"


def test_it_compiles_with_tensorrts_headers(compiled: Path) -> None:
    assert compiled.is_file()


def test_it_links_and_starts_with_a_library_of_nvidias(compiled: Path, tmp_path: Path) -> None:
    """TensorRT for RTX, which PyPI has, exports what TensorRT does.

    It says its version; without a GPU that is as far as it goes.
    """
    try:
        installed = version("tensorrt-rtx")
    except PackageNotFoundError:
        pytest.skip("no tensorrt-rtx")
    cuda = cuda_headers().parent
    libraries = [
        shared_library("libtensorrt_rtx", package_folder("tensorrt_rtx_libs")),
        shared_library("libcudart", cuda / "lib", cuda / "lib64"),
    ]
    program = tmp_path / "cswap_run"
    paths = [f"-Wl,-rpath,{library.parent}" for library in libraries]
    run(compiler(), compiled, *libraries, *paths, "-lcrypto", "-o", program)
    write_ppm(tmp_path / "a.ppm", pixels(0))

    def start(built_with: str) -> subprocess.CompletedProcess[str]:
        folder = write_bundle(tmp_path / built_with, versions={"tensorrt": built_with})
        return subprocess.run(
            [program, folder, tmp_path / "a.ppm"],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        )

    same, other = start(installed), start("0.9.0.1")
    assert same.returncode == 4, same.stderr
    assert "error: no CUDA device: " in same.stderr
    assert other.returncode == 6, other.stderr
    assert f"tensorrt 0.9.0.1, this program runs with {installed}" in other.stderr
