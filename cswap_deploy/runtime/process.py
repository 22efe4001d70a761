"""How both commands begin and end: their streams, the signals that stop them, their exit codes."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cswap_deploy.errors import CswapError, MissingDependencyError, lacking

_STOPS = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "ended by SIGTERM",
    signal.SIGHUP: "ended by SIGHUP",
}
_PATIENCE_SECONDS = 2.0
"""A signal so soon after the first would break off the clearing up."""

Fail = Callable[[int, str], object]
"""Says an exit code and a message, on stderr and where results go as JSON there too."""


class Stopper:
    """What handles the signals: Ctrl-C, ``kill``, a terminal that is closed."""

    def __init__(self) -> None:
        self.came: list[int] = []
        """Their numbers."""
        self._last = 0.0
        self._notice: Callable[[], None] | None = None

    def __call__(self, number: int, frame: Any) -> None:
        """What is under way ends as after Ctrl-C, so that all that it holds is cleared away."""
        if self.came and time.monotonic() - self._last < _PATIENCE_SECONDS:
            return
        self._last = time.monotonic()
        self.came.append(number)
        if self._notice is None:
            raise KeyboardInterrupt
        self._notice()

    @contextmanager
    def noticing(self, notice: Callable[[], None]) -> Iterator[None]:
        """Within, a signal calls ``notice`` and raises nothing."""
        self._notice = notice
        try:
            yield
        finally:
            self._notice = None


class _Stream(io.FileIO):
    """stdout, which remembers that it could not be written; stderr, which nothing waits for."""

    failed = False

    def write(self, data: Any) -> int:
        """See ``io.FileIO``."""
        try:
            return super().write(data)
        except OSError:
            self.failed = True
            if self.fileno() == 1:
                raise
            return len(data)


def guarded(command: Callable[[], int], fail: Fail, *, kept: str = "") -> int:
    """Run a command; what ends it early is said in one line, unless it is a bug.

    Args:
        command: Gives its exit code.
        fail: Tells the user.
        kept: What to say of an interrupted command's work.

    Returns:
        The exit code; 128 and the signal's number where one came.

    Raises:
        Exception: What is no ``CswapError`` and does not come of what this machine lacks.
    """
    with _stop_signals() as stopper:
        try:
            try:
                _open_streams()
                return command()
            finally:
                sys.stdout.flush()
        except (Exception, KeyboardInterrupt) as err:  # noqa: BLE001 - bugs are raised again
            if stopper.came or isinstance(err, KeyboardInterrupt):
                number = stopper.came[0] if stopper.came else signal.SIGINT
                return _told(fail, 128 + number, _STOPS[signal.Signals(number)] + kept)
            return _explain(err, fail)


def _explain(err: Exception, fail: Fail) -> int:
    if isinstance(err, BrokenPipeError):  # whoever read the results has left
        _silence_stdout()
        return 0
    if isinstance(err, OSError) and _stdout_failed():
        _silence_stdout()
        code = MissingDependencyError.exit_code
        return _told(fail, code, f"cannot write the results: {err.strerror}")
    told = lacking(err) or err
    if not isinstance(told, CswapError):
        raise err
    return _told(fail, told.exit_code, str(told))


def _told(fail: Fail, code: int, message: str) -> int:
    try:
        fail(code, message)
        sys.stdout.flush()
    except OSError:  # stdout, where results go as JSON, takes nothing
        _silence_stdout()
    return code


def _silence_stdout() -> None:
    """Nothing more goes there, or Python complains again at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _open_streams() -> None:
    """See that the first three files are open: what is opened later would become stdout.

    Raises:
        MissingDependencyError: stdout is closed.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
    closed = sys.stdout is None
    sys.stdout, sys.stderr = _watched(sys.stdout, 1), _watched(sys.stderr, 2)
    if closed:
        raise MissingDependencyError(
            "stdout is closed, so the results cannot be written",
            fix="open it: > FILE, or > /dev/null",
        )


def _watched(stream: Any, number: int) -> Any:
    """A stream as Python opens it, through :class:`_Stream`; what others put there stays."""
    if stream is not None and (type(stream) is not io.TextIOWrapper or _number(stream) != number):
        return stream
    raw = _Stream(number, "wb", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw), getattr(stream, "encoding", None), getattr(stream, "errors", None),
        line_buffering=number == 2 or raw.isatty(),
    )  # fmt: skip


def _number(stream: Any) -> int:
    try:
        return int(stream.fileno())
    except (OSError, ValueError):  # in memory
        return -1


def _stdout_failed() -> bool:
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return isinstance(raw, _Stream) and raw.failed


@contextmanager
def _stop_signals() -> Iterator[Stopper]:
    """Handle the signals; those that whoever started this wants ignored (``nohup``) stay so."""
    stopper = Stopper()
    if threading.current_thread() is not threading.main_thread():
        yield stopper
        return
    before = {s: signal.getsignal(s) for s in _STOPS}
    ours = [s for s, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    for number in ours:
        signal.signal(number, stopper)
    try:
        yield stopper
    finally:
        if not stopper.came:  # else another one finds the process clearing up
            for number in ours:
                signal.signal(number, before[number])
