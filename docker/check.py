"""Carry out a Dockerfile on a machine that has no Docker engine.

    python docker/check.py docker/Dockerfile.cpu

Every COPY and RUN is done, in order, on a scratch system: what debootstrap makes of Debian's
packages stands in for ``FROM debian:...``. Then the result is tried as a container would start it.
Stages over an image that cannot be made this way (NVIDIA's) are not run, and the table says so.
pip gets this machine's configuration through its environment. ``.dockerignore`` is not applied.

Needs root, unshare, overlayfs and debootstrap. A step is root in a chroot, with its own mounts and
processes but this machine's network: check only files that you trust.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from dockerfile import SETTINGS, DockerfileError, Step, expand, parse
from scratch import Image, StepError, call, make_debian


@dataclass(slots=True)
class Checker:
    """Carries out the steps of one file and prints a row for each."""

    context: Path
    scratch: Path
    """For what is built; empty."""
    kept: Path
    """For Debian and pip's cache."""
    given: Mapping[str, str]
    """Build arguments."""
    stand_in: Path | None
    """A root folder to take for Debian's images."""
    states: Counter[str] = field(default_factory=Counter)
    _before: dict[str, str] = field(default_factory=dict)
    """Arguments from before the first FROM."""
    _stages: dict[str, Image] = field(default_factory=dict)

    def run(self, steps: Sequence[Step], attempts: Sequence[str]) -> None:
        """Do one step after the other, then try the last stage.

        Args:
            steps: Of the whole file.
            attempts: More arguments to try the entry point with.

        Raises:
            DockerfileError: A setting is not understood.
        """
        image = Image(Path("/"), lacks="no FROM yet", arguments=self._before)
        for step in steps:
            if step.word in SETTINGS:
                self._set(image, step)
                continue
            if step.word == "FROM":
                image = self._next_stage(step)
            do = {"FROM": self._base, "COPY": self._copy, "RUN": self._run}[step.word]
            done = self._row(
                f"{step.line:>4}", f"{step.word} {step.text}", image, partial(do, image, step)
            )
            if not done and not image.lacks:
                image.lacks = f"line {step.line} failed"
        commands = {"the user is not root": 'id; [ "$(id -u)" != 0 ]'}
        for arguments in ("--version", *attempts):
            command = f"{shlex.join(image.entry) or 'false'} {arguments}"
            commands[command] = command
        for what, command in commands.items():
            self._row("", what, image, partial(image.run, command))
        self._row("", "no cache is left", image, image.find_caches)

    def _row(self, line: str, what: str, image: Image, do: Callable[[], str | None]) -> bool:
        """Do something and print what came of it; whether it did not fail."""
        began = time.monotonic()
        state, note = "ran", ""
        try:
            if not image.lacks:
                note = do() or ""
            if image.lacks:  # now or before
                state, note = "not run", image.lacks
        except (StepError, OSError) as err:
            state, note = "failed", str(err)
        self.states[state] += 1
        what = " ".join(what.split())
        took = time.monotonic() - began
        print(f"{line:>4}  {state:<7} {took:7.1f} s  {what:.100}", flush=True)
        for words in note.splitlines():
            print(f"{'':>25}{words}", flush=True)
        return state != "failed"

    def _base_of(self, step: Step) -> tuple[str, str]:
        return Step(step.line, "FROM", (), expand(step.text, self._before)).stage()

    def _next_stage(self, step: Step) -> Image:
        base, name = self._base_of(step)
        image = Image(self.scratch / f"stage{len(self._stages)}" / "root")
        if base in self._stages:
            parent = self._stages[base]
            image.environment, image.user = dict(parent.environment), parent.user
            image.folder, image.entry, image.lacks = parent.folder, parent.entry, parent.lacks
        self._stages[name or str(len(self._stages))] = image
        return image

    def _base(self, image: Image, step: Step) -> str:
        base, _ = self._base_of(step)
        if base in self._stages:
            image.lay_over(self._stages[base].root)
        elif debian := re.fullmatch(r"debian:([a-z]+)(-\d{8})?(-slim)?", base):
            root = self.stand_in or self.kept / f"debian-{debian[1]}"
            if self.stand_in is None:
                make_debian(debian[1], root)
            image.lay_over(root)
            return f"in its place: {self.stand_in or 'debootstrap --variant=minbase ' + debian[1]}"
        else:
            image.lacks = f"needs the base {base}, which cannot be fetched here"
        return ""

    def _set(self, image: Image, step: Step) -> None:
        values = image.values()
        pairs = [word.partition("=") for word in shlex.split(step.text)]
        if step.word == "ARG":
            for name, has_default, default in pairs:
                value = expand(default, values) if has_default else self._before.get(name)
                value = self.given.get(name, value)
                if value is not None:
                    image.arguments[name] = value
        elif step.word == "ENV":
            if not all(equals for _, equals, _ in pairs):
                raise DockerfileError(f"line {step.line}: write ENV NAME=VALUE")
            image.environment |= {name: expand(value, values) for name, _, value in pairs}
        elif step.word == "USER":
            image.user = expand(step.text, values)
        elif step.word == "WORKDIR":
            image.folder = str(Path(image.folder, expand(step.text, values)))
            if not image.lacks:
                image.path(".").mkdir(parents=True, exist_ok=True)
        elif step.word == "ENTRYPOINT":
            image.entry = tuple(step.program())

    def _origin(self, options: Mapping[str, str]) -> Path:
        """What ``from=`` means: the root of a stage, or the context."""
        if "from" not in options:
            return self.context
        stage = self._stages.get(options["from"])
        if stage is None or stage.lacks:
            why = "there is none" if stage is None else stage.lacks
            raise StepError(f"needs the stage {options['from']}: {why}")
        return stage.root

    def _copy(self, image: Image, step: Step) -> None:
        *sources, target = (expand(word, image.values()) for word in shlex.split(step.text))
        into = image.path(target)
        is_folder = target.endswith("/") or len(sources) > 1
        (into if is_folder else into.parent).mkdir(parents=True, exist_ok=True)
        for source in sources:
            found = sorted(self._origin(step.options()).glob(source.strip("/")))
            if not found:
                raise StepError(f"{source} is not there")
            for one in found:
                content = ["-T"] if one.is_dir() else []  # of a folder COPY takes the content
                call("cp", "-a", "--no-preserve=ownership", *content, one, into)

    def _run(self, image: Image, step: Step) -> None:
        with ExitStack() as mounts:
            for options in step.mounts():
                target, kind = options["target"], options["type"]
                if kind == "cache":
                    source = self.kept / "caches" / target.strip("/").replace("/", "-")
                    source.mkdir(parents=True, exist_ok=True)
                elif kind == "bind":
                    source = self._origin(options) / options["source"].strip("/")
                else:
                    raise DockerfileError(f"line {step.line}: no mount of type {kind}")
                mounts.enter_context(image.mounted(source, target, writable=kind == "cache"))
            image.run(step.text)


def main(argv: Sequence[str]) -> int:
    """Check one file.

    Returns:
        0 when nothing failed (steps that could not be run are no failure), 1 when a step did, 2
        when the file is not understood or this machine cannot check it.
    """
    parser = argparse.ArgumentParser(description="Carry out a Dockerfile without a Docker engine.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--context", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--try", dest="attempts", action="append", default=[], metavar="ARGUMENTS",
                        help="try the entry point with these too; may be repeated")  # fmt: skip
    parser.add_argument("--root", type=Path, help="take this folder for Debian's images")
    parser.add_argument("--keep", type=Path, help="keep Debian and pip's cache here for next time")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    try:
        steps = parse(options.file.read_text())
        if options.inside is None:
            if os.geteuid() != 0 or shutil.which("unshare") is None:
                raise DockerfileError("needs root and unshare, for mounts of its own")
            # the folder is emptied out here, where nothing is mounted below it
            with tempfile.TemporaryDirectory(prefix="check-") as scratch:
                line = ["unshare", "--mount", "--pid", "--fork", "--kill-child", sys.executable]
                line += [__file__, *argv, "--inside", scratch]
                return subprocess.run(line, check=False).returncode
        checker = Checker(
            context=options.context.resolve(),
            scratch=options.inside,
            kept=(options.keep or options.inside).resolve(),
            given=dict(one.partition("=")[::2] for one in options.build_arg),
            stand_in=options.root and options.root.resolve(),
        )
        checker.run(steps, options.attempts)
    except (DockerfileError, OSError) as err:
        print(f"{options.file}: {err}", file=sys.stderr)
        return 2
    print(", ".join(f"{checker.states[state]} {state}" for state in ("ran", "failed", "not run")))
    return 1 if checker.states["failed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
