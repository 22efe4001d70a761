"""Verdicts in the forms that continuous integration reads: JUnit XML and GitHub annotations."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from xml.etree import ElementTree

from cswap_deploy.gate.budgets import BudgetVerdict

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def to_junit(verdicts: tuple[BudgetVerdict, ...], *, suite: str) -> str:
    """Write one test case per budget.

    Args:
        verdicts: From ``check_budgets``.
        suite: Name of the bundle; the suite is called ``cswap-deploy.<suite>``.

    Returns:
        A JUnit XML document. A budget that failed is a ``failure``; one that was not measured too.

    Source:
        The format that Jenkins and GitLab read: https://github.com/testmoapp/junitxml
    """
    counts = {
        "name": _clean(f"cswap-deploy.{suite}"),
        "tests": str(len(verdicts)),
        "failures": str(sum(not verdict.ok for verdict in verdicts)),
        "errors": "0",
        "skipped": "0",
    }
    root = ElementTree.Element("testsuites", counts)
    parent = ElementTree.SubElement(root, "testsuite", counts)
    for verdict in verdicts:
        case = ElementTree.SubElement(
            parent,
            "testcase",
            {"classname": counts["name"], "name": _clean(verdict.name), "time": "0"},
        )
        text = _clean(verdict.text)
        if verdict.ok:
            ElementTree.SubElement(case, "system-out").text = text
        else:
            failure = {"type": "budget", "message": text}
            ElementTree.SubElement(case, "failure", failure).text = text
    ElementTree.indent(root)
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n'
        + ElementTree.tostring(root, encoding="unicode")
        + "\n"
    )


def github_annotations(
    verdicts: tuple[BudgetVerdict, ...], *, environ: Mapping[str, str] = os.environ
) -> tuple[str, ...]:
    """Lines that GitHub Actions shows as errors, one per failed budget; none outside of it.

    Source:
        GitHub Actions, "Workflow commands": percent, line ends, colon and comma are escaped.
    """
    if environ.get("GITHUB_ACTIONS") != "true":
        return ()
    return tuple(
        f"::error title={_property(f'cswap-deploy budget {verdict.name}')}::{_data(verdict.text)}"
        for verdict in verdicts
        if not verdict.ok
    )


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def _clean(text: str) -> str:
    """Drop the control characters that XML 1.0 cannot hold."""
    return _NOT_XML.sub("\ufffd", text)
