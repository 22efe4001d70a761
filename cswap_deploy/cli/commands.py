"""The command ``cswap-deploy``: flags -> one library call -> rendering.

Results go to stdout, everything else to stderr. Imports stand inside the commands, so that
``--help`` answers at once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cswap_deploy.cli import gates, store
from cswap_deploy.cli.shared import CheckedPaths, Json, Quiet, console_of, numbers

if TYPE_CHECKING:
    from cswap_deploy.cli.output import Console
    from cswap_deploy.config import Config
    from cswap_deploy.pipeline import Stage

app = typer.Typer()
"""The commands without settings; :func:`command_line` puts the stages before them."""
app.add_typer(store.app, name="store")

ConfigFile = Annotated[
    Path | None, typer.Option(metavar="FILE.toml", help="The same names, and more; flags win.")
]
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="What an earlier stage left.")]


def command_line(asked: str | None = None) -> typer.Typer:
    """The whole command.

    Args:
        asked: The command whose settings become flags; every one unless given. Reading the settings
            takes 0.2 s, and ``--help`` must answer at once.
    """
    whole = typer.Typer(
        name="cswap-deploy",
        help="Prune a vision network without training, export it, build an engine, check it.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for name, (told, stage, sections, argument) in _STAGES.items():
        command: Callable[..., None] = _without_settings
        if asked in (None, name):
            from cswap_deploy.cli.flags import with_settings
            from cswap_deploy.config import AIMS, ModelConfig

            without: tuple[str, ...] = AIMS if name in _WITHOUT_AIM else ()
            if sections is _LATER:  # the rest of the model is the folder's to say
                without = tuple(ModelConfig.model_fields.keys() - {"model", "checkpoint"})
            command = with_settings(stage, sections, argument=argument, but=without)
        whole.command(name, help=told)(command)
    whole.registered_commands += gates.app.registered_commands + app.registered_commands
    whole.registered_groups += gates.app.registered_groups + app.registered_groups
    whole.registered_callback = app.registered_callback
    inner = [group.typer_instance for group in whole.registered_groups]
    for each in (whole, *filter(None, inner)):
        for made in each.registered_commands:
            made.cls = CheckedPaths
    return whole


def _without_settings() -> None:
    """Stands for a command that was not asked for."""


def _build_command(until: Stage) -> Callable[..., None]:
    """``build`` and ``prune`` take the same flags; they differ in the last stage they run."""

    def command(
        config: ConfigFile = None,
        dry_run: Annotated[
            bool, typer.Option("--dry-run", help="Say what may go, and how long.")
        ] = False,
        as_json: Json = False,
        quiet: Quiet = False,
        **settings: Any,
    ) -> None:  # fmt: skip
        from cswap_deploy.config import load_config

        wanted = load_config(config, **settings)
        console = console_of(as_json=as_json, quiet=quiet)
        if dry_run:
            _dry_run(wanted, console)
        else:
            _build(wanted, until, None, console)

    return command


def _continue_command(until: Stage) -> Callable[..., None]:
    """The later stages of ``build``, on the folder that an earlier one left."""

    def command(
        folder: Folder, as_json: Json = False, quiet: Quiet = False, **settings: Any
    ) -> None:
        from cswap_deploy.pipeline import going_on

        console = console_of(as_json=as_json, quiet=quiet)
        _build(going_on(folder, settings, until), until, folder, console)

    return command


def _engine_command() -> Callable[..., None]:
    def command(
        folder: Folder,
        check_ops: Annotated[
            bool,
            typer.Option("--check-ops", help="Only ask the parser; an ONNX file will do."),
        ] = False,
        as_json: Json = False,
        quiet: Quiet = False,
        **settings: Any,
    ) -> None:  # fmt: skip
        console = console_of(as_json=as_json, quiet=quiet)
        if check_ops:
            from cswap_deploy.targets import check_operators

            graph = folder / "model.onnx" if folder.is_dir() else folder
            targets = settings["target"] or ["tensorrt-rtx"]
            check_operators(graph, targets)
            console.result({"onnx": str(graph), "supported_by": targets})
        else:
            from cswap_deploy.pipeline import going_on

            _build(going_on(folder, settings, "engine"), "engine", folder, console)

    return command


def _sweep_command() -> Callable[..., None]:
    def command(
        speedups: Annotated[
            str | None, typer.Option(metavar="X,X", help="Points: times as fast, on the target.")
        ] = None,
        ratios: Annotated[
            str | None, typer.Option(metavar="X,X", help="Or: fractions, of what --ratio-of says.")
        ] = None,
        pick: Annotated[
            str | None,
            typer.Option(metavar="'drop<=1%'", help="Keep only the fastest point that meets this."),
        ] = None,
        against: Annotated[
            list[str] | None,
            typer.Option(metavar="MODEL", help="Dense networks to set beside it; repeat."),
        ] = None,
        config: ConfigFile = None,
        as_json: Json = False,
        quiet: Quiet = False,
        **settings: Any,
    ) -> None:  # fmt: skip
        from cswap_deploy.config import load_config
        from cswap_deploy.sweep import sweep

        console = console_of(as_json=as_json, quiet=quiet)
        with console.progress() as progress:
            path, found = sweep(
                load_config(config, **settings), speedups=numbers(speedups),
                ratios=numbers(ratios), picked_by=pick, progress=progress,
                against=[name for each in against or () for name in each.split(",")],
            )  # fmt: skip
        console.sweep(path, found)

    return command


def _kit_command() -> Callable[..., None]:
    def command(as_json: Json = False, quiet: Quiet = False, **settings: Any) -> None:
        from cswap_deploy.config import load_config
        from cswap_deploy.pipeline import profile_kit

        wanted = load_config(**(settings | {"ratio_of": "latency"}))
        console = console_of(as_json=as_json, quiet=quiet)
        with console.progress() as progress:
            told = profile_kit(wanted, output=wanted.folder("kit"), progress=progress)
        console.result(told)

    return command


_LATER = ("model", "data", "export", "engine", "measure", "run")
_ALL = ("model", "data", "prune", "export", "engine", "measure", "run")
_STAGES: dict[str, tuple[str, Callable[..., None], tuple[str, ...], str | None]] = {
    "build": (
        "All stages: prune, export, build engines, check accuracy and latency.",
        _build_command("validate"), _ALL, "model",
    ),
    "prune": (
        "The first stage of build: plan.json and pruned weights in a folder.",
        _build_command("prune"), _ALL, "model",
    ),
    "sweep": (
        "One network at several sizes: bundles, and accuracy against latency.",
        _sweep_command(), _ALL, "model",
    ),
    "profile-kit": (
        "For --latency-table: graphs that `cswap-run --profile` times on a device.",
        _kit_command(), ("model", "prune", "export", "engine", "measure", "run"), "model",
    ),
    "export": ("Go on from prune: model.onnx.", _continue_command("export"), _LATER, None),
    "engine": ("Go on from export: engines for --target.", _engine_command(), _LATER, None),
    "validate": (
        "Go on to the end: measure, and close the bundle with its report.",
        _continue_command("validate"), _LATER, None,
    ),
}  # fmt: skip
"""Command -> help, function, the sections whose settings are its flags, its positional setting."""
_WITHOUT_AIM = "sweep", "profile-kit"
"""Commands that do not go to one size."""


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(metavar="BUNDLE_OR_ONNX_OR_MODEL")],
    groups: Annotated[
        bool, typer.Option("--groups", help="Of a MODEL: what can be removed, and what stays.")
    ] = False,
    input_size: Annotated[
        str | None, typer.Option(metavar="C,H,W", help="With --groups: what the network takes.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a bundle or an ONNX file holds (digests are verified), or a model's groups."""
    from cswap_deploy.export.onnx import describe_onnx
    from cswap_deploy.records.bundle import describe, verify_bundle

    console = console_of(as_json=as_json)
    if groups:
        from cswap_deploy.api import groups_of

        with console.waiting("following the network"):
            told = groups_of(str(path), input_size=input_size)
        console.groups(told)
    elif path.is_dir():
        checked = verify_bundle(path)
        console.result(describe(checked.manifest) | {"unlisted_files": list(checked.extra)})
    else:
        console.result(describe_onnx(path).model_dump(mode="json"))


@app.command()
def verify(
    bundle: Annotated[
        Path | None, typer.Argument(metavar="BUNDLE", help="A finished bundle.")
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Only print the JSON Schema of manifest.json.")
    ] = False,
    key: Annotated[
        Path | None,
        typer.Option(metavar="PUBLIC.pem", help="Of who signed it; its signature must hold."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say whether a bundle is as it was built: digests, sizes, records, weights and plan."""
    from cswap_deploy.errors import UsageError

    if schema:
        from cswap_deploy.runtime.schema import MANIFEST_SCHEMA

        typer.echo(MANIFEST_SCHEMA.read_text(), nl=False)
        return
    if bundle is None:
        raise UsageError("no bundle is named", fix="cswap-deploy verify BUNDLE, or --schema")
    from cswap_deploy.api import verify as verified
    from cswap_deploy.records.bundle import require_sound

    console = console_of(as_json=as_json)
    with console.waiting("reading every file"):
        checked = verified(bundle, key=key)
    if not (as_json and checked.wrong):  # else the error is the one JSON object
        console.verified(checked)
    require_sound(checked)


@app.command(
    epilog="A pair of keys: openssl ecparam -name prime256v1 -genkey -noout -out private.pem; "
    "openssl ec -in private.pem -pubout -out public.pem"
)
def sign(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A finished bundle.")],
    key: Annotated[
        Path, typer.Option(metavar="PRIVATE.pem", help="Elliptic-curve key, P-256, P-384 or P-521.")
    ],
    as_json: Json = False,
) -> None:
    """Sign every file of a bundle, for `verify --key`; nothing is sent anywhere."""
    from cswap_deploy.api import sign as signed
    from cswap_deploy.records.bundle import SIGNATURE

    console = console_of(as_json=as_json)
    with console.waiting("reading every file"):
        names = signed(bundle, key)
    told = {"bundle": str(bundle), "signature": str(bundle / SIGNATURE), "files": len(names)}
    console.result(told)


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
    console_of(as_json=as_json).explanation(explained(plan, manifest, group=group, top=top))


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
    console_of(as_json=as_json).table("models", found)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what is installed, loads and works here, and how to mend what does not."""
    from dataclasses import asdict

    from cswap_deploy.cli.doctor import examine

    console = console_of(as_json=as_json)
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


def _build(settings: Config, until: Stage, source: Path | None, console: Console) -> None:
    from cswap_deploy.pipeline import build

    with console.progress() as progress:
        built = build(settings, until=until, source=source, progress=progress)
    console.bundle(built.plain())
    if built.results:
        from cswap_deploy.cli.gates import conclude

        conclude(built.results, console, extra=None)


def _dry_run(settings: Config, console: Console) -> None:
    from cswap_deploy.pipeline import forecast

    with console.progress() as progress:
        told = forecast(settings, progress=progress)
    console.result(told)
