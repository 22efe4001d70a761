"""The loop: measure every unit on the network as it is now, remove, refit, and again.

Removing all units that look harmless at once breaks a network: each effect was measured with all
the others in place. So the ratio is reached in rounds, and each round measures again on what is
left. Within a round units leave in steps (one unit, or as many as ``round_to`` asks for), what
disturbs the prediction least for what it saves first.

The network keeps its dense shape all along: a removed unit is masked at its consumers, which gives
the same outputs as deleting it. It is deleted once, at the end, by ``network.deletion``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from cswap_deploy.causal.experiment import Experiment
from cswap_deploy.causal.interventions import Moments, input_moments
from cswap_deploy.causal.mixtures import half_mixed
from cswap_deploy.data.sampling import balanced_order
from cswap_deploy.errors import PruneError
from cswap_deploy.network.deletion import remove_units
from cswap_deploy.network.graph import Graph
from cswap_deploy.network.placing import HOST, moved
from cswap_deploy.network.units import consumers
from cswap_deploy.network.walk import Batches, images_at_once
from cswap_deploy.pruning.allocation import Goal, Ranking
from cswap_deploy.pruning.approach import Timed, next_to_time
from cswap_deploy.pruning.candidates import (
    Choice,
    allocations,
    best_candidate,
    best_from_dense,
    branches_in_turn,
    curved,
    proposals,
    rankings,
    search_branches,
)
from cswap_deploy.pruning.importance import View
from cswap_deploy.pruning.job import Job
from cswap_deploy.pruning.round_effects import RoundEffects
from cswap_deploy.pruning.state import RoundStore, State
from cswap_deploy.pruning.timing import TimedDevice
from cswap_deploy.pruning.trials import (
    MAX_ROWS,
    Ground,
    Judging,
    Trials,
    refit_behind,
    remove,
    starved,
    widened,
)
from cswap_deploy.records.plan import RoundLog, TimedTry

LOOKED = 256
"""Images that moments are taken on, where there are more. They decide what stands in for a unit
while it is measured; once it is gone, what is left is refitted on all images."""
_FORWARD = 8
"""One part in so many of the memory budget is for the values of one forward."""
_WIDENED = 2
"""And one part in so many for images and mosaics, where the former are few."""
NEAR = 0.03
"""How far from the latency that is asked for a network may end, as a fraction of it."""
_ATTEMPTS = 6
"""At a latency: so many candidates are timed where one of them is near."""
_MOST_ATTEMPTS = 12
"""Where none is."""


def remove_in_rounds(job: Job, state: State, saved: RoundStore | None = None) -> State:
    """Mask units of ``job.network``, in place, until the ratio is reached.

    Every round measures on the next ``scoring_samples`` calibration images, balanced by class; all
    of them serve the refit.

    Args:
        job: What is pruned, and how.
        state: Changed and returned: of a fresh run, or of one that was interrupted, with the
            network's weights as they were then.
        saved: Is given every finished round.
    """
    loop = _Loop(job, state)
    while state.round < job.resolved.rounds:
        loop.round()
        if saved is not None:
            saved.save(state, job.network.module, job.resolved.path)
    return state


class _Loop:
    """The rounds of one job."""

    def __init__(self, job: Job, state: State) -> None:
        self.job, self.state = job, state
        for name, units in state.removed.items():
            job.network.sizes.remove(name, units)
        images, labels = job.calibration.images, job.calibration.labels
        self.order = torch.from_numpy(balanced_order(labels.numpy()))
        self.rng = np.random.default_rng(job.seed)
        network, memory = job.network, job.backend.budget.total
        size = images_at_once(network.dense, memory // _FORWARD)
        few = bool(starved(network.dense, len(images)))
        wide = widened(images, self.order, memory // _WIDENED) if few else (images, self.order)
        batches = Batches(*wide, size, network.dense.device)
        self.ground = Ground(network.dense, batches, memory, job.calibration.task, few)
        # Few images say too little of many weights for a refit before the last one.
        self.trials = Trials(
            network, state.removed, self.ground, refits=job.config.refit and not few
        )
        self.first_moments: dict[str, Moments] = {}
        """Of the dense network; empty where the run goes on after an interruption."""
        self.slower = 1.0
        """Latency as measured last over what the model says, of the dense network's each."""

    def round(self) -> None:
        """Measure, choose, remove and refit once."""
        job, state = self.job, self.state
        begun = time.perf_counter()
        state.round += 1
        last = job.finishes(state.round)
        goal = self._goal(last)
        moments = self._moments(job.network.graph)
        if not state.removed:
            self.first_moments = moments
        view = View(job.network.graph, job.network.groups, job.calibration, self.rng)
        proposed = proposals(view) if job.compares else {}
        effects = RoundEffects(job, state, goal, self._experiment(moments), allocations(proposed))
        values = job.importance.of(replace(view, measure=effects.measure))
        name = "effect" if job.importance.needs_images else job.config.criterion
        tried = {name: Ranking(values, per_saving=not job.importance.allocates)}
        if job.compares:
            if job.device is not None:
                values = branches_in_turn(self.trials, goal, values, moments, job.progress)
            tried = rankings(goal, values, proposed)
            tried |= curved(self.trials, goal, {name: values} | proposed, moments, job.progress)
        choice = best_candidate(self.trials, goal, tried, moments, progress=job.progress)
        if job.device is not None:
            choice = search_branches(self.trials, goal, choice, moments, progress=job.progress)
        if last and state.round > 1 and choice.trial is not None and job.config.refit:
            choice = self._or_from_dense(choice, goal, view)
        fraction: float | None = None
        tries: tuple[TimedTry, ...] = ()
        if job.device is not None:
            choice, fraction, tries = self._at_the_latency(choice, job.device)
        self._remove(choice, last)
        state.rounds.append(
            RoundLog(
                round=state.round, measured=effects.units,
                forwards=effects.spent.forwards, forwards_exact=effects.spent.exact,
                removed=sum(map(len, choice.gone.values())),
                params=job.network.sizes.size().params,
                candidate=choice.name, kl=choice.effect,
                speedup=None if fraction is None else 1 / fraction, tries=tries,
                seconds=round(time.perf_counter() - begun, 2),
            )
        )  # fmt: skip

    def _at_the_latency(
        self, choice: Choice, device: TimedDevice
    ) -> tuple[Choice, float | None, tuple[TimedTry, ...]]:
        """The candidate at the size at which it really has the latency that is asked.

        Weights do not count for that, so nothing is refitted meanwhile. Where a round's network is
        a result, candidates are timed until one is near. The round before is timed once, for the
        model.

        Returns:
            The candidate, what it takes of the dense network's time (``None`` in the rounds
            before), and all that was timed.

        Raises:
            PruneError: None of them is near.
        """
        job = self.job
        tried: list[Timed] = []
        once = not job.finishes(self.state.round)
        if once and not job.finishes(self.state.round + 1):
            return choice, None, ()
        wanted = 1 - job.resolved.path[self.state.round - 1]
        following: Choice | None = choice
        while following is not None:
            fraction, predicted = self._timed(following, device, len(tried) + 1)
            if fraction is None:
                return choice, predicted, ()
            if abs(fraction / wanted - 1) <= NEAR and not once:  # by chance, maybe
                again, _ = self._timed(following, device, len(tried) + 1)
                fraction = fraction if again is None else (fraction + again) / 2
            tried.append(Timed(following, fraction, predicted))
            off = min(abs(each.fraction / wanted - 1) for each in tried)
            most = _ATTEMPTS if off <= NEAR else _MOST_ATTEMPTS
            done = once or off <= NEAR / 2 or len(tried) >= most
            following = None if done else next_to_time(tried, wanted)
        # A limit is met by what is quicker, too, and a curve may have its points anywhere.
        least = 0.0 if job.config.max_latency or job.config.waypoints else wanted * (1 - NEAR)
        enough = [each for each in tried if least <= each.fraction <= wanted * (1 + NEAR)]
        if not enough and not once:
            raise _not_reached([each.fraction for each in tried], wanted)
        best = min(enough or tried, key=lambda each: abs(each.fraction - wanted))
        self.slower = best.fraction / best.predicted
        tries = (TimedTry(predicted=1 / x.predicted, measured=1 / x.fraction) for x in tried)
        return best.choice, best.fraction, tuple(tries)

    def _timed(self, choice: Choice, device: TimedDevice, at: int) -> tuple[float | None, float]:
        """What a candidate's network takes of the dense one's time: measured, and by the model."""
        job = self.job
        job.progress.begin(f"timing what is left, try {at}", 0)
        removed = dict(choice.goal.removed)
        for name, units in choice.gone.items():
            removed[name] = [*removed.get(name, ()), *units]
        smaller = moved(job.network.module, HOST)
        remove_units(smaller, removed, job.network.groups)
        fraction = device.fraction(smaller)
        job.progress.end()
        dense = job.network.dense_size.amount("latency")
        return fraction, choice.goal.without(choice.gone).amount("latency") / dense

    def _moments(self, graph: Graph) -> dict[str, Moments]:
        where = self.job.resolved.called(self.state.round)
        self.job.progress.begin(f"looking at what layers read, {where}", 0)
        seen = self.ground.solved_on if self.ground.few else self.ground.batches.first(LOOKED)
        return input_moments(
            graph, consumers(self.job.network.groups),
            seen.images[seen.rows],
            intervention=self.job.config.intervention, chunk=self.ground.batches.size,
        )  # fmt: skip

    def _goal(self, last: bool) -> Goal:
        network, config = self.job.network, self.job.config
        total = network.dense_size.amount(config.ratio_of)
        return Goal(
            network.groups, network.limits, network.sizes, self.state.removed, config.ratio_of,
            target=total * (1 - self.job.resolved.path[self.state.round - 1]) / self.slower,
            split=last and network.limits.split,
        )  # fmt: skip

    def _experiment(self, moments: Mapping[str, Moments]) -> Experiment:
        """On the next images in each round, so that a lucky effect is not believed twice."""
        size, count = self.job.resolved.scoring_samples, len(self.order)
        start = (self.state.round - 1) * size
        rows = self.order[torch.arange(start, start + min(size, count)) % count]
        images = self.job.calibration.images[rows]
        if self.job.config.mix:
            images = half_mixed(images, seed=self.state.round)
        labels = self.job.calibration.labels[rows]
        budget, task = self.job.backend.budget, self.job.calibration.task
        return Experiment(self.job.network.graph, images, labels, moments, budget, task)

    def _or_from_dense(self, choice: Choice, goal: Goal, view: View) -> Choice:
        """The candidate of the last round, or one from the dense network on, which undoes all.

        Both are tried as they will be: with producers reconstructed, which take over more of what
        left all layers alike than of what left a few. ResNet-20 without half of its channels, KL:
        .89 and .90 without them, .84 and .76 with them, .48 and .39 in the end (benchmarks/LOG.md).
        """
        job = self.job
        trials = replace(self.trials, producers=job.config.refit_producers)
        other = best_from_dense(
            trials, goal, view, progress=job.progress,
            moments=self.first_moments or self._moments(job.network.dense),
        )  # fmt: skip
        if trials.refits and trials.producers:
            job.progress.begin("trying what the rounds came to", 1)
            choice = replace(choice, trial=trials.trial(choice.gone, choice.moments))
            job.progress.advance(1)
            job.progress.end()
        assert choice.trial is not None
        assert other.trial is not None
        if float(other.trial.effect.mean()) >= float(choice.trial.effect.mean()):
            return choice
        network = job.network
        network.module.load_state_dict(network.dense.module.state_dict())
        for name, units in self.state.removed.items():
            network.sizes.restore(name, units)
        self.state.removed.clear()
        return other

    def _remove(self, choice: Choice, last: bool) -> None:
        """Mask the units of a candidate and refit."""
        state, network, done = self.state, self.job.network, None
        if choice.trial is not None and not last:  # the last refit is on all images
            network.module.load_state_dict(choice.trial.module.state_dict())
            done = choice.trial.refit
        else:
            remove(network, choice.gone, choice.moments)
        for name, units in choice.gone.items():
            network.sizes.remove(name, units)
            state.removed.setdefault(name, []).extend(units)
        if (self.trials.refits or (last and self.job.config.refit)) and choice.gone:
            done = done or refit_behind(
                network, state.removed, self.ground.targets(self.ground.solved_on, MAX_ROWS),
                judge=Judging(network.graph, self.ground) if self.ground.few else None,
                most_bytes=self.ground.share, progress=self.job.progress,
                # Every round refits all layers anew, so reconstructed producers count at the end.
                producers=self.job.config.refit_producers and last,
            )  # fmt: skip
            state.refitted, state.not_refitted = done.layers, done.skipped
            images = len(self.job.calibration.images)
            there = starved(network.dense, images)
            state.producers = done.producers
            state.starved = {name: there[name] for name in done.layers if name in there}


def _not_reached(fractions: Sequence[float], wanted: float) -> PruneError:
    """Says which speed-ups around the one that was asked for were measured."""
    asked = f"a speed-up of {1 / wanted:.2f}x was not reached"
    quicker = [each for each in fractions if each < wanted]
    slower = min((each for each in fractions if each > wanted), default=1.0)
    if not quicker:
        return PruneError(
            f"{asked}: the networks that the model took for one were at most {1 / slower:.2f}x as "
            "fast as the dense one, as measured",
            fix=f"pass --speedup {(1 - NEAR) / slower:.2f} or less"
            if slower < 1 - NEAR else "pass --ratio 0 to build the dense network",
        )  # fmt: skip
    beyond = 1 / max(quicker)
    return PruneError(
        f"{asked}: of all networks that were timed those next to it are {1 / slower:.2f}x and "
        f"{beyond:.2f}x as fast as the dense one",
        fix=f"pass --speedup {beyond:.2f}"
        + (f" or --speedup {1 / slower:.2f}" if slower < 1 - NEAR else ""),
    )
