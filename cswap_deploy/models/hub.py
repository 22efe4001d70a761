"""The Hugging Face hub: whether it answers, and its failures as the package's errors.

The hub's libraries retry a dead connection for half a minute and more. One plain request first
tells a hub that is not there from one that is slow.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from types import ModuleType

from cswap_deploy.errors import MissingDependencyError

_TIMEOUT_S = 10.0
_CLIENTS = {
    "huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "urllib",
    "aiohttp", "fsspec",
}  # fmt: skip


def reach_hub(repository: str, *, what: str, fix: str) -> None:
    """Ask once for ``models/OWNER/NAME`` or ``datasets/OWNER/NAME``, called ``what`` in the error.

    Any answer but a server error will do.

    Raises:
        MissingDependencyError: There is no connection, or the hub is in offline mode or down.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    endpoint = constants.ENDPOINT
    words = (
        f"cannot fetch {what}: the hub at {endpoint} is not reached "
        f"(huggingface_hub {version('huggingface_hub')})"
    )
    with hub_errors(words, fix=fix):
        if constants.HF_HUB_OFFLINE:
            raise ConnectionError("HF_HUB_OFFLINE is set")
        answer = get_session().get(f"{endpoint}/api/{repository}", timeout=_TIMEOUT_S)
        if answer.status_code >= 500:
            raise ConnectionError(f"it answers {answer.status_code}")


@contextmanager
def hub_errors(words: str, *, fix: str, also: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn failures of the network or the hub, whatever library raises them, into one error.

    The message begins with ``words``, the library's own follow; ``also`` are further exceptions
    that are such failures.

    Raises:
        MissingDependencyError: For such a failure; other exceptions pass.
    """
    try:
        yield
    except Exception as err:
        if not isinstance(err, also) and not hub_failure(err):
            raise
        raise MissingDependencyError(f"{words}: {hub_words(err)}", fix=fix) from err


def hub_failure(err: BaseException) -> bool:
    """Whether the network or the hub is to blame, whichever client library raised it."""
    if isinstance(err, (ConnectionError, TimeoutError)):
        return True
    clients = {kind.__module__.partition(".")[0] for kind in type(err).__mro__}
    return bool(clients & _CLIENTS)


def hub_words(err: BaseException) -> str:
    """An error's type and its message, on one line."""
    words = " ".join(str(err).split())
    return f"{type(err).__name__}: {words[:600]}" if words else type(err).__name__


@contextmanager
def settings_within(module: ModuleType, **settings: object) -> Iterator[None]:
    """Give other values to a library's settings in the block."""
    before = {name: vars(module)[name] for name in settings.keys() & vars(module).keys()}
    vars(module).update(settings)
    try:
        yield
    finally:
        vars(module).update(before)
