"""Images as folders: layers over a root folder, and commands run in them.

Only for a process that has mounts of its own (``unshare --mount``), which take theirs with them.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_HOST = "run/host"
"""Where a step sees this machine's files, read-only: pip's certificates and local packages."""
_CACHES = ("root/.cache", "var/lib/apt/lists", "var/cache/apt/archives")
_LAST_LINES = 15


class StepError(Exception):
    """A step did not do what it should; the message has the last words of its program."""


@dataclass(slots=True)
class Image:
    """A stage, as far as it is built."""

    root: Path
    lacks: str = ""
    """Why its steps are not run; empty while they are."""
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": _PATH})
    arguments: dict[str, str] = field(default_factory=dict)
    user: str = "0"
    folder: str = "/"
    entry: tuple[str, ...] = ()

    def values(self) -> dict[str, str]:
        """What ``$NAME`` stands for: ENV wins over ARG."""
        return {**self.arguments, **self.environment}

    def path(self, name: str) -> Path:
        """Where a path of the image lies on this machine."""
        return self.root / str(Path(self.folder, name))[1:]

    def lay_over(self, lower: Path) -> None:
        """Make the image a layer over a root folder, with what every step finds there.

        Raises:
            StepError: The mounts are refused.
        """
        upper, aside = self.root.with_name("upper"), self.root.with_name("aside")
        for folder in (self.root, upper, aside):
            folder.mkdir(parents=True)
        layers = f"lowerdir={lower},upperdir={upper},workdir={aside}"
        call("mount", "-t", "overlay", "overlay", "-o", layers, self.root)
        for name in ("proc", "dev", _HOST):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        call("mount", "-t", "proc", "proc", self.root / "proc")
        call("mount", "--rbind", "/dev", self.root / "dev")
        call("mount", "-o", "bind,ro", "/", self.root / _HOST)

    @contextmanager
    def mounted(self, source: Path, target: str, *, writable: bool) -> Iterator[None]:
        """Have a file or folder in the image for a while.

        Raises:
            StepError: The source is not there, or the mount is refused.
        """
        place, is_folder = self.path(target), source.is_dir()
        (place if is_folder else place.parent).mkdir(parents=True, exist_ok=True)
        if not is_folder:
            place.touch()
        call("mount", "-o", "bind" if writable else "bind,ro", source, place)
        try:
            yield
        finally:
            call("umount", place)
            with suppress(OSError):  # it was there before, with something in it
                place.rmdir() if is_folder else place.unlink()

    def run(self, command: str) -> str:
        """Run a shell command as the image's user, with the image's environment and pip's.

        Returns:
            The last line that it prints.

        Raises:
            StepError: Its exit status is not 0; the message has its last lines.
        """
        rows = [row.split(":") for row in (self.root / "etc/passwd").read_text().splitlines()]
        name, _, group = self.user.partition(":")
        account = next((row for row in rows if name in (row[0], row[2])), None)
        home = "/" if account is None else account[5]
        # as Docker: a number that is no account's is in group 0
        user = self.user if account is not None or group else f"{name}:0"
        line = [shutil.which("chroot") or "chroot", f"--userspec={user}", str(self.root)]
        line += ["/bin/sh", "-c", 'cd "$0" && exec /bin/sh -c "$1"', self.folder, command]
        log = self.root.with_name("log")
        with log.open("wb") as file:
            code = subprocess.run(
                line, env={**_network(), "HOME": home, **self.values()}, check=False,
                stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            ).returncode  # fmt: skip
        words = log.read_text(errors="replace").splitlines()
        if code:
            raise StepError("\n".join([f"exit status {code}", *words[-_LAST_LINES:]]))
        return "".join(words[-1:]).strip()

    def find_caches(self) -> None:
        """Look for what a package manager leaves behind.

        Raises:
            StepError: Something is there.
        """
        files = [one for name in _CACHES for one in (self.root / name).rglob("*") if one.is_file()]
        left = [one.relative_to(self.root) for one in files if one.name != "lock"]
        if left:
            raise StepError(f"{len(left)} files, the first /{left[0]}")


def make_debian(suite: str, root: Path) -> None:
    """Make a minimal Debian from packages, unless it is there.

    Args:
        suite: Such as ``bookworm``.
        root: The folder to make; complete or absent.

    Raises:
        StepError: debootstrap is absent or fails.
    """
    if root.is_dir():
        return
    if shutil.which("debootstrap") is None:
        raise StepError("debootstrap is not installed\n  fix: apt-get install debootstrap")
    part = root.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    call("debootstrap", "--variant=minbase", suite, part)
    for name in _CACHES:
        shutil.rmtree(part / name, ignore_errors=True)  # as in the published image
    part.rename(root)


@cache
def _network() -> dict[str, str]:
    """This machine's proxies and pip configuration; local paths as a step sees them."""
    found = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    line = [sys.executable, "-m", "pip", "--disable-pip-version-check", "config", "list"]
    listed = subprocess.run(line, capture_output=True, text=True, check=False).stdout
    for entry in listed.splitlines():
        name, _, quoted = entry.partition("=")
        section, _, key = name.rpartition(".")
        if section in ("global", ":env:"):
            words = re.sub(r"(?<!\S)(file://)?/", rf"\1/{_HOST}/", ast.literal_eval(quoted))
            found[f"PIP_{key.upper().replace('-', '_')}"] = " ".join(words.split())
    return found


def call(*words: str | Path) -> None:
    """Run a program of this machine.

    Raises:
        StepError: Its exit status is not 0; the message has what it said.
    """
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise StepError(f"{words[0]}: {(done.stderr or done.stdout).strip()}")
