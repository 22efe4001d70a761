from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cswap_deploy.runtime import host


@pytest.mark.parametrize(
    ("whole", "inner", "cores"),
    [
        ("max 100000", "max 100000", math.inf),
        ("200000 100000", "max 100000", 2.0),
        ("400000 100000", "150000 100000", 1.5),
    ],
)
def test_the_quota_is_the_least_of_the_group_and_its_root(
    whole: str, inner: str, cores: float, tmp_path: Path
) -> None:
    (tmp_path / "build").mkdir()
    (tmp_path / "cpu.max").write_text(f"{whole}\n")
    (tmp_path / "build" / "cpu.max").write_text(f"{inner}\n")
    own = tmp_path / "cgroup"
    own.write_text("0::/build\n")
    assert host._cpu_quota(tmp_path, own) == cores


def test_without_such_a_group_there_is_no_quota(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    own.write_text("4:memory:/build\n1:cpu:/\n")
    assert host._cpu_quota(tmp_path, own) == math.inf


def test_a_quota_leaves_a_core_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_cpu_quota", lambda: 0.3)
    assert host.usable_cores() == 1


@pytest.mark.parametrize("own", [{}, {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "active"}])
def test_torch_starts_with_what_the_command_set(own: dict[str, str]) -> None:
    """In a process of its own: torch reads the environment once, when it is loaded."""
    code = (
        "import os, sys; sys.argv = ['cswap-deploy', '--version'];"
        "from cswap_deploy.cli.main import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "import torch; print(torch.get_num_threads(), os.environ['OMP_WAIT_POLICY'])"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")} | own
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    threads, policy = done.stdout.split()[-2:]
    assert (int(threads), policy) == ((1, "active") if own else (host.usable_cores(), "passive"))
