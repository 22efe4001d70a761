"""The pytest plugin, in runs of pytest of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Made

pytest_plugins = ["pytester"]
QUICK = "at_most=6"


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.delenv("CSWAP_BUNDLE", raising=False)
    return pytester


def test_the_fixture_measures_and_says_what_it_saw(suite: pytest.Pytester, made: Made) -> None:
    suite.makepyfile(f"""
        def test_fast(cswap_bundle):
            cswap_bundle.assert_faster_than("10 s", percentile=95, {QUICK})

        def test_slow(cswap_bundle):
            cswap_bundle.assert_faster_than("1 us", percentile=90, batch=2, {QUICK})

        def test_words(cswap_bundle):
            cswap_bundle.assert_faster_than("soon")

        def test_itself(cswap_bundle):
            cswap_bundle.assert_not_slower_than(cswap_bundle.path, by=0.4, {QUICK})
    """)
    done = suite.runpytest_subprocess(f"--cswap-bundle={made.bundle}", "-p", "no:randomly")
    done.assert_outcomes(passed=2, failed=2)
    done.stdout.fnmatch_lines(
        ["latency.onnxruntime.p90_ms: p90 (onnxruntime, batch 2, * calls) * to *limit at most*"]
    )
    done.stdout.fnmatch_lines(["*'soon' is no time: write '5 ms'*"])


def test_the_marker_holds_a_budgets_file(suite: pytest.Pytester, made: Made) -> None:
    suite.makefile(".toml", good="params_max = 20_000", bad="params_max = 5", typo="parms_max = 5")
    suite.makeini(f"[pytest]\ncswap_bundle = {made.bundle}\n")
    suite.makepyfile("""
        import pytest

        @pytest.mark.cswap_budget("good.toml")
        def test_good():
            pass

        @pytest.mark.cswap_budget("bad.toml")
        def test_bad():
            raise AssertionError("the body must not run")

        @pytest.mark.cswap_budget("typo.toml")
        def test_typo():
            pass
    """)
    done = suite.runpytest_subprocess("--strict-markers")
    done.assert_outcomes(passed=1, failed=2)
    done.stdout.fnmatch_lines(["params_max: pruned network * parameters, limit at most 5 *"])
    done.stdout.fnmatch_lines(["*did you mean params_max*"])
    done.stdout.no_fnmatch_line("*the body must not run*")


def test_without_a_bundle_it_says_how_to_name_one(suite: pytest.Pytester) -> None:
    suite.makepyfile("def test_it(cswap_bundle): pass")
    done = suite.runpytest_subprocess()
    done.stdout.fnmatch_lines(["*no bundle is named: pytest --cswap-bundle DIR*"])
    assert done.ret != 0


def test_it_costs_nothing_where_it_is_not_used(suite: pytest.Pytester) -> None:
    suite.makepyfile("""
        import sys

        def test_it():
            assert not {"torch", "onnxruntime", "numpy"} & set(sys.modules)
    """)
    done = suite.runpytest_subprocess("-p", "no:hypothesispytest", "-p", "no:xdist")
    done.assert_outcomes(passed=1)
