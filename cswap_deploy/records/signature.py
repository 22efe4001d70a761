"""Who made a bundle: a signature over every file in it, with a key of the maker's own.

The library ``model-signing`` makes it and holds it: an in-toto statement of every file's sha256, in
a Sigstore bundle, signed offline with an elliptic-curve key. Its own command reads it as well:
``model_signing verify key BUNDLE --signature BUNDLE/bundle.sig --public_key public.pem``.
"""

from __future__ import annotations

import base64
import contextlib
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cswap_deploy.errors import ArtifactError, CswapError, UsageError, first_line, missing
from cswap_deploy.records.bundle import SIGNATURE
from cswap_deploy.records.files import write_atomic
from cswap_deploy.runtime.documents import parse, read_regular

if TYPE_CHECKING:
    from model_signing.hashing import Config as Hashing

MAKE_KEYS = (
    "openssl ecparam -name prime256v1 -genkey -noout -out private.pem && "
    "openssl ec -in private.pem -pubout -out public.pem"
)
"""Makes a pair of keys."""
_MOST_BYTES = 64 << 20
"""Of a signature, which names every file."""


def sign_files(folder: Path, key: Path) -> tuple[str, ...]:
    """Sign every file of a folder, whatever lists it; an earlier signature is replaced.

    Args:
        folder: A bundle that was verified.
        key: The private key, PEM, on the curve P-256, P-384 or P-521.

    Returns:
        The files under the signature, by their paths in the folder.

    Raises:
        UsageError: The key cannot be used, or lies in the folder.
        ArtifactError: The folder holds a link, or what is no file.
        MissingDependencyError: ``model-signing`` is not installed.
    """
    try:
        from model_signing import signing
    except ImportError as err:
        raise missing("model_signing", "signing", err) from err

    folder = folder.resolve()
    _require_outside(key, folder, "would be given away with it")
    try:
        signer = signing.Config().use_elliptic_key_signer(private_key=key)
    except _key_errors() as err:
        raise _unusable(key, "private", err) from err
    with tempfile.TemporaryDirectory(prefix="cswap-sign-") as scratch:
        made = Path(scratch, SIGNATURE)
        try:
            signer.set_hashing_config(_every_file()).sign(folder, made)
        except (ValueError, OSError) as err:
            raise ArtifactError(
                f"{folder} cannot be signed: {first_line(err)}",
                fix="put a file that may be read in its place",
            ) from err
        content = made.read_bytes()
    write_atomic(folder / SIGNATURE, content, option="a copy of the bundle elsewhere")
    return _signed(content)


def require_signature(folder: Path, key: Path) -> tuple[str, ...]:
    """Hold a bundle against its signature, and that against the key of who is to have made it.

    Nothing of the bundle is loaded; do this before anything is.

    Args:
        folder: The bundle.
        key: The public key, PEM; from its owner, not from the bundle.

    Returns:
        The files under the signature: all that are there.

    Raises:
        ArtifactError: There is no signature, it is not this key's, or a file was changed, added or
            removed since; names it.
        UsageError: The key cannot be used, or lies in the folder.
        MissingDependencyError: ``model-signing`` is not installed.
    """
    folder = folder.resolve()
    _require_outside(key, folder, "proves nothing: whoever changes the bundle can change it too")
    place = folder / SIGNATURE
    try:
        content = read_regular(place, within=folder, most=_MOST_BYTES)
    except (FileNotFoundError, NotADirectoryError) as err:
        raise ArtifactError(
            f"{folder} is not signed: it has no {SIGNATURE}",
            fix=f"where it was built: cswap-deploy sign {folder.name} --key private.pem",
        ) from err
    except OSError as err:
        raise ArtifactError(f"cannot read {place}: {err.strerror or err}") from err
    try:
        from cryptography.exceptions import InvalidSignature
        from model_signing import verifying
    except ImportError as err:
        raise missing("model_signing", "signing", err) from err
    try:
        verifier = verifying.Config().use_elliptic_key_verifier(public_key=key)
    except _key_errors() as err:
        raise _unusable(key, "public", err) from err
    again = "copy the bundle again, pass the public key of who signed it, or sign it again"
    try:
        names = _signed(content)
        with contextlib.redirect_stdout(sys.stderr):  # the library prints its warnings
            verifier.set_hashing_config(_every_file()).verify(folder, place)
    except InvalidSignature as err:
        raise ArtifactError(f"{place} was not made with the key of {key}", fix=again) from err
    except CswapError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as err:
        raise ArtifactError(f"{place} does not hold: {first_line(err)}", fix=again) from err
    return names


def _signed(content: bytes) -> tuple[str, ...]:
    """The files that a signature is over; what it leaves out is itself alone.

    Raises:
        ArtifactError: It is no signature, or leaves out more.
    """
    try:
        statement = parse(base64.b64decode(parse(content)["dsseEnvelope"]["payload"]))
        told: dict[str, Any] = statement["predicate"]
        left_out = told["serialization"].get("ignore_paths", [])
        names = tuple(str(resource["name"]) for resource in told["resources"])
    except (ValueError, LookupError, TypeError, AttributeError) as err:
        raise ArtifactError(
            f"{SIGNATURE} is no signature of a bundle: {first_line(err)}",
            fix="copy the bundle again, or sign it again",
        ) from err
    if left_out != [SIGNATURE]:
        raise ArtifactError(
            f"{SIGNATURE} leaves out files: {left_out!r:.200}", fix="cswap-deploy sign signs all"
        )
    return names


def _every_file() -> Hashing:
    """What is signed: every file but the signature; the library would leave out git's."""
    from model_signing.hashing import Config

    return Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)


def _key_errors() -> tuple[type[Exception], ...]:
    """What loading a key raises; ``AttributeError`` where it is of no curve."""
    from cryptography.exceptions import UnsupportedAlgorithm

    return OSError, ValueError, TypeError, AttributeError, UnsupportedAlgorithm


def _unusable(key: Path, kind: str, err: Exception) -> UsageError:
    if isinstance(err, TypeError):
        fix = f"the key is encrypted: --key <(openssl ec -in {key})"
    elif isinstance(err, OSError):
        fix = f"name a {kind} key that is there and may be read"
    else:
        fix = f"pass the {kind} key of a pair made by: {MAKE_KEYS}"
    words = "it is of no elliptic curve" if isinstance(err, AttributeError) else first_line(err)
    return UsageError(f"{key} is no {kind} key that can be used: {words}", fix=fix)


def _require_outside(key: Path, folder: Path, why: str) -> None:
    if key.resolve().is_relative_to(folder):
        raise UsageError(
            f"{key} lies in the bundle and {why}", fix="keep keys elsewhere, and pass one of those"
        )
