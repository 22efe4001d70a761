"""The command ``cswap-deploy``: flags -> one library call -> rendering.

Results go to stdout, everything else to stderr. Imports stand inside the commands, so that
``--help`` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cswap_deploy.errors import CswapError, GateError
from cswap_deploy.help_sections import Sectioned

if TYPE_CHECKING:
    from cswap_deploy.cli.output import Console
    from cswap_deploy.gate.budgets import BudgetVerdict
    from cswap_deploy.old_config import BuildConfig
    from cswap_deploy.pipeline import Bundle, Stage

app = typer.Typer(
    name="cswap-deploy",
    help="Prune a vision network without training, export it, build an engine, check it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_INTERRUPTED = 130

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary.")]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="DIR", help="Folder to leave the result in."),
]
Target = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="onnxruntime (default), onnxruntime-cuda, tensorrt, tensorrt-rtx, openvino; repeat.",
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="DIR|FILE.npz|hf:NAME[:SPLIT]", help="Labelled images to prune and test on."
    ),
]
ValidationData = Annotated[
    str | None, typer.Option(metavar="...", help="As --data, for the test images alone.")
]
ClassMap = Annotated[
    Path | None, typer.Option(metavar="FILE.json", help="Folder or label name -> class index.")
]
Budget = Annotated[
    Path | None, typer.Option(metavar="FILE.toml", help="Fail (exit 3) if a limit is exceeded.")
]
Precision = Annotated[
    str | None, typer.Option(metavar="fp32|fp16|bf16|int8|mixed", help="Of the engine (fp32).")
]
PrecisionDrop = Annotated[
    float | None,
    typer.Option(help="Top-1 it may cost, a fraction (fp16 .001, bf16 .005, int8 .01), or exit 3."),
]
KeepFp32 = Annotated[
    list[str] | None,
    typer.Option(metavar="MODULE", help="Keeps float32, as blocks.0.attn or '*/Softmax'."),
]
Int8Calibration = Annotated[
    str | None, typer.Option(metavar="auto|entropy|percentile|minmax", help="Ranges for int8.")
]
Int8Quantizer = Annotated[
    str | None, typer.Option(metavar="onnxruntime|modelopt", help="Who makes int8 (README).")
]
Opset = Annotated[
    str | None, typer.Option(metavar="N|auto", help="ONNX opset (the lowest that does).")
]
Batch = Annotated[
    str | None, typer.Option(metavar="MIN:OPT:MAX", help="Batches of the engine (1:1:16).")
]
Workspace = Annotated[
    int | None, typer.Option(metavar="MIB", help="TensorRT: scratch memory of the builder.")
]
OptimizationLevel = Annotated[
    int | None, typer.Option(metavar="0..5", help="TensorRT: effort of the builder (3).")
]
HardwareCompat = Annotated[
    str | None,
    typer.Option(metavar="none|ampere+|same-cc", help="TensorRT: other GPUs that may run it."),
]
LatencyBatch = Annotated[
    int | None, typer.Option(metavar="N", help="Batch that is timed (OPT of --batch).")
]
LatencyRuns = Annotated[int | None, typer.Option(metavar="N", help="Timed calls (200).")]
Threads = Annotated[
    int | None, typer.Option(metavar="N", help="Of a CPU runtime (this machine's cores).")
]
VersionCompatible = Annotated[
    bool | None,
    typer.Option("--version-compatible", help="TensorRT: later versions may run it."),
]
ComputeCapability = Annotated[
    list[str] | None,
    typer.Option(metavar="X.Y", help="TensorRT-RTX: GPUs to build for; repeat for several."),
]
StripWeights = Annotated[
    bool | None,
    typer.Option(
        "--strip-weights",
        help="TensorRT: weights come from model.onnx on loading (RTX: built with a GPU only).",
    ),
]
RefitEngine = Annotated[
    bool | None,
    typer.Option("--refit-engine", help="TensorRT: weights of the engine may be replaced."),
]
StoreDir = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Where finished stages are kept.")
]
Resume = Annotated[
    bool | None, typer.Option("--resume/--fresh", help="Reuse finished stages (default), or not.")
]


def _build_command(until: Stage) -> Callable[..., None]:
    """``build`` and ``prune`` take the same flags; they differ in the last stage they run."""

    def command(
        model: Annotated[
            str | None,
            typer.Argument(help="demo-resnet, demo-vit, a timm name, or package.module:factory."),
        ] = None,
        ratio: Annotated[
            float | None, typer.Option(help="Fraction to remove, 0 <= R < 1 (default 0.4).")
        ] = None,
        ratio_of: Annotated[
            str | None, typer.Option(metavar="params|channels|macs", help="Of what (params).")
        ] = None,
        data: Data = None,
        output: Output = None,
        target: Target = None,
        checkpoint: Annotated[
            Path | None, typer.Option(metavar="FILE", help="Weights: safetensors, or torch.save.")
        ] = None,
        pretrained: Annotated[
            bool | None, typer.Option(help="timm's own weights (default), or random ones.")
        ] = None,
        validation_data: ValidationData = None,
        calibration_samples: Annotated[
            int | None, typer.Option(metavar="N", help="Images to prune on (1024).")
        ] = None,
        validation_samples: Annotated[
            int | None, typer.Option(metavar="N", help="Images to test on (2000).")
        ] = None,
        allow_overlap: Annotated[
            bool | None, typer.Option(help="Let an image be in both sets.")
        ] = None,
        class_map: ClassMap = None,
        input_size: Annotated[
            str | None, typer.Option(metavar="C,H,W", help="What the network takes.")
        ] = None,
        mean: Annotated[
            str | None, typer.Option(metavar="R,G,B", help="Of pixels in [0, 1].")
        ] = None,
        std: Annotated[str | None, typer.Option(metavar="R,G,B", help="As --mean.")] = None,
        round_to: Annotated[
            str | None, typer.Option(metavar="N|auto", help="Kept units per group: a multiple.")
        ] = None,
        criterion: Annotated[
            str | None, typer.Option(help="cswap (default), or a baseline: magnitude, random.")
        ] = None,
        method: Annotated[
            str | None,
            typer.Option(metavar="cswap|paper", help="The best measured (cswap), or as published."),
        ] = None,
        rounds: Annotated[
            int | None, typer.Option(metavar="N", help="Steps of measuring and removing (4).")
        ] = None,
        scoring_samples: Annotated[
            str | None, typer.Option(metavar="N|auto", help="Images each unit is measured on.")
        ] = None,
        measuring: Annotated[
            str | None,
            typer.Option(
                metavar="auto|exact|bf16|adaptive", help="All of them, or as far as needed."
            ),
        ] = None,
        error_rate: Annotated[
            float | None, typer.Option(help="At which adaptive measuring of a unit ends (0.05).")
        ] = None,
        memory_budget: Annotated[
            str | None, typer.Option(metavar="SIZE", help="For measuring, as 2GiB (a third).")
        ] = None,
        scoring_device: Annotated[
            str | None, typer.Option(metavar="cpu|cuda", help="Where effects are measured (cpu).")
        ] = None,
        workers: Annotated[
            str | None, typer.Option(metavar="N|ray://HOST:PORT", help="Who measures, over Ray.")
        ] = None,
        effect: Annotated[
            str | None, typer.Option(metavar="kl|true-class", help="What ranks the units (kl).")
        ] = None,
        mix: Annotated[
            bool | None,
            typer.Option(help="Measure on lightly mixed images too (default)."),
        ] = None,
        intervention: Annotated[
            str | None,
            typer.Option(metavar="predicted|mean|zero", help="What a unit is set to (predicted)."),
        ] = None,
        select: Annotated[
            str | None, typer.Option(metavar="set|unit", help="Whose effect decides (set).")
        ] = None,
        alpha: Annotated[
            float | None, typer.Option(help="False-discovery rate of the verdicts (0.05).")
        ] = None,
        refit: Annotated[
            bool | None,
            typer.Option(help="Solve the layers behind again, in closed form (default)."),
        ] = None,
        refit_producers: Annotated[
            bool | None,
            typer.Option(help="And let the units that stay take over, in closed form (default)."),
        ] = None,
        precision: Precision = None,
        precision_drop: PrecisionDrop = None,
        keep_fp32: KeepFp32 = None,
        int8_calibration: Int8Calibration = None,
        int8_quantizer: Int8Quantizer = None,
        opset: Opset = None,
        batch: Batch = None,
        workspace_mib: Workspace = None,
        optimization_level: OptimizationLevel = None,
        hardware_compat: HardwareCompat = None,
        version_compatible: VersionCompatible = None,
        compute_capability: ComputeCapability = None,
        strip_weights: StripWeights = None,
        refit_engine: RefitEngine = None,
        latency_batch: LatencyBatch = None,
        latency_runs: LatencyRuns = None,
        threads: Threads = None,
        parity_tolerance: Annotated[
            float | None, typer.Option(help="Largest difference of logits allowed (1e-3).")
        ] = None,
        budget: Budget = None,
        config: Annotated[
            Path | None, typer.Option(metavar="FILE.toml", help="The same names; flags win.")
        ] = None,
        store: StoreDir = None,
        resume: Resume = None,
        seed: Annotated[int | None, typer.Option(metavar="N")] = None,
        dry_run: Annotated[
            bool, typer.Option("--dry-run", help="Say what may go, and how long measuring takes.")
        ] = False,
        as_json: Json = False,
        quiet: Quiet = False,
    ) -> None:
        given = dict(locals())
        for name in ("config", "dry_run", "as_json", "quiet", "until"):
            given.pop(name, None)
        given["input_size"] = _numbers(input_size, int, "--input-size")
        given["mean"] = _numbers(mean, float, "--mean")
        given["std"] = _numbers(std, float, "--std")
        given["round_to"] = _maybe_int(round_to)
        given["scoring_samples"] = _maybe_int(scoring_samples)
        given["opset"] = _maybe_int(opset)
        from cswap_deploy.old_config import load_config

        settings = load_config(config, **given)
        console = _console(as_json=as_json, quiet=quiet)
        if dry_run:
            _dry_run(settings, console)
        else:
            _build(settings, until, None, console)

    return command


app.command(
    "build",
    cls=Sectioned,
    help="All stages: prune, export, build engines, check accuracy and latency.",
)(_build_command("validate"))
app.command(
    "prune",
    cls=Sectioned,
    help="The first stage of build: plan.json and pruned weights in a folder.",
)(_build_command("prune"))


def _continue_command(until: Stage) -> Callable[..., None]:
    """The later stages of ``build``, on the folder that an earlier one left."""

    def command(
        folder: Annotated[Path, typer.Argument(help="What an earlier stage left.")],
        output: Output = None,
        target: Target = None,
        data: Data = None,
        validation_data: ValidationData = None,
        class_map: ClassMap = None,
        precision: Precision = None,
        precision_drop: PrecisionDrop = None,
        keep_fp32: KeepFp32 = None,
        int8_calibration: Int8Calibration = None,
        int8_quantizer: Int8Quantizer = None,
        opset: Opset = None,
        batch: Batch = None,
        workspace_mib: Workspace = None,
        optimization_level: OptimizationLevel = None,
        hardware_compat: HardwareCompat = None,
        version_compatible: VersionCompatible = None,
        compute_capability: ComputeCapability = None,
        strip_weights: StripWeights = None,
        refit_engine: RefitEngine = None,
        latency_batch: LatencyBatch = None,
        latency_runs: LatencyRuns = None,
        threads: Threads = None,
        budget: Budget = None,
        store: StoreDir = None,
        resume: Resume = None,
        check_ops: Annotated[
            bool, typer.Option("--check-ops", help="Only ask RTX's parser; an ONNX file will do.")
        ] = False,
        as_json: Json = False,
        quiet: Quiet = False,
    ) -> None:  # fmt: skip
        given = dict(locals())
        for name in ("folder", "check_ops", "as_json", "quiet", "until"):
            given.pop(name, None)
        if check_ops:
            _check_ops(folder, target, _console(as_json=as_json, quiet=quiet))
            return
        from cswap_deploy.old_config import PRECISION_SETTINGS, load_config
        from cswap_deploy.pipeline import settings_of

        before = settings_of(folder).model_dump()
        if precision not in (None, before["precision"]):  # what was set for another is not for this
            before = {k: v for k, v in before.items() if k not in PRECISION_SETTINGS}
        given["opset"] = _maybe_int(opset)
        given = {name: value for name, value in given.items() if value is not None}
        settings = load_config(**(before | {"output": folder} | given))
        _build(settings, until, folder, _console(as_json=as_json, quiet=quiet))

    if until != "engine":
        whole = signature(command, eval_str=True)
        shown = [p for name, p in whole.parameters.items() if name != "check_ops"]
        command.__signature__ = whole.replace(parameters=shown)  # type: ignore[attr-defined]
    return command


app.command("export", cls=Sectioned, help="Go on from prune: model.onnx.")(
    _continue_command("export")
)
app.command("engine", cls=Sectioned, help="Go on from export: engines for --target.")(
    _continue_command("engine")
)
app.command(
    "validate",
    cls=Sectioned,
    help="Go on to the end: measure, and close the bundle with its report.",
)(_continue_command("validate"))


@app.command()
def check(
    bundle: Annotated[Path, typer.Argument(help="A finished bundle.")],
    budget: Annotated[Path, typer.Option("--budget", metavar="FILE.toml", help="The limits.")],
    junit: Annotated[Path | None, typer.Option(metavar="FILE.xml", help="Verdicts for CI.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Hold a bundle's measurements against budgets; exit 3 when one fails."""
    from cswap_deploy.gate.budgets import check_budgets, read_budgets
    from cswap_deploy.gate.junit import to_junit
    from cswap_deploy.records.bundle import verify_bundle
    from cswap_deploy.records.files import write_atomic

    limits = read_budgets(budget)
    verdicts = check_budgets(verify_bundle(bundle).manifest, limits)
    if junit is not None:
        write_atomic(junit, to_junit(verdicts, suite=str(bundle)).encode())
    _judge(verdicts, _console(as_json=as_json, quiet=quiet), extra={"bundle": str(bundle)})


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(metavar="BUNDLE_OR_ONNX")],
    as_json: Json = False,
) -> None:
    """Say what a bundle or an ONNX file holds; a bundle's digests are verified."""
    from cswap_deploy.export.onnx import describe_onnx
    from cswap_deploy.records.bundle import describe, verify_bundle

    console = _console(as_json=as_json)
    if path.is_dir():
        checked = verify_bundle(path)
        console.result(describe(checked.manifest) | {"unlisted_files": list(checked.extra)})
    else:
        console.result(describe_onnx(path).model_dump(mode="json"))


@app.command()
def explain(
    bundle: Annotated[Path, typer.Argument(help="A bundle, or any folder with a plan.json.")],
    group: Annotated[str | None, typer.Argument(help="One group; without: all of them.")] = None,
    top: Annotated[int, typer.Option(metavar="N", min=1, help="Units in each list.")] = 5,
    as_json: Json = False,
) -> None:
    """Say why units went or stayed: verdicts, largest effects, the classes that a unit serves."""
    from cswap_deploy.report.explain import explain as explained
    from cswap_deploy.report.explain import read_explained

    plan, manifest = read_explained(bundle)
    _console(as_json=as_json).explanation(explained(plan, manifest, group=group, top=top))


@app.command()
def models(
    pattern: Annotated[
        str | None, typer.Argument(help="For example 'resnet*'; without: demos and tested ones.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List what can be built: the demos, the tested families, any timm name."""
    from dataclasses import asdict

    from cswap_deploy.errors import UsageError
    from cswap_deploy.models.listing import list_models

    found = [asdict(entry) for entry in list_models(pattern)]
    if not found:
        raise UsageError(
            f"no timm model matches {pattern!r}", fix="try a wider pattern: '*resnet*'"
        )
    _console(as_json=as_json).table("models", found)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what is installed, loads and works here, and how to mend what does not."""
    from dataclasses import asdict

    from cswap_deploy.cli.doctor import examine

    console = _console(as_json=as_json)
    with console.waiting("looking around"):
        findings = [asdict(finding) for finding in examine()]
    console.findings(findings)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from cswap_deploy import __version__

        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command; errors become messages and exit codes (see ``errors``)."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    as_json = "--json" in sys.argv
    try:
        code = app(standalone_mode=False)
        if code == _INTERRUPTED:  # what typer makes of Ctrl-C, without a word
            code = _interrupted(as_json=as_json)
        sys.stdout.flush()
    except CswapError as err:
        code = _fail(err.exit_code, str(err), as_json=as_json)
    except (KeyboardInterrupt, typer.Abort):
        code = _interrupted(as_json=as_json)
    except (BrokenPipeError, SystemExit) as err:
        if isinstance(err, SystemExit) and not isinstance(err.__context__, BrokenPipeError):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whoever read stdout has left
        code = 0
    except Exception as err:
        show: Callable[[], None] | None = getattr(err, "show", None)
        if show is None:
            raise  # a bug: Python prints the traceback and exits with 1
        if as_json:
            code = _fail(2, str(getattr(err, "message", err)), as_json=True)
        else:
            show()
            code = 2
    sys.exit(code if isinstance(code, int) else 0)


def _interrupted(*, as_json: bool) -> int:
    return _fail(
        _INTERRUPTED, "interrupted; finished stages are kept, the same command goes on from there",
        as_json=as_json,
    )  # fmt: skip


def _fail(code: int, message: str, *, as_json: bool) -> int:
    typer.echo(f"error: {message}", err=True)
    if as_json:
        typer.echo(json.dumps({"error": message, "exit_code": code}))
    return code


def _build(settings: BuildConfig, until: Stage, source: Path | None, console: Console) -> None:
    from cswap_deploy.pipeline import build

    with console.progress() as progress:
        bundle = build(settings, until=until, source=source, progress=progress)
    console.bundle(_result(bundle))
    if bundle.verdicts:
        _judge(bundle.verdicts, console, extra=None)


def _check_ops(path: Path, targets: list[str] | None, console: Console) -> None:
    """Whether a graph's operators are supported, by the parsers' own word; exit 5 if not."""
    from cswap_deploy.errors import BuildError, UsageError
    from cswap_deploy.targets import get_target

    graph = path / "model.onnx" if path.is_dir() else path
    problems: dict[str, list[str]] = {}
    for name in targets or ["tensorrt-rtx"]:
        check = getattr(get_target(name), "check_ops", None)
        if check is None:
            raise UsageError(
                f"{name} has no parser to ask", fix="--target tensorrt-rtx, or --target tensorrt"
            )
        problems[name] = list(check(graph))
    lines = [f"{name}: {line}" for name, found in problems.items() for line in found]
    if lines:
        raise BuildError(f"{graph} is not supported:\n  " + "\n  ".join(lines))
    console.result({"onnx": str(graph), "supported_by": list(problems)})


def _result(bundle: Bundle) -> dict[str, Any]:
    """A build as plain data."""
    from cswap_deploy.records.bundle import describe

    if bundle.manifest is not None:
        told = describe(bundle.manifest)
    else:
        plan = bundle.plan
        told = {
            "ratio_requested": plan.ratio_requested,
            "ratio_of": plan.ratio_of,
            "ratio_effective": {of: plan.effective(of) for of in ("params", "channels", "macs")},
            "dense": plan.dense.model_dump(),
            "pruned": plan.pruned.model_dump(),
        }
    return {"bundle": str(bundle.path), "stages": bundle.stages} | told


def _judge(
    verdicts: tuple[BudgetVerdict, ...], console: Console, *, extra: dict[str, Any] | None
) -> None:
    from cswap_deploy.gate.budgets import require
    from cswap_deploy.gate.junit import github_annotations

    for line in github_annotations(verdicts):
        typer.echo(line, err=True)
    console.verdicts(verdicts, extra)
    try:
        require(verdicts)
    except GateError as err:
        typer.echo(f"error: {err}", err=True)
        raise typer.Exit(err.exit_code) from err


def _dry_run(settings: BuildConfig, console: Console) -> None:
    from cswap_deploy.pipeline import forecast

    with console.progress() as progress:
        told = forecast(settings, progress=progress)
    console.result(told)


def _console(*, as_json: bool, quiet: bool = False) -> Console:
    from cswap_deploy.cli.output import Console

    return Console(as_json=as_json, quiet=quiet)


def _numbers(text: str | None, kind: type, flag: str) -> tuple[Any, ...] | None:
    from cswap_deploy.errors import UsageError

    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as err:
        raise UsageError(
            f"{flag} {text!r}: numbers with commas between them are wanted",
            fix=f"for example {flag} " + ("3,224,224" if kind is int else "0.485,0.456,0.406"),
        ) from err


def _maybe_int(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.lstrip("-").isdigit() else text


if __name__ == "__main__":
    main()
