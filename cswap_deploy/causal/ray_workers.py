"""Measuring on several processes or machines, over Ray.

The work is cut by groups and by parts of the images. A piece is computed in the same batches
wherever it runs, and results are put together in the order of the pieces, so with the same number
of threads a worker's effects are those of one process to the last bit. A worker that dies loses
only its piece, which another one does again.

No module travels: workers build the architecture from its name and take weights as safetensors,
named by their sha256; a worker fetches those of a round once.

Source: Ray documentation, "Actors", "Actor fault tolerance", "Objects".
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cswap_deploy.causal.effects import Effects, join
from cswap_deploy.causal.interventions import Moments
from cswap_deploy.causal.memory import Budget, keep_freed_memory
from cswap_deploy.causal.scoring import MOST_IMAGES, Local, Tick
from cswap_deploy.errors import MissingDependencyError, StageError, UsageError, missing
from cswap_deploy.models.load import fresh_module, weights_digest
from cswap_deploy.network.graph import Graph, trace
from cswap_deploy.network.units import Group, give_bias
from cswap_deploy.records.model import ModelSpec
from cswap_deploy.runtime.host import usable_cores

_log = logging.getLogger(__name__)
_PIECES_A_WORKER = 3
"""Pieces of a part's groups for each worker: small enough that none waits long for the last."""
_LIVES = 3
"""Times that a piece is given out before it is given up."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a worker needs to build the network, apart from its weights."""

    spec: ModelSpec
    biased: tuple[str, ...]
    """Layers that were given a bias."""
    example: np.ndarray
    """(2, C, H, W) float32, to trace with."""


@dataclass(frozen=True, slots=True)
class Task:
    """What a network is measured on; fetched once by each worker."""

    digest: str
    """Of the weights."""
    weights: bytes
    """A safetensors file."""
    images: np.ndarray
    labels: np.ndarray
    moments: Mapping[str, Moments]
    variant_bytes: int


class Worker:
    """Lives in a process of its own."""

    def __init__(self, recipe: Recipe, threads: int, budget: int) -> None:
        keep_freed_memory()
        torch.set_num_threads(threads)
        module = fresh_module(recipe.spec)
        for layer in recipe.biased:
            give_bias(module.get_submodule(layer))  # type: ignore[arg-type]
        self._graph = trace(module, torch.from_numpy(recipe.example.copy()))
        self._budget = budget
        self._scorer: Local | None = None
        self._task: Any = None

    def pid(self) -> int:
        """Of the process, for whoever wants to watch it."""
        return os.getpid()

    def measure(
        self,
        name: int,
        task: list[Any],
        groups: list[tuple[Group, list[int]]],
        rows: np.ndarray,
        half: bool,
    ) -> list[Effects]:
        """One piece.

        Args:
            name: Of the task; one that is known is not fetched again.
            task: A reference to it, in a list, so that Ray does not fetch it for every call.
            groups: Which units.
            rows: Which images.
            half: See ``scoring.Scorer``.
        """
        if self._task != name:
            import ray

            self._scorer, self._task = self._load(ray.get(task[0])), name
        assert self._scorer is not None
        return self._scorer.effects(dict(groups), torch.from_numpy(rows.copy()), half=half)

    def _load(self, task: Task) -> Local:
        from safetensors.torch import load

        self._graph.module.load_state_dict(load(task.weights), strict=True)
        found = weights_digest(self._graph.module)
        if found != task.digest:
            raise StageError(
                f"a worker got other weights than were sent: sha256 {found[:12]}…, not "
                f"{task.digest[:12]}…"
            )
        images = torch.from_numpy(task.images.copy()).contiguous(memory_format=torch.channels_last)
        labels = torch.from_numpy(task.labels.copy())
        budget = Budget(self._budget, task.variant_bytes)
        return Local(self._graph, images, labels, task.moments, budget)


@dataclass(slots=True)
class Pool:
    """Workers that measure for one network, in all of its rounds."""

    recipe: Recipe
    count: int
    threads: int
    """Of each worker."""
    budget: int
    """Bytes of each worker."""
    ray: Any
    workers: list[Any] = field(default_factory=list)
    _tasks: int = 0
    lost: int = 0
    """Workers that died."""

    def start_worker(self) -> Any:
        """One more, or another one."""
        kind = self.ray.remote(num_cpus=0, max_restarts=0)(Worker)
        return kind.remote(self.recipe, self.threads, self.budget)

    def scorer(
        self,
        graph: Graph,
        images: Tensor,
        labels: Tensor,
        moments: Mapping[str, Moments],
        budget: Budget,
    ) -> Remote:
        """Measures one network, as it is now, on some images; see ``progressive.Scorers``."""
        from safetensors.torch import save

        self._tasks += 1
        state = {k: v.detach().contiguous() for k, v in graph.module.state_dict().items()}
        task = Task(
            digest=weights_digest(graph.module),
            weights=save(state),
            images=images.contiguous().numpy(),
            labels=labels.numpy(),
            moments=moments,
            variant_bytes=budget.variant_bytes,
        )
        return Remote(self, self._tasks, self.ray.put(task), len(images))


@dataclass(frozen=True, slots=True)
class Piece:
    """Some groups on one part of the images."""

    part: int
    groups: list[tuple[Group, list[int]]]
    rows: np.ndarray


@dataclass(slots=True)
class Remote:
    """Measures one network on one set of images, by a pool's workers."""

    pool: Pool
    name: int
    task: Any
    images: int

    def effects(
        self,
        wanted: Mapping[Group, Sequence[int]],
        rows: Tensor | None = None,
        *,
        half: bool = False,
        tick: Tick | None = None,
    ) -> list[Effects]:
        """See ``scoring.Scorer``."""
        asked = [(g, list(units)) for g, units in wanted.items() if len(units)]
        chosen = torch.arange(self.images) if rows is None else rows
        parts = list(torch.split(chosen, MOST_IMAGES))
        pieces = [
            Piece(at, groups, part.numpy())
            for at, part in enumerate(parts)
            for groups in _shares(asked, self.pool.count * _PIECES_A_WORKER)
        ]
        done: dict[tuple[str, int], Effects] = {}
        for at, found in self._run(pieces, half):
            for effects in found:
                done[effects.group, at] = effects
                if tick is not None:
                    tick(effects.kl.size)
        return [join([done[g.name, at] for at in range(len(parts))]) for g, _ in asked]

    def _run(self, pieces: list[Piece], half: bool) -> Iterator[tuple[int, list[Effects]]]:
        """Give the pieces out, one to each worker at a time; those of the dead again."""
        ray, pool = self.pool.ray, self.pool
        waiting = deque((piece, _LIVES) for piece in pieces)
        idle = list(pool.workers)
        busy: dict[Any, tuple[Any, Piece, int]] = {}
        while waiting or busy:
            while waiting and idle:
                piece, lives = waiting.popleft()
                worker = idle.pop()
                answer = worker.measure.remote(
                    self.name, [self.task], piece.groups, piece.rows, half
                )
                busy[answer] = worker, piece, lives
            (answer, *_), _ = ray.wait(list(busy), num_returns=1)
            worker, piece, lives = busy.pop(answer)
            try:
                yield piece.part, ray.get(answer)
            except ray.exceptions.RayActorError as err:
                pool.lost += 1
                if lives <= 1:
                    raise StageError(
                        f"workers died {_LIVES} times over the same piece of work: {err}",
                        fix="pass a smaller --memory-budget, or fewer --workers",
                    ) from err
                _log.warning("a worker died; another one does its piece again")
                pool.workers.remove(worker)
                worker = pool.start_worker()
                pool.workers.append(worker)
                waiting.append((piece, lives - 1))
            except ray.exceptions.RayTaskError as err:  # the piece itself fails, wherever it runs
                if isinstance(err.cause, StageError):
                    raise err.cause from err
                raise
            idle.append(worker)


@contextmanager
def pool_of(where: str, recipe: Recipe, *, memory_budget: int | None) -> Iterator[Pool]:
    """Workers on this machine (``4``) or on a cluster (``ray://HOST:PORT``).

    Args:
        where: How many, or where (``config.BuildConfig.workers``); on a cluster as many as it has
            CPUs.
        recipe: Of the network.
        memory_budget: Bytes of each worker; of a third of what is free an equal share unless said.

    Raises:
        UsageError: The network cannot be built again from its name.
        MissingDependencyError: Ray is not installed, or no cluster answers.
    """
    count = int(where) if where.isdigit() else None
    if recipe.spec.source == "factory" and ":" not in recipe.spec.name:
        raise UsageError(
            "--workers needs a network that can be built from its name; this one was passed as an "
            "object",
            fix="put what makes it into a function and pass package.module:function",
        )
    try:
        import ray
    except ImportError as err:
        raise missing("ray", "ray", err) from err
    # Ray would otherwise start every worker with "uv run" or send usage statistics
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    started = not ray.is_initialized()
    if started and count is not None:
        ray.init(
            address="local", num_cpus=count, include_dashboard=False, log_to_driver=False,
            logging_level=logging.ERROR,
        )  # fmt: skip
    elif started:
        try:
            ray.init(where, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as err:
            raise MissingDependencyError(
                f"no Ray cluster answers at {where}: {err}",
                fix="start one with `ray start --head --ray-client-server-port=10001`, with the "
                "same Python, Ray and cswap-deploy on all machines; if it wants a token, set "
                "RAY_AUTH_MODE=token here too",
            ) from err
    try:
        found = count if count is not None else max(1, int(ray.cluster_resources().get("CPU", 1)))
        share = Budget.of().total // (found if count is not None else 1)
        pool = Pool(
            recipe=recipe,
            count=found,
            threads=max(1, usable_cores() // found) if count is not None else 1,
            budget=memory_budget if memory_budget is not None else share,
            ray=ray,
        )
        pool.workers = [pool.start_worker() for _ in range(found)]
        yield pool
    finally:
        if started:
            ray.shutdown()


def _shares(
    asked: list[tuple[Group, list[int]]], most: int
) -> Iterator[list[tuple[Group, list[int]]]]:
    """Neighbouring groups, in about equal shares by units; a group is never split."""
    total = sum(len(units) for _, units in asked)
    share: list[tuple[Group, list[int]]] = []
    count = 0
    for group, units in asked:
        share.append((group, units))
        count += len(units)
        if count * most >= total:
            yield share
            share, count = [], 0
    if share:
        yield share
