"""Builds the CUDA kernels as one shared library, with nvcc and without torch.

pip install ./kernels
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent
SOURCE = HERE / "masked_fanout" / "masked_fanout.cu"
ARCHITECTURES = ("75", "80", "86", "87", "89", "90", "100", "120")
"""Compute capabilities with machine code of their own, ascending."""
INTERMEDIATE = ("100", "120")
"""And with PTX, which drivers compile for the generations between and after them."""


def find_nvcc() -> str:
    """The compiler of CUDA_HOME, on PATH, or where the toolkit installs itself."""
    home = os.environ.get("CUDA_HOME")
    for path in (home and f"{home}/bin/nvcc", shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"):
        if path and os.access(path, os.X_OK):
            return path
    sys.exit(
        "cswap-kernels: nvcc was found neither in CUDA_HOME, on PATH nor in /usr/local/cuda\n"
        "  fix: install the CUDA toolkit (https://developer.nvidia.com/cuda-downloads) or set "
        "CUDA_HOME; cswap-deploy runs without this package"
    )


def gencode(known: Iterable[str]) -> list[str]:
    """Flags for every architecture that a compiler knows; what is newer than all gets PTX."""
    chosen = [arch for arch in ARCHITECTURES if arch in set(known)]
    if not chosen:
        sys.exit(f"cswap-kernels: this nvcc knows none of {', '.join(ARCHITECTURES)}")
    intermediate = sorted({*INTERMEDIATE, chosen[-1]} & set(chosen), key=int)
    return [
        *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in chosen),
        *(f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in intermediate),
    ]


def compile_library(nvcc: str | Path, target: Path) -> None:
    """Compile and link; nvcc's own words go to the terminal."""
    listed = subprocess.run(
        [nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True
    ).stdout.split()  # fmt: skip
    known = {arch.removeprefix("compute_") for arch in listed}
    command = [
        nvcc, "-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC",
        "-Xlinker", "--exclude-libs,ALL", *gencode(known), SOURCE, "-o", target,
    ]  # fmt: skip
    subprocess.run([str(part) for part in command], check=True)


def main() -> None:
    """What ``pip`` calls."""
    from setuptools import Distribution, setup
    from setuptools.command.bdist_wheel import bdist_wheel
    from setuptools.command.build_py import build_py

    class Build(build_py):
        """Adds the library to the package's files."""

        def run(self) -> None:
            super().run()
            folder = HERE if self.editable_mode else Path(self.build_lib)
            target = folder / "cswap_kernels" / "libmasked_fanout.so"
            target.parent.mkdir(parents=True, exist_ok=True)
            compile_library(find_nvcc(), target)

    class Binary(Distribution):
        """Not the same on every platform."""

        def has_ext_modules(self) -> bool:
            return True

    class Wheel(bdist_wheel):
        """Any Python: the library knows nothing of it."""

        def get_tag(self) -> tuple[str, str, str]:
            return "py3", "none", super().get_tag()[2]

    setup(distclass=Binary, cmdclass={"build_py": Build, "bdist_wheel": Wheel})


if __name__ == "__main__":
    main()
