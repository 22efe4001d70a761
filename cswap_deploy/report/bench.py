"""Engines that were timed in one loop, as a table."""

from __future__ import annotations

from cswap_deploy.measure.statistics import percentile_interval, samples_for
from cswap_deploy.records.comparison import Bench, BenchRow
from cswap_deploy.report import cells as c
from cswap_deploy.report.document import Report, section, table


def described(found: Bench) -> Report:
    """The table, and what disturbed it."""
    rows = (
        (
            row.label, row.target, row.latency.batch, row.latency.threads,
            *(_percentile(row, percent) for percent in (50, 90, 99)),
            c.interval(_rate, row.throughput.value, row.throughput.low, row.throughput.high),
            c.interval(_times, row.ratio.value, row.ratio.low, row.ratio.high),
        )
        for row in found.rows
    )  # fmt: skip
    heads = "engine | target | batch | threads | p50 | p90 | p99 | images/s | of the first's time"
    calls = min(len(row.latency.samples_ms) for row in found.rows)
    words = [
        f"Milliseconds of a call, {calls:,} of each in turn on {found.device.cpu}; in brackets "
        "95 % intervals.",
    ]
    missing = [p for p in (90, 99) if samples_for(p) > calls]
    words += [
        f"p{p} takes {samples_for(p)} calls for its interval, so it is left out." for p in missing
    ]
    words += [
        f"{row.label} ({row.target}, batch {row.latency.batch}): {told}."
        for row in found.rows
        for told in row.noise
    ]
    made = section("Latency", *words, tables=[table(heads, rows)])
    return Report(
        title="bench", sections=(made,) if made is not None else (), sources=(),
        about=f"cswap-deploy {found.tool_version} · {found.created}",
    )  # fmt: skip


def _percentile(row: BenchRow, percent: int) -> c.Amount | None:
    ends = percentile_interval(row.latency.samples_ms, percent)
    value = getattr(row.latency, f"p{percent}_ms")
    return None if ends is None else c.interval(c.ms, value, *ends)


def _rate(value: float) -> c.Amount:
    return c.Amount(f"{value:,.1f}")


def _times(value: float) -> c.Amount:
    return c.Amount(f"{value:.3f}")
