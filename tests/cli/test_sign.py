"""``cswap-deploy sign`` and ``verify --key``: every file is under the signature, or exit 6."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from cswap_deploy.records.bundle import SIGNATURE, read_bundle
from cswap_deploy.records.signature import MAKE_KEYS

if TYPE_CHECKING:
    from conftest import Made, Ran

    Command = Callable[..., Ran]


class Keys(NamedTuple):
    """A pair, PEM."""

    private: Path
    public: Path


def make_keys(folder: Path, *, kind: str = "secp256r1", password: bytes | None = None) -> Keys:
    """By the library that ``openssl`` is made with too; ``kind`` is a curve, or ``rsa``."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    key = (
        rsa.generate_private_key(65537, 2048)
        if kind == "rsa"
        else ec.generate_private_key(getattr(ec, kind.upper())())
    )
    folder.mkdir(parents=True)
    keys = Keys(folder / "private.pem", folder / "public.pem")
    closed: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password is not None:
        closed = serialization.BestAvailableEncryption(password)
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    keys.private.write_bytes(key.private_bytes(pem, pkcs8, closed))
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    keys.public.write_bytes(key.public_key().public_bytes(pem, form))
    return keys


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys") / "pair")


@pytest.fixture
def signed(command: Command, made: Made, keys: Keys, tmp_path: Path) -> Path:
    """A signed copy of the bundle, to be changed."""
    bundle = shutil.copytree(made.bundle, tmp_path / "bundle")
    assert command("sign", bundle, "--key", keys.private).code == 0
    return bundle


def test_a_signed_bundle(command: Command, made: Made, keys: Keys, tmp_path: Path) -> None:
    bundle = shutil.copytree(made.bundle, tmp_path / "bundle")
    told = command("sign", bundle, "--key", keys.private, "--json").json()
    assert told["signature"] == str(bundle / SIGNATURE)
    assert told["files"] == len(read_bundle(bundle).files) + 1  # the manifest
    moved = bundle.rename(tmp_path / "renamed")
    done = command("verify", moved, "--key", keys.public)
    assert (done.code, done.err) == (0, "")
    assert f"over all {told['files']} files" in " ".join(done.out.split())
    assert "not in the manifest" not in done.out
    found = command("verify", moved, "--key", keys.public, "--json").json()
    assert (found["ok"], found["unlisted_files"]) == (True, [])
    assert found["findings"][0]["what"] == SIGNATURE


def test_who_has_no_key_is_served_as_before(command: Command, made: Made, signed: Path) -> None:
    done = command("verify", signed)
    assert done.code == 0
    assert "not held against a key" in done.out
    assert command("inspect", signed, "--json").json()["unlisted_files"] == []
    listed = {ref.path for ref in read_bundle(signed).files}
    assert SIGNATURE not in listed
    assert read_bundle(signed) == read_bundle(made.bundle)


def test_the_device_runs_a_signed_bundle(signed: Path, tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "a.png")
    ran = subprocess.run(
        [sys.executable, "-m", "cswap_deploy.runtime.cli", str(signed), str(tmp_path / "a.png")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr


def test_a_signed_bundle_passes_its_budgets(command: Command, signed: Path, tmp_path: Path) -> None:
    budgets = tmp_path / "budgets.toml"
    budgets.write_text("accuracy_drop_max = 1.0\n")
    assert command("check", signed, "--budget", budgets, "--recorded").code == 0


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_in_any_file_is_named(
    command: Command, keys: Keys, signed: Path, tmp_path: Path
) -> None:
    names = [str(p.relative_to(signed)) for p in sorted(signed.rglob("*")) if p.is_file()]
    assert {"manifest.json", "build.json", "model.onnx", SIGNATURE} <= set(names)
    for at, name in enumerate(names):
        copy = shutil.copytree(signed, tmp_path / f"copy-{at}")
        flip(copy / name)
        done = command("verify", copy, "--key", keys.public)
        assert done.code == 6, (name, done.out)
        assert name in done.err


@pytest.mark.parametrize(
    "name", ["notes.txt", ".gitattributes", ".github/workflows/a.yml", "engine/more.plan"]
)
def test_an_added_file(command: Command, keys: Keys, signed: Path, name: str) -> None:
    (signed / name).parent.mkdir(parents=True, exist_ok=True)
    (signed / name).write_text("more")
    done = command("verify", signed, "--key", keys.public)
    assert done.code == 6
    assert name in done.err


def test_a_removed_file_and_a_link(command: Command, keys: Keys, signed: Path) -> None:
    page = (signed / "report.md").read_bytes()
    (signed / "report.md").unlink()
    done = command("verify", signed, "--key", keys.public)
    assert done.code == 6
    assert "report.md" in done.err
    outside = signed.parent / "report.md"
    outside.write_bytes(page)
    (signed / "report.md").symlink_to(outside)
    done = command("verify", signed, "--key", keys.public)
    assert done.code == 6
    assert "report.md" in done.err
    (signed / "report.md").unlink()
    os.mkfifo(signed / "report.md")
    done = command("verify", signed, "--key", keys.public)
    assert done.code == 6
    assert "report.md" in done.err


def test_a_forger_who_seals_everything_anew(command: Command, keys: Keys, signed: Path) -> None:
    from made_up_bundle import reseal

    told = json.loads((signed / "manifest.json").read_text())
    reseal(signed / "manifest.json", told | {"created": "2020-01-01T00:00:00Z"})
    assert command("verify", signed).code == 0
    done = command("verify", signed, "--key", keys.public)
    assert done.code == 6
    assert "manifest.json" in done.err


def test_another_key(command: Command, keys: Keys, signed: Path, tmp_path: Path) -> None:
    other = make_keys(tmp_path / "other")
    done = command("verify", signed, "--key", other.public)
    assert done.code == 6
    assert "Key mismatch" in done.err
    # One who claims the right key.
    told = json.loads((signed / SIGNATURE).read_text())
    assert command("sign", signed, "--key", other.private).code == 0
    forged = json.loads((signed / SIGNATURE).read_text())
    forged["verificationMaterial"] = told["verificationMaterial"]
    (signed / SIGNATURE).write_text(json.dumps(forged))
    done = command("verify", signed, "--key", keys.public)
    assert done.code == 6
    assert "was not made with the key of" in done.err
    assert command("sign", signed, "--key", keys.private).code == 0
    assert command("verify", signed, "--key", keys.public).code == 0


def test_a_bundle_that_is_not_signed(command: Command, made: Made, keys: Keys) -> None:
    done = command("verify", made.bundle, "--key", keys.public)
    assert done.code == 6
    assert "is not signed" in done.err
    assert "fix: where it was built: cswap-deploy sign" in done.err


def test_a_signature_that_leaves_files_out(
    command: Command, keys: Keys, signed: Path, tmp_path: Path
) -> None:
    """As the library's own command makes them: git's files are under no signature."""
    from model_signing import hashing, signing

    made = tmp_path / "made.sig"
    hashes = hashing.Config().set_ignored_paths(paths=[SIGNATURE])
    signer = signing.Config().use_elliptic_key_signer(private_key=keys.private)
    signer.set_hashing_config(hashes).sign(signed, made)
    made.rename(signed / SIGNATURE)
    done = command("verify", signed, "--key", keys.public)
    assert done.code == 6
    assert "leaves out files" in done.err


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{}", b"[]", b"\xff", b"[" * 100_000, b'{"dsseEnvelope": {"payload": "e30="}}',
        b'{"dsseEnvelope": {"payload": 7}}',
    ],
)  # fmt: skip
def test_what_is_no_signature(command: Command, keys: Keys, signed: Path, content: bytes) -> None:
    (signed / SIGNATURE).write_bytes(content)
    done = command("verify", signed, "--key", keys.public)
    assert done.code == 6
    assert SIGNATURE in done.err


@pytest.mark.parametrize(
    "spoil",
    [
        lambda told: told.pop("verificationMaterial"),
        lambda told: told.update(mediaType="text/plain"),
        lambda told: told["dsseEnvelope"].update(signatures=[]),
        lambda told: told["dsseEnvelope"].update(payloadType="text/plain"),
        lambda told: told["verificationMaterial"].update(publicKey=None),
    ],
)
def test_a_signature_that_lacks_a_part(
    command: Command, keys: Keys, signed: Path, spoil: Callable[[dict[str, object]], None]
) -> None:
    told = json.loads((signed / SIGNATURE).read_text())
    spoil(told)
    (signed / SIGNATURE).write_text(json.dumps(told))
    done = command("verify", signed, "--key", keys.public)
    assert done.code == 6, done.err
    assert SIGNATURE in done.err


def test_a_signature_of_other_words(command: Command, keys: Keys, signed: Path) -> None:
    """The statement is what is signed."""
    told = json.loads((signed / SIGNATURE).read_text())
    statement = json.loads(base64.b64decode(told["dsseEnvelope"]["payload"]))
    statement["predicate"]["resources"].pop()
    told["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    (signed / SIGNATURE).write_text(json.dumps(told))
    done = command("verify", signed, "--key", keys.public)
    assert done.code == 6
    assert "was not made with the key of" in done.err


def test_built_again_in_place_it_is_no_longer_signed(
    command: Command, made: Made, keys: Keys, signed: Path, store: Path
) -> None:
    done = command("build", *made.flags, "-o", signed, "--store", store)
    assert done.code == 0, done.err
    done = command("verify", signed, "--key", keys.public)
    assert done.code == 6
    assert "is not signed" in done.err
    assert command("sign", signed, "--key", keys.private).code == 0
    assert command("verify", signed, "--key", keys.public).code == 0


def test_a_report_that_grows_is_signed_no_more(signed: Path) -> None:
    from cswap_deploy.pipeline import add_to_report
    from cswap_deploy.report.document import Section

    add_to_report(signed, Section("More", (), (), ()))
    assert not (signed / SIGNATURE).exists()
    assert SIGNATURE not in {ref.path for ref in read_bundle(signed).files}


def test_a_damaged_bundle_is_not_signed(
    command: Command, made: Made, keys: Keys, tmp_path: Path
) -> None:
    bundle = shutil.copytree(made.bundle, tmp_path / "bundle")
    flip(bundle / "model.onnx")
    done = command("sign", bundle, "--key", keys.private)
    assert done.code == 6
    assert "model.onnx" in done.err
    assert not (bundle / SIGNATURE).exists()
    assert command("sign", tmp_path, "--key", keys.private).code == 6


def test_keys_that_are_none(command: Command, made: Made, tmp_path: Path, keys: Keys) -> None:
    bundle = shutil.copytree(made.bundle, tmp_path / "bundle")
    rsa = make_keys(tmp_path / "rsa", kind="rsa")
    closed = make_keys(tmp_path / "closed", password=b"secret")
    other = make_keys(tmp_path / "curve", kind="secp224r1")
    words = tmp_path / "words.pem"
    words.write_text("no key")
    given = {
        keys.public: "no private key", rsa.private: "of no elliptic curve",
        closed.private: "fix: the key is encrypted: --key <(openssl ec -in",
        other.private: "Unsupported key for curve", words: "fix: pass the private key of a pair",
        tmp_path / "absent.pem": "No such file", tmp_path: "Is a directory",
    }  # fmt: skip
    for key, said in given.items():
        done = command("sign", bundle, "--key", key)
        assert (done.code, said in done.err) == (2, True), (key, done.err)
    assert command("sign", bundle, "--key", keys.private).code == 0
    for key in (keys.private, rsa.public, words, tmp_path / "absent.pem"):
        done = command("verify", bundle, "--key", key)
        assert (done.code, "no public key" in done.err) == (2, True), (key, done.err)


def test_a_key_in_the_bundle_vouches_for_nothing(
    command: Command, keys: Keys, signed: Path
) -> None:
    for name, key in (("sign", keys.private), ("verify", keys.public)):
        inside = shutil.copy(key, signed / key.name)
        done = command(name, signed, "--key", inside)
        assert done.code == 2
        assert "lies in the bundle" in done.err
        Path(inside).unlink()


def test_without_the_library(
    command: Command, keys: Keys, signed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    for arguments in (
        ("sign", signed, "--key", keys.private),
        ("verify", signed, "--key", keys.public),
    ):
        done = command(*arguments)
        assert done.code == 4
        assert "fix: pip install 'cswap-deploy[signing]'" in done.err
    assert command("verify", signed).code == 0


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_keys_by_the_line_that_is_told(
    command: Command, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = command("sign", "--help").out
    assert "openssl ecparam -name prime256v1 -genkey" in " ".join(told.split())
    monkeypatch.chdir(tmp_path)
    subprocess.run(MAKE_KEYS, shell=True, check=True, capture_output=True)
    bundle = shutil.copytree(made.bundle, tmp_path / "bundle")
    assert command("sign", bundle, "--key", "private.pem").code == 0
    assert command("verify", "bundle", "--key", "public.pem").code == 0


def test_the_library_reads_it_too(signed: Path, keys: Keys) -> None:
    ran = subprocess.run(
        [
            sys.executable, "-m", "model_signing", "verify", "key", str(signed), "--signature",
            str(signed / SIGNATURE), "--public_key", str(keys.public),
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
