"""Run the command; errors become messages and exit codes (see ``errors``)."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from cswap_deploy.errors import printable
from cswap_deploy.runtime.process import guarded

_INTERRUPTED = 130


def main() -> None:
    """The entry point of ``cswap-deploy``.

    Only what stops it is imported before it begins: imports take most of its first second.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    kept = "; finished stages are kept, the same command goes on from there"
    sys.exit(guarded(_command, _fail, kept=kept))


def _command() -> int:
    import typer

    from cswap_deploy.cli.commands import command_line
    from cswap_deploy.runtime.host import share_cores

    share_cores()
    try:
        asked = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
        code = command_line(asked)(standalone_mode=False)
    except typer.Abort as err:
        raise KeyboardInterrupt from err
    except SystemExit as err:
        if isinstance(err.__context__, BrokenPipeError):  # click's way to leave
            raise err.__context__ from None
        raise
    except Exception as err:
        show: Callable[[], None] | None = getattr(err, "show", None)  # of click's usage errors
        if show is None:
            raise
        return _misused(err, show)
    if code == _INTERRUPTED:  # what typer makes of Ctrl-C, without a word
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0


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


def _fail(code: int, message: str) -> int:
    print(f"error: {printable(message)}", file=sys.stderr)
    if "--json" in sys.argv:
        print(json.dumps({"error": message, "exit_code": code}))
    return code
