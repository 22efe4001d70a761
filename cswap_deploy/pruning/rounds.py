"""The loop: measure every unit on the network as it is now, remove the least, make up, again.

Removing all units that look harmless at once breaks a network: each effect was measured with all
the others in place. So the ratio is reached in rounds, and each round measures again on what is
left. Within a round units leave in bundles (one unit, or as many as ``round_to`` asks for), the
bundle that disturbs the prediction least for what it saves first.

The network keeps its dense shape all along: a removed unit is masked at its consumers, which gives
the same outputs as deleting it. It is deleted once, at the end, by ``network.deletion``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from cswap_deploy.causal.adaptive import NOTHING, Spent
from cswap_deploy.causal.interventions import Moments, input_moments
from cswap_deploy.causal.memory import Budget
from cswap_deploy.causal.mixtures import half_mixed
from cswap_deploy.causal.scoring import Local, Scorer
from cswap_deploy.network.graph import Graph
from cswap_deploy.network.sizes import SizeModel
from cswap_deploy.network.units import Group
from cswap_deploy.progress import Phases
from cswap_deploy.pruning.allocation import Limits, Ranking
from cswap_deploy.pruning.candidates import (
    Goal,
    Order,
    Rival,
    best_ridge,
    consumers,
    least,
    orders,
    start_afresh,
)
from cswap_deploy.pruning.round_effects import Round
from cswap_deploy.pruning.state import Settings, State
from cswap_deploy.pruning.trials import Trials, clearly_less, solve_behind, take_out
from cswap_deploy.records.plan import RoundLog

Scorers = Callable[[Graph, Tensor, Tensor, Mapping[str, Moments], Budget], Scorer]
"""(network as it stands, images, true classes, moments, budget) -> who measures effects on them."""


def prune_progressively(
    graph: Graph,
    dense: Graph,
    groups: tuple[Group, ...],
    sizes: SizeModel,
    *,
    settings: Settings,
    limits: Limits,
    dense_amount: int,
    fine: bool = False,
    images: Tensor,
    labels: Tensor,
    scores: Order | None = None,
    rivals: Mapping[str, Rival] | None = None,
    state: State | None = None,
    budget: Budget | None = None,
    scorers: Scorers = Local,
    watcher: Phases,
    checkpoint: Callable[[State, nn.Module], None] | None = None,
) -> State:
    """Remove units until the ratio is reached, in place.

    Args:
        graph: Over the module to mask; its consumers have biases.
        dense: The same graph over the network as it was.
        groups: What can be removed.
        sizes: Of the network before anything is removed.
        settings: How.
        limits: Of each group.
        dense_amount: What the ratio is a fraction of (parameters, units or MACs).
        fine: In the last round let a group end between multiples of its granule where that
            meets the ratio.
        images: (N, C, H, W) float32, the calibration set. Every round measures on the next
            ``scoring_samples`` of them, balanced by class; all of them serve the refit.
        labels: (N,) int64.
        scores: A baseline's order instead of measured effects.
        rivals: Other orders to try beside the measured effects, where ``settings.select`` is
            ``set``; in the last round also from the dense network on.
        state: Of an interrupted run, with the module's weights as they were then.
        budget: Of memory, for measuring; a third of what is free unless said.
        scorers: Who measures; this process unless said.
        watcher: Progress.
        checkpoint: Called after every round.

    Returns:
        What was removed and what was measured.
    """
    state = state if state is not None else State()
    total = dense_amount
    for name, units in state.removed.items():
        sizes.remove(name, units)
    order = torch.from_numpy(balanced_order(labels.numpy()))
    budget = budget if budget is not None else Budget.of()
    trials = Trials(graph, dense, groups, state.removed, images[order])
    while state.round < settings.rounds:
        state.round += 1
        begun = time.perf_counter()
        target = total * (1 - settings.ratio * state.round / settings.rounds)
        last = state.round == settings.rounds
        ridge = state.ridge if settings.refit else None
        goal = Goal(groups, limits, target, settings.ratio_of, fine and last)
        moments: Mapping[str, Moments] = input_moments(
            graph, consumers(groups), images, intervention=settings.intervention, chunk=64
        )
        if scores is None:
            tried, measured, spent = _propose(
                graph, goal, state, settings, sizes, images, labels, order, moments,
                rivals if rivals is not None and settings.select == "set" else {}, budget, scorers,
                watcher,
            )  # fmt: skip
        else:
            tried, measured, spent = (
                {"effect": Ranking({g.name: scores(g) for g in groups})},
                0,
                NOTHING,
            )
        sets = goal.sets(sizes, state.removed, tried)
        chosen, judged = least(trials, sets, moments, ridge=ridge, watcher=watcher)
        gone = sets[chosen]
        if last and state.round > 1 and judged is not None and ridge is not None:
            afresh = start_afresh(
                trials, goal, sizes, rivals or {},
                intervention=settings.intervention, ridge=ridge, watcher=watcher,
            )  # fmt: skip
            # What saw no image does not fit the images by chance: the measured set must be better
            # than they could tell by luck.
            if afresh is not None and not clearly_less(judged, afresh.effect):
                chosen, gone, judged = afresh.name, afresh.gone, afresh.effect
                moments = afresh.moments
                _put_back(graph, dense, sizes, state)
        effect = None if judged is None else float(judged.mean())
        if last and ridge is not None and gone:
            state.ridge, effect = best_ridge(
                trials, gone, moments, ridge=ridge, effect=effect, watcher=watcher
            )
        take_out(graph, groups, gone, moments)
        for name, units in gone.items():
            sizes.remove(name, units)
            state.removed.setdefault(name, []).extend(units)
        if settings.refit and gone:
            done = solve_behind(
                graph, dense, groups, state.removed, trials.images,
                ridge=state.ridge, watcher=watcher,
                # Every round solves all layers anew, so what the units take over counts at the end.
                producers=settings.refit_producers and last,
            )  # fmt: skip
            state.refitted, state.not_refitted = done.layers, done.skipped
            state.producers = done.producers
        state.rounds.append(
            RoundLog(
                round=state.round,
                measured=measured,
                forwards=spent.forwards,
                forwards_exact=spent.exact,
                removed=sum(map(len, gone.values())),
                params=sizes.size().params,
                order=chosen,
                kl=effect,
                ridge=state.ridge if settings.refit else None,
                seconds=round(time.perf_counter() - begun, 2),
            )
        )
        if checkpoint is not None:
            checkpoint(state, graph.module)
    return state


def _propose(
    graph: Graph,
    goal: Goal,
    state: State,
    settings: Settings,
    sizes: SizeModel,
    images: Tensor,
    labels: Tensor,
    order: Tensor,
    moments: Mapping[str, Moments],
    rivals: Mapping[str, Rival],
    budget: Budget,
    scorers: Scorers,
    watcher: Phases,
) -> tuple[dict[str, Ranking], int, Spent]:
    """Measure, and say in which orders units may go; how many were measured, and what it took."""
    rows = _window(order, state.round, settings.scoring_samples)
    shown = images[rows]
    if settings.mix:
        shown = half_mixed(shown, seed=state.round)
    proposed = {name: rival.scores(graph.module, goal.groups) for name, rival in rivals.items()}
    spreads = {name: values for name, values in proposed.items() if rivals[name].own_spread}
    truth = labels[rows]
    measured, spent = Round(
        graph, goal, state, settings, sizes, spreads, shown, truth, moments, budget,
        scorers(graph, shown, truth, moments, budget),
    ).measure(watcher)  # fmt: skip
    costs = {g.name: state.costs(g, settings) for g in goal.groups}
    if settings.select == "unit":
        return {"effect": Ranking(costs)}, measured, spent
    return orders(goal.groups, state.removed, costs, rivals, proposed), measured, spent


def balanced_order(labels: np.ndarray) -> np.ndarray:
    """Rows of all images such that every prefix holds each class about equally often."""
    turn = np.zeros(len(labels), dtype=np.int64)
    for c in np.unique(labels):
        rows = np.flatnonzero(labels == c)
        turn[rows] = np.arange(len(rows))
    return np.lexsort((labels, turn))


def _window(order: Tensor, round_: int, size: int) -> Tensor:
    """The images of a round: the next ones, so that a lucky effect is not believed twice."""
    start = (round_ - 1) * size
    return order[torch.arange(start, start + min(size, len(order))) % len(order)]


def _put_back(graph: Graph, dense: Graph, sizes: SizeModel, state: State) -> None:
    """Undo every removal, in place."""
    graph.module.load_state_dict(dense.module.state_dict())
    for name, units in state.removed.items():
        sizes.restore(name, units)
    state.removed.clear()
