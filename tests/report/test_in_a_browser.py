"""The report in a real browser: Debian's Chromium, driven by Playwright, checked by axe."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up_bundle import made_up_manifest, made_up_plan

from cswap_deploy.measure.accuracy import Predicted
from cswap_deploy.report import cells as c
from cswap_deploy.report.classes import Evidence
from cswap_deploy.report.pages import render_html

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


def evidence() -> Evidence:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, size=300)
    networks = {}
    for name, wrong in (("dense", 0.08), ("pruned", 0.12), ("onnxruntime", 0.12)):
        classes = np.where(rng.random(300) < wrong, (labels + 1) % 10, labels)
        networks[name] = Predicted(classes, rng.uniform(0.4, 1, size=300).astype(np.float32))
    return Evidence(networks, labels, rng.integers(0, 255, (300, 28, 28, 1), dtype=np.uint8))


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render_html(made_up_manifest(), made_up_plan(), evidence=evidence()))
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as running:
        one = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield one
        one.close()


@pytest.fixture
def opened(browser: Any, page_file: Path) -> Any:
    """Opens the page; what it says and asks for is kept in ``said`` and ``asked``."""

    def open_(size: str = "desktop", scheme: str = "light", **more: Any) -> Any:
        width, height = SIZES[size]
        page = browser.new_page(
            viewport={"width": width, "height": height}, color_scheme=scheme, **more
        )
        page.said, page.asked = [], []
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(page_file.as_uri())
        return page

    return open_


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", list(SIZES))
def test_nothing_is_wrong_with_it(opened: Any, size: str, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page = opened(size, scheme)
    found = axe.Axe().run(page).response["violations"]
    serious = [v for v in found if v["impact"] in ("serious", "critical")]
    assert not serious, [(v["id"], [n["html"] for n in v["nodes"]]) for v in serious]
    assert page.said == []
    assert [url for url in page.asked if not url.startswith(("file:", "data:"))] == []
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= SIZES[size][0], "nothing sticks out"
    page.close()


def cells(page: Any, column: str) -> list[str]:
    """A column of the table that has the heading, top to bottom."""
    found: list[str] = page.evaluate(
        """head => {
            const th = [...document.querySelectorAll("thead th")].find(
                th => th.textContent.trim() === head);
            const at = [...th.parentNode.children].indexOf(th);
            return [...th.closest("table").tBodies[0].rows].map(row => row.cells[at].textContent);
        }""",
        column,
    )
    return found


def number(text: str) -> float:
    found = re.match(r"[+-]?[\d,.]+", text.replace("−", "-"))
    assert found is not None
    return float(found[0].replace(",", ""))


def test_tables_sort_by_their_headings_with_the_keyboard_too(opened: Any) -> None:
    page = opened()
    before = [number(text) for text in cells(page, "change, 95 %")]
    button = page.locator("th button", has_text="change, 95 %")
    button.click()
    assert [number(text) for text in cells(page, "change, 95 %")] == sorted(before)
    head = button.locator("xpath=..")
    assert head.get_attribute("aria-sort") == "ascending"
    button.focus()
    page.keyboard.press("Enter")
    assert [number(text) for text in cells(page, "change, 95 %")] == sorted(before, reverse=True)
    assert head.get_attribute("aria-sort") == "descending"
    page.locator("th button", has_text=re.compile("^class$")).click()
    names = cells(page, "class")
    assert names == sorted(names)
    page.close()


def test_every_figure_is_the_manifest_s(opened: Any) -> None:
    manifest = made_up_manifest()
    page = opened()
    shown = page.locator("main").inner_text().replace("\u00a0", " ")
    (result,) = (r for r in manifest.targets if r.latency is not None)
    assert result.latency is not None
    assert result.speedup is not None
    assert result.accuracy is not None
    for figure in (
        f"{manifest.pruned.params:,}"[:3], f"{result.speedup:.2f}x",
        f"{100 * result.accuracy.pruned.top1:.2f} %", f"{100 * result.accuracy.dense.top1:.2f} %",
        c.ms(result.latency.p50_ms), manifest.model.weights_sha256, manifest.created,
    ):  # fmt: skip
        assert figure in shown, figure
    page.close()


def test_without_scripts_all_of_it_is_there(opened: Any) -> None:
    with_script, without = opened(), opened(java_script_enabled=False)
    assert without.locator("th button").count() == 0
    texts = [page.locator("main").inner_text() for page in (with_script, without)]
    assert texts[0].split() == texts[1].split()
    assert without.locator(".photos img").count() == 12
    with_script.close()
    without.close()
