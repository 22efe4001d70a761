"""Two bundles, or ONNX files, against each other on this machine: latency, accuracy, size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from cswap_deploy import __version__
from cswap_deploy.errors import UsageError
from cswap_deploy.gate.budgets import BudgetResult
from cswap_deploy.gate.subjects import Subject, open_subject
from cswap_deploy.measure.accuracy import PREDICTIONS, accuracy_change, read_predictions
from cswap_deploy.measure.device import describe_device
from cswap_deploy.measure.paired import Contender, paired_ratio
from cswap_deploy.progress import Progress, Silent
from cswap_deploy.records.amounts import fixed, mebibytes, percent
from cswap_deploy.records.comparison import Compared, Comparison, Ratio, Verdict
from cswap_deploy.records.measurements import AccuracyChange
from cswap_deploy.records.value import now

MIN_EFFECT = 0.02
MAX_DROP = 0.01
AT_MOST = 60.0


@dataclass(frozen=True, slots=True)
class CompareOptions:
    """How two engines are compared."""

    target: str | None = None
    batch: int = 1
    threads: int | None = None
    min_effect: float = MIN_EFFECT
    """Fraction of the latency."""
    max_drop: float = MAX_DROP
    """Fraction of top-1."""
    at_most: float = AT_MOST
    """Seconds of timing."""


def compare(
    base: Path, head: Path, options: CompareOptions | None = None, *,
    progress: Progress | None = None,
) -> Comparison:  # fmt: skip
    """Time two engines in alternation until it is clear which is faster, and hold the rest.

    Args:
        base: A bundle or an ONNX file.
        head: What is judged.
        options: See :class:`CompareOptions`.
        progress: Told of what takes time.

    Raises:
        UsageError: A path or a setting is wrong, or they take different inputs.
        ArtifactError: A bundle is damaged, or does not fit this device.
        CswapError: As loading an engine may.
    """
    options = options or CompareOptions()
    progress = progress if progress is not None else Silent()
    _check(options)
    with TemporaryDirectory(prefix="cswap-compare-") as folder:
        first, second = opened(base, head, Path(folder), options)
        progress.stage("compare", f"{head} with {base}, on {second.target}")
        timed = [
            each.contender(batch=options.batch, threads=options.threads) for each in (first, second)
        ]
        parts = [compare_latency(timed[0], timed[1], options, progress=progress)]
        if (accurate := compare_accuracy(first, second, options)) is not None:
            parts.append(accurate)
        parts.append(_size(first, second, options))
    found = Comparison(
        created=now(), tool_version=__version__,
        base=str(base), head=str(head), target=second.target, batch=options.batch,
        threads=options.threads, min_effect=options.min_effect, max_drop=options.max_drop,
        parts=tuple(parts), device=describe_device(),
    )  # fmt: skip
    progress.done(found.verdict, reused=False)
    return found


def opened(
    base: Path, head: Path, scratch: Path, options: CompareOptions
) -> tuple[Subject, Subject]:
    """Both on one runtime: the one that is asked for, or the head's first that the base has too."""
    target, most = options.target, options.batch
    second = open_subject(head, scratch, target=target, batch=most)
    first = open_subject(base, scratch, target=target or second.target, batch=most)
    if first.input_size != second.input_size:
        raise UsageError(
            f"{base} takes {first.input_size}, {head} takes {second.input_size}: time of unlike "
            "inputs is not compared",
            fix="`cswap-deploy bench` times both side by side",
        )
    return first, second


def compare_latency(
    base: Contender, head: Contender, options: CompareOptions, *, progress: Progress | None = None
) -> Compared:
    """Whether a call takes longer, by more than half of the smallest effect that counts.

    ``worse``: the interval of the ratio lies above 1 + half of ``min_effect``; ``better``: below
    the same on the other side; ``same``: within one ``min_effect`` on either side. So an effect of
    ``min_effect`` itself is found more often than not, and one of nothing is called the same.
    """
    found = paired_ratio(
        base, head, decided=lambda r: latency_verdict(r, options.min_effect) != "inconclusive",
        at_most=options.at_most, progress=progress,
    )  # fmt: skip
    verdict = latency_verdict(found, options.min_effect)
    return Compared(what="latency", verdict=verdict, text=ratio_words(found), ratio=found)


def latency_verdict(found: Ratio, min_effect: float) -> Verdict:
    """See :func:`compare_latency`."""
    half = min_effect / 2
    if found.low > 1 + half:
        return "worse"
    if found.high < 1 / (1 + half):
        return "better"
    if found.low > 1 / (1 + min_effect) and found.high < 1 + min_effect:
        return "same"
    return "inconclusive"


def ratio_words(found: Ratio) -> str:
    """A ratio of latencies for people."""
    change = 100 * (found.value - 1)
    low, high = (100 * (end - 1) for end in (found.low, found.high))
    text = "as fast" if abs(change) < 0.05 else f"{abs(change):.1f} % "
    text += "" if abs(change) < 0.05 else ("slower" if change > 0 else "faster")
    return (
        f"{text} ({low:+.1f} to {high:+.1f} %; {found.calls:,} calls of each in "
        f"{found.seconds:.0f} s, loaded {len(found.epochs)} times)"
    )


def compare_accuracy(base: Subject, head: Subject, options: CompareOptions) -> Compared | None:
    """Paired by image, of what both bundles' builds predicted of the same validation images.

    ``None`` where one of them is no bundle of a classifier, or its images are others.
    """
    change = _paired(base, head)
    if change is None:
        return None
    half = options.max_drop / 2
    verdict: Verdict = "inconclusive"
    if change.low > 0 and change.drop > half:
        verdict = "worse"
    elif change.high < 0 and change.drop < -half:
        verdict = "better"
    elif change.high < options.max_drop:
        verdict = "same"
    text = (
        f"top-1 {percent(change.dense.top1, 2)} -> {percent(change.pruned.top1, 2)} (drop "
        f"{fixed(100 * change.low, 2)} to {fixed(100 * change.high, 2)} points, same class on "
        f"{percent(change.agreement, 1)} of {change.pruned.images:,} images)"
    )
    p_value = change.p_value
    return Compared(what="accuracy", verdict=verdict, text=text, change=change, p_value=p_value)


def _paired(base: Subject, head: Subject) -> AccuracyChange | None:
    known = []
    for each in (base, head):
        path = each.path / PREDICTIONS
        manifest = each.manifest
        if manifest is None or manifest.validation is None or not manifest.lists(PREDICTIONS):
            return None
        networks, labels = read_predictions(path)
        if labels is None or each.target not in networks:
            return None
        known.append((manifest.validation.sha256, networks[each.target], labels))
    (images, before, labels), (others, after, _) = known
    return accuracy_change(before, after, labels) if images == others else None


def _size(base: Subject, head: Subject, options: CompareOptions) -> Compared:
    before, after = base.size_bytes, head.size_bytes
    ratio = after / before
    verdict: Verdict = "same"
    if abs(ratio - 1) > options.min_effect:
        verdict = "worse" if ratio > 1 else "better"
    text = f"{mebibytes(before)} -> {mebibytes(after)}"
    exact = Ratio(value=ratio, low=ratio, high=ratio)
    return Compared(what="size", verdict=verdict, text=text, ratio=exact)


def _check(options: CompareOptions) -> None:
    for name, value in (("min-effect", options.min_effect), ("max-drop", options.max_drop)):
        if not 0 < value < 1:
            raise UsageError(f"--{name} {value:g}: a fraction between 0 and 1 is wanted")
    if not 1 <= options.at_most <= 3600:
        raise UsageError(f"--at-most {options.at_most:g}s: between 1 and 3600 seconds")


def effect_on(history: Path | None, asked: float | None) -> float:
    """The smallest effect that counts: as asked, and no less than the runner's own noise.

    Args:
        history: A file of :mod:`cswap_deploy.gate.history`, or none.
        asked: Fraction of the latency; 2 % unless given.
    """
    least = MIN_EFFECT if asked is None else asked
    if history is None or not history.is_file():
        return least
    from cswap_deploy.gate.history import History

    return max(least, History(history).smallest_effect() or 0.0)


def results_of(found: Comparison, *, inconclusive_passes: bool) -> tuple[BudgetResult, ...]:
    """The parts of a comparison as results that CI reads."""
    limits = {"latency": found.min_effect, "accuracy": found.max_drop, "size": found.min_effect}
    results = []
    for part in found.parts:
        open_ = part.verdict == "inconclusive"
        ratio, change = part.ratio, part.change
        value = None if ratio is None else ratio.value - 1
        low = None if ratio is None else ratio.low - 1
        high = None if ratio is None else ratio.high - 1
        if change is not None:
            value, low, high = change.drop, change.low, change.high
        ok = inconclusive_passes if open_ else part.verdict != "worse"
        text = f"{part.verdict}: {part.text}"
        results.append(
            BudgetResult(
                f"compare.{part.what}", value, limits[part.what], ok, text, low, high, open_
            )
        )
    return tuple(results)
