"""A bundle's speed and limits as tests: the fixture ``cswap_bundle``, the marker ``cswap_budget``.

    def test_latency(cswap_bundle):
        cswap_bundle.assert_faster_than("5 ms", percentile=95)

    @pytest.mark.cswap_budget("budgets.toml")
    def test_budgets(): ...

``pytest --cswap-bundle DIR``, ``cswap_bundle = DIR`` in pytest's configuration or ``CSWAP_BUNDLE``
in the environment names the bundle. Nothing is imported before a test asks.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from cswap_deploy.gate.budgets import BudgetResult

_OPTION = "cswap_bundle"
_VARIABLE = "CSWAP_BUNDLE"
_MARK = "cswap_budget"
_TIME = re.compile(r"(\d+\.?\d*|\.\d+)\s*(us|µs|ms|s)")
_MILLISECONDS = {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3}


@dataclass(frozen=True)
class BundleUnderTest:
    """A bundle that is measured on this machine."""

    path: Path

    def assert_faster_than(
        self, limit: str, *, percentile: float = 50, batch: int = 1, target: str | None = None,
        threads: int | None = 1, at_most: float = 60.0,
    ) -> None:  # fmt: skip
        """Fail where the interval of a percentile of the latency lies beyond a limit.

        A limit inside of the interval, when time is up, is a warning.

        Args:
            limit: ``5 ms``, ``800 us``.
            percentile: Of the calls.
            batch: Images a call.
            target: The bundle's first engine unless given.
            threads: Of CPU runtimes; ``None`` for all cores.
            at_most: Seconds of timing.
        """
        from cswap_deploy.gate.fresh import time_limits

        found = _TIME.fullmatch(limit.strip())
        if found is None:
            raise ValueError(f"{limit!r} is no time: write '5 ms', '800 us' or '1 s'")
        ms = float(found[1]) * _MILLISECONDS[found[2]]
        with self._opened(target, batch) as subject:
            own = subject.contender(batch=batch, threads=threads)
            results = time_limits(
                own, {f"p{percentile:g}_ms": ms}, None, where=f"{subject.target}, batch {batch}",
                prefix=f"latency.{subject.target}.", inconclusive="pass", at_most=at_most,
            )  # fmt: skip
        _judge(results)

    def assert_within(self, budgets: str | Path, *, at_most: float = 60.0) -> None:
        """Fail where a limit of a budgets file does, measured here."""
        from cswap_deploy.api import check

        _judge(check(self.path, budgets, at_most=at_most))

    def assert_not_slower_than(
        self, baseline: str | Path, *, by: float = 0.03, batch: int = 1,
        target: str | None = None, threads: int | None = 1, at_most: float = 60.0,
    ) -> None:  # fmt: skip
        """Fail where the median call takes longer than another bundle's, in alternation.

        Args:
            baseline: A bundle or an ONNX file.
            by: Fraction that is allowed.
            batch: Images a call.
            target: The bundle's first engine unless given.
            threads: Of CPU runtimes.
            at_most: Seconds of timing.
        """
        from cswap_deploy.gate.compare import CompareOptions, compare, results_of

        options = CompareOptions(
            target=target, batch=batch, threads=threads, min_effect=2 * by, at_most=at_most
        )
        found = compare(Path(baseline), self.path, options)
        results = results_of(found, inconclusive_passes=True)
        _judge([r for r in results if r.name == "compare.latency"])

    def _opened(self, target: str | None, batch: int) -> Any:
        from contextlib import contextmanager
        from tempfile import TemporaryDirectory

        from cswap_deploy.gate.subjects import Subject, open_subject

        @contextmanager
        def opened() -> Iterator[Subject]:
            with TemporaryDirectory(prefix="cswap-pytest-") as folder:
                yield open_subject(self.path, Path(folder), target=target, batch=batch)

        return opened()


def _judge(results: Any) -> None:
    __tracebackhide__ = True
    found: list[BudgetResult] = list(results)
    for result in found:
        if result.ok and result.inconclusive:
            warnings.warn(f"{result.name}: {result.text}", stacklevel=3)
    failed = [f"{result.name}: {result.text}" for result in found if not result.ok]
    if failed:
        pytest.fail("\n".join(failed), pytrace=False)


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--cswap-bundle``, and the same in pytest's configuration."""
    group = parser.getgroup("cswap-deploy")
    group.addoption(
        "--cswap-bundle", dest=_OPTION, metavar="DIR", help="the bundle of the fixture cswap_bundle"
    )
    parser.addini(_OPTION, "the bundle of the fixture cswap_bundle, from this file's folder")


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker."""
    config.addinivalue_line(
        "markers",
        f"{_MARK}(budgets, bundle=None): measure a bundle and hold it against a budgets file",
    )


@pytest.fixture
def cswap_bundle(request: pytest.FixtureRequest) -> BundleUnderTest:
    """The bundle that ``--cswap-bundle`` names."""
    return BundleUnderTest(_named(request.config))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Hold the budgets of a marked test before its body runs."""
    for mark in item.iter_markers(_MARK):
        if len(mark.args) != 1 or set(mark.kwargs) - {"bundle", "at_most"}:
            raise pytest.UsageError(f'{item.nodeid}: @pytest.mark.{_MARK}("budgets.toml")')
        given = mark.kwargs.get("bundle")
        bundle = _named(item.config) if given is None else _near(item, given)
        at_most = mark.kwargs.get("at_most", 60.0)
        BundleUnderTest(bundle).assert_within(_near(item, mark.args[0]), at_most=at_most)


def _near(item: pytest.Item, path: str | Path) -> Path:
    """A path from the test's folder, or from pytest's root."""
    here = item.path.parent / path
    return here if here.exists() else item.config.rootpath / path


def _named(config: pytest.Config) -> Path:
    ini = config.getini(_OPTION)
    root = (config.inipath or config.rootpath / "pytest.ini").parent
    named = config.getoption(_OPTION) or (root / ini if ini else os.environ.get(_VARIABLE))
    if not named:
        raise pytest.UsageError(
            f"no bundle is named: pytest --cswap-bundle DIR, {_OPTION} = DIR in pytest's "
            f"configuration, or {_VARIABLE}"
        )
    return Path(named)
