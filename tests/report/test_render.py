"""The report says what the manifest holds, and nothing else."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest
from made_up_bundle import (
    accuracy_change,
    made_up_manifest,
    made_up_plan,
    made_up_targets,
    magnitude_plan,
)

from cswap_deploy.errors import ArtifactError
from cswap_deploy.gate.budgets import Budgets, check_budgets
from cswap_deploy.records.manifest import Manifest
from cswap_deploy.records.measurements import Agreement
from cswap_deploy.records.plan import PrunePlan, Size
from cswap_deploy.records.value import FileRef
from cswap_deploy.report import cells, headline
from cswap_deploy.report.pages import render_html, render_markdown
from cswap_deploy.report.reproduce import speed_instead
from cswap_deploy.report.sections import describe
from cswap_deploy.report.terminal import draw
from cswap_deploy.sweep import conditions


class Page(HTMLParser):
    """A page's text, ids and addresses; also shows that its tags are balanced."""

    VOID = frozenset({"meta", "link", "br", "img", "use", "path", "hr"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.open: list[str] = []
        self.feed(html)
        assert self.open == []
        self.text = " ".join(" ".join(self.words).replace("\u00a0", " ").split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        values = dict(attrs)
        self.ids += [v for k, v in attrs if k == "id" and v]
        self.addresses += [
            v for k, v in values.items() if k in ("src", "href", "xlink:href", "action") and v
        ]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def one_group(**changes: Any) -> PrunePlan:
    """Where the figures are not what is tested they are small ones."""
    plan = made_up_plan()
    return plan.model_copy(update={"groups": (plan.groups[0].model_copy(update=changes),)})


def both(manifest: Manifest) -> tuple[str, str]:
    plan = one_group()
    return render_markdown(manifest, plan), Page(render_html(manifest, plan)).text


@pytest.fixture(scope="module")
def html() -> str:
    return render_html(made_up_manifest(), made_up_plan())


@pytest.fixture(scope="module")
def markdown() -> str:
    return render_markdown(made_up_manifest(), made_up_plan())


def test_both_reports_carry_the_result(markdown: str, html: str) -> None:
    manifest = made_up_manifest()
    for text in (markdown, Page(html).text):
        assert (
            "40.0 % of the parameters were to be removed; removed were 40.1 % of the parameters, "
            "43.5 % of the units (channels, heads, neurons), 31.2 % of the MACs." in text
        )
        assert (
            "Top-1 went from 92.05 % to 91.35 % on 2,000 images (onnxruntime): 0.70 points lower, "
            "95 % interval 0.20 to 1.20." in text
        )
        assert "takes 0.627 ms instead of 0.853 ms (1.36x)" in text
        assert "653.6 KiB" in text
        assert "1.34 MiB" in text
        assert "4.10e-06" in text
        assert "conv1" in text
        assert "feeds the residual stream" in text
        assert manifest.model.weights_sha256 in text
        assert "The tensorrt-rtx engine was built but not run here: no NVIDIA driver" in text
        for group in made_up_plan().groups:
            assert group.name in text
        for name, version in manifest.versions.items():
            assert name in text
            assert version in text


@pytest.mark.parametrize("width", [60, 100, 160])
def test_a_terminal_shows_the_same_report(width: int) -> None:
    manifest, plan = made_up_manifest(), made_up_plan()
    report = describe(manifest, plan, check_budgets(manifest, Budgets(size_max_mib=0.5)))
    text = " ".join(" ".join(line.plain for line in draw(report, width)).split())
    assert text.startswith("demo-resnet demo-resnet: 40.0 % of the parameters were to be removed;")
    for words in (
        "p50, onnxruntime: 0.627 ms (1.36x from 0.853 ms)",
        "! The tensorrt-rtx engine was built but not run here: no NVIDIA driver",
        "FAIL size_max_mib",
        "653.6 KiB",
        "4.10e-06",
        "feeds the residual stream",
        "Verdicts describe (false-discovery rate 5 %",
        manifest.model.weights_sha256,
        *(group.name for group in plan.groups),
        *manifest.versions.values(),
    ):
        assert words in text


def test_the_group_table_adds_up(markdown: str) -> None:
    plan = made_up_plan()
    row = r"^\| (layer\S+) \| channels \| (\d+) \| (\d+) \| [\d.]+ % \| (.*) \|$"
    rows = re.findall(row, markdown, flags=re.MULTILINE)
    assert [row[0] for row in rows] == [group.name for group in plan.groups]
    assert sum(int(row[1]) for row in rows) == plan.dense.units
    assert sum(int(row[2]) for row in rows) == plan.pruned.units
    for _, units, kept, others in rows:
        *counts, largest = others.split(" | ")
        assert re.fullmatch(r"[−+][\d.]+ % \([−+][\d.]+ to [−+][\d.]+\)", largest)
        pairs = [cell.split("+") for cell in counts]
        assert len(pairs) == 3, "critical, neutral, detrimental"
        assert sum(int(stays) for stays, _ in pairs) == int(kept)
        assert sum(int(goes) for _, goes in pairs) == int(units) - int(kept)


def test_effects_are_told_with_interval_verdict_and_classes(markdown: str, html: str) -> None:
    plan = made_up_plan()
    measured = [(g, e) for g in plan.groups for e in g.effects]
    group, most = max(measured, key=lambda pair: abs(pair[1].true_class))
    for text in (markdown, Page(html).text):
        assert (
            "An effect is the relative change of the true class's probability when a unit is set "
            "to its mean (128 images, 95 % interval): below zero the unit helps the prediction, "
            "above zero it harms it." in text
        )
        assert "Verdicts describe (false-discovery rate 5 %, effects of 1 % or more)" in text
        assert (
            "The removal itself goes by the KL divergence (how far the whole output moves) for "
            "each parameter saved, smallest first." in text
        )
        counts = [
            f"{sum(e.verdict == v for _, e in measured)} {v}"
            for v in ("critical", "neutral", "detrimental")
        ]
        assert f"Verdicts on all 336 units: {', '.join(counts)}." in text
    interval = cells.interval(cells.effect, most.true_class, most.low, most.high)
    state = "kept" if most.unit in group.kept else "removed"
    [row] = re.findall(rf"^\| {group.name} \| {most.unit} \| {state} .*$", markdown, re.MULTILINE)
    names = ("T-shirt/top", "Trouser", *(f"class {i}" for i in range(2, 10)))
    serves = ", ".join(names[c] for c in most.serves)
    assert row.startswith(f"| {group.name} | {most.unit} | {state} | critical | {serves} |")
    assert f"| {interval} | {cells.nats(most.kl)} |" in row
    head = markdown.index("| largest effects | unit |")
    assert head < markdown.index(row) < markdown.index("| detrimental | unit |")
    assert "| removed at the largest cost | unit |" in markdown


def test_a_plan_without_effects_says_so() -> None:
    plan = magnitude_plan()
    markdown = render_markdown(made_up_manifest(), plan)
    assert "The importance magnitude ranks the units without measuring them" in markdown
    assert "## Measured effects" not in markdown
    assert "| group | kind | units | kept | kept, % |\n" in markdown
    html = render_html(made_up_manifest(), plan)
    assert "Units kept and removed in each group</title>" in html


def test_a_plan_of_an_older_version_names_no_classes() -> None:
    plan = made_up_plan().model_dump(mode="json")
    for group in plan["groups"]:
        for effect in group["effects"]:
            del effect["serves"], effect["harms"]
    markdown = render_markdown(made_up_manifest(), PrunePlan.model_validate(plan))
    assert "| largest effects | unit |  | verdict | effect, 95 % | KL, nats |" in markdown


def test_the_page_stands_alone(html: str) -> None:
    page = Page(html)
    (script,) = re.findall("<script>(.*?)</script>", html, flags=re.DOTALL)
    assert not re.search("fetch|import|src|http|eval|innerHTML", script)
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    assert len(page.ids) == len(set(page.ids))
    assert {address[1:] for address in page.addresses if address[0] == "#"} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= set(page.ids)
    assert len(re.findall("<svg ", html)) == 3
    assert "prefers-color-scheme: dark" in html
    for svg in re.findall("<svg .*?</svg>", html, flags=re.DOTALL):
        assert "currentColor" in svg, "text and lines follow the theme"
        assert "#010203" not in svg
        assert "#040506" not in svg
        assert "#000000" not in svg


def test_the_same_values_give_the_same_bytes(html: str) -> None:
    assert render_html(made_up_manifest(), made_up_plan()) == html


def test_names_cannot_break_out() -> None:
    model = made_up_manifest().model.model_copy(update={"name": "<script>x|y</script>\n# z"})
    plan = one_group(name="</text><script>bad</script>")
    html = render_html(made_up_manifest(model=model), plan)
    assert html.count("<script") == 1, "the page's own"
    assert "<script>bad" not in html
    assert "<script>x|y</script>" in Page(html).text
    markdown = render_markdown(made_up_manifest(model=model), plan)
    _, _, markdown = markdown.removeprefix("---\n").partition("---\n\n")
    assert markdown.startswith("# \\<script\\>x\\|y\\</script\\> # z\n")


def test_a_reader_is_warned() -> None:
    manifest = made_up_manifest()
    assert manifest.validation is not None
    unreadable = tuple(f"{i}.jpg" for i in range(7))
    validation = manifest.validation.model_copy(update={"unreadable": unreadable})
    lost = manifest.export_parity[0].model_copy(update={"max_abs": 0.5})
    manifest = made_up_manifest(
        validation=validation,
        shared_images=3,
        export_parity=(lost,),
        fallbacks=("round-to auto: 1 was used",),
    )
    for text in both(manifest):
        assert (
            "3 images are in both the calibration and the validation set: the accuracy is not "
            "that on unseen images." in text
        )
        assert (
            "7 validation files could not be read and were left out: 0.jpg, 1.jpg, 2.jpg, 3.jpg, "
            "4.jpg and 2 more." in text
        )
        assert "6.jpg was unreadable and left out" in text
        assert (
            "Parity is lost: export differs from PyTorch, pruned by 0.5 (at most 0.001 allowed)."
            in text
        )
        assert "round-to auto: 1 was used" in text


def test_what_was_not_measured_is_said() -> None:
    manifest = made_up_manifest(
        torch_accuracy=None,
        targets=made_up_targets()[1:],
        export_parity=(),
        calibration=None,
        validation=None,
    )
    for text in both(manifest):
        assert "Accuracy was not measured." in text
        assert "Not measured: no validation images were scored." in text
        assert "no engine was run on this machine" in text
        assert "no graph was compared" in text
        assert "No calibration images were used." in text
        assert "points lower" not in text


def test_a_better_network_is_not_called_worse() -> None:
    better = accuracy_change(-0.003)
    assert "0.30 points higher" in headline.summary(
        made_up_manifest(torch_accuracy=better, targets=())
    )


def test_ratio_zero_is_called_dense() -> None:
    manifest = made_up_manifest(settings={"ratio": 0.0, "ratio_of": "params"})
    assert headline.summary(manifest).startswith("demo-resnet was exported dense: ")


@pytest.mark.parametrize("labelled", [True, False])
def test_fewer_parameters_come_with_the_sweep_that_asks_for_speed(labelled: bool) -> None:
    """Its condition holds for a network that keeps what this one did, and not for a worse one."""
    manifest = made_up_manifest()
    first = manifest.targets[0]
    if not labelled:
        assert first.accuracy is not None
        alike = Agreement(share=0.9437, low=0.93, high=0.96, kl=0.1, images=1000)
        first = first.model_copy(update={"accuracy": None, "agreement": alike})
        manifest = manifest.model_copy(update={"targets": (first,)})
    line = speed_instead(manifest)
    assert line is not None
    assert line in " ".join(both(manifest)[0].split())
    words = shlex.split(line)
    assert words[:3] == ["cswap-deploy", "sweep", manifest.model.name]
    speedups = [float(x) for x in words[words.index("--speedups") + 1].split(",")]
    assert min(speedups) > (first.speedup or 0)
    (wanted,) = conditions(words[words.index("--pick") + 1])
    if first.accuracy is not None:
        assert -1e-9 <= wanted.limit - first.accuracy.drop <= 0.001
    else:
        assert wanted.limit == pytest.approx(0.943)
    settings = manifest.settings | {"ratio_of": "latency"}
    other = manifest.model_copy(update={"ratio_of": "latency", "settings": settings})
    assert speed_instead(other) is None, "it was the aim"


def test_budgets_are_shown_when_there_are_some(markdown: str) -> None:
    """And a long table, here of files, is folded away."""
    assert "## Budgets" not in markdown
    files = tuple(FileRef(path=f"{i}.txt", sha256="0" * 64, size_bytes=1) for i in range(40))
    manifest, plan = made_up_manifest(files=files), one_group()
    results = check_budgets(manifest, Budgets(size_max_mib=0.5, params_max=200_000))
    markdown = render_markdown(manifest, plan, results=results)
    assert "| FAIL | size_max_mib | model.onnx 0.638 MiB, limit at most 0.500 MiB |" in markdown
    assert "| pass | params_max |" in markdown
    html = render_html(manifest, plan, results=results)
    assert '<td class="bad">FAIL</td>' in html
    assert re.findall("<details><summary>(.*)</summary>", html) == ["40 rows"]


def test_a_plan_of_another_build_is_refused() -> None:
    plan = made_up_plan().model_copy(update={"pruned": Size(units=1, params=2, macs=3)})
    with pytest.raises(ArtifactError, match="its pruned network has 2 parameters, the manifest's"):
        render_markdown(made_up_manifest(), plan)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.1234, "0.123 ms"),
        (1.234, "1.23 ms"),
        (12.34, "12.3 ms"),
        (123.4, "123 ms"),
        (0.0001, "0.0001 ms"),
    ],
)
def test_milliseconds_have_three_digits(value: float, text: str) -> None:
    assert cells.ms(value) == text


@pytest.mark.parametrize("cell", [cells.percent, cells.top1, cells.points, cells.ms, cells.seconds])
def test_nothing_small_reads_as_zero(cell: Callable[[float], str]) -> None:
    assert not re.search("[1-9]", cell(0.0))
    assert re.search("[1-9]", cell(3e-7))


@pytest.mark.parametrize(
    ("value", "text"),
    [(950, "950"), (163_120, "163 k"), (25_557_032, "25.6 M"), (4_089_184_256, "4.09 G")],
)
def test_counts_are_short(value: int, text: str) -> None:
    assert cells.short(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(17, "17 B"), (669_312, "653.6 KiB"), (4_194_304, "4.00 MiB")]
)
def test_sizes_are_in_binary_units(value: int, text: str) -> None:
    assert cells.size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (-0.4567, "−46 %"),
        (-0.0996, "−10 %"),
        (0.0123, "+1.2 %"),
        (-0.0012, "−0.12 %"),
        (-1e-6, "0 %"),
    ],
)
def test_effects_are_signed_percentages(value: float, text: str) -> None:
    assert cells.effect(value) == text


def test_an_effect_with_its_interval() -> None:
    assert cells.interval(cells.effect, -0.153, -0.206, -0.0999) == "−15 % (−21 to −10)"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.1, "0.10"), (0.00047, "0.00047"), (1.0, "1.0"), (12.4, "12"), (-0.3, "−0.30")],
)
def test_divergences_have_two_digits(value: float, text: str) -> None:
    assert cells.nats(value) == text


def test_the_images_are_described_with_what_is_odd_about_them() -> None:
    manifest = made_up_manifest()
    note = "2 of the 10 classes of demo-resnet have no images: 3, 4"
    both = {
        role: getattr(manifest, role).model_copy(update={"notes": (note,), "source": "photos"})
        for role in ("calibration", "validation")
    }
    steps = manifest.model.preprocessing.model_copy(update={"exif_rotate": True})
    model = manifest.model.model_copy(update={"preprocessing": steps})
    said = render_markdown(manifest.model_copy(update={**both, "model": model}), made_up_plan())
    assert said.count(f"photos: {note}.") == 1
    assert "Preprocessing: turned by EXIF orientation, shorter side to 28 pixels" in said
