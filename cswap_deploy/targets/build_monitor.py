"""A TensorRT builder's progress on the screen, and Ctrl-C during a build."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cswap_deploy.progress import Progress
from cswap_deploy.runtime.process import Stopper


def make_monitor(trt: Any, progress: Progress) -> Any:
    """Show a builder's progress; the outermost counted phase is the bar.

    Source:
        TensorRT Python API, ``IProgressMonitor``: a step that answers ``False`` cancels the build.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.interrupted = False
            self._bar = ""
            self._done = 0

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is not None and not self._bar:
                self._bar, self._done = phase, 0
                self._tell(lambda: progress.begin(phase[:1].lower() + phase[1:], steps))

        def step_complete(self, phase: str, step: int) -> bool:
            if phase == self._bar and step >= self._done:
                more, self._done = step + 1 - self._done, step + 1
                self._tell(lambda: progress.advance(more))
            return not self.interrupted

        def phase_finish(self, phase: str) -> None:
            if phase == self._bar:
                self._bar = ""
                self._tell(progress.end)

        def _tell(self, tell: Callable[[], None]) -> None:
            try:
                tell()
            except KeyboardInterrupt:  # what leaves a callback is printed and forgotten
                self.interrupted = True

    return Monitor()


@contextmanager
def noticing_ctrl_c(monitor: Any) -> Iterator[None]:
    """Ctrl-C ends the build at its next step.

    The only Python code that runs meanwhile is the callbacks, most of all the logger's, and an
    exception that leaves one is printed by the binding and forgotten (tensorrt-rtx 1.7). So the
    signal must raise none.
    """

    def notice(*_: object) -> None:
        monitor.interrupted = True

    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    if isinstance(handler, Stopper):  # the command's own
        with handler.noticing(notice):
            yield
        return
    if not main or handler is not signal.default_int_handler:
        yield  # the caller handles Ctrl-C
        return
    signal.signal(signal.SIGINT, notice)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
