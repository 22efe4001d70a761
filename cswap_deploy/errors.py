"""What can go wrong, and the exit code that says so.

    CswapError                       user errors: shown without a traceback
    ├── UsageError               2   a flag, a setting or a model name is wrong
    ├── GateError                3   a budget or a regression gate failed
    ├── MissingDependencyError   4   a package, device, dataset or hub is not there
    ├── StageError               5   a stage refused its input
    │   ├── PruneError               nothing left to remove, or the ratio cannot be met
    │   ├── ExportError              the model does not export, or the graph lost parity
    │   └── BuildError               the runtime's parser or builder refused the graph
    └── ArtifactError            6   an artefact is damaged or does not fit this device

Anything else that escapes is a bug: exit code 1, with its traceback; where this machine lacks what
it takes (memory, room on the disk, a permission: ``lacking``) it is 4. Signals exit with 128 and
their number: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

_LIMITS = {
    errno.ENOMEM: (
        "memory ran out",
        "close other programs, raise the limit (`ulimit -v unlimited`), or take a machine with "
        "more memory",
    ),
    errno.EAGAIN: (
        "no more threads or processes can be started",
        "raise the limit (`ulimit -u`, pids.max of a container), or set OMP_NUM_THREADS=1",
    ),
    errno.EMFILE: ("this process may not open more files", "raise the limit: `ulimit -n 4096`"),
    errno.ENFILE: ("this machine has too many files open", "close other programs"),
    errno.EFBIG: (
        "a file became larger than this process or the disk's file system allows",
        "raise the limit: `ulimit -f unlimited`",
    ),
}
"""Of a process: what it lacks, and what helps."""
_DISK = {
    errno.ENOSPC: ("the disk is full", "free some space"),
    errno.EDQUOT: ("the quota of disk space is used up", "free some space"),
    errno.EROFS: ("the disk cannot be written", "name a folder on another disk"),
    errno.EACCES: ("not permitted", "change who may use it (`ls -ld`), or name another"),
    errno.EPERM: ("not permitted", "change who may use it (`ls -ld`), or name another"),
    errno.EIO: ("the disk or the device fails", "look into the system's log: `dmesg`"),
    errno.ESTALE: ("the network disk is gone", "mount it again"),
}
_TOLD = {
    "can't allocate memory": errno.ENOMEM, "Cannot allocate memory": errno.ENOMEM,
    "not enough memory": errno.ENOMEM, "bad_alloc": errno.ENOMEM, "bad allocation": errno.ENOMEM,
    "out of memory": errno.ENOMEM, "Failed to allocate memory": errno.ENOMEM,
    "failed to map segment": errno.ENOMEM, "could not create a primitive": errno.ENOMEM,
    "can't start new thread": errno.EAGAIN,
    "Resource temporarily unavailable": errno.EAGAIN, "Too many open files": errno.EMFILE,
    "File too large": errno.EFBIG, "No space left on device": errno.ENOSPC,
}  # fmt: skip
"""How libraries say it in errors of their own."""


def printable(text: str) -> str:
    """For a terminal: what is not printable is spelled out, so that a name from a file that someone
    else made cannot move the cursor or colour what follows.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


class CswapError(Exception):
    """A failure the user can mend; the message says what failed and, when known, the fix."""

    exit_code = 1

    def __init__(self, message: str, *, fix: str | None = None, log: tuple[str, ...] = ()) -> None:
        super().__init__(message if fix is None else f"{message}\n  fix: {fix}")
        self.fix = fix
        self.log = log
        """The tool's own words, line by line."""


class UsageError(CswapError):
    """A flag, a setting, a model name or a dataset is wrong."""

    exit_code = 2


class GateError(CswapError):
    """A budget or a regression gate failed."""

    exit_code = 3


class MissingDependencyError(CswapError):
    """A package, a device, a dataset or a hub is not there."""

    exit_code = 4


class StageError(CswapError):
    """A stage refused its input."""

    exit_code = 5


class PruneError(StageError):
    """Nothing is left to remove, or the requested ratio cannot be met."""


class ExportError(StageError):
    """The model does not export to ONNX, or a graph pass changed its outputs."""


class BuildError(StageError):
    """A runtime's parser or builder refused the graph; ``log`` holds its words."""


class ArtifactError(CswapError):
    """An artefact is damaged, incomplete, or does not fit this device."""

    exit_code = 6


def missing(module: str, extra: str, err: ImportError) -> MissingDependencyError:
    """The error for an optional package, telling absent from broken."""
    absent = isinstance(err, ModuleNotFoundError) and err.name == module
    state = "is not installed" if absent else f"is installed but does not load: {err}"
    return MissingDependencyError(f"{module} {state}", fix=f"pip install 'cswap-deploy[{extra}]'")


def own_words(err: BaseException) -> tuple[str, ...]:
    """A tool's message as lines, for the ``log`` of the error that replaces it."""
    lines = (line.strip() for line in str(err).splitlines())
    return tuple(line for line in lines if line)


def first_line(err: BaseException) -> str:
    """What an exception says in its first line, or its name where it says nothing."""
    return (str(err).strip().splitlines() or [type(err).__name__])[0]


def lacking(err: BaseException) -> MissingDependencyError | None:
    """What of this machine an error comes of, as the error to show; ``None`` where it does not.

    Memory, threads, open files and sizes of files are found below a ``CswapError`` too: its advice
    is about something else. The disk and permissions are not: it has said those itself.
    """
    own = isinstance(err, CswapError)
    for cause in _causes(err):
        number = _resource(cause)
        known = _LIMITS if own else _LIMITS | _DISK
        if number in known and not (own and cause is err):
            what, fix = known[number]
            name = getattr(cause, "filename", None)
            where = f"{os.fsdecode(name)}: " if isinstance(name, (str, bytes)) else ""
            return MissingDependencyError(f"{where}{what} ({first_line(cause)})", fix=fix)
    return None


def _causes(err: BaseException) -> Iterator[BaseException]:
    """An error, and what it was raised from; what was handled meanwhile is another matter."""
    seen: BaseException | None = err
    while seen is not None:
        yield seen
        seen = seen.__cause__


def _resource(err: BaseException) -> int:
    """The system's number for what an error is about; 0 where it is about something else."""
    if isinstance(err, MemoryError):
        return errno.ENOMEM
    if isinstance(err, OSError) and err.errno:
        return err.errno
    words = str(err)
    return next((number for told, number in _TOLD.items() if told in words), 0)
