"""What Python code calls: :func:`prune`, :func:`build`, :func:`load`, :func:`check`.

The README's section on Python has examples. Every error is a :class:`CswapError` with an
``exit_code`` and, where it is known, a ``fix``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cswap_deploy.progress import Progress, Silent
from cswap_deploy.records.manifest import Manifest
from cswap_deploy.records.plan import PrunePlan

if TYPE_CHECKING:
    import os

    from torch import nn

    from cswap_deploy.gate.budgets import BudgetResult
    from cswap_deploy.pruning.prune import Pruned
    from cswap_deploy.records.bundle import BundleCheck, Finding
    from cswap_deploy.runtime.classifier import Classifier


@dataclass(frozen=True, slots=True)
class Bundle:
    """A finished bundle on disk, its files held against their digests."""

    path: Path
    plan: PrunePlan
    manifest: Manifest
    results: tuple[BudgetResult, ...] = ()
    """Results of the budgets that ``build`` was given."""
    was_named: bool = False
    """Whether this process named the model: a factory that a file names is not called."""

    def module(self, architecture: nn.Module | None = None) -> nn.Module:
        """The pruned network in PyTorch, in evaluation mode, its weights loaded strictly.

        Args:
            architecture: The dense network, any weights; not changed. Needed where a factory or a
                module in memory was built from; else it is made from the model's name.

        Raises:
            UsageError: The network cannot be made from its name.
            ArtifactError: The plan or the weights do not fit the architecture.
        """
        from cswap_deploy.network.deletion import load_pruned
        from cswap_deploy.records.bundle import WEIGHTS

        dense = self._dense(architecture)
        return load_pruned(self.path / WEIGHTS, self.plan, dense, self._example())

    def classifier(self, **options: Any) -> Classifier:
        """What runs the bundle on this machine: pictures in, classes or named outputs out.

        Args:
            **options: Of :meth:`cswap_deploy.runtime.classifier.Classifier.open`.
        """
        from cswap_deploy.runtime.classifier import Classifier

        return Classifier.open(self.path, **options)

    def _dense(self, architecture: nn.Module | None) -> nn.Module:
        from cswap_deploy.errors import UsageError
        from cswap_deploy.models.load import fresh_module

        if architecture is not None:
            return architecture
        spec = self.manifest.model
        if spec.source == "factory" and ":" not in spec.name:
            raise UsageError(
                f"{self.path} was built from a {spec.name} in memory, which no name makes again",
                fix="pass the dense network: bundle.module(architecture)",
            )
        if spec.source == "factory" and not self.was_named:
            raise UsageError(
                f"{self.path} was built from {spec.name}, code that it only names; what a file "
                "names is not run",
                fix="if it is yours, call it: bundle.module({0}()), with {0} of {1}".format(
                    *reversed(spec.name.split(":", 1))
                ),
            )
        return fresh_module(spec)

    def _example(self) -> Any:
        import torch

        return torch.zeros(2, *self.manifest.model.preprocessing.input_size)


def prune(
    module: nn.Module,
    data: Any,
    *,
    ratio: float | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Pruned:
    """Remove channels, attention heads and hidden neurons from a network, without training.

    Args:
        module: Maps (N, C, H, W) float32 to logits or probabilities (N, classes), or to other
            outputs (``task``): tensors, or tuples, lists, dictionaries and dataclasses of them; not
            changed.
        data: Images to measure on, as the network takes them: ``(images, labels)`` as tensors or
            arrays, (N, C, H, W) float32 and (N,) integers; an iterable of such batches, for example
            a ``DataLoader``; or the path of a folder of class folders or of an ``.npz`` file, with
            ``input_size``, ``mean`` and ``std``. Images alone will do: a classifier's own
            predictions stand for labels then.
        ratio: Fraction of the parameters to remove (see ``ratio_of``), 0 <= ratio < 1; 0.4 unless
            said.
        progress: Told of everything that takes time.
        **settings: Fields of the sections ``model``, ``data``, ``prune`` and ``run`` of
            :class:`cswap_deploy.config.Config`, for example ``ratio_of="macs"``.

    Returns:
        ``module``, of the same class, smaller, with its weights in place, float32, on the CPU and
        in evaluation mode; and ``plan``.

    Raises:
        UsageError: A setting or the data is wrong.
        PruneError: The ratio cannot be met, or nothing can be removed.
        StageError: A prediction is not finite.
    """
    from cswap_deploy.config import load_config
    from cswap_deploy.data import calibration_from
    from cswap_deploy.measure.chance import CHECK_IMAGES, check_dense
    from cswap_deploy.models.plain import plain
    from cswap_deploy.network.probabilities import output_kind
    from cswap_deploy.pruning.prune import prune as run
    from cswap_deploy.runtime.probabilities import note

    config = load_config(model=type(module).__name__, ratio=ratio, **settings)
    progress = progress if progress is not None else Silent()
    module, notes = plain(module)
    calibration = calibration_from(
        data, module, model=config.model, config=config.data, seed=config.run.seed,
        progress=progress,
    )  # fmt: skip
    if calibration.task == "classify" and calibration.labelled:
        first = calibration.images[:CHECK_IMAGES].contiguous().numpy()
        labels, most = calibration.labels[:CHECK_IMAGES].numpy(), config.engine.batch.max
        check = check_dense(module, first, labels, part="calibration", batch=most)
        if check is not None and check.verdict == "at":  # what labels mean is the caller's affair
            notes += (check.words,)
    if told := note(output_kind(module, calibration.images, calibration.task)):
        notes += (told,)
    if not calibration.labelled:
        notes += ("no labels were passed: the network's own predictions stand for them",)
    for each in notes:
        progress.note(each)
    done = run(module, calibration, config=config.prune, seed=config.run.seed, progress=progress)
    if config.prune.recover is not None and config.prune.ratio > 0:
        from cswap_deploy.network.placing import device_for
        from cswap_deploy.pruning.recover import Lesson, recover

        minutes, seed, device = config.prune.recover, config.run.seed, device_for(config.prune)
        trained, record = recover(
            done.module, module, calibration.images,
            Lesson(minutes, calibration.task, seed, device), progress=progress,
        )  # fmt: skip
        plan = done.plan.model_copy(update={"recovery": record})
        done = replace(done, module=trained, plan=plan)
    return replace(done, notes=(*notes, *done.notes))


def groups_of(
    model: str, *, input_size: str | tuple[int, int, int] | None = None
) -> dict[str, Any]:
    """What can be removed from a model, and what stays whole and why, as plain data.

    Args:
        model: As for :func:`build`; no weights are loaded.
        input_size: (C, H, W); the model's own unless given, needed for a factory.
    """
    import torch

    from cswap_deploy.config import load_config
    from cswap_deploy.models.load import load_model
    from cswap_deploy.network.overview import describe_groups

    settings: dict[str, Any] = {"model": model, "pretrained": False, "input_size": input_size}
    if ":" in model:  # what pictures look like does not matter here
        channels = int(str(input_size).strip("( ").split(",")[0]) if input_size else 3
        settings |= {"mean": (0.5,) * channels, "std": (0.5,) * channels}
    loaded = load_model(load_config(**settings).model)
    return describe_groups(loaded.module, torch.randn(2, *loaded.spec.preprocessing.input_size))


def build(
    model: str | nn.Module,
    *,
    ratio: float | None = None,
    config: Path | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Bundle:
    """Prune a pretrained network, export it, build engines, and check them.

    The command ``cswap-deploy build`` does the same.

    Args:
        model: A demo or timm name, ``"package.module:factory"``, or a module in memory (then
            ``input_size``, ``mean`` and ``std`` are needed).
        ratio: Fraction of the parameters to remove (see ``ratio_of``), 0 <= ratio < 1; 0.4 unless
            said here or in ``config``.
        config: TOML file of settings; arguments win over it.
        progress: Told of everything that takes time.
        **settings: Any other setting of :class:`cswap_deploy.config.Config`, for example ``data``,
            ``output``, ``target=("openvino",)``.

    Raises:
        CswapError: A subclass says what failed and how to mend it; see ``cswap_deploy.errors``.
    """
    from cswap_deploy.config import load_config
    from cswap_deploy.pipeline import build as run

    name = model if isinstance(model, str) else type(model).__name__
    settings |= {"model": name, "ratio": ratio}
    for source in ("data", "validation_data"):
        settings[source] = None if settings.get(source) is None else str(settings[source])
    module = None if isinstance(model, str) else model
    built = run(load_config(config, **settings), module=module, progress=progress)
    assert built.manifest is not None
    return Bundle(built.path, built.plan, built.manifest, built.results, was_named=True)


def load(path: str | os.PathLike[str]) -> Bundle:
    """Open a bundle that ``build`` wrote; every file is held against its digest.

    Raises:
        ArtifactError: It is no bundle, or a file is missing or altered.
    """
    from cswap_deploy.records.bundle import read_plan, verify_bundle

    folder = Path(path)
    manifest = verify_bundle(folder).manifest
    return Bundle(folder, read_plan(folder), manifest)


def sign(path: str | os.PathLike[str], key: str | os.PathLike[str]) -> tuple[str, ...]:
    """Sign every file of a bundle with a private key; the signature is its ``bundle.sig``.

    Returns:
        The files under the signature, by their paths in the bundle.

    Raises:
        ArtifactError: It is no bundle, or is damaged.
        UsageError: The key cannot be used.
        MissingDependencyError: ``cswap-deploy[signing]`` is not installed.
    """
    from cswap_deploy.records.bundle import verify_bundle
    from cswap_deploy.records.signature import sign_files

    verify_bundle(Path(path))
    return sign_files(Path(path), Path(key))


def verify(
    path: str | os.PathLike[str], *, key: str | os.PathLike[str] | None = None
) -> BundleCheck:
    """Hold everything in a bundle against its manifest, and its weights against its plan.

    The pruned network is made again from a demo's or timm's name, and its recorded weights loaded;
    a factory that the bundle names is not called. The command ``cswap-deploy verify`` exits with 6
    where something is wrong.

    Args:
        path: The bundle.
        key: The public key of who signed it, which is held before anything else is looked at.

    Raises:
        ArtifactError: It is no bundle, its manifest cannot be read, or the signature does not hold.
        UsageError: The key cannot be used.
        MissingDependencyError: ``cswap-deploy[signing]`` is not installed.
    """
    from cswap_deploy.records.bundle import examine_bundle

    signed = _signature(Path(path), None if key is None else Path(key))
    checked = examine_bundle(Path(path))
    checked = replace(checked, findings=(*signed, *checked.findings))
    if checked.wrong:
        return checked
    return replace(checked, findings=(*checked.findings, _replayed(checked)))


def _signature(folder: Path, key: Path | None) -> tuple[Finding, ...]:
    """What can be said of who made a bundle."""
    from cswap_deploy.records.bundle import SIGNATURE, Finding
    from cswap_deploy.records.signature import require_signature

    if key is not None:
        names = require_signature(folder, key)
        words = f"made with the key of {key}, over all {len(names)} files"
    elif (folder / SIGNATURE).is_file():
        words = "not held against a key: none was passed (--key)"
    else:
        return ()
    return (Finding(SIGNATURE, True, words),)


def _replayed(checked: BundleCheck) -> Finding:
    """The plan, applied to the network that it is of, and the weights in it."""
    from cswap_deploy.errors import ArtifactError, CswapError, first_line
    from cswap_deploy.records.bundle import PLAN, WEIGHTS, Finding, read_plan

    manifest, plan = checked.manifest, read_plan(checked.path)
    if manifest.model.source == "factory":
        words = f"not loaded: {manifest.model.name} is code, which is not run here"
        return Finding(WEIGHTS, True, words)
    try:
        module = Bundle(checked.path, plan, manifest).module()
    except ArtifactError as err:
        return Finding(WEIGHTS, False, first_line(err))
    except CswapError as err:
        return Finding(WEIGHTS, True, f"not loaded: {first_line(err)}")
    count = sum(parameter.numel() for parameter in module.parameters())
    words = f"{count:,} parameters load into what {PLAN} makes of {manifest.model.name}"
    if count != plan.pruned.params:
        words = f"{count:,} parameters, {plan.pruned.params:,} in {PLAN}"
    return Finding(WEIGHTS, count == plan.pruned.params, words)


def check(
    bundle: Bundle | str | os.PathLike[str], budgets: str | os.PathLike[str], *,
    recorded: bool = False, threads: int | None = None, at_most: float = 60.0,
    progress: Progress | None = None,
) -> tuple[BudgetResult, ...]:  # fmt: skip
    """Measure a bundle on this machine and hold it against the limits of ``budgets.toml``.

    The command ``cswap-deploy check`` exits with 3 where one of the results is not ``ok``.

    Args:
        bundle: A finished one.
        budgets: The limits.
        recorded: Judge what the build measured, and measure nothing.
        threads: Of CPU runtimes; as in the build unless given.
        at_most: Seconds of timing for each limit that needs it.
        progress: Told of what takes time.

    Raises:
        UsageError: The budgets cannot be read, or their baseline is not there.
        ArtifactError: The bundle is damaged, or does not fit this device.
    """
    from cswap_deploy.gate.budgets import check_budgets, read_budgets
    from cswap_deploy.gate.fresh import FreshOptions, check_here

    limits = read_budgets(Path(budgets))
    opened = bundle if isinstance(bundle, Bundle) else load(bundle)
    if recorded:
        return check_budgets(opened.manifest, limits)
    options = FreshOptions(threads=threads, at_most=at_most)
    near = Path(budgets).resolve().parent
    return check_here(opened.path, limits, near=near, options=options, progress=progress)
