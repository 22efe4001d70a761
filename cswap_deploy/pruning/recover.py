"""A short recovery after pruning, for those who ask for it. This is training, and called that.

Without labels: the pruned network is taught by the dense one, on the calibration images with flips,
shifts and mixing, first by what blocks give (where their shapes are the same in both), then by the
logits alone. Every sixth image is held out: nothing is trained on it. The weights with the least
divergence there are kept, so the network never ends worse than it came. Where images are few for
the network, held-out ones are not pruned or refitted on either, as what was refitted knows them by
heart (EfficientNet-Lite0: a divergence of .008 on them, of 1.1 on others) and nothing would look
like a gain. Elsewhere they are: ResNet-56 without a sixth of its images loses what recovery gains.
Nothing else in this package takes a gradient step.

Source:
    Wang & Wu 2023, "Practical Network Acceleration with Tiny Sets" (arXiv:2202.07861): distilling
    features from few unlabelled images. Hinton, Vinyals & Dean 2015 (arXiv:1503.02531).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cswap_deploy.causal.effects import kl_divergence
from cswap_deploy.config import Task
from cswap_deploy.errors import UsageError
from cswap_deploy.models.outputs import named_outputs
from cswap_deploy.models.plain import copied
from cswap_deploy.network.probabilities import giving_logits, output_kind
from cswap_deploy.progress import Progress
from cswap_deploy.records.amounts import percent
from cswap_deploy.records.plan import Recovery, RecoveryCheck
from cswap_deploy.records.store import Store, stage_key

HELD_OUT = 6
"""Every so many images judge, and nothing is trained on them."""
FEWEST_IMAGES = 24
_BATCH = 32
_MOST_JUDGED = 256
"""Held-out images that judge."""
_LOOKING = 0.15
"""Part of the time that looks may take."""
_RATE = 3e-4
"""Largest learning rate, of Adam."""
_AVERAGED = 0.98
"""What judges, and is kept, is a running mean of the weights: this much of it stays at each step.
Single steps on batches of few images go up and down (benchmarks/LOG.md)."""
_WARM = 0.1
"""Part of the time in which the rate rises."""
_FEATURES_END = 0.4
"""Part of the time after which blocks no longer count."""
_MOST_BLOCKS = 8
_CHECKS = 20
"""Looks at the held-out images."""
_PATIENCE = 6
"""Looks without a gain after which it ends, late: what is gained comes as the rate falls."""
_LATE = 0.75
"""From this part of the time on."""
_TENSORS = "progress.safetensors"
_SHIFT = 1 / 8
"""Of the picture's side."""


@dataclass
class Progressed:
    """How far a recovery is; what is saved, and gone on from."""

    seconds: float = 0.0
    step: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)
    now: dict[str, Tensor] = field(default_factory=dict)
    mean: dict[str, Tensor] = field(default_factory=dict)
    """Running, of the weights."""
    moments: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """Of Adam, by the parameter's number."""
    checks: list[RecoveryCheck] = field(default_factory=list)


Saver = Callable[[Progressed], None]


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a recovery is to do."""

    minutes: float
    """Of training, looks at the held-out images included."""
    task: Task
    """What the outputs are: of a classifier the divergence of its prediction counts, else the
    squared change of the outputs over their size."""
    seed: int
    """Of the order and of what is done to pictures."""
    device: torch.device


def recover(
    pruned: nn.Module, dense: nn.Module, images: Tensor, lesson: Lesson, *, progress: Progress,
    before: Progressed | None = None, save: Saver | None = None,
) -> tuple[nn.Module, Recovery]:  # fmt: skip
    """Train a pruned network towards the dense one for some minutes.

    Args:
        pruned: In eval mode, float32; not changed.
        dense: What teaches it; not changed.
        images: (N, C, H, W) float32, as the network takes them; no labels.
        lesson: How long, and where.
        progress: Told of the steps.
        before: Where an interrupted run was.
        save: Keeps where this one is.

    Returns:
        A copy with other weights, on the CPU and in eval mode, and how it went.

    Raises:
        UsageError: There are too few images to hold some out.
    """
    judges, device = held_out(len(images)), lesson.device
    student, teacher = copied(pruned).to(device), copied(dense).to(device)
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    judged, taught = images[judges][:_MOST_JUDGED], images[~judges]
    state, kind = before or Progressed(), output_kind(dense, images, lesson.task)
    # Of a softmax inside the network another one would see next to nothing.
    with giving_logits(student, kind), giving_logits(teacher, kind):
        trainer = _Trainer(student, teacher, taught, judged, lesson)
        trainer.run(state, 60 * lesson.minutes, progress, save)
    student.load_state_dict(state.best)
    first, last = state.checks[0], min(state.checks, key=lambda check: check.divergence)
    record = Recovery(
        minutes=lesson.minutes, seconds=round(state.seconds, 1), steps=state.step,
        images=len(taught), held_out=len(judged), checks=tuple(state.checks),
        divergence_before=first.divergence, divergence=last.divergence,
        agreement_before=first.agreement, agreement=last.agreement,
    )  # fmt: skip
    return student.to("cpu").eval().requires_grad_(False), record


def held_out(count: int) -> Tensor:
    """(count,) bool: which of the calibration images judge a recovery.

    Raises:
        UsageError: There are too few to hold some out.
    """
    if count < FEWEST_IMAGES:
        raise UsageError(
            f"--recover needs {FEWEST_IMAGES} calibration images, there are {count}",
            fix="pass more images, or leave --recover out",
        )
    return torch.arange(count) % HELD_OUT == HELD_OUT - 1


class _Trainer:
    """One recovery under way."""

    def __init__(
        self, student: nn.Module, teacher: nn.Module, images: Tensor, judged: Tensor, lesson: Lesson
    ) -> None:
        self._student, self._teacher, self._task = student, teacher, lesson.task
        self._images, self._judged, self._device = images, judged, lesson.device
        self._seed = lesson.seed
        self._blocks = _common_blocks(student, teacher, judged[:2].to(lesson.device))
        self._trained = [p.requires_grad_(True) for p in student.parameters()]
        self._optimizer = torch.optim.Adam(self._trained, lr=_RATE)
        self._mean = copied(student)
        self._averaged = list(self._mean.parameters())

    def run(
        self, state: Progressed, seconds: float, progress: Progress, save: Saver | None
    ) -> None:
        """Until the time is up, or nothing is gained any more."""
        if state.now:
            self._student.load_state_dict(state.now)
            self._mean.load_state_dict(state.mean)
            groups = self._optimizer.state_dict()["param_groups"]
            self._optimizer.load_state_dict({"state": state.moments, "param_groups": groups})
        else:
            self._check(state)
        begun = time.perf_counter()
        self._divergence()
        apart = max(seconds / _CHECKS, (time.perf_counter() - begun) / _LOOKING)
        progress.begin(f"training on {len(self._images)} images, {seconds / 60:g} min", 100)
        shown, due = 0, state.seconds + apart
        while state.seconds < seconds and not self._is_idle(state, seconds):
            begun = time.perf_counter()
            self._step(state, state.seconds / seconds)
            if state.seconds + time.perf_counter() - begun >= due:
                self._check(state)
                due += apart
                state.seconds += time.perf_counter() - begun
                state.now, state.mean = _weights(self._student), _weights(self._mean)
                state.moments = {
                    at: {what: value.detach().cpu().clone() for what, value in each.items()}
                    for at, each in self._optimizer.state_dict()["state"].items()
                }
                if save is not None:
                    save(state)
            else:
                state.seconds += time.perf_counter() - begun
            part = min(100, int(100 * state.seconds / seconds))
            progress.advance(part - shown)
            shown = part
        self._check(state)
        progress.end()

    def _is_idle(self, state: Progressed, seconds: float) -> bool:
        best = min(range(len(state.checks)), key=lambda at: state.checks[at].divergence)
        return state.seconds > _LATE * seconds and len(state.checks) - 1 - best >= _PATIENCE

    def _step(self, state: Progressed, part: float) -> None:
        """One batch at a part of the time."""
        generator = torch.Generator().manual_seed(hash((self._seed, state.step)) % 2**63)
        chosen = torch.randint(len(self._images), (_BATCH,), generator=generator)
        batch = varied(self._images[chosen], generator).to(self._device)
        rate = _RATE * min(1.0, part / _WARM) * (1 + math.cos(math.pi * part)) / 2
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        blocks = self._blocks if part < _FEATURES_END else []
        with torch.no_grad(), _kept(self._teacher, blocks) as wanted:
            expected = named_outputs(self._teacher(batch))
        with _kept(self._student, blocks) as given:
            found = named_outputs(self._student(batch))
        loss = _loss(expected, found, self._task)
        for name in blocks:
            scale = wanted[name].pow(2).mean() + 1e-12
            loss = loss + (given[name] - wanted[name]).pow(2).mean() / scale / len(blocks)
        self._optimizer.zero_grad(set_to_none=True)
        if torch.isfinite(loss):
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self._trained, 1.0)
            self._optimizer.step()
            with torch.no_grad():
                for mean, now in zip(self._averaged, self._trained, strict=True):
                    mean.lerp_(now, 1 - _AVERAGED)
        state.step += 1

    def _check(self, state: Progressed) -> None:
        """Judge on the held-out images, and keep the best."""
        mean, alike = self._divergence()
        check = RecoveryCheck(
            seconds=round(state.seconds, 1), divergence=mean if math.isfinite(mean) else 1e30,
            agreement=alike if self._task == "classify" else None,
        )  # fmt: skip
        best = min((c.divergence for c in state.checks), default=math.inf)
        if not state.best or check.divergence < best:
            state.best = _weights(self._mean)
        state.checks.append(check)

    @torch.no_grad()
    def _divergence(self) -> tuple[float, float]:
        """Mean over the held-out images, and the share of them with the dense network's class."""
        total, alike = 0.0, 0.0
        for part in torch.split(self._judged, 64):
            batch = part.to(self._device)
            expected = named_outputs(self._teacher(batch))
            found = named_outputs(self._mean(batch))
            total += float(divergence(expected, found, self._task).sum())
            if self._task == "classify":
                one, other = (next(iter(outputs.values())) for outputs in (expected, found))
                alike += float((one.argmax(1) == other.argmax(1)).sum())
        return total / len(self._judged), alike / len(self._judged)


def _loss(expected: dict[str, Tensor], found: dict[str, Tensor], task: Task) -> Tensor:
    """What training lessens: of a classifier the squared error of its logits over their variance.

    The divergence that judges is deaf to what the dense network thinks of the classes that it does
    not choose, and on images that it knows by heart these are all that it could teach. Agreement of
    ResNet-20 without 60 %, 45 s: .762 to .768 by the divergence, to .80 by this; ResNet-56, 4.5
    minutes: .917 to .928 (benchmarks/LOG.md).

    Source: Kim et al. 2021, "Comparing Kullback-Leibler Divergence and Mean Squared Error Loss in
    Knowledge Distillation" (arXiv:2105.08919), section 3.
    """
    if task == "classify":  # a constant added to all logits says nothing
        expected, found = (
            {name: logits - logits.mean(1, keepdim=True) for name, logits in outputs.items()}
            for outputs in (expected, found)
        )
    return _relative_squares(expected, found).mean()


def divergence(expected: dict[str, Tensor], found: dict[str, Tensor], task: Task) -> Tensor:
    """(N,) how far each image's outputs are from what is expected: nats, or relative squares."""
    if task == "classify":
        one, other = (next(iter(outputs.values())) for outputs in (expected, found))
        return kl_divergence(other[None], one)[0]
    return _relative_squares(expected, found)


def _relative_squares(expected: dict[str, Tensor], found: dict[str, Tensor]) -> Tensor:
    """(N,) squared error of each image's outputs, over their mean square in all."""
    parts = []
    for name, wanted in expected.items():
        if wanted.is_floating_point() and wanted.ndim:
            square = (found[name] - wanted).pow(2).flatten(1).mean(1)
            parts.append(square / (wanted.pow(2).mean() + 1e-12))
    return torch.stack(parts).mean(0)


def varied(images: Tensor, generator: torch.Generator) -> Tensor:
    """(N, C, H, W) shifted, half of them mirrored, half mixed with another."""
    count, _, height, width = images.shape
    most = max(1, int(_SHIFT * height)), max(1, int(_SHIFT * width))
    padded = F.pad(images, (most[1], most[1], most[0], most[0]), mode="replicate")
    found = torch.empty_like(images)
    for at in range(count):
        down = int(torch.randint(2 * most[0] + 1, (), generator=generator))
        right = int(torch.randint(2 * most[1] + 1, (), generator=generator))
        found[at] = padded[at, :, down : down + height, right : right + width]
    mirrored = torch.rand(count, generator=generator) < 0.5
    found[mirrored] = found[mirrored].flip(3)
    share = torch.rand(count, 1, 1, 1, generator=generator)
    share = torch.where(torch.rand(count, 1, 1, 1, generator=generator) < 0.5, share, 1.0)
    order = torch.randperm(count, generator=generator)
    return share * found + (1 - share) * found[order]


def _common_blocks(student: nn.Module, teacher: nn.Module, images: Tensor) -> list[str]:
    """Modules with parts whose output is a tensor of one shape in both, evenly over the depth."""
    shapes = []
    for module in (student, teacher):
        names = [name for name, part in module.named_modules() if name and any(part.children())]
        with torch.no_grad(), _kept(module, names) as kept:
            module(images)
        shapes.append({name: value.shape for name, value in kept.items()})
    common = [name for name, shape in shapes[0].items() if shapes[1].get(name) == shape]
    step = max(1, math.ceil(len(common) / _MOST_BLOCKS))
    return common[step - 1 :: step]


@contextmanager
def _kept(module: nn.Module, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """What modules return within, by name, in the order in which they run."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                found[name] = output

        return hook

    handles = [module.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}


def recovery_words(found: Recovery) -> str:
    """How it went, in a line."""
    text = f"{found.divergence_before:.3g} -> {found.divergence:.3g} on {found.held_out} held out"
    if found.agreement is not None and found.agreement_before is not None:
        before, now = percent(found.agreement_before, 1), percent(found.agreement, 1)
        text += f", same class {before} -> {now}"
    return f"{text}; {found.steps:,} steps in {found.seconds:.0f} s"


class ProgressStore:
    """Where a recovery is, kept after every look, so that an interruption costs little."""

    def __init__(self, store: Store, key: str, *, resume: bool = True) -> None:
        self._store = store
        self._resume = resume
        self._key = stage_key(
            "recovering", version=3, inputs={"recover": key}, settings={}, tools={}
        )

    def load(self) -> Progressed | None:
        """What an interrupted run left."""
        from safetensors.torch import load_file

        folder = self._store.find(self._key) if self._resume else None
        if folder is None:
            return None
        told = json.loads((folder / "progress.json").read_bytes())
        tensors = load_file(folder / _TENSORS)
        parts: dict[str, dict[str, Tensor]] = {"best": {}, "now": {}, "mean": {}, "adam": {}}
        for name, value in tensors.items():
            kind, _, rest = name.partition(".")
            parts[kind][rest] = value
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in parts["adam"].items():
            at, _, what = name.partition(".")
            moments.setdefault(int(at), {})[what] = value
        return Progressed(
            told["seconds"], told["step"], parts["best"], parts["now"], parts["mean"], moments,
            [RecoveryCheck.model_validate(check) for check in told["checks"]],
        )  # fmt: skip

    def save(self, state: Progressed) -> None:
        """Keep where it is."""
        from safetensors.torch import save_file

        kinds = {"best": state.best, "now": state.now, "mean": state.mean}
        tensors = {f"{k}.{name}": v for k, each in kinds.items() for name, v in each.items()}
        for at, each in state.moments.items():
            tensors |= {f"adam.{at}.{what}": value for what, value in each.items()}
        told = {
            "seconds": state.seconds, "step": state.step,
            "checks": [check.model_dump() for check in state.checks],
        }  # fmt: skip
        with self._store.create(self._key, stage="recovering", replace=True) as folder:
            (folder / "progress.json").write_text(json.dumps(told))
            save_file({n: v.contiguous() for n, v in tensors.items()}, folder / _TENSORS)

    def forget(self) -> None:
        """The stage is finished."""
        self._store.remove(self._key)
