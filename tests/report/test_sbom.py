"""What went into a bundle, as a CycloneDX document that the library's own validator accepts."""

from __future__ import annotations

import json
import shutil
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from made_up_bundle import made_up_manifest

from cswap_deploy.config import ModelConfig, load_config
from cswap_deploy.models.load import load_model, weights_licence
from cswap_deploy.records.bundle import read_bundle, verify_bundle
from cswap_deploy.records.files import list_files
from cswap_deploy.records.value import FileRef, sha256_text
from cswap_deploy.report.sbom import SBOM, render_sbom

if TYPE_CHECKING:
    from conftest import Made

FILES = (FileRef(path="engine/a b.plan", sha256=sha256_text("a"), size_bytes=1),)


def require_valid(text: str) -> None:
    wrong = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    assert wrong is None, wrong


def components(text: str, kind: str) -> dict[str, Any]:
    """Name -> component."""
    found = json.loads(text)["components"]
    return {each["name"]: each for each in found if each["type"] == kind}


def test_a_build_leaves_one_and_lists_it(made: Made) -> None:
    text = (made.bundle / SBOM).read_text()
    require_valid(text)
    manifest = verify_bundle(made.bundle).manifest
    assert manifest.lists(SBOM)
    digests = {ref.path: ref.sha256 for ref in manifest.files if ref.path != SBOM}
    found = components(text, "file")
    assert {n: c["hashes"] for n, c in found.items()} == {
        name: [{"alg": "SHA-256", "content": digest}] for name, digest in digests.items()
    }
    told = json.loads(text)
    assert told["metadata"]["timestamp"] == manifest.created
    (model,) = components(text, "machine-learning-model").values()
    assert model["name"] == manifest.model.name
    assert model["hashes"][0]["content"] == manifest.model.weights_sha256
    assert "licenses" not in model  # this user's own
    said = {p["name"]: p["value"] for p in model["properties"]}
    assert said["cswap-deploy:weights"] == manifest.model.weights
    tools = components(text, "library")
    there = {name: v for name, v in manifest.versions.items() if v != "absent"}
    assert {n: c["version"] for n, c in tools.items()} == there | {
        "cswap-deploy": manifest.tool_version
    }
    assert tools["torch"]["purl"].startswith("pkg:pypi/torch@")
    expression = metadata.metadata("torch")["License-Expression"]
    assert tools["torch"]["licenses"] == [{"expression": expression}]
    assert tools["cswap-deploy"]["licenses"] == [{"license": {"id": "Apache-2.0"}}]


def test_the_same_bundle_gives_the_same_bytes(made: Made) -> None:
    manifest = read_bundle(made.bundle)
    files = [ref for ref in list_files(made.bundle) if ref.path not in (SBOM, "manifest.json")]
    text = render_sbom(manifest, files, weights_licence=None)
    assert text == (made.bundle / SBOM).read_text()
    assert text == render_sbom(manifest, files, weights_licence=None)


def test_another_bundle_has_another_number() -> None:
    manifest = made_up_manifest()
    numbers = {
        json.loads(render_sbom(m, files, weights_licence=None))["serialNumber"]
        for m in (manifest, manifest.model_copy(update={"created": "2026-11-23T12:00:00+00:00"}))
        for files in ((), FILES)
    }
    assert len(numbers) == 4


@pytest.mark.parametrize(
    ("licence", "told"),
    [
        (None, None),
        ("apache-2.0", {"license": {"id": "Apache-2.0"}}),
        ("MIT OR BSD-2-Clause", {"expression": "MIT OR BSD-2-Clause"}),
        ("seer-license", {"license": {"name": "seer-license"}}),
    ],
)
def test_a_licence_by_its_name(licence: str | None, told: dict[str, Any] | None) -> None:
    text = render_sbom(made_up_manifest(), FILES, weights_licence=licence)
    require_valid(text)
    (model,) = components(text, "machine-learning-model").values()
    assert model.get("licenses") == (None if told is None else [told])


def test_every_package_here_has_a_valid_entry() -> None:
    """Whatever packages write where their licence belongs."""
    names = {each.metadata["Name"] for each in metadata.distributions()}
    versions = {name: metadata.version(name) for name in names if name}
    assert len(versions) > 50
    require_valid(render_sbom(made_up_manifest(versions=versions), FILES, weights_licence=None))


def test_what_the_weights_are_licensed_under() -> None:
    demo = load_model(ModelConfig(model="demo-resnet")).spec
    settings = load_config(model="demo-resnet").settings()
    assert weights_licence(demo, settings) == "Apache-2.0"
    assert weights_licence(demo, settings | {"checkpoint": "own.safetensors"}) is None
    timm = load_model(ModelConfig(model="resnet10t", pretrained=False)).spec
    assert weights_licence(timm, settings) == "apache-2.0"
    assert weights_licence(timm, settings | {"pretrained": False}) is None
    own = timm.model_copy(update={"source": "factory"})
    assert weights_licence(own, settings) is None


def test_a_report_that_grows_is_described_anew(made: Made, tmp_path: Path) -> None:
    from cswap_deploy.pipeline import add_to_report
    from cswap_deploy.report.document import Section

    bundle = shutil.copytree(made.bundle, tmp_path / "bundle")
    add_to_report(bundle, Section("More", (), (), ()))
    digests = {ref.path: ref.sha256 for ref in verify_bundle(bundle).manifest.files}
    page = components((bundle / SBOM).read_text(), "file")["report.html"]
    assert page["hashes"][0]["content"] == digests["report.html"]
