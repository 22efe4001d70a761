"""Two bundles side by side, as one page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cswap_deploy.records.amounts import fixed, mebibytes, percent
from cswap_deploy.records.bundle import read_bundle
from cswap_deploy.records.comparison import Comparison
from cswap_deploy.records.manifest import Manifest
from cswap_deploy.report import cells as c
from cswap_deploy.report.document import Report, Row, Section, Tile, section, table
from cswap_deploy.report.pages import page
from cswap_deploy.runtime.manifest import MANIFEST


def render_html(found: Comparison, base: Path, head: Path) -> str:
    """What a comparison found, and what both bundles say of themselves."""
    both = tuple(
        read_bundle(path) if (path / MANIFEST).is_file() else None for path in (base, head)
    )
    return page(described(found, both))


def described(found: Comparison, both: tuple[Manifest | None, ...]) -> Report:
    """The verdicts first."""
    rows = ((c.Mark(_word(part.verdict)), part.what, part.text) for part in found.parts)
    words = (
        f"Timed in alternation on {found.device.cpu} ({found.device.cores} cores), target "
        f"{found.target}, batch {found.batch}: better or worse is a change of over half of "
        f"{100 * found.min_effect:.3g} % of the latency, or half of {100 * found.max_drop:.3g} % "
        "of top-1, that the 95 % interval is clear of.",
    )
    made = (
        section("Verdicts", *words, tables=[table("| | measured", rows)]),
        _beside(found, both),
    )
    tiles = tuple(Tile(p.what, p.verdict, p.text.partition(" (")[0]) for p in found.parts)
    return Report(
        title=f"{Path(found.head).name} against {Path(found.base).name}",
        about=f"cswap-deploy {found.tool_version} · {found.created}",
        summary=f"{found.head} is {found.verdict}.", tiles=tiles,
        sections=tuple(part for part in made if part is not None),
        sources=(),
    )  # fmt: skip


def _word(verdict: str) -> str:
    return "FAIL: worse" if verdict == "worse" else verdict


def _beside(found: Comparison, both: tuple[Manifest | None, ...]) -> Section | None:
    """What the builds recorded of both."""
    told: tuple[tuple[str, Callable[[Manifest], str]], ...] = (
        ("model", lambda m: m.model.name),
        ("built", lambda m: m.created[:16].replace("T", " ")),
        ("parameters", lambda m: f"{m.pruned.params:,}"),
        ("MACs per image", lambda m: f"{m.pruned.macs:,}"),
        ("precision", lambda m: m.onnx.precision),
        ("model.onnx", lambda m: mebibytes(m.onnx.size_bytes)),
        ("top-1, as built", _top1),
        ("p50 on the target, as built", lambda m: _p50(m, found.target)),
        ("weights sha256", lambda m: m.model.weights_sha256[:16]),
        ("device of the build", lambda m: m.device.cpu),
        ("cswap-deploy", lambda m: m.tool_version),
    )
    rows: list[Row] = [
        (name, *("-" if m is None else cell(m) for m in both)) for name, cell in told
    ]
    heads = f"| {Path(found.base).name or 'base'} | {Path(found.head).name or 'head'}"
    return section("Side by side", tables=[table(heads, rows)])


def _top1(manifest: Manifest) -> str:
    change = manifest.torch_accuracy
    return "-" if change is None else percent(change.pruned.top1, 2)


def _p50(manifest: Manifest, target: str) -> str:
    found = (r.latency for r in manifest.targets if r.engine.target == target)
    latency = next(found, None)
    return "-" if latency is None else f"{fixed(latency.p50_ms, 2)} ms"
