"""Hold work to a limit, if need be in a process of its own: an abort or a hang is a failure too.

Limits are seconds of processor time, so that a busy machine changes nothing.
"""

from __future__ import annotations

import multiprocessing
import resource
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")
_PRELOADED = ["torch", "torch._dynamo", "torch.onnx", "onnxruntime", "onnxscript", "pydantic"]
"""Imported once; every process is a copy of one that has them."""
_WAIT = 8
"""Limit of the waiting, over that of the work: for work that sleeps, or a machine that is busy."""


class AbortedError(Exception):
    """A signal ended the process."""


class OutOfTimeError(Exception):
    """It ran past its limit and was ended."""


class RaisedError(Exception):
    """It raised; the message is its traceback."""


class _Alarm(BaseException):
    """Not an ``Exception``: code that answers every exception must not answer this one."""


@contextmanager
def limited(limit_s: float) -> Iterator[None]:
    """Hold what runs within to a limit, in this process; Python code alone can be ended so.

    Raises:
        OutOfTimeError: It took longer.
    """

    def end(_: int, __: FrameType | None) -> None:
        raise _Alarm

    before = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, limit_s)
    try:
        yield
    except _Alarm:
        raise OutOfTimeError(f"over {limit_s:g} s of processor time") from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def apart(work: Callable[..., T], *args: Any, limit_s: float) -> T:
    """``work(*args)``, from another process; both must be picklable.

    Raises:
        AssertionError: ``work`` raised one; the words are the same.
        RaisedError: It raised anything else.
        AbortedError: The process ended without an answer; says the signal.
        OutOfTimeError: It took longer than its limit.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, limit_s, work, args), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(_WAIT * limit_s):
            raise OutOfTimeError(f"no answer after {_WAIT * limit_s:g} s")
        kind, value = receiver.recv()
    except EOFError:
        process.join()
        ending = _ending(process.exitcode or 0)
        if ending == "SIGXCPU":
            raise OutOfTimeError(f"over {limit_s:g} s of processor time") from None
        raise AbortedError(ending) from None
    finally:
        process.kill()
        process.join()
        receiver.close()
    if kind == "value":
        return value  # type: ignore[no-any-return]
    raise AssertionError(value) if kind == "wrong" else RaisedError(value)


def _answer(
    sender: Connection, limit_s: float, work: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    seconds = round(limit_s)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 9))
    try:
        answer = ("value", work(*args))
    except AssertionError as err:
        answer = ("wrong", str(err))
    except BaseException:  # noqa: BLE001  (whatever it is, the parent is told)
        answer = ("raised", traceback.format_exc())
    sender.send(answer)


def _ending(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name
