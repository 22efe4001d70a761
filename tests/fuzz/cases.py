"""Runs cases, each known by its parser and number, and says what was raised that is not ours."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType

from fuzz.parsers import PARSERS, Parser

LIMIT_S = 20
"""Processor time of a case; a parser that takes more hangs."""
MEMORY = 6 << 30
"""Bytes that a case may ask for, beside what the process has."""


@dataclass
class Found:
    """What the cases of a parser came to."""

    cases: int = 0
    read: int = 0
    """Without an error."""
    seconds: float = 0.0
    faults: dict[str, list[int]] = field(default_factory=dict)
    """What was raised, and where -> the cases."""


def spoilt(parser: Parser, seeds: list[bytes], name: str, case: int) -> bytes:
    """The file of a case: the same each time."""
    rng = random.Random(f"{name}/{case}")
    return parser.mutate(rng, rng.choice(seeds))


class _OutOfTimeError(BaseException):
    """Not an ``Exception``: a reader that answers every exception must not answer this one."""


def run_here(name: str, cases: range) -> Iterator[tuple[int, str | None]]:
    """Each case, and what is wrong with it: ``None`` for refused as it should be, else "" if it was
    read."""
    from cswap_deploy.errors import CswapError

    parser = PARSERS[name]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seeds, read = parser.seeds(), parser.reader()
        path = Path(folder, parser.file)
        for case in cases:
            path.write_bytes(spoilt(parser, seeds, name, case))
            wrong: str | None = ""
            try:
                signal.setitimer(signal.ITIMER_VIRTUAL, LIMIT_S)
                read(path)
            except CswapError:
                wrong = None
            except (Exception, _OutOfTimeError) as err:  # noqa: BLE001 - that is the question
                wrong = _where(err)
            finally:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            yield case, wrong


def run_apart(name: str, cases: range) -> Found:
    """The same in processes of their own: a crash of one is a fault of its case."""
    found, began = Found(), time.monotonic()
    context = multiprocessing.get_context("fork")
    following = cases.start
    while following < cases.stop:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=_send, args=(sender, name, range(following, cases.stop)), daemon=True
        )
        process.start()
        sender.close()
        ending = ""
        try:
            while following < cases.stop:
                if not receiver.poll(10 * LIMIT_S):
                    ending = "hangs"
                    break
                case, wrong = receiver.recv()
                if case is None:
                    raise RuntimeError(f"{name}, {following}: the harness failed\n{wrong}")
                _count(found, case, wrong)
                following = case + 1
        except EOFError:
            ending = "?"
        finally:
            process.kill() if ending == "hangs" else None
            process.join()
            receiver.close()
        if ending:
            code = process.exitcode or 0
            words = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
            words = ending if ending == "hangs" else words
            _count(found, following, words)
            following += 1
    found.seconds = time.monotonic() - began
    return found


def _count(found: Found, case: int, wrong: str | None) -> None:
    found.cases += 1
    if wrong:
        found.faults.setdefault(wrong, []).append(case)
    elif wrong == "":
        found.read += 1


def _send(sender: Connection, name: str, cases: range) -> None:
    def end(_: int, __: FrameType | None) -> None:
        raise _OutOfTimeError

    signal.signal(signal.SIGVTALRM, end)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # decoders write there themselves
    try:
        _send_each(sender, name, cases)
    except BaseException:  # noqa: BLE001 - whatever it is, the parent is told
        sender.send((None, traceback.format_exc()))


def _send_each(sender: Connection, name: str, cases: range) -> None:
    for case, wrong in run_here(name, cases):
        if case == cases.start:  # its libraries are loaded now
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
        sender.send((case, wrong))


def _where(err: BaseException) -> str:
    """The exception, and our last line on its way."""
    frames = [f for f in traceback.extract_tb(err.__traceback__) if "cswap_deploy" in f.filename]
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    words = (str(err).splitlines() or [""])[0][:100]
    return f"{type(err).__name__} at {place}: {words}"
