"""Results of budgets in the forms that continuous integration reads: JUnit, GitHub annotations."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping

from junitparser import Failure, JUnitXml, TestCase, TestSuite

from cswap_deploy.gate.budgets import BudgetResult

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def to_junit(results: tuple[BudgetResult, ...], *, suite: str) -> str:
    """Write a JUnit XML document: the suite ``cswap-deploy.<suite>``, one test case a budget.

    A budget that failed is a ``failure``; one that was not measured too.
    """
    name = _clean(f"cswap-deploy.{suite}")
    cases = TestSuite(name)
    for result in results:
        case = TestCase(_clean(result.name), classname=name, time=0)
        text = _clean(result.text)
        if result.ok:
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
    """Lines that GitHub Actions shows as errors, one for each failed budget; none outside of it.

    Source:
        GitHub Actions, "Workflow commands": percent, line ends, colon and comma are escaped.
    """
    if environ.get("GITHUB_ACTIONS") != "true":
        return ()
    ends = "%\r\n"

    def escaped(text: str, special: str) -> str:
        return "".join(f"%{ord(c):02X}" if c in special else c for c in text)

    return tuple(
        f"::error title={escaped(f'cswap-deploy budget {result.name}', ends + ':,')}"
        f"::{escaped(result.text, ends)}"
        for result in results
        if not result.ok
    )


def _clean(text: str) -> str:
    """Replace the control characters that XML 1.0 cannot hold."""
    return _NOT_XML.sub("\ufffd", text)
