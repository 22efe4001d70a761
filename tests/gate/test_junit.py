"""Continuous integration can read the verdicts."""

from __future__ import annotations

from xml.etree import ElementTree

from cswap_deploy.gate.budgets import BudgetVerdict
from cswap_deploy.gate.junit import github_annotations, to_junit

VERDICTS = (
    BudgetVerdict("size_max_mib", 0.6, 4.0, True, "model.onnx 0.600 MiB, limit at most 4.000 MiB"),
    BudgetVerdict("latency.a:b,c.p50_ms", None, 1.0, False, "not measured: 50 % <gone>\n\x07"),
)


def test_junit_has_one_case_per_budget() -> None:
    document = to_junit(VERDICTS, suite="demo & co")
    root = ElementTree.fromstring(document.encode())
    (suite,) = root.findall("testsuite")
    assert suite.attrib == {
        "name": "cswap-deploy.demo & co",
        "tests": "2",
        "failures": "1",
        "errors": "0",
        "skipped": "0",
    }
    good, bad = suite.findall("testcase")
    assert good.get("name") == "size_max_mib"
    assert good.find("failure") is None
    assert good.findtext("system-out") == VERDICTS[0].text
    assert bad.get("classname") == "cswap-deploy.demo & co"
    failure = bad.find("failure")
    assert failure is not None
    assert failure.get("type") == "budget"
    assert failure.text == "not measured: 50 % <gone>\n\ufffd"


def test_annotations_appear_on_github_only_and_for_failures_only() -> None:
    assert github_annotations(VERDICTS, environ={}) == ()
    assert github_annotations(VERDICTS, environ={"GITHUB_ACTIONS": "true"}) == (
        "::error title=cswap-deploy budget latency.a%3Ab%2Cc.p50_ms::"
        "not measured: 50 %25 <gone>%0A\x07",
    )
    assert github_annotations(VERDICTS[:1], environ={"GITHUB_ACTIONS": "true"}) == ()
