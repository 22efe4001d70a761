"""From a network and a ratio to a smaller network and its plan."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial

from torch import Tensor, nn

from cswap_deploy.causal.arithmetic import ieee_float32
from cswap_deploy.causal.experiment import independent
from cswap_deploy.causal.measurement import LocalMeasurement
from cswap_deploy.causal.memory import Budget, keep_freed_memory
from cswap_deploy.causal.ray_workers import Recipe, pool_of
from cswap_deploy.config import PruneConfig, Task
from cswap_deploy.data.calibration import Calibration
from cswap_deploy.errors import PruneError, UsageError
from cswap_deploy.models.plain import copied
from cswap_deploy.network.deletion import delete_removed
from cswap_deploy.network.nodes import memory_format_of
from cswap_deploy.network.placing import HOST, device_for, moved
from cswap_deploy.network.probabilities import give_outputs, giving_logits, output_kind
from cswap_deploy.network.sizes import SizeModel
from cswap_deploy.network.steadiness import require_steady
from cswap_deploy.network.units import Group
from cswap_deploy.progress import Progress
from cswap_deploy.pruning.importance import importance_of
from cswap_deploy.pruning.job import Backend, Job
from cswap_deploy.pruning.pace import Pace, expected_costs, macs_per_second
from cswap_deploy.pruning.prepare import Prepared, check_reach, prepare
from cswap_deploy.pruning.recover import held_out
from cswap_deploy.pruning.rounds import NEAR, remove_in_rounds
from cswap_deploy.pruning.state import RoundStore, State
from cswap_deploy.pruning.timing import NARROWED, TimedDevice, latency_model
from cswap_deploy.pruning.trials import starved
from cswap_deploy.records.model import ModelSpec
from cswap_deploy.records.plan import GroupPlan, LatencyByLayer, LayerTime, PrunePlan

_DEPENDENT = (
    "an image's prediction depends on the others of its batch, or on the batch's size: each unit "
    "is measured by forwards of its own, which is slow"
)


@dataclass(frozen=True, slots=True)
class Pruned:
    """The smaller network with its weights, and how it came about."""

    module: nn.Module
    plan: PrunePlan
    notes: tuple[str, ...] = ()
    """Fallbacks that were taken; for the manifest."""


def prune(
    module: nn.Module,
    calibration: Calibration,
    *,
    config: PruneConfig,
    seed: int = 0,
    spec: ModelSpec | None = None,
    rounds: RoundStore | None = None,
    device: TimedDevice | None = None,
    progress: Progress,
) -> Pruned:
    """Prune a network to its ratio, without training.

    Args:
        module: In eval mode, float32; not changed. Where it gives probabilities, its effects are
            those on their logarithms.
        calibration: Images of the network's size.
        config: With ratio 0 nothing is removed. With ``recover``, which comes later, no weight is
            fitted to the images that are to judge it where images are few for the network.
        seed: Of the importance ``random``.
        spec: How workers can build the network again; without it there are none.
        rounds: Where finished rounds are kept; the latest one is gone on from.
        device: What a ratio of latency is about.
        progress: Told of phases, and of what the user should know.

    Raises:
        ExportError: The network cannot be traced.
        PruneError: Nothing can be removed, the ratio is out of reach, or deleting what was masked
            changed the outputs.
        StageError: A prediction was not finite, or outputs differ from run to run.
        UsageError: An unknown criterion, an effect that the task does not have, or a network that
            workers cannot build.
        MissingDependencyError: There is no GPU, no Ray or no cluster where one was asked for.
    """
    keep_freed_memory()
    importance = importance_of(config.criterion)
    judges = None
    if config.recover is not None and config.ratio > 0:
        judges = held_out(len(calibration.images))
    images = calibration.images
    require_steady(module, images)
    if config.ratio == 0:
        size = SizeModel(module, images[:2], ()).size()
        settings = config.key() | {"criterion": "none"}
        plan = PrunePlan(
            settings=settings, task=calibration.task, dense=size, pruned=size, groups=()
        )
        return Pruned(copied(module), plan)
    notes: list[str] = []
    config = _with_an_effect(config, calibration.task, progress, notes)
    progress.begin("tracing the network", 0)
    with giving_logits(module, output_kind(module, images, calibration.task)):
        network = prepare(module, images, config)
    progress.end()
    if judges is not None and starved(network.dense, len(images)):
        kept = images[~judges].contiguous(memory_format=memory_format_of(images))
        calibration = replace(calibration, images=kept, labels=calibration.labels[~judges])
        images = kept
    if config.ratio_of == "latency":
        network, config = _aimed_at(network, device, config, progress)
    else:
        device = None
    network = network.to(device_for(config))
    for note in network.notes:
        progress.note(note)
    with ieee_float32(), _backend(network, images, config, spec, progress, notes) as backend:
        job = Job(network, calibration, config, importance, seed, backend, device=device)
        state = (rounds.load(network.module, job.resolved.path) if rounds else None) or State()
        if state.round:
            progress.note(f"going on after round {state.round}, which is in the store")
        costs = {kind: each[state.round :] for kind, each in expected_costs(job).items()}
        pace = Pace(progress, costs, macs_per_second(network.graph, images))
        remove_in_rounds(replace(job, progress=pace), state, rounds)
    module = moved(network.module, HOST)
    smaller = delete_removed(module, state.removed, network.groups, images[:8])
    plan = _plan(job, state)
    if (faster := _faster_than_asked(plan, 1 / (1 - config.ratio))) is not None:
        progress.note(faster)
        notes.append(faster)
    assert sum(p.numel() for p in smaller.parameters()) == plan.pruned.params
    return Pruned(give_outputs(smaller), plan, tuple(notes))


def _aimed_at(
    network: Prepared, device: TimedDevice | None, config: PruneConfig, progress: Progress
) -> tuple[Prepared, PruneConfig]:
    """The network with the device's latency model, and the ratio that comes to what is asked."""
    if device is None:
        raise UsageError(
            "a speed-up or a latency needs a target that runs here",
            fix="run `cswap-deploy build`, whose first --target is the one that is aimed at",
        )
    progress.begin(f"timing networks of {NARROWED + 1} widths", 0)
    network.sizes.latency = latency_model(network, device)
    progress.end()
    timed = {"latency_ms": network.sizes.size().latency_ms}
    network = replace(network, dense_size=network.dense_size.model_copy(update=timed))
    if config.max_latency is not None:
        dense = network.dense_size.amount("latency")
        if dense <= config.max_latency:
            raise PruneError(
                f"--max-latency {config.max_latency:g}ms: the dense network takes {dense:.3g} ms",
                fix="pass --ratio 0 to build it as it is, or a lower latency",
            )
        config = config.model_copy(update={"ratio": 1 - config.max_latency / dense})
    check_reach(network, config)
    return network, config


def _with_an_effect(
    config: PruneConfig, task: Task, progress: Progress, notes: list[str]
) -> PruneConfig:
    """Units are ranked by the change of the outputs where there is no true class."""
    if task == "classify" or config.effect == "kl":
        return config
    if config.method != "paper":
        raise UsageError(
            f"--effect true-class: a network of task {task} has no true class",
            fix="leave --effect out: units are ranked by how far the outputs move",
        )
    note = f"task {task} has no true class: units are ranked by how far the outputs move"
    progress.note(note)
    notes.append(note)
    return config.model_copy(update={"effect": "kl"})


def _plan(job: Job, state: State) -> PrunePlan:
    network = job.network
    too_wide = dict.fromkeys(state.not_refitted, "too wide to refit; means were folded")
    return PrunePlan(
        settings=job.config.key()
        | asdict(job.resolved)
        | {"seed": job.seed, "rounds": job.resolved.rounds, "path": [*job.resolved.path]},
        task=job.calibration.task,
        dense=network.dense_size,
        pruned=network.sizes.size(),
        groups=tuple(_group_plan(g, state) for g in network.groups),
        excluded=network.excluded | too_wide,
        biased=network.biased,
        refitted=state.refitted,
        producers=state.producers,
        starved=state.starved,
        rounds=tuple(state.rounds),
        latency=_by_layer(network, state),
    )


def _faster_than_asked(plan: PrunePlan, asked: float) -> str | None:
    """Said where a limit or a curve took what is quicker: accuracy was spent on more than asked."""
    if not plan.rounds or not (tries := plan.rounds[-1].tries):
        return None
    reached = plan.rounds[-1].speedup
    if reached is None or reached <= asked / (1 - NEAR):
        return None
    slower = max((each.measured for each in tries if each.measured < asked), default=1.0)
    return (
        f"{reached:.2f}x as fast where {asked:.2f}x was asked: of the {len(tries)} networks that "
        f"were timed the next slower one has {slower:.2f}x"
    )


def _by_layer(network: Prepared, state: State) -> LatencyByLayer | None:
    """Where the time of a call was, and is."""
    if (model := network.sizes.latency) is None:
        return None
    dense = {group.name: group.units for group in network.groups}
    before, after = model.by_layer(dense), model.by_layer(network.sizes.widths)
    gone = [g.name for g in network.groups if g.kind == "branch" and state.removed.get(g.name)]
    return LatencyByLayer(
        layers=tuple(
            LayerTime(layer=name, dense_ms=ms, pruned_ms=after[name]) for name, ms in before.items()
        ),
        depth_ms=model.branch_ms(dense, gone),
    )


def _group_plan(group: Group, state: State) -> GroupPlan:
    taken = any(state.removed.get(branch) for branch in group.within)
    gone = set(range(group.units) if taken else state.removed.get(group.name, ()))
    return GroupPlan(
        name=group.name, kind=group.kind, units=group.units,
        kept=tuple(u for u in range(group.units) if u not in gone),
        effects=tuple(e for _, e in sorted(state.effects.get(group.name, {}).items())),
        attributes=tuple(a.path for a in group.attributes),
    )  # fmt: skip


@contextmanager
def _backend(
    network: Prepared, images: Tensor, config: PruneConfig, spec: ModelSpec | None,
    progress: Progress, notes: list[str],
) -> Iterator[Backend]:  # fmt: skip
    """Where effects are measured: this process or workers; ``notes`` gets fallbacks."""
    device = network.graph.device
    budget = Budget.of(config.memory_budget, device)
    if not network.together or (len(images) >= 4 and not independent(network.graph, images)):
        progress.note(_DEPENDENT)
        notes.append(_DEPENDENT)
        yield Backend(partial(LocalMeasurement, together=False), budget)
    elif config.workers is None:
        yield Backend(budget=budget)
    else:
        recipe = Recipe(spec, network.biased, network.example.numpy())
        progress.begin(f"starting workers ({config.workers})", 0)
        with pool_of(config.workers, recipe, memory_budget=config.memory_budget) as pool:
            progress.end()
            yield Backend(pool.measurement, budget)
            if pool.lost:
                notes.append(f"{pool.lost} worker(s) died; their pieces were measured again")
