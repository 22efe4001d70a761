"""What long work tells whoever waits for it, and the one place that silences libraries.

The library is silent; the command draws bars.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Protocol


class Phases(Protocol):
    """Receives how far one long phase is."""

    def begin(self, what: str, total: int) -> None:
        """A phase of many steps starts; ``total`` is 0 where they cannot be counted."""

    def advance(self, steps: int) -> None:
        """Some of them are done."""

    def end(self) -> None:
        """The phase is over."""

    def overall(self, part: float, left: float) -> None:
        """How much of the whole stage is done (0 to 1), and how many seconds are left of it."""


class Progress(Phases, Protocol):
    """Receives what a build is doing."""

    def stage(self, name: str, detail: str = "") -> None:
        """A stage starts."""

    def done(self, detail: str, *, reused: bool) -> None:
        """It ended; ``reused`` when its result was found in the store."""

    def note(self, text: str) -> None:
        """Something the user should know: a fallback, a choice made for them."""


class Silent:
    """Ignores everything."""

    def stage(self, name: str, detail: str = "") -> None:
        """Nothing."""

    def done(self, detail: str, *, reused: bool) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def begin(self, what: str, total: int) -> None:
        """Nothing."""

    def advance(self, steps: int) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""

    def overall(self, part: float, left: float) -> None:
        """Nothing."""


@contextlib.contextmanager
def captured() -> Iterator[io.StringIO]:
    """Keep what libraries print off the terminal: it would tear the progress bars and the JSON.

    Prints, warnings and log lines go nowhere; yields what was printed.
    """
    chatter = io.StringIO()
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(chatter),
            contextlib.redirect_stderr(chatter),
        ):
            warnings.simplefilter("ignore")
            yield chatter
    finally:
        logging.disable(before)
