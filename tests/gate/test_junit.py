"""Continuous integration can read the results."""

from __future__ import annotations

from xml.etree import ElementTree

from cswap_deploy.gate.budgets import BudgetResult
from cswap_deploy.gate.junit import github_annotations, to_junit

RESULTS = (
    BudgetResult("size_max_mib", 0.6, 4.0, True, "model.onnx 0.600 MiB, limit at most 4.000 MiB"),
    BudgetResult("latency.a:b,c.p50_ms", None, 1.0, False, "not measured: 50 % <gone>\n\x07"),
)


def test_junit_has_one_case_for_each_budget() -> None:
    document = to_junit(RESULTS, suite="demo & co\x00")
    root = ElementTree.fromstring(document.encode())
    assert root.tag == "testsuites"
    (suite,) = root.findall("testsuite")
    for element in (root, suite):
        assert element.attrib == {
            "name": "cswap-deploy.demo & co\ufffd",
            "tests": "2",
            "failures": "1",
            "errors": "0",
            "skipped": "0",
            "time": "0.0",
        }
    good, bad = suite.findall("testcase")
    assert good.get("name") == "size_max_mib"
    assert good.find("failure") is None
    assert good.findtext("system-out") == RESULTS[0].text
    assert bad.get("classname") == "cswap-deploy.demo & co\ufffd"
    failure = bad.find("failure")
    assert failure is not None
    assert failure.attrib == {"type": "budget", "message": "not measured: 50 % <gone>\n\ufffd"}
    assert failure.text == "not measured: 50 % <gone>\n\ufffd"


def test_annotations_appear_on_github_only_and_for_failures_only() -> None:
    assert github_annotations(RESULTS, environ={}) == ()
    assert github_annotations(RESULTS, environ={"GITHUB_ACTIONS": "true"}) == (
        "::error title=cswap-deploy budget latency.a%3Ab%2Cc.p50_ms::"
        "not measured: 50 %25 <gone>%0A\x07",
    )
    assert github_annotations(RESULTS[:1], environ={"GITHUB_ACTIONS": "true"}) == ()
