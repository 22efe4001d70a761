"""A report as one HTML page, and as Markdown."""

from __future__ import annotations

import re

import jinja2

from cswap_deploy.errors import ArtifactError
from cswap_deploy.gate.budgets import BudgetResult
from cswap_deploy.records.manifest import Manifest
from cswap_deploy.records.plan import PrunePlan
from cswap_deploy.report.cells import Cell, Digest, Mark, text
from cswap_deploy.report.classes import Evidence
from cswap_deploy.report.document import Report, Section
from cswap_deploy.report.sections import describe

_MORE = "<!-- more -->"
"""Where a page takes another section."""
_UNIT = re.compile(r"(?<=\d) (%|ms|KiB|MiB|[kMG]\b)")
_MARKDOWN = re.compile(r"([\\`*\[\]<>|])")


def render_markdown(
    manifest: Manifest, plan: PrunePlan, *, results: tuple[BudgetResult, ...] = (),
    evidence: Evidence | None = None,
) -> str:  # fmt: skip
    """Write the report of a bundle as Markdown (GitHub's tables), without figures.

    It opens with a model card's metadata. The same values give the same text. ``results`` are those
    of the budgets, where some were given; ``evidence`` is what was predicted.

    Raises:
        ArtifactError: The plan is not the manifest's.
    """
    _require_own(manifest, plan)
    return markdown(describe(manifest, plan, results, evidence))


def render_html(
    manifest: Manifest, plan: PrunePlan, *, results: tuple[BudgetResult, ...] = (),
    evidence: Evidence | None = None,
) -> str:  # fmt: skip
    """The same as one HTML page: figures and pictures inside, nothing loaded from elsewhere.

    A few lines of script sort tables; nothing needs them.
    """
    _require_own(manifest, plan)
    return page(describe(manifest, plan, results, evidence))


def markdown(report: Report) -> str:
    """Any report as Markdown."""
    return _render("report.md.j2", report)


def page(report: Report) -> str:
    """Any report as one HTML page."""
    return _render("report.html.j2", report)


def with_section(html: str, more: Section) -> str:
    """A page with one more section before its first."""
    made = _environment().get_template("section.html.j2").render(section=more)
    return html.replace(_MORE, f"{made}{_MORE}", 1)


def _require_own(manifest: Manifest, plan: PrunePlan) -> None:
    for which, here, there in (
        ("dense", manifest.dense.params, plan.dense.params),
        ("pruned", manifest.pruned.params, plan.pruned.params),
    ):
        if here != there:
            raise ArtifactError(
                f"the plan is not this manifest's: its {which} network has {there:,} parameters, "
                f"the manifest's has {here:,}"
            )


def _render(template: str, report: Report) -> str:
    return _environment().get_template(template).render(report=report)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cswap_deploy", "report"),
        autoescape=jinja2.select_autoescape(enabled_extensions=("html.j2",)),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"plain": _plain, "tight": _tight, "text": text, "look": _look}
    return environment


def _plain(cell: Cell) -> str:
    """Text that Markdown shows as it stands, on one line."""
    return _MARKDOWN.sub(r"\\\1", " ".join(text(cell).split()))


def _tight(cell: Cell) -> str:
    """Keep a number and its unit on one line."""
    return _UNIT.sub("\u00a0\\1", text(cell))


def _look(cell: Cell) -> str:
    """The style of a cell of text."""
    if isinstance(cell, Digest):
        return "hash"
    if isinstance(cell, Mark) and cell in ("FAIL", "NO"):
        return "bad"
    if isinstance(cell, Mark) and cell.startswith("not faster"):
        return "slow"
    return "long" if len(text(cell)) > 60 else ""
