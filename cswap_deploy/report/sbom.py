"""What went into a bundle as a CycloneDX document: the network, the tools, the files.

Read from the manifest alone, and from the installed packages' own words on their licences: the same
bundle gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from importlib import metadata
from typing import TYPE_CHECKING
from uuid import NAMESPACE_OID, uuid5

from cswap_deploy.records.manifest import Manifest
from cswap_deploy.records.value import FileRef, canonical_json

if TYPE_CHECKING:
    from cyclonedx.model.component import Component
    from cyclonedx.model.license import License

SBOM = "sbom.cdx.json"
_OWN = "cswap-deploy"
_LICENCE = "License :: "


def render_sbom(
    manifest: Manifest, files: Sequence[FileRef], *, weights_licence: str | None
) -> str:
    """The document as JSON, of CycloneDX 1.6.

    Args:
        manifest: Of the bundle.
        files: What lies in it beside the manifest and this document.
        weights_licence: Of the dense network's weights; ``None`` where it is not known.
    """
    from cyclonedx.model import HashAlgorithm, HashType, Property
    from cyclonedx.model.bom import Bom, BomMetaData
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.output import make_outputter
    from cyclonedx.schema import OutputFormat, SchemaVersion

    spec = manifest.model
    bundle = Component(
        type=ComponentType.MACHINE_LEARNING_MODEL, name=f"{spec.name} (pruned)", bom_ref="bundle",
        description=f"{spec.name}, pruned by {_OWN} {manifest.tool_version}",
    )  # fmt: skip
    dense = Component(
        type=ComponentType.MACHINE_LEARNING_MODEL, name=spec.name, bom_ref="model",
        description="the dense network that was pruned", licenses=_licences(weights_licence),
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=spec.weights_sha256)],
        properties=[
            Property(name=f"{_OWN}:source", value=spec.source),
            Property(name=f"{_OWN}:weights", value=spec.weights),
            Property(
                name=f"{_OWN}:sha256_of", value="every tensor's name, dtype, shape and bytes"
            ),
        ],
    )  # fmt: skip
    parts = [dense, *_tools({_OWN: manifest.tool_version} | manifest.versions)]
    parts += (
        Component(
            type=ComponentType.FILE, name=ref.path, bom_ref=f"file:{ref.path}",
            hashes=[HashType(alg=HashAlgorithm.SHA_256, content=ref.sha256)],
        )
        for ref in files
    )  # fmt: skip
    told = [manifest.created, [ref.model_dump(mode="json") for ref in files]]
    bom = Bom(
        components=parts,
        # The library would take a random one, and the time of now.
        serial_number=uuid5(NAMESPACE_OID, canonical_json(told)),
        metadata=BomMetaData(component=bundle, timestamp=datetime.fromisoformat(manifest.created)),
    )
    bom.register_dependency(bundle, parts)
    return make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string(indent=1)


def _tools(versions: dict[str, str]) -> Iterator[Component]:
    """What built the bundle; none of it is in it."""
    from cyclonedx.model.component import Component, ComponentScope
    from packageurl import PackageURL

    for name, version in versions.items():
        if version != "absent":
            yield Component(
                name=name, version=version, bom_ref=f"tool:{name}", scope=ComponentScope.EXCLUDED,
                licenses=_licences(_package_licence(name)),
                purl=PackageURL("pypi", None, name, version),
            )  # fmt: skip


def _package_licence(name: str) -> str | None:
    """What an installed package says of its licence; a whole text is no name."""
    try:
        told = metadata.metadata(name).json
    except metadata.PackageNotFoundError:
        return None
    named = [c.rpartition(" :: ")[2] for c in told.get("classifier", ()) if c.startswith(_LICENCE)]
    said = str(told.get("license_expression") or " / ".join(named) or told.get("license", ""))
    is_name = "\n" not in said and said not in ("", "UNKNOWN")
    return said if is_name else None


def _licences(name: str | None) -> list[License]:
    """A licence by its SPDX name or expression, else by the name that it was given."""
    from cyclonedx.contrib.license.factories import LicenseFactory

    return [] if name is None else [LicenseFactory().make_from_string(name)]
