"""Reading Dockerfiles: as much of the language as the files in this folder use.

What is not understood is an error, never skipped: ADD, SHELL, HEALTHCHECK, heredocs, the escape
directive. (dockerfile-parse on PyPI knows no flags such as ``RUN --mount``.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

ACTIONS = ("FROM", "COPY", "RUN")
SETTINGS = ("ARG", "ENV", "WORKDIR", "USER", "ENTRYPOINT", "CMD", "LABEL", "EXPOSE", "VOLUME")


class DockerfileError(ValueError):
    """The file is not understood, or asks for what the check cannot do."""


@dataclass(frozen=True, slots=True)
class Step:
    """One instruction."""

    line: int
    """Where it starts, from 1."""
    word: str
    flags: tuple[str, ...]
    """``--from=...``, ``--mount=...``."""
    text: str
    """All that follows, in one line."""

    def options(self) -> dict[str, str]:
        """The flags by name, where each name stands once."""
        return dict(flag.removeprefix("--").partition("=")[::2] for flag in self.flags)

    def mounts(self) -> list[dict[str, str]]:
        """What each ``--mount`` says."""
        said = [flag.removeprefix("--mount=") for flag in self.flags if flag.startswith("--mount=")]
        return [dict(part.partition("=")[::2] for part in one.split(",")) for one in said]

    def stage(self) -> tuple[str, str]:
        """The base and the name of a FROM; an empty name where none is given."""
        base, _, name = re.sub(r"\s+as\s+", " ", self.text, flags=re.IGNORECASE).partition(" ")
        return base, name

    def program(self) -> list[str]:
        """The words of ``["program", "argument"]``.

        Raises:
            DockerfileError: It is the shell form.
        """
        try:
            words = json.loads(self.text)
        except ValueError:
            words = None
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise DockerfileError(f'line {self.line}: write {self.word} ["program", "argument"]')
        return words


def parse(text: str) -> list[Step]:
    """Read a Dockerfile: comments, continuation lines, flags.

    Args:
        text: The whole file.

    Returns:
        The instructions, in order.

    Raises:
        DockerfileError: With the line.
    """
    steps: list[Step] = []
    start, joined = 0, ""
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if re.match(r"#\s*escape\s*=", stripped, re.IGNORECASE):
            raise DockerfileError(f"line {number}: the escape directive is not understood")
        if not stripped or stripped.startswith("#"):  # within an instruction too
            continue
        start = start or number
        if stripped.endswith("\\"):
            joined += line.rstrip()[:-1]
            continue
        steps.append(_step(start, joined + line))
        start, joined = 0, ""
    if start:
        raise DockerfileError(f"line {start}: the file ends within this instruction")
    if not any(step.word == "FROM" for step in steps):
        raise DockerfileError("there is no FROM")
    return steps


def _step(line: int, text: str) -> Step:
    word, _, rest = text.strip().partition(" ")
    word, rest = word.upper(), rest.strip()
    flags: list[str] = []
    if word not in ACTIONS + SETTINGS:
        raise DockerfileError(f"line {line}: {word} is not understood")
    while word in ACTIONS and rest.startswith("--"):
        flag, _, rest = rest.partition(" ")
        flags.append(flag)
        rest = rest.strip()
    if word in ("COPY", "RUN") and re.search(r"<<-?[\"']?[A-Za-z_]", rest):
        raise DockerfileError(f"line {line}: heredocs are not understood")
    if not rest:
        raise DockerfileError(f"line {line}: {word} of nothing")
    return Step(line, word, tuple(flags), rest)


def expand(text: str, values: Mapping[str, str]) -> str:
    """Replace ``$NAME``, ``${NAME}``, ``${NAME:-else}`` and ``${NAME:+then}``."""

    def value(match: re.Match[str]) -> str:
        found = values.get(match["plain"] or match["name"], "")
        other = match["other"] or ""
        return (other if found else "") if match["kind"] == ":+" else found or other

    pattern = r"\$(?:(?P<plain>\w+)|\{(?P<name>\w+)(?:(?P<kind>:[-+])(?P<other>[^}]*))?\})"
    return re.sub(pattern, value, text)
