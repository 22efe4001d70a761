"""Manifests and records of builds say themselves whether they are as they were written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest
from made_up_bundle import made_up_manifest, reseal, write_made_up_bundle

from cswap_deploy.errors import ArtifactError
from cswap_deploy.records.bundle import (
    BuildRecord,
    examine_bundle,
    read_bundle,
    read_plan,
    verify_bundle,
)
from cswap_deploy.records.manifest import Manifest, schema
from cswap_deploy.records.value import read_value, write_sealed
from cswap_deploy.runtime.bundle import DeviceBundle
from cswap_deploy.runtime.documents import UNSEALED, parse_sealed, sealed
from cswap_deploy.runtime.schema import CHECKED, SAID, check, manifest_schema

if TYPE_CHECKING:
    from conftest import Made, Ran

Command = Callable[..., "Ran"]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    write_made_up_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def copy(made: Made, tmp_path: Path) -> Path:
    return shutil.copytree(made.bundle, tmp_path / "copy")


def flipped(content: bytes, at: int, bit: int) -> bytes:
    changed = bytearray(content)
    changed[at] ^= 1 << bit
    return bytes(changed)


@pytest.mark.parametrize(
    ("name", "since"), [("manifest.json", Manifest.sealed_since), ("build.json", 3)]
)
def test_one_flipped_bit_in_every_byte_is_refused(made: Made, name: str, since: int) -> None:
    content = (made.bundle / name).read_bytes()
    assert parse_sealed(content, since=since)[1]
    accepted = []
    for at in range(len(content)):
        try:
            parse_sealed(flipped(content, at, at % 8), since=since)
        except ValueError:
            continue
        accepted.append(at)
    assert not accepted, f"of {len(content)} bytes"


@pytest.mark.parametrize("field", ["schema_version", "seal"])
def test_every_bit_of_what_could_switch_the_seal_off_is_held(made: Made, field: str) -> None:
    content = (made.bundle / "manifest.json").read_bytes()
    start = content.index(f'"{field}"'.encode())
    for at in range(start - 2, content.index(b"\n", start) + 1):
        for bit in range(8):
            with pytest.raises(ValueError):  # noqa: PT011 the words are those of many faults
                parse_sealed(flipped(content, at, bit), since=5)


def test_a_flipped_bit_is_refused_by_everyone_who_reads_a_bundle(
    command: Command, copy: Path, tmp_path: Path
) -> None:
    manifest = copy / "manifest.json"
    content = manifest.read_bytes()
    (tmp_path / "budgets.toml").write_text("params_max = 20_000\n")
    at = content.index(b'"top1": 0.') + len(b'"top1": 0.')
    manifest.write_bytes(flipped(content, at, 0))
    for line in (
        ("verify", copy), ("inspect", copy), ("explain", copy), ("compare", copy, copy),
        ("check", copy, "--budget", tmp_path / "budgets.toml"), ("bench", copy),
        ("history", "add", tmp_path / "h.db", copy),
    ):  # fmt: skip
        done = command(*line)
        assert (done.code, done.out) == (6, ""), line
        assert f"cannot read {manifest}: it was changed: its seal is not" in done.err
    with pytest.raises(ArtifactError, match="its seal is not"):
        DeviceBundle.open(copy)


def test_a_flipped_byte_in_any_file_is_refused_by_name(
    command: Command, made: Made, copy: Path, tmp_path: Path
) -> None:
    (tmp_path / "budgets.toml").write_text("params_max = 20_000\n")
    names = [ref.path for ref in read_bundle(copy).files]
    assert len(names) >= 7
    for name in names:
        file = copy / name
        content = file.read_bytes()
        file.write_bytes(flipped(content, len(content) // 2, 3))
        limits = tmp_path / "budgets.toml"
        for line in (("verify", copy), ("inspect", copy), ("check", copy, "--budget", limits)):
            done = command(*line)
            assert done.code == 6, (name, line, done)
            assert f"{name} has sha256 " in done.err
        file.write_bytes(content)
    assert command("verify", copy).code == 0


def test_a_seal_taken_away_is_missed(copy: Path) -> None:
    """With the version lowered too, the sealed record beside it tells."""
    told = json.loads((copy / "manifest.json").read_text())
    del told["seal"]
    (copy / "manifest.json").write_text(json.dumps(told))
    with pytest.raises(ArtifactError, match="it has no seal in schema version 5"):
        read_bundle(copy)
    (copy / "manifest.json").write_text(json.dumps(told | {"schema_version": 4}))
    assert not read_bundle(copy).is_sealed
    with pytest.raises(ArtifactError, match=r"build\.json is sealed and the manifest is not"):
        verify_bundle(copy)


def test_a_seal_of_earlier_schemas_is_none(copy: Path) -> None:
    told = json.loads((copy / "manifest.json").read_text())
    reseal(copy / "manifest.json", told | {"schema_version": 4})
    with pytest.raises(ArtifactError, match="it has a seal in schema version 4"):
        read_bundle(copy)


def test_a_value_is_sealed_anew_each_time(tmp_path: Path) -> None:
    first = write_sealed(tmp_path / "a.json", made_up_manifest())
    second = write_sealed(tmp_path / "b.json", first.model_copy(update={"tool_version": "9"}))
    again = write_sealed(tmp_path / "c.json", first)
    assert first.is_sealed
    assert first.seal != second.seal
    assert first == again == read_value(tmp_path / "c.json", Manifest)
    with pytest.raises(ValueError, match="a document has one seal"):
        sealed(f'{{"seal": "{UNSEALED}", "other": "{UNSEALED}"}}')


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda m: m["onnx"].update(sha256="0" * 64),
            "onnx and files have another sha256 of model",
        ),
        (
            lambda m: m["onnx"].update(size_bytes=1),
            "onnx and files have another size of model.onnx",
        ),
        (
            lambda m: m["targets"][1]["engine"].update(sha256="0" * 64),
            "targets.1.engine and files have another sha256 of engine/tensorrt-rtx/model.engine",
        ),
        (
            lambda m: m["targets"][1]["engine"].update(extra_files=["layers.json"]),
            "targets.1.engine has files beside it that are not listed",
        ),
        (
            lambda m: m["onnx"].update(path="other.onnx"),
            "onnx names other.onnx, which is not listed in files",
        ),
        (lambda m: m["files"].append(m["files"][0]), "twice"),
    ],
)
def test_a_digest_that_is_stated_twice_is_one(
    bundle: Path, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    told = json.loads((bundle / "manifest.json").read_text())
    change(told)
    reseal(bundle / "manifest.json", told)
    for read in (verify_bundle, DeviceBundle.open):
        with pytest.raises(ArtifactError, match=r"manifest\.json is damaged: ") as caught:
            read(bundle)
        assert words in str(caught.value)
        assert caught.value.exit_code == 6


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (
            "manifest.json",
            {"pruned": {"units": 1, "params": 1, "macs": 1}},
            "another size of the pr",
        ),
        (
            "manifest.json",
            {"ratio_effective": {"params": 0.9}},
            "another effective ratio of params",
        ),
        ("manifest.json", {"settings": {"ratio": 0.4, "ratio_of": "macs"}}, "setting ratio_of is"),
    ],
)
def test_what_manifest_and_plan_both_say_agrees(
    bundle: Path, name: str, change: dict[str, Any], words: str
) -> None:
    told = json.loads((bundle / name).read_text())
    reseal(bundle / name, told | change)
    (wrong,) = examine_bundle(bundle).wrong
    assert wrong.what == "plan.json"
    assert words in wrong.words


@pytest.mark.parametrize(
    "settings", [{}, {"ratio": "much"}, {"ratio": 0.4, "ratio_of": "luck"}, {"ratio_of": "params"}]
)
def test_what_was_asked_is_there(command: Command, bundle: Path, settings: dict[str, Any]) -> None:
    told = json.loads((bundle / "manifest.json").read_text())
    reseal(bundle / "manifest.json", told | {"settings": settings})
    done = command("inspect", bundle)
    assert done.code == 6
    assert "manifest.json is damaged: the setting ratio" in done.err
    plan = json.loads((bundle / "plan.json").read_text())
    (bundle / "plan.json").write_text(json.dumps(plan | {"settings": settings}))
    with pytest.raises(ArtifactError, match=r"plan\.json is damaged: the setting "):
        read_plan(bundle)


def test_a_record_of_another_network_is_refused(copy: Path) -> None:
    told = json.loads((copy / "manifest.json").read_text())
    told["model"]["weights_sha256"] = "0" * 64
    reseal(copy / "manifest.json", told)
    with pytest.raises(ArtifactError, match=r"build\.json is of another network's weights"):
        verify_bundle(copy)


@pytest.mark.parametrize(
    "content",
    [
        b'{"schema_version": 3, "schema_version": 3}', b'{"schema_version": NaN}',
        b'{"schema_version": 1e999}', b'{"schema_version": ' + b"9" * 5000 + b"}",
        b"[" * 100_000, b'{"schema_version": 3, "files": ' + b"[" * 80 + b"]" * 80 + b"}",
        b'{"schema_version": 3, "prune_key": "\\ud800"}', b"\xff\xfe{\x00}\x00", b"",
    ],
    ids=["twice", "nan", "infinite", "digits", "deep", "deeper", "half", "utf-16", "empty"],
)  # fmt: skip
def test_json_with_surprises_is_damage(tmp_path: Path, content: bytes) -> None:
    for name, kind in (("build.json", BuildRecord), ("manifest.json", Manifest)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ArtifactError, match=f"{name} is not a ") as caught:
            read_value(tmp_path / name, kind)
        assert len(str(caught.value)) < 500


# --- the published schema ------------------------------------------------------------------------


def test_the_published_schema_is_the_code_s(command: Command) -> None:
    """Made again by ``json.dumps(schema(), indent=1)`` and a line's end."""
    assert manifest_schema() == schema()
    done = command("verify", "--schema")
    assert done.code == 0
    assert json.loads(done.out) == schema()
    jsonschema.Draft202012Validator.check_schema(schema())


def test_a_real_manifest_is_of_the_published_schema(made: Made) -> None:
    told = json.loads((made.bundle / "manifest.json").read_text())
    validator = jsonschema.Draft202012Validator(manifest_schema())
    validator.validate(told)
    check(told, manifest_schema())
    for broken in (
        {name: value for name, value in told.items() if name != "seal"},
        told | {"schema_version": 4}, told | {"more": 1}, told | {"created": 3},
        told | {"model": told["model"] | {"weights_sha256": -1}},
        told | {"targets": {}}, told | {"shared_images": True}, told | {"dense": None},
    ):  # fmt: skip
        assert not validator.is_valid(broken)
        with pytest.raises(ValueError):  # noqa: PT011 the words are those of many faults
            check(broken, manifest_schema())


def test_no_keyword_of_the_schema_goes_unchecked() -> None:
    def keywords(node: Any, *, names: bool = False) -> set[str]:
        if isinstance(node, list):
            return set().union(*map(keywords, node))
        if not isinstance(node, dict):
            return set()
        own = set() if names else set(node)
        inner = (
            keywords(v, names=k in ("properties", "$defs") and not names)
            for k, v in node.items()
            if names or k not in ("default", "enum", "const", "required")
        )
        return own.union(*inner)

    assert keywords(schema()) <= CHECKED | SAID
