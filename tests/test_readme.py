"""The README's Python examples run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cswap_deploy.models.demos import IMAGES

README = Path(__file__).parent.parent / "README.md"
PAGES = [
    README, README.parent / "benchmarks" / "README.md",
    *sorted(README.parent.glob("cswap_deploy/*/README.md")),
]  # fmt: skip
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+")
OTHERS = {"--quick", "--cswap-bundle"}
"""Flags of benchmarks and of pytest."""


def test_python_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Defaults that make it quick; the example's own arguments are untouched.
    defaults = tmp_path / "quick.toml"
    defaults.write_text(
        "scoring-samples = 8\nrounds = 1\ncalibration-samples = 64\n"
        'validation-samples = 200\nlatency-runs = 10\nselect = "unit"\n'
    )
    monkeypatch.setenv("CSWAP_CONFIG", str(defaults))
    monkeypatch.setenv("CSWAP_STORE", str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    build, prune, classify = examples
    exec(compile(build, str(README), "exec"), {})
    printed = capsys.readouterr().out
    removed = re.search(r"([\d.]+)% of the parameters are gone", printed)
    assert removed is not None
    assert 38 <= float(removed[1]) <= 42
    assert (tmp_path / "my-bundle" / "report.html").is_file()

    exec(compile(prune, str(README), "exec"), {})
    before, after = re.search(r"([\d,]+) -> ([\d,]+) parameters", capsys.readouterr().out).groups()  # type: ignore[union-attr]
    assert int(after.replace(",", "")) < 0.85 * int(before.replace(",", ""))

    pictures = np.load(IMAGES["validation"])["images"]
    Image.fromarray(pictures[0][..., 0]).save("photo.jpg")
    exec(compile(classify, str(README), "exec"), {})
    assert "CPUExecutionProvider" in capsys.readouterr().out


def test_every_command_in_the_readme_exists() -> None:
    from typer.main import get_command

    from cswap_deploy.cli.commands import command_line

    known = set(get_command(command_line()).commands)  # type: ignore[attr-defined]
    used = set(re.findall(r"cswap-deploy (\w+)", README.read_text()))
    assert used <= known, used - known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(README.parent)))
def test_every_flag_and_link_on_a_page_exists(page: Path) -> None:
    from typer.main import get_command

    from cswap_deploy.cli.commands import command_line
    from cswap_deploy.config import sections

    text = page.read_text()
    known = {f"--{name.replace('_', '-')}" for s in sections().values() for name in s.model_fields}
    waiting = [get_command(command_line())]
    while waiting:
        command = waiting.pop()
        waiting += getattr(command, "commands", {}).values()
        known |= {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
    used = {
        flag for line in re.findall(r"cswap-deploy ([^`\n]*)", text) for flag in FLAG.findall(line)
    }
    used |= set(re.findall(r"`(--[a-z][a-z0-9-]+)", text)) - OTHERS
    assert used <= known, used - known
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    assert not [link for link in links if not (page.parent / link).exists()]


def test_the_readme_is_read_in_five_minutes() -> None:
    assert len(README.read_text().splitlines()) < 200


def test_the_budgets_in_the_gates_page_are_valid(tmp_path: Path) -> None:
    from cswap_deploy.gate.budgets import read_budgets

    page = README.parent / "cswap_deploy" / "gate" / "README.md"
    (block,) = re.findall(r"```toml\n(.*?)```", page.read_text(), flags=re.DOTALL)
    file = tmp_path / "budgets.toml"
    file.write_text(block)
    assert read_budgets(file).accuracy_drop_max == 0.02
