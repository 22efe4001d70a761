"""The kernel's own source, built for the CPU."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from cswap_deploy.causal.fanout_library import SOURCES, Library


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """The kernel's tiles on the CPU."""
    compiler = next((c for c in ("g++", "c++", "clang++") if shutil.which(c)), None)
    if compiler is None:
        pytest.skip("no C++ compiler (g++, c++ or clang++)")
    made = tmp_path_factory.mktemp("masked_fanout") / "host.so"
    subprocess.run(
        [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared",
         str(SOURCES / "host.cpp"), "-o", str(made)],
        check=True,
    )  # fmt: skip
    return Library(made, entry="masked_fanout_host")
