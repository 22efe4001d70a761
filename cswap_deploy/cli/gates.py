"""The commands that measure and judge: ``check compare bench budget history``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cswap_deploy.cli.shared import Json, Quiet, console_of, fraction, numbers, seconds

if TYPE_CHECKING:
    from cswap_deploy.cli.output import Console
    from cswap_deploy.errors import GateError
    from cswap_deploy.gate.budgets import BudgetResult

app = typer.Typer()
budget = typer.Typer(no_args_is_help=True, help="Write a budgets file, and a CI job.")
history = typer.Typer(no_args_is_help=True, help="Keep measurements, and show their trends.")
app.add_typer(budget, name="budget")
app.add_typer(history, name="history")

Bundle = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A finished bundle.")]
Junit = Annotated[Path | None, typer.Option(metavar="FILE.xml", help="Results for CI.")]
Markdown = Annotated[Path | None, typer.Option(metavar="FILE.md", help="A table for a comment.")]
Target = Annotated[str | None, typer.Option(metavar="NAME", help="Runtime; the bundle's first.")]
Threads = Annotated[int | None, typer.Option(metavar="N", min=1, help="Of a CPU runtime.")]
AtMost = Annotated[str, typer.Option(metavar="60s", help="Timing ends then, clear or not.")]
Batch = Annotated[int, typer.Option(metavar="N", min=1, help="Images a call.")]


@app.command()
def check(
    bundle: Bundle,
    budget: Annotated[Path, typer.Option("--budget", metavar="FILE.toml", help="The limits.")],
    recorded: Annotated[
        bool, typer.Option("--recorded", help="Judge the build's figures; measure nothing.")
    ] = False,
    threads: Threads = None,
    at_most: AtMost = "60s",
    junit: Junit = None,
    markdown: Markdown = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a bundle here and hold it against budgets; exit 3 when one fails."""
    from cswap_deploy.api import check as checked

    console = console_of(as_json=as_json, quiet=quiet)
    limit = seconds(at_most)
    with console.progress() as progress:
        results = checked(
            bundle, budget, recorded=recorded, threads=threads, at_most=limit, progress=progress
        )
    _write(results, str(bundle), junit, markdown)
    conclude(results, console, extra={"bundle": str(bundle)})


@app.command()
def compare(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="A bundle or an ONNX file.")],
    head: Annotated[Path, typer.Argument(metavar="HEAD", help="What is judged.")],
    target: Target = None,
    batch: Batch = 1,
    threads: Threads = None,
    min_effect: Annotated[
        str | None, typer.Option(metavar="2%", help="Of the latency, that counts (2%).")
    ] = None,
    max_drop: Annotated[str, typer.Option(metavar="1%", help="Of top-1, that counts.")] = "1%",
    at_most: AtMost = "60s",
    inconclusive: Annotated[
        str, typer.Option(metavar="pass|fail", help="What it counts as.")
    ] = "pass",
    history_file: Annotated[
        Path | None,
        typer.Option("--history", metavar="FILE.db", help="Its runner's noise; adds the result."),
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Side by side.")] = None,
    junit: Junit = None,
    markdown: Markdown = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time two engines in alternation until it is clear; exit 3 when HEAD is worse."""
    from cswap_deploy.errors import GateError, UsageError
    from cswap_deploy.gate.compare import CompareOptions, effect_on, results_of
    from cswap_deploy.gate.compare import compare as compared
    from cswap_deploy.records.files import write_atomic

    if inconclusive not in ("pass", "fail"):
        raise UsageError(f"--inconclusive {inconclusive!r}: pass or fail is wanted")
    console = console_of(as_json=as_json, quiet=quiet)
    options = CompareOptions(
        target=target, batch=batch, threads=threads,
        min_effect=effect_on(history_file, None if min_effect is None else fraction(min_effect)),
        max_drop=fraction(max_drop), at_most=seconds(at_most),
    )  # fmt: skip
    with console.progress() as progress:
        found = compared(base, head, options, progress=progress)
    results = results_of(found, inconclusive_passes=inconclusive == "pass")
    if history_file is not None:
        from cswap_deploy.gate.history import History, measurements_from, this_revision

        History(history_file).add(measurements_from(found, this_revision()))
    if html is not None:
        from cswap_deploy.report.compare import render_html

        write_atomic(html, render_html(found, base, head).encode())
    _write(results, f"{head} against {base}", junit, markdown)
    _annotate(results)
    console.comparison(found)
    if failed := [result for result in results if not result.ok]:
        names = ", ".join(result.name for result in failed)
        raise _failed(GateError(f"{head} is {found.verdict} ({names})"))


@app.command()
def bench(
    paths: Annotated[list[Path], typer.Argument(metavar="BUNDLE|ONNX...", help="What is timed.")],
    batch: Annotated[str, typer.Option(metavar="1,8", help="Images a call.")] = "1",
    target: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Runtime, the bundle's own; repeat.")
    ] = None,
    threads: Threads = None,
    runs: Annotated[int, typer.Option(metavar="N", min=2, help="Calls of each, at least.")] = 400,
    lasting: Annotated[
        str | None, typer.Option("--for", metavar="30s", help="Goes on for so long.")
    ] = None,
    self_test: Annotated[
        bool, typer.Option("--self-test", help="Against itself: what this machine can tell.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time several engines in one loop, one table."""
    from cswap_deploy.errors import UsageError
    from cswap_deploy.gate import bench as benches

    console = console_of(as_json=as_json, quiet=quiet)
    sizes = [int(size) for size in numbers(batch)]
    lasts = None if lasting is None else seconds(lasting)
    if self_test:
        if len(paths) != 1:
            raise UsageError("--self-test takes one engine")
        with console.progress() as progress:
            tested = benches.self_test(
                paths[0], target=target[0] if target else None, batch=sizes[0], threads=threads,
                seconds=lasts or 60.0, progress=progress,
            )  # fmt: skip
        console.self_test(tested)
        return
    with console.progress() as progress:
        found = benches.bench(
            paths, targets=target or (), batches=sizes, threads=threads, runs=runs,
            seconds=lasts, progress=progress,
        )  # fmt: skip
    console.bench(found)


@budget.command("init")
def budget_init(
    bundle: Bundle,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE.toml", help="Where it goes.")
    ] = Path("budgets.toml"),
    margin: Annotated[str, typer.Option(metavar="10%", help="How much worse it may be.")] = "10%",
    baseline: Annotated[
        str | None, typer.Option(metavar="PATH|git:REF:PATH", help="To hold later bundles against.")
    ] = None,
    ci: Annotated[
        str | None, typer.Option(metavar="github|gitlab", help="Also write its job.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
) -> None:
    """Write limits that the bundle meets today, with a margin."""
    from cswap_deploy.errors import UsageError
    from cswap_deploy.gate.starting import PLACES, budgets_text, job_text
    from cswap_deploy.records.bundle import verify_bundle
    from cswap_deploy.records.files import write_atomic

    if ci is not None and ci not in PLACES:
        raise UsageError(f"--ci {ci!r}: {' or '.join(PLACES)}")
    manifest = verify_bundle(bundle).manifest
    made = {
        output: budgets_text(manifest, margin=fraction(margin), bundle=bundle, baseline=baseline)
    }
    if ci is not None:
        service: Any = ci
        made[Path(PLACES[service])] = job_text(service, bundle=bundle, budgets=output)
    there = [str(path) for path in made if path.exists() and not force]
    if there:
        raise UsageError(f"{', '.join(there)} is there already", fix="--force, or another -o")
    for path, text in made.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text.encode())
        print(path)


@history.command("add")
def history_add(
    file: Annotated[Path, typer.Argument(metavar="FILE.db", help="The history.")],
    results: Annotated[
        list[Path],
        typer.Argument(metavar="BUNDLE|JSON...", help="Bundles; results of bench or compare."),
    ],
    revision: Annotated[str, typer.Option(metavar="REV", help="Of the code; git's.")] = "",
    as_json: Json = False,
) -> None:
    """Keep measurements in a file."""
    from cswap_deploy.gate.history import History, measurements_of, this_revision

    mark = revision or this_revision()
    found = [one for path in results for one in measurements_of(path, revision=mark)]
    added = History(file).add(found)
    console_of(as_json=as_json).result({"history": str(file), "added": added})


@history.command("show")
def history_show(
    file: Annotated[Path, typer.Argument(metavar="FILE.db", help="The history.")],
    pattern: Annotated[str, typer.Argument(help="Of the series, as '*/p50'.")] = "*",
    html: Annotated[Path | None, typer.Option(metavar="FILE.html", help="With plots.")] = None,
    as_json: Json = False,
) -> None:
    """Trends, and where a series took another level."""
    from cswap_deploy.errors import UsageError
    from cswap_deploy.gate.history import History

    if not file.is_file():
        raise UsageError(
            f"there is no history at {file}", fix="`cswap-deploy history add` makes it"
        )
    trends = History(file).trends(pattern)
    if html is not None:
        from cswap_deploy.records.files import write_atomic
        from cswap_deploy.report.trends import render_html

        write_atomic(html, render_html(trends, file.name).encode())
    console_of(as_json=as_json).trends(trends)


def conclude(
    results: tuple[BudgetResult, ...], console: Console, *, extra: dict[str, Any] | None
) -> None:
    """Show how the budgets did; exit 3 where one failed."""
    from cswap_deploy.errors import GateError
    from cswap_deploy.gate.budgets import require

    _annotate(results)
    console.budgets(results, extra)
    try:
        require(results)
    except GateError as err:
        raise _failed(err) from err


def _failed(err: GateError) -> typer.Exit:
    """Say why; what was measured is on stdout already, so this is no error object there."""
    from cswap_deploy.errors import printable

    typer.echo(f"error: {printable(str(err))}", err=True)
    return typer.Exit(err.exit_code)


def _annotate(results: tuple[BudgetResult, ...]) -> None:
    from cswap_deploy.gate.junit import github_annotations

    for line in github_annotations(results):
        typer.echo(line, err=True)


def _write(
    results: tuple[BudgetResult, ...], what: str, junit: Path | None, markdown: Path | None
) -> None:
    """The forms that CI reads."""
    from cswap_deploy.gate.junit import add_to_summary, to_junit, to_markdown
    from cswap_deploy.records.files import write_atomic

    text = to_markdown(results, title=what)
    if junit is not None:
        write_atomic(junit, to_junit(results, suite=what).encode())
    if markdown is not None:
        write_atomic(markdown, text.encode())
    add_to_summary(text)
