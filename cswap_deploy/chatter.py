"""Keep what libraries print off the terminal: it would tear the progress bars and the JSON."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def captured() -> Iterator[io.StringIO]:
    """Prints, warnings and log lines go nowhere; yields what was printed."""
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
