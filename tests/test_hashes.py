"""``.ci/hashes.py``: what was downloaded, held against what is known of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / ".ci" / "hashes.py"


def report(file: Path, **digests: str) -> Path:
    """As pip writes it; this project itself comes from a folder."""
    base = "https://example.org/a/"
    items = []
    for name, digest in digests.items():
        archive: dict[str, object] = {"hashes": {"sha256": digest}}
        if name == "numpy":  # as pip 23.0 has it
            archive = {"hash": f"sha256={digest}"}
        url = f"{base}{name}-1.0%2Bcpu.whl"
        items.append({"download_info": {"url": url, "archive_info": archive}})
    folder = {"download_info": {"url": "file:///here", "dir_info": {"editable": True}}}
    file.write_text(json.dumps({"install": [*items, folder]}))
    return file


def run(script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_known_new_and_changed(tmp_path: Path) -> None:
    script = Path(shutil.copy(SCRIPT, tmp_path))
    first = report(tmp_path / "1.json", torch="a" * 64)
    done = run(script, first)
    assert (done.returncode, done.stdout) == (
        0, "0 of 1 downloaded files have their known digest; not known: torch-1.0+cpu.whl\n"
    )  # fmt: skip
    assert run(script, "--learn", first).returncode == 0
    second = report(tmp_path / "2.json", numpy="b" * 64)
    assert run(script, "--learn", second).returncode == 0
    known = (tmp_path / "hashes.txt").read_text()
    assert known == f"{'b' * 64}  numpy-1.0+cpu.whl\n{'a' * 64}  torch-1.0+cpu.whl\n"
    done = run(script, first, second)
    assert (done.returncode, done.stdout) == (
        0, "2 of 2 downloaded files have their known digest\n"
    )  # fmt: skip
    report(second, numpy="c" * 64)
    for arguments in ((first, second), ("--learn", first, second)):
        done = run(script, *arguments)
        assert done.returncode == 1
        assert f"numpy-1.0+cpu.whl has sha256 {'c' * 64}, known is {'b' * 64}" in done.stderr
    assert (tmp_path / "hashes.txt").read_text() == known


def test_nothing_was_recorded(tmp_path: Path) -> None:
    done = run(SCRIPT, tmp_path / "downloaded-*.json")
    assert done.returncode == 1
    assert "fix: rm -r .venv && make install" in done.stderr


def test_the_projects_own_list_is_in_order() -> None:
    lines = SCRIPT.with_name("hashes.txt").read_text().splitlines()
    names = [
        name for digest, _, name in (line.partition("  ") for line in lines) if len(digest) == 64
    ]
    assert len(names) == len(lines) > 100
    assert names == sorted(set(names))
