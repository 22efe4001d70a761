"""The README's Python examples run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cswap_deploy.models.demos import ZOO_DIR

README = Path(__file__).parent.parent / "README.md"


def test_python_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Defaults that make it quick; the example's own arguments are untouched.
    defaults = tmp_path / "quick.toml"
    defaults.write_text(
        "scoring-samples = 8\nrounds = 1\ncalibration-samples = 64\n"
        "validation-samples = 200\nlatency-runs = 10\n"
    )
    monkeypatch.setenv("CSWAP_CONFIG", str(defaults))
    monkeypatch.setenv("CSWAP_STORE", str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    build, classify = examples
    exec(compile(build, str(README), "exec"), {})
    printed = capsys.readouterr().out
    removed = re.search(r"([\d.]+)% of the parameters are gone", printed)
    assert removed is not None
    assert 38 <= float(removed[1]) <= 42
    assert (tmp_path / "my-bundle" / "report.html").is_file()

    pictures = np.load(ZOO_DIR / "fashion-mnist-test.npz")["images"]
    Image.fromarray(pictures[0][..., 0]).save("photo.jpg")
    exec(compile(classify, str(README), "exec"), {})
    assert "CPUExecutionProvider" in capsys.readouterr().out


def test_every_command_in_the_readme_exists() -> None:
    from typer.main import get_command

    from cswap_deploy.cli import app

    known = set(get_command(app).commands)  # type: ignore[attr-defined]
    used = set(re.findall(r"cswap-deploy (\w+)", README.read_text()))
    assert used <= known, used - known


def test_the_budgets_in_the_readme_are_valid(tmp_path: Path) -> None:
    from cswap_deploy.gate.budgets import read_budgets

    (block,) = re.findall(r"```toml\n(.*?)```", README.read_text(), flags=re.DOTALL)
    file = tmp_path / "budgets.toml"
    file.write_text(block)
    assert read_budgets(file).accuracy_drop_max == 0.02
