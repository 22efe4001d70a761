"""What the report says of number formats. The figures are made up."""

from __future__ import annotations

from made_up_bundle import accuracy_change, made_up_manifest, made_up_plan, made_up_targets

from cswap_deploy.records.manifest import Manifest
from cswap_deploy.records.measurements import KeptLayer, PrecisionResult, PrecisionTrial
from cswap_deploy.report.pages import render_markdown


def narrowed() -> Manifest:
    ran, not_run = made_up_targets()
    reduced = accuracy_change(0.005)
    result = PrecisionResult(
        precision="fp16", layers=113, images=256, kl=0.00033, agreement=0.996, drop_limit=0.001,
        tried=(
            PrecisionTrial(what="fp16, 0 in float32", kl=None, agreement=0, passes=False),
            PrecisionTrial(what="fp16, 2 in float32", kl=3e-4, agreement=1, passes=True),
        ),
        kept=(
            KeptLayer(node="norm/Mul", operator="Mul", reason="range", value=123456.0),
            KeptLayer(node="head/Gemm", operator="Gemm", reason="asked"),
        ),
    )  # fmt: skip
    targets = (
        ran.model_copy(update={"reduced": reduced, "judged_by": "this engine"}),
        not_run.model_copy(update={"reduced": reduced, "judged_by": "the same graph"}),
    )
    return made_up_manifest(targets=targets).model_copy(update={"precision": result})


def test_the_report_says_what_was_tried_what_stayed_and_what_it_cost() -> None:
    markdown = render_markdown(narrowed(), made_up_plan())
    section = markdown.split("## Precision")[1].split("\n## ")[0]
    for words in (
        "allows a loss of 0.10 points of top-1",
        "| fp16, 0 in float32 | not finite | 0.0 % | fails |",
        "| fp16, 2 in float32 | 0.00030 | 100.0 % | passes |",
        "| this engine | 92.05 % | 91.55 % | 0.50 (",
        "| the same graph | 92.05 % | 91.55 % | 0.50 (",
        "| norm/Mul | Mul | values beyond the type's range | 1.23e+05 |",
        "| head/Gemm | Gemm | --keep-fp32 | - |",
    ):
        assert words in section


def test_float32_has_no_such_section() -> None:
    assert "## Precision" not in render_markdown(made_up_manifest(), made_up_plan())
