"""Run the command; errors become messages and exit codes (see ``errors``)."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import typer

from cswap_deploy.cli.commands import command_line
from cswap_deploy.errors import CswapError
from cswap_deploy.runtime.host import share_cores

_INTERRUPTED = 130


def main() -> None:
    """The entry point of ``cswap-deploy``."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    share_cores()
    try:
        asked = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
        code = command_line(asked)(standalone_mode=False)
        if code == _INTERRUPTED:  # what typer makes of Ctrl-C, without a word
            code = _interrupted()
        sys.stdout.flush()
    except CswapError as err:
        code = _fail(err.exit_code, str(err))
    except (KeyboardInterrupt, typer.Abort):
        code = _interrupted()
    except (BrokenPipeError, SystemExit) as err:
        if isinstance(err, SystemExit) and not isinstance(err.__context__, BrokenPipeError):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whoever read stdout has left
        code = 0
    except Exception as err:
        show: Callable[[], None] | None = getattr(err, "show", None)  # of click's usage errors
        if show is None:
            raise  # a bug: Python prints the traceback and exits with 1
        code = _misused(err, show)
    sys.exit(code if isinstance(code, int) else 0)


def _misused(err: Any, show: Callable[[], None]) -> int:
    """A flag that does not exist or lacks its value; some settings have no flag."""
    from cswap_deploy.config import sections
    from cswap_deploy.settings import flag_of

    typed = str(getattr(err, "option_name", "")).lstrip("-").removeprefix("no-")
    for section in sections().values():
        name = typed.replace("-", "_")
        if name in section.model_fields and flag_of(section, name).expert:
            return _fail(
                2, f"--{typed} is no flag: it is a setting for a TOML file\n"
                f"  fix: write `{typed} = ...` into FILE.toml, and pass --config FILE.toml",
            )  # fmt: skip
    if "--json" in sys.argv:
        return _fail(2, str(getattr(err, "message", err)))
    show()
    return 2


def _interrupted() -> int:
    return _fail(
        _INTERRUPTED, "interrupted; finished stages are kept, the same command goes on from there"
    )


def _fail(code: int, message: str) -> int:
    typer.echo(f"error: {message}", err=True)
    if "--json" in sys.argv:
        typer.echo(json.dumps({"error": message, "exit_code": code}))
    return code
