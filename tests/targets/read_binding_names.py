"""Write ``binding_names.json``: what the official TensorRT bindings are made of.

    .venv/bin/python tests/targets/read_binding_names.py

For maintainers; run it again with new pins when a version joins ``targets.tensorrt.FLAVOURS``. The
wheels come from PyPI with pip (6 MB in all). NVIDIA's libraries are not needed: what the bindings
want of them is a dozen C functions, and stubs that return null let them load. Nothing can be built
with these, but every class tells its names.

The format, one line for each class:

    enums      name -> its members, ``NAME=value``
    ordered    enums whose members compare with ``<``
    classes    name(bases) -> its own members: ``method(2)`` or ``method(1-2)`` by how many
               arguments it takes after ``self``, ``property`` read-only, ``property=`` writable
    functions  of the module
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

OUT = Path(__file__).with_name("binding_names.json")
PYTHON = (3, 11)
PINS = {
    "tensorrt 10.3.0": ("tensorrt-cu12-bindings", "tensorrt_bindings"),
    "tensorrt 10.16.1.11": ("tensorrt-cu12-bindings", "tensorrt_bindings"),
    "tensorrt 11.4.0.106": ("tensorrt-cu13-bindings", "tensorrt_bindings"),
    "tensorrt_rtx 1.7.1.116": ("tensorrt-rtx-cu13-bindings", "tensorrt_rtx_bindings"),
}
"""Package and version as ``import`` and ``FLAVOURS`` know them -> distribution, module."""
LIBRARIES = {
    "tensorrt": ("libnvinfer.so.{0}", "libnvinfer_plugin.so.{0}", "libnvonnxparser.so.{0}"),
    "tensorrt_rtx": ("libtensorrt_rtx.so.{0}", "libtensorrt_onnxparser_rtx.so.{0}"),
}
STUBS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry", "getInferLibVersion", "getLogger", "getNvOnnxParserVersion",
    "getPluginRegistry", "initLibNvInferPlugins",
)  # fmt: skip


def main() -> None:
    """Fetch, stub, ask, write."""
    if sys.version_info[:2] != PYTHON or sys.platform != "linux":
        sys.exit("the pinned wheels are those of Python 3.11 on Linux: run this there")
    told = {}
    with tempfile.TemporaryDirectory() as name:
        for package, (distribution, module) in PINS.items():
            folder = Path(name, package.replace(" ", "-"))
            folder.mkdir()
            told[package] = read_wheel(package, distribution, module, folder)
            print(f"{package}: {len(told[package]['classes'])} classes", file=sys.stderr)
    OUT.write_text(json.dumps(told, indent=1) + "\n")


def read_wheel(package: str, distribution: str, module: str, folder: Path) -> dict[str, Any]:
    """One version's entry.

    Args:
        package: A key of ``PINS``.
        distribution: Its name on PyPI.
        module: What it imports as.
        folder: Empty, to work in.
    """
    name, _, version = package.partition(" ")
    run(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
        "--no-deps", "--only-binary", ":all:", "--dest", str(folder),
        f"{distribution}=={version}")  # fmt: skip
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    make_stubs(folder, [library.format(version.split(".")[0]) for library in LIBRARIES[name]])
    names = run(sys.executable, __file__, "names", module,
                LD_LIBRARY_PATH=str(folder), PYTHONPATH=str(folder))  # fmt: skip
    return {
        "wheel": wheel.name,
        "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        **json.loads(names.splitlines()[-1]),
    }


def make_stubs(folder: Path, libraries: list[str]) -> None:
    """Libraries whose functions all return null."""
    source = folder / "stubs.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in STUBS))
    for library in libraries:
        run("cc", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", str(folder / library),
            str(source))  # fmt: skip


def run(*command: str, **environment: str) -> str:
    """A command's output; its own words go to stderr."""
    import os

    done = subprocess.run(
        command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def names_of(module: Any) -> dict[str, Any]:
    """Enums, classes and functions of a binding, in the format of this file's docstring."""
    found: dict[str, type] = {}
    functions = []
    for name in sorted(vars(module)):
        value = getattr(module, name)
        if isinstance(value, type):
            _add(found, name, value, vars(module)["__name__"])
        elif callable(value) and not name.startswith("_"):
            functions.append(name)
    enums = {n: kind for n, kind in found.items() if hasattr(kind, "__members__")}
    return {
        "enums": {
            name: " ".join(f"{m}={int(v)}" for m, v in sorted(kind.__members__.items()))
            for name, kind in enums.items()
        },
        "ordered": " ".join(n for n, kind in enums.items() if "__lt__" in vars(kind)),
        "classes": {
            _title(name, kind): " ".join(_members(kind))
            for name, kind in found.items()
            if name not in enums
        },
        "functions": " ".join(functions),
    }


def _add(found: dict[str, type], name: str, kind: type, module: str) -> None:
    """A class of this binding and those inside it."""
    if not kind.__module__.startswith(module) or name.startswith("_"):
        return
    found[name] = kind
    for inner, value in sorted(vars(kind).items()):
        if isinstance(value, type):
            _add(found, f"{name}.{inner}", value, module)


def _title(name: str, kind: type) -> str:
    bases = [base.__name__ for base in kind.__bases__ if base.__module__ == kind.__module__]
    return f"{name}({', '.join(bases)})" if bases else name


def _members(kind: type) -> list[str]:
    told = []
    for name, value in sorted(vars(kind).items()):
        if name.startswith("_") or isinstance(value, type):
            continue
        if isinstance(value, property):
            told.append(f"{name}=" if value.fset is not None else name)
        elif callable(value) or isinstance(value, staticmethod):
            told.append(f"{name}({_count(getattr(kind, name))})")
        else:
            told.append(name)
    return told


def _count(method: Any) -> str:
    """How many arguments pybind11 says it takes after ``self``, by its docstring."""
    name = method.__name__
    text = method.__doc__ or ""
    signatures = re.findall(rf"^(?:\d+\. )?{name}\((.*)\) ->", text, re.MULTILINE)
    counts = set()
    for signature in signatures:
        # Commas inside brackets and defaults such as <Enum.NAME: 0> part no arguments.
        flat = re.sub(r"<[^<>]*>|\[[^\[\]]*\]", "", re.sub(r"\[[^\[\]]*\]", "", signature))
        arguments = [
            part for part in flat.split(",") if part.strip() and not part.startswith("self")
        ]
        counts |= {sum("=" not in part for part in arguments), len(arguments)}
    if not counts:
        return "?"
    return str(min(counts)) if len(counts) == 1 else f"{min(counts)}-{max(counts)}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["names"]:
        import importlib

        print(json.dumps(names_of(importlib.import_module(sys.argv[2]))))
    else:
        main()
