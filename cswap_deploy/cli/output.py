"""What the command prints: rich bars and tables on stderr, results on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich import markup
from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from cswap_deploy.errors import printable
from cswap_deploy.records.amounts import duration, fixed, percent, speed

if TYPE_CHECKING:
    from pathlib import Path

    from cswap_deploy.gate.budgets import BudgetResult
    from cswap_deploy.gate.history import Trend
    from cswap_deploy.progress import Progress as Told
    from cswap_deploy.records.bundle import BundleCheck
    from cswap_deploy.records.comparison import Bench, Comparison, SelfTest
    from cswap_deploy.records.sweep import Sweep
    from cswap_deploy.report.explain import Explanation

_WIDE = 200
_VERDICTS = {"better": "green", "same": "green", "worse": "red", "inconclusive": "yellow"}
_COLOURS = {"ok": "green", "warn": "yellow", "missing": "dim", "broken": "red"}


class Console:
    """Where results and progress go."""

    def __init__(self, *, as_json: bool, quiet: bool) -> None:
        self.as_json, self.quiet = as_json, quiet
        # The file as it is now: exporters' chatter is kept off whatever sys.stderr is then.
        self.err = RichConsole(file=sys.stderr, quiet=quiet, highlight=False)
        # In a pipe nothing is cut: whoever reads it wants whole names and digests.
        width = None if sys.stdout.isatty() else _WIDE
        self.out = RichConsole(highlight=False, width=width)

    @contextmanager
    def progress(self) -> Iterator[Told]:
        """Bars on a terminal, a line a stage elsewhere."""
        teller = _Teller(self.err)
        try:
            yield teller
        finally:
            teller.end()

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """A spinner."""
        with self.err.status(what):
            yield

    def result(self, told: dict[str, Any]) -> None:
        """One result, as JSON or as a list of names and values."""
        if self.as_json:
            print(json.dumps(told))
            return
        grid = Table.grid(padding=(0, 2))
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in _flat(told):
            grid.add_row(f"[bold]{escape(name)}", escape(value))
        self.out.print(grid)

    def table(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Rows with the same columns."""
        if self.as_json:
            print(json.dumps({name: rows}))
            return
        heads = [column.replace("_", " ") for column in rows[0]]
        self._columns(heads, [[escape(_text(v)) for v in row.values()] for row in rows])

    def groups(self, told: dict[str, Any]) -> None:
        """What can be removed from a network, and what stays whole."""
        if self.as_json:
            print(json.dumps(told))
            return
        if told["groups"]:
            self.table("groups", told["groups"])
            self.out.print()
        rows = [[escape(name), escape(why)] for name, why in told["whole"].items()]
        self._columns(["stays whole", "why"], rows)

    def findings(self, rows: list[dict[str, Any]]) -> None:
        """What ``doctor`` saw."""
        if self.as_json:
            print(json.dumps({"findings": rows}))
            return
        shown = []
        for row in rows:
            state, detail = row["state"], escape(row["detail"])
            detail += f"\n[dim]fix:[/] {escape(row['fix'])}" if row["fix"] else ""
            shown.append([f"[{_COLOURS[state]}]{state}", escape(row["name"]), detail])
        self._columns(["", "what", "found"], shown)

    def verified(self, checked: BundleCheck) -> None:
        """What a bundle was held against."""
        if self.as_json:
            rows = [asdict(finding) for finding in checked.findings]
            told = {"bundle": str(checked.path), "ok": not checked.wrong, "findings": rows}
            print(json.dumps(told | {"unlisted_files": list(checked.extra)}))
            return
        shown = [
            ["[green]ok" if f.ok else "[red]wrong", escape(f.what), escape(f.words)]
            for f in checked.findings
        ]
        shown += [["[yellow]?", escape(name), "is not in the manifest"] for name in checked.extra]
        self._columns(["", "what", "found"], shown)

    def budgets(self, results: tuple[BudgetResult, ...], extra: dict[str, Any] | None) -> None:
        """Budgets; ``extra`` is None where a result was printed already."""
        if self.as_json:
            if extra is not None:
                fields = ("name", "measured", "low", "high", "limit", "ok", "inconclusive", "text")
                rows = [{field: getattr(v, field) for field in fields} for v in results]
                print(json.dumps(extra | {"ok": all(v.ok for v in results), "budgets": rows}))
            return
        for v in results:
            mark = "[green]ok  [/]" if v.ok else "[red]FAIL[/]"
            if v.ok and v.inconclusive:
                mark = "[yellow]?   [/]"
            self.err.print(f"{mark} {escape(v.name)}: {escape(v.text)}", soft_wrap=True)

    def bundle(self, told: dict[str, Any]) -> None:
        """A finished build: its path on stdout, a summary on stderr."""
        if self.as_json:
            print(json.dumps(told))
            return
        effective, of = told["ratio_effective"], told["ratio_of"]
        asked = f"{percent(effective[of], 2)} of {of} (asked {percent(told['ratio_requested'], 2)})"
        if of == "latency":
            asked = f"for {1 / (1 - told['ratio_requested']):.2f}x the speed"
        self.err.print()
        self._line(
            "[bold]removed[/]",
            f"{asked}; params {percent(effective['params'], 1)}, "
            f"MACs {percent(effective['macs'], 1)}, units {percent(effective['channels'], 1)}",
        )
        pruned = told["ratio_requested"] > 0
        for target in told.get("targets", ()):
            faster, words = _speed(target, pruned=pruned)
            words = escape(words) if faster else f"[yellow]{escape(words)}[/]"
            self._line(f"[bold]{target['target']}[/]", _target_line(target), words)
        for doubt in told.get("doubts", ()):
            self._line("[red]doubt[/]", doubt)
        for fallback in told.get("fallbacks", ()):
            self._line("[yellow]note[/]", fallback)
        if "targets" in told:
            self._line("[bold]report[/]", f"{told['bundle']}/report.html")
        print(told["bundle"])

    def sweep(self, path: Path, found: Sweep) -> None:
        """A finished sweep: its folder on stdout, the table on stderr."""
        if self.as_json:
            told = found.model_dump(mode="json")
            for point in told["points"]:
                (point["latency"] or {}).pop("samples_ms", None)
            print(json.dumps({"sweep": str(path)} | told))
            return
        from cswap_deploy.report.sweep import described
        from cswap_deploy.report.terminal import draw

        self.err.print()
        for line in draw(described(found), self.err.width):
            self.err.print(line)
        self._line("[bold]page[/]", f"{path}/sweep.html")
        print(path)

    def comparison(self, found: Comparison) -> None:
        """Two engines: the verdict on stdout, what it rests on on stderr."""
        if self.as_json:
            print(json.dumps(found.model_dump(mode="json") | {"verdict": found.verdict}))
            return
        for part in found.parts:
            colour = _VERDICTS[part.verdict]
            self.err.print(
                f"[{colour}]{part.verdict:12}[/] {part.what}: {escape(part.text)}", soft_wrap=True
            )
        print(found.verdict)

    def self_test(self, found: SelfTest) -> None:
        """What a machine tells apart."""
        if self.as_json:
            print(found.model_dump_json())
            return
        ratio = found.ratio
        self.result(
            {
                "with itself": f"{ratio.value:.4f} ({ratio.low:.4f} to {ratio.high:.4f})",
                "noise of a loading": f"{100 * found.spread:.2f} %",
                "smallest effect that is told": f"{100 * found.smallest:.2f} %",
                "calls": ratio.calls,
                "seconds": ratio.seconds,
            }
        )

    def bench(self, found: Bench) -> None:
        """Engines timed in one loop."""
        if self.as_json:
            print(found.model_dump_json())
            return
        from cswap_deploy.report.bench import described
        from cswap_deploy.report.terminal import draw

        for line in draw(described(found), self.out.width):
            self.out.print(line)

    def trends(self, found: list[Trend]) -> None:
        """Series of a history."""
        if self.as_json:
            print(json.dumps({"trends": [asdict(trend) for trend in found]}))
            return
        from cswap_deploy.report.terminal import draw
        from cswap_deploy.report.trends import described

        for line in draw(described(found), self.out.width):
            self.out.print(line)

    def explanation(self, told: Explanation) -> None:
        """What a plan says about its units, for ``explain``."""
        if self.as_json:
            print(json.dumps(told.plain()))
            return
        from cswap_deploy.report.terminal import draw
        from cswap_deploy.report.units import explained

        for line in draw(explained(told), self.out.width):
            self.out.print(line)

    def _columns(self, heads: list[str], rows: list[list[str]]) -> None:
        table = Table(box=None, pad_edge=False)
        for head in heads:
            table.add_column(head, overflow="fold")
        for row in rows:
            table.add_row(*row)
        self.out.print(table)

    def _line(self, name: str, text: str, marked: str = "") -> None:
        """``marked`` is in rich's markup and ends the line."""
        self.err.print(name, escape(text) + marked, soft_wrap=True)


class _Teller:
    """Draws the stages of a build; satisfies ``progress.Progress``."""

    def __init__(self, console: RichConsole) -> None:
        self._console = console
        self._live = console.is_terminal and not console.quiet
        self._name = ""
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._what = self._overall = ""

    def stage(self, name: str, detail: str = "") -> None:
        self.end()
        self._name = f"{name} {detail}".strip()

    def done(self, detail: str, *, reused: bool) -> None:
        self.end()
        self._overall = ""
        how = " [dim](reused)[/]" if reused else ""
        self._console.print(
            f"[green]✓[/] [bold]{escape(self._name)}[/]{how} {escape(detail)}", soft_wrap=True
        )

    def note(self, text: str) -> None:
        self._console.print(f"  [yellow]![/] {escape(text)}", soft_wrap=True)

    def begin(self, what: str, total: int) -> None:
        self.end()
        self._what = escape(what)
        if not self._live:
            self._console.print(f"  {self._said()}", soft_wrap=True)
            return
        counted = total > 0
        bar = [BarColumn(bar_width=30), MofNCompleteColumn()] if counted else []
        own = counted and not self._overall  # the time of the whole stage says more
        left: list[str | ProgressColumn] = [TimeRemainingColumn(), "left,"] if own else []
        self._bar = Progress(
            SpinnerColumn(), "{task.description}", *bar, _Rate(), *left, TimeElapsedColumn(),
            "so far", _Memory(), console=self._console, transient=True,
        )  # fmt: skip
        self._task = self._bar.add_task(self._said(), total=total if counted else None)
        self._bar.start()

    def advance(self, steps: int) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, steps)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None

    def overall(self, part: float, left: float) -> None:
        self._overall = f"{percent(part, 0)} of the stage, {duration(left)} left: "
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=self._said())

    def _said(self) -> str:
        return self._overall + self._what


class _Rate(ProgressColumn):
    """Steps a second, once there are some."""

    def render(self, task: Task) -> Text:
        rate = task.finished_speed or task.speed
        if not rate:
            return Text("")
        return Text(f"{rate:.0f}/s" if rate >= 10 else f"{fixed(rate, 1)}/s", style="dim")


class _Memory(ProgressColumn):
    """Resident memory of this process, looked up twice a second."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        import psutil

        used = psutil.Process().memory_info().rss
        return Text(f"{used / 2**20:,.0f} MiB", style="dim")


def _target_line(target: dict[str, Any]) -> str:
    if all(target[name] is None for name in ("top1", "agreement", "outputs")):
        return f"built, not run here: {target['reason']}"
    if target["top1"] is None and target["agreement"] is not None:
        line = f"same class as the dense network on {percent(target['agreement'], 2)}"
    elif target["top1"] is None:
        line = ", ".join(_output_words(*pair) for pair in target["outputs"].items())
    else:
        drop = fixed(100 * target["top1_drop"], 2, sign="+")
        line = f"top-1 {percent(target['top1'], 2)} (drop {drop} points)"
    if target["p50_ms"] is not None:
        line += f", p50 {fixed(target['p50_ms'], 2)} ms, p99 {fixed(target['p99_ms'], 2)} ms"
    return line


def _speed(target: dict[str, Any], *, pruned: bool) -> tuple[bool, str]:
    """Whether a target is faster than the dense network, or was not to be, and the end of its
    line."""
    if not target.get("speedup"):
        return True, ""
    faster, words = speed(target["speedup"], target["speedup_low"], target["speedup_high"])
    if faster or not pruned:
        return True, f", {fixed(target['speedup'], 2)}x the dense network's speed"
    return False, f", {words}"


def _output_words(name: str, change: dict[str, Any]) -> str:
    error, agreement = change["error_db"], change["agreement"]
    text = name if error is None else f"{name} {fixed(error, 1)} dB"
    return text if agreement is None else f"{text} ({percent(agreement, 2)} of decisions alike)"


def _flat(told: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in told.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for i, item in enumerate(value):
                yield from _flat(item, f"{prefix}{name}[{i}].")
        else:
            yield f"{prefix}{name}", _text(value)


def escape(text: str) -> str:
    """Any text, so that neither rich nor the terminal takes a part of it for a command."""
    return markup.escape(printable(text))


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return "-" if value is None else str(value)
