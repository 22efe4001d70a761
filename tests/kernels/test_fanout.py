"""What callers of ``fanout`` meet: refusals, dispatch, how the library is found and built."""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fanout_cases import LAYOUTS, Layout, make_case

from cswap_deploy.causal import fanout_library
from cswap_deploy.causal.fanout import (
    Activation,
    Epilogue,
    Fanout,
    fanout_backend,
    lay_out,
    masked_fanout,
    masked_fanout_reference,
)
from cswap_deploy.causal.fanout_library import SOURCES
from cswap_deploy.network.unfolding import Window


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"r": torch.zeros(3, 2, 1, 5, 5)}, r"^z: height and width \(4, 4\) are not \(5, 5\)"),
        ({"r": torch.zeros(2, 2, 1, 4, 4)}, r"^r: .* is not \(3, 2, 1, H, W\)"),
        ({"r": torch.zeros(3, 2, 1, 4, 4).half()}, r"^r: torch.float16 does not go with z's"),
        ({"r": torch.zeros(3, 2, 1, 4, 4, device="meta")}, r"^r: is on meta, z on cpu"),
        ({"weight": torch.zeros(3, 5)}, r"^weight: \(3, 5\) is neither"),
        (
            {"weight": torch.zeros(3, 5, 1, 3, 3)},
            r"^window: kernel \(1, 1\) is not",
        ),
        ({"weight": torch.zeros(3, 6, 1, 1, 1)}, r"^z: .* is not \(N, 6, Ho, Wo\)"),
        ({"z": torch.zeros(2, 5, 4, 4, dtype=torch.int32)}, r"^z: torch.int32 is not a floating"),
        ({"constant": torch.zeros(5)}, r"^constant: \(5,\) is not \(3, 5\)"),
        ({"epilogue": Epilogue(scale=torch.zeros(4))}, r"^scale: \(4,\) is not \(5,\)"),
        ({"epilogue": Epilogue(shift=torch.zeros(5).half())}, r"^shift: torch.float16 does not"),
        ({"epilogue": Epilogue(other=torch.zeros(2, 5, 4))}, r"^other: \(2, 5, 4\) is not"),
    ],
)
def test_an_error_names_the_argument(change: dict[str, object], words: str) -> None:
    arguments = {
        "z": torch.zeros(2, 5, 4, 4),
        "r": torch.zeros(3, 2, 1, 4, 4),
        "weight": torch.zeros(3, 5, 1, 1, 1),
        **change,
    }
    with pytest.raises(ValueError, match=words):
        Fanout(**arguments)  # type: ignore[arg-type]


def test_linear_layers_have_no_window() -> None:
    with pytest.raises(ValueError, match="window: a linear layer"):
        Fanout(
            torch.zeros(2, 5), torch.zeros(3, 2, 1), torch.zeros(3, 5, 1),
            window=Window(stride=(2, 2)),
        )  # fmt: skip


def test_settings_that_no_layer_has() -> None:
    with pytest.raises(ValueError, match="activation: 'tanh' is none of none, relu"):
        Activation("tanh")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"hardtanh from 1\.0 to 0\.0 is empty"):
        Activation("hardtanh", 1.0, 0.0)
    with pytest.raises(ValueError, match=r"stride must be two numbers >= 1, not \(0, 1\)"):
        Window(stride=(0, 1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_the_cpu_the_reference_runs(layout: Layout) -> None:
    case = make_case(layout, torch.float32)
    assert fanout_backend("cpu") == "reference"
    got = masked_fanout(case)
    torch.testing.assert_close(got, masked_fanout_reference(case), rtol=0, atol=0)


@pytest.mark.parametrize(("variants", "images"), [(0, 2), (3, 0)])
def test_nothing_in_nothing_out(variants: int, images: int) -> None:
    case = make_case("nchw", torch.float32, variants=variants, images=images)
    assert masked_fanout_reference(case).shape == (0, 5, 9, 7)
    assert lay_out(case).out.shape == (0, 5, 9, 7)


@pytest.fixture
def nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts a stand-in for nvcc first; its body sees the output's path in $out."""

    def make(body: str) -> Path:
        home = tmp_path / "cuda"
        (home / "bin").mkdir(parents=True, exist_ok=True)
        script = home / "bin" / "nvcc"
        script.write_text(
            '#!/bin/sh\nif [ "$1" = --version ]; then echo "release 1"; exit; fi\n'
            f'echo run >> {tmp_path}/runs\nfor out; do :; done\n{body}\n'
        )  # fmt: skip
        script.chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(home))
        return tmp_path / "runs"

    return make


def test_a_build_is_kept_and_found_by_its_sources(
    nvcc: Callable[[str], Path], tmp_path: Path
) -> None:
    runs, cache = nvcc('echo library > "$out"'), tmp_path / "cache"
    first = fanout_library.build_library((8, 6), cache_dir=cache)
    assert first.read_text() == "library\n"
    assert fanout_library.build_library((8, 6), cache_dir=cache) == first
    assert len(runs.read_text().splitlines()) == 1
    assert fanout_library.build_library((9, 0), cache_dir=cache) != first
    sources = shutil.copytree(SOURCES, tmp_path / "sources")
    with (sources / "masked_fanout.h").open("a") as file:
        file.write("// changed\n")
    assert fanout_library.build_library((8, 6), cache_dir=cache, sources=sources) != first


def test_a_build_that_fails_leaves_nothing_and_says_why(
    nvcc: Callable[[str], Path], tmp_path: Path
) -> None:
    nvcc('echo half > "$out"; echo "error: no such architecture" >&2; exit 1')
    with pytest.raises(OSError, match=r"nvcc failed: error: no such architecture"):
        fanout_library.build_library((8, 6), cache_dir=tmp_path / "cache")
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] in ([], [".lock"])


def test_without_sources_nothing_is_built(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="sources are not there"):
        fanout_library.build_library((8, 6), cache_dir=tmp_path, sources=tmp_path)


def _setup() -> object:
    import importlib.util

    spec = importlib.util.spec_from_file_location("setup_kernels", SOURCES.parent / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_package_is_built_for_what_nvcc_knows() -> None:
    flags = _setup().gencode({"75", "80", "90", "100", "121"})  # type: ignore[attr-defined]
    assert flags == [
        "-gencode=arch=compute_75,code=sm_75",
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]


@pytest.mark.slow
def test_nvcc_compiles_for_the_oldest_and_the_newest_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    """The source tells none from another, so those between see the same code.

    Compiled once for each state of the sources, the set-up and the compiler: it takes minutes.
    """
    nvcc = fanout_library.find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    state = hashlib.sha256(subprocess.check_output([nvcc, "--version"]))
    state.update((SOURCES.parent / "setup.py").read_bytes())
    for file in sorted(SOURCES.glob("*.[hc]*")):
        assert not re.search(r"__CUDA_ARCH__\s*[<>=]", file.read_text()), file
        state.update(file.read_bytes())
    made = pytestconfig.cache.mkdir("kernels") / f"{state.hexdigest()}.so"  # type: ignore[union-attr]
    if not made.exists():
        setup = _setup()
        ends = (setup.ARCHITECTURES[0], setup.ARCHITECTURES[-1])  # type: ignore[attr-defined]
        monkeypatch.setattr(setup, "ARCHITECTURES", ends)
        setup.compile_library(nvcc, tmp_path / "both.so")  # type: ignore[attr-defined]
        shutil.move(tmp_path / "both.so", made)
    handle = ctypes.CDLL(str(made))  # every symbol resolves
    assert handle.masked_fanout_abi() == 1 << 16 | ctypes.sizeof(fanout_library.Params)
