"""Results in the forms that continuous integration reads: JUnit, annotations, Markdown."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping

from junitparser import Failure, JUnitXml, Skipped, TestCase, TestSuite

from cswap_deploy.gate.budgets import BudgetResult

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def to_junit(results: tuple[BudgetResult, ...], *, suite: str) -> str:
    """Write a JUnit XML document: the suite ``cswap-deploy.<suite>``, one test case a budget.

    A budget that failed is a ``failure``; one that was not measured too. One that is inconclusive
    and may pass is ``skipped``.
    """
    name = _clean(f"cswap-deploy.{suite}")
    cases = TestSuite(name)
    for result in results:
        case = TestCase(_clean(result.name), classname=name, time=0)
        text = _clean(result.text)
        if result.ok and result.inconclusive:
            case.result = [Skipped(message=text)]
        elif result.ok:
            case.system_out = text
        else:
            failure = Failure(message=text, type_="budget")
            failure.text = text
            case.result = [failure]
        cases.add_testcase(case)
    document = JUnitXml(name)
    document += cases
    written = io.BytesIO()
    document.write(written)
    return written.getvalue().decode()


def github_annotations(
    results: tuple[BudgetResult, ...], *, environ: Mapping[str, str] = os.environ
) -> tuple[str, ...]:
    """Lines that GitHub Actions shows: an error for each failed budget, a warning for each that is
    inconclusive; none outside of it.

    Source:
        GitHub Actions, "Workflow commands": percent, line ends, colon and comma are escaped.
    """
    if environ.get("GITHUB_ACTIONS") != "true":
        return ()
    ends = "%\r\n"

    def escaped(text: str, special: str) -> str:
        return "".join(f"%{ord(c):02X}" if c in special else c for c in text)

    return tuple(
        f"::{'warning' if result.ok else 'error'} "
        f"title={escaped(f'cswap-deploy budget {result.name}', ends + ':,')}"
        f"::{escaped(result.text, ends)}"
        for result in results
        if not result.ok or result.inconclusive
    )


def to_markdown(results: tuple[BudgetResult, ...], *, title: str) -> str:
    """A table for a pull request's comment or a step's summary."""
    failed = sum(not result.ok for result in results)
    head = f"{failed} of {len(results)} limits failed" if failed else f"{len(results)} limits held"
    rows = (
        f"| {mark(result)} | `{_cell(result.name)}` | {_cell(result.text)} |" for result in results
    )
    return "\n".join(
        [
            f"### {_cell(title)}: {head}",
            "",
            "| | limit | measured |",
            "| --- | --- | --- |",
            *rows,
            "",
        ]
    )


def add_to_summary(text: str, *, environ: Mapping[str, str] = os.environ) -> None:
    """Append Markdown to the summary of a GitHub Actions step; nothing outside of one.

    Source:
        GitHub Actions, "Workflow commands", adding a job summary: ``GITHUB_STEP_SUMMARY``.
    """
    if path := environ.get("GITHUB_STEP_SUMMARY"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(text + "\n")


def mark(result: BudgetResult) -> str:
    """A word for a result."""
    if result.inconclusive:
        return "inconclusive" if result.ok else "FAIL (inconclusive)"
    return "pass" if result.ok else "FAIL"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _clean(text: str) -> str:
    """Replace the control characters that XML 1.0 cannot hold."""
    return _NOT_XML.sub("\ufffd", text)
