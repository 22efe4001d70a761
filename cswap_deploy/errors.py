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

Anything else that escapes is a bug: exit code 1, with its traceback. Ctrl-C exits with 130.
"""

from __future__ import annotations


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
