"""Whether the Hugging Face hub answers, asked once and quickly, and its own words when not.

The hub's libraries retry a dead connection for half a minute and more. One plain request first
tells a hub that is not there from one that is slow.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

from cswap_deploy.errors import MissingDependencyError, missing

_TIMEOUT_S = 10.0
_CLIENTS = frozenset(
    {
        "huggingface_hub",
        "httpx",
        "httpx2",
        "httpcore",
        "httpcore2",
        "requests",
        "urllib3",
        "urllib",
        "aiohttp",
        "fsspec",
    }
)


def reach_hub(repository: str, *, what: str, fix: str) -> None:
    """Ask the hub for a repository once; an answer of any kind but "server error" is enough.

    Args:
        repository: ``models/OWNER/NAME`` or ``datasets/OWNER/NAME``.
        what: What is wanted from it, for the error.
        fix: What to pass instead.

    Raises:
        MissingDependencyError: There is no connection, or the hub is in offline mode or down.
    """
    try:
        from huggingface_hub import constants
        from huggingface_hub.utils import get_session  # type: ignore[attr-defined]
    except ImportError as err:
        raise missing("huggingface_hub", "hub", err) from err
    endpoint = constants.ENDPOINT
    try:
        if constants.HF_HUB_OFFLINE:
            raise ConnectionError("HF_HUB_OFFLINE is set")
        answer = get_session().get(f"{endpoint}/api/{repository}", timeout=_TIMEOUT_S)
        if answer.status_code >= 500:
            raise ConnectionError(f"it answers {answer.status_code}")
    except Exception as err:
        if not hub_failure(err):
            raise
        raise MissingDependencyError(
            f"cannot fetch {what}: the hub at {endpoint} is not reached "
            f"(huggingface_hub {version('huggingface_hub')}): {hub_words(err)}",
            fix=fix,
        ) from err


def hub_failure(err: BaseException) -> bool:
    """Whether the network or the hub is at fault, whichever client library says so."""
    if isinstance(err, (ConnectionError, TimeoutError)):
        return True
    clients = {kind.__module__.partition(".")[0] for kind in type(err).__mro__}
    return bool(clients & _CLIENTS)


def hub_words(err: BaseException) -> str:
    """The library's own words, on one line, after its type."""
    words = " ".join(str(err).split())
    return f"{type(err).__name__}: {words[:600]}" if words else type(err).__name__


@contextmanager
def cache_only() -> Iterator[None]:
    """Inside, the hub's libraries use what was downloaded before and ask for nothing."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
