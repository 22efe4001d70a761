"""report.md and report.html of a bundle."""

from __future__ import annotations

import re

import jinja2

from cswap_deploy.errors import ArtifactError
from cswap_deploy.gate.budgets import BudgetVerdict
from cswap_deploy.records.manifest import Manifest
from cswap_deploy.records.plan import PrunePlan
from cswap_deploy.report import headline, sections

_UNIT = re.compile(r"(?<=\d) (%|ms|KiB|MiB|[kMG]\b)")
_MARKDOWN = re.compile(r"([\\`*\[\]<>|])")


def render_markdown(
    manifest: Manifest, plan: PrunePlan, *, verdicts: tuple[BudgetVerdict, ...] = ()
) -> str:
    """Write the report as Markdown (GitHub's tables), without figures.

    Args:
        manifest: Of the bundle.
        plan: Of the same build.
        verdicts: On the budgets, where some were given.

    Returns:
        The document; the same values give the same text.

    Raises:
        ArtifactError: The plan is not the manifest's.
    """
    return _render("report.md.j2", manifest, plan, verdicts, draw=False)


def render_html(
    manifest: Manifest, plan: PrunePlan, *, verdicts: tuple[BudgetVerdict, ...] = ()
) -> str:
    """Write the report as one HTML page: no scripts, nothing loaded from elsewhere.

    Args:
        manifest: Of the bundle.
        plan: Of the same build.
        verdicts: On the budgets, where some were given.

    Returns:
        The document with its figures as inline SVG; the same values give the same text.

    Raises:
        ArtifactError: The plan is not the manifest's.
    """
    return _render("report.html.j2", manifest, plan, verdicts, draw=True)


def _render(
    template: str,
    manifest: Manifest,
    plan: PrunePlan,
    verdicts: tuple[BudgetVerdict, ...],
    *,
    draw: bool,
) -> str:
    for which in ("dense", "pruned"):
        here, there = getattr(manifest, which).params, getattr(plan, which).params
        if here != there:
            raise ArtifactError(
                f"the plan is not this manifest's: its {which} network has {there:,} parameters, "
                f"the manifest's has {here:,}"
            )
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cswap_deploy", "report"),
        autoescape=jinja2.select_autoescape(enabled_extensions=("html.j2",)),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["plain"] = _plain
    environment.filters["tight"] = _tight
    return environment.get_template(template).render(
        manifest=manifest,
        summary=headline.summary(manifest),
        tiles=headline.tiles(manifest),
        warnings=headline.warnings(manifest),
        sections=sections.sections(manifest, plan, verdicts, draw=draw),
    )


def _plain(text: str) -> str:
    """Text that Markdown shows as it stands, on one line."""
    return _MARKDOWN.sub(r"\\\1", " ".join(text.split()))


def _tight(text: str) -> str:
    """Keep a number and its unit on one line."""
    return _UNIT.sub("\u00a0\\1", text)
