"""What a machine lacks is named, with exit code 4; it is no bug and no mistake of the user's."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from cswap_deploy.errors import ExportError, UsageError, lacking

if TYPE_CHECKING:
    from conftest import Made, Ran

Command = Callable[..., "Ran"]
HERE = Path(__file__).parents[1]
_DROP_CAPABILITY = 24
_READS_ALL, _SEARCHES_ALL = 1, 2


def run(
    *arguments: object, before: Callable[[], object] | None = None,
    module: str = "cswap_deploy.cli", **streams: object,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """The command in a process of its own, which does something before it begins."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    return subprocess.run(  # type: ignore[call-overload,no-any-return]
        [sys.executable, "-m", module, *map(str, arguments)], text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(HERE), "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=before, timeout=300, **streams,
    )  # fmt: skip


def as_others() -> None:
    """Be bound by who may read and write what, as root is not."""
    if os.geteuid() == 0:
        for right in (_READS_ALL, _SEARCHES_ALL):
            if ctypes.CDLL(None).prctl(_DROP_CAPABILITY, right, 0, 0, 0):
                raise OSError


def said(done: subprocess.CompletedProcess[str], *words: str, code: int = 4) -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    error = done.stderr[done.stderr.index("error: ") :]
    for each in words:
        assert each in error


# --- memory, threads, open files, sizes of files -------------------------------------------------


@pytest.mark.parametrize("kib", [300_000, 700_000])
def test_too_little_memory_to_load_libraries(
    flags: tuple[str, ...], tmp_path: Path, kib: int
) -> None:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (kib << 10, kib << 10))

    done = run("build", *flags, "-o", tmp_path / "out", before=limited)
    said(done, "memory ran out (", "fix: close other programs, raise the limit (`ulimit -v")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (MemoryError(), "memory ran out (MemoryError)"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 99 bytes"),
            "memory ran out ([enforce fail] DefaultCPUAllocator",
        ),
        (RuntimeError("std::bad_alloc"), "memory ran out (std::bad_alloc)"),
        (RuntimeError("could not create a primitive"), "memory ran out (could not"),
        (RuntimeError("can't start new thread"), "no more threads or processes can be started"),
        (
            ImportError("libx.so: failed to map segment from shared object"),
            "memory ran out (libx.so",
        ),
        (OSError(errno.EMFILE, "Too many open files"), "may not open more files"),
    ],
)
def test_what_runs_out_while_a_network_is_traced(
    command: Command, flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    failure: Exception, words: str,
) -> None:  # fmt: skip
    def export(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(torch.export, "export", export)
    done = command("prune", *flags, "-o", tmp_path / "out")
    assert done.code == 4, done.err
    assert f"error: {words}" in done.err.replace("error: this process ", "error: ")
    assert "control flow" not in done.err
    assert "Traceback" not in done.err


def test_a_device_that_fails_is_named() -> None:
    told = lacking(OSError(errno.EIO, "Input/output error", "/d/a.png"))
    assert str(told).startswith("/d/a.png: the disk or the device fails ([Errno 5] Input/output")


def test_a_bug_is_no_lack() -> None:
    assert lacking(ValueError("a bug")) is None
    assert lacking(FileNotFoundError(errno.ENOENT, "No such file", "x")) is None
    bug = KeyError("x")
    bug.__context__ = PermissionError(errno.EACCES, "Permission denied", "y")  # it was handled
    assert lacking(bug) is None
    own = UsageError("cannot use y: Permission denied", fix="choose another")
    own.__cause__ = bug.__context__
    assert lacking(own) is None, "its own words are better"
    own = ExportError("cannot trace", fix="keep control flow out of forward")
    own.__cause__ = RuntimeError("std::bad_alloc")
    told = lacking(own)
    assert told is not None
    assert "control flow" not in str(told)


def test_a_file_that_becomes_too_large(flags: tuple[str, ...], tmp_path: Path) -> None:
    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 10, 8 << 10))

    store = tmp_path / "store"
    done = run("prune", *flags, "-o", tmp_path / "out", "--store", store, before=limited)
    said(done, "a file became larger than this process", "File too large", "`ulimit -f unlimited`")
    assert "is full" not in done.stderr
    assert not (tmp_path / "out").exists()
    assert not list(store.rglob("*"))


# --- stdout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", [("models",), ("models", "--json"), ("--help",), ("--version",)])
def test_a_full_stdout(line: tuple[str, ...]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with Path("/dev/full").open("w") as full:
        done = run(*line, stdout=full)
    assert (done.returncode, done.stderr) == (
        4, "error: cannot write the results: No space left on device\n",
    )  # fmt: skip


@pytest.mark.parametrize("module", ["cswap_deploy.cli", "cswap_deploy.runtime.cli"])
def test_a_closed_stdout(module: str, tmp_path: Path) -> None:
    done = run("inspect", tmp_path, module=module, before=lambda: os.close(1), stdout=None)
    said(done, "stdout is closed, so the results cannot be written\n  fix: open it: > FILE")


def test_a_full_stderr_stops_nothing() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with Path("/dev/full").open("w") as full:
        done = run("models", "no-such*", stderr=full)
        assert (done.returncode, done.stdout) == (2, "")
    done = run("models", before=lambda: os.close(2), stderr=None)
    assert done.returncode == 0
    assert "demo-resnet" in done.stdout


# --- files and folders that may not be used ------------------------------------------------------


@pytest.fixture
def bound() -> Callable[[], None]:
    """For ``run``: to be bound by permissions."""
    try:
        subprocess.run([sys.executable, "-c", ""], preexec_fn=as_others, check=True)
    except subprocess.SubprocessError:
        pytest.skip("root cannot give up its rights here")
    return as_others


def test_an_output_folder_that_may_not_be_replaced(
    made: Made, store: Path, tmp_path: Path, bound: Callable[[], None]
) -> None:
    (tmp_path / "out").mkdir(mode=0o555)
    done = run(
        "build", *made.flags, "-o", tmp_path / "out", "--store", store, before=bound
    )  # fmt: skip
    said(done, f"{tmp_path / 'out'} may not be replaced: it has mode 555", "fix: chmod u+rwx ")
    assert "load" not in done.stderr, "it is said before minutes of work"


@pytest.mark.parametrize("name", ["manifest.json", "plan.json", "model.onnx"])
def test_a_file_of_a_bundle_that_may_not_be_read(
    made: Made, tmp_path: Path, bound: Callable[[], None], name: str
) -> None:
    copy = shutil.copytree(made.bundle, tmp_path / "copy")
    (copy / name).chmod(0)
    command = "explain" if name == "plan.json" else "inspect"
    said(run(command, copy, before=bound), f"{copy / name}", "Permission denied")
