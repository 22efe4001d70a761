"""Measuring on several processes or machines, over Ray.

The work is cut by groups and by parts of the images. A piece is computed in the same batches
wherever it runs, so with the same number of threads a worker's effects are those of one process to
the last bit. A worker that dies loses only its piece, which another one does again.

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
from cswap_deploy.causal.experiment import Experiment
from cswap_deploy.causal.interventions import Moments
from cswap_deploy.causal.measurement import MOST_IMAGES, LocalMeasurement, Tick
from cswap_deploy.causal.memory import Budget, keep_freed_memory
from cswap_deploy.config import Task as TaskName
from cswap_deploy.errors import MissingDependencyError, StageError, UsageError, missing
from cswap_deploy.models.load import fresh_module, weights_digest
from cswap_deploy.network.deletion import contiguous_state
from cswap_deploy.network.graph import trace
from cswap_deploy.network.probabilities import give_logits
from cswap_deploy.network.units import Group, give_bias
from cswap_deploy.records.model import ModelSpec
from cswap_deploy.runtime.host import usable_cores

_log = logging.getLogger(__name__)
_PIECES_A_WORKER = 3
"""Pieces of a part's groups for each worker: small enough that none waits long for the last."""
_LIVES = 3
"""Times that a piece is given out before it is given up."""
Units = list[tuple[Group, list[int]]]
"""Some groups, and which of their units."""
Piece = tuple[int, Units, np.ndarray]
"""A part of the images by number, groups to measure on it, and its rows."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a worker needs to build the network, apart from its weights."""

    spec: ModelSpec | None
    """``None``: of a module that has no name to be built from."""
    biased: tuple[str, ...]
    """Layers that were given a bias."""
    example: np.ndarray
    """(2, C, H, W) float32, to trace with."""


@dataclass(frozen=True, slots=True)
class Task:
    """What a network is measured on; fetched once by each worker."""

    digest: str
    """sha256 of the weights."""
    weights: bytes
    """A safetensors file."""
    images: np.ndarray
    labels: np.ndarray
    moments: Mapping[str, Moments]
    variant_bytes: int
    task: TaskName = "classify"
    """What the network's outputs are."""


class Worker:
    """Lives in a process of its own."""

    def __init__(self, recipe: Recipe, threads: int, budget: int) -> None:
        keep_freed_memory()
        torch.set_num_threads(threads)
        assert recipe.spec is not None, "pool_of refuses it"
        module = give_logits(fresh_module(recipe.spec), recipe.spec.output_kind)
        for layer in recipe.biased:
            give_bias(module.get_submodule(layer))  # type: ignore[arg-type]
        self._graph = trace(module, torch.from_numpy(recipe.example.copy()))
        self._budget = budget
        self._measurement: LocalMeasurement | None = None
        self._task: Any = None

    def measure(
        self, name: int, task: list[Any], groups: Units, rows: np.ndarray, bfloat16: bool
    ) -> list[Effects]:
        """Measure one piece.

        Args:
            name: Of the task; one that is known is not fetched again.
            task: A reference to it, in a list, so that Ray does not fetch it for every call.
            groups: Which units.
            rows: Which images.
            bfloat16: As :class:`EffectMeasurement` says.
        """
        if self._task != name:
            import ray

            self._measurement, self._task = self._load(ray.get(task[0])), name
        assert self._measurement is not None
        part = torch.from_numpy(rows.copy())
        return self._measurement.effects(dict(groups), part, bfloat16=bfloat16)

    def _load(self, task: Task) -> LocalMeasurement:
        from safetensors.torch import load

        self._graph.module.load_state_dict(load(task.weights), strict=True)
        found = weights_digest(self._graph.module)
        if found != task.digest:
            sha256 = f"sha256 {found[:12]}…, not {task.digest[:12]}…"
            raise StageError(f"a worker got other weights than were sent: {sha256}")
        images = torch.from_numpy(task.images.copy()).contiguous(memory_format=torch.channels_last)
        labels = torch.from_numpy(task.labels.copy())
        budget = Budget(self._budget, task.variant_bytes)
        return LocalMeasurement(
            Experiment(self._graph, images, labels, task.moments, budget, task.task)
        )


@dataclass(slots=True)
class WorkerPool:
    """Workers that measure for one network, in all of its rounds."""

    recipe: Recipe
    count: int
    threads: int
    """Threads of each worker."""
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

    def measurement(self, experiment: Experiment) -> RayMeasurement:
        """Send the network as it is now, and the images, to whichever workers will need them."""
        from safetensors.torch import save

        self._tasks += 1
        module, images = experiment.graph.module, experiment.images
        task = Task(
            weights_digest(module), save(contiguous_state(module)), images.contiguous().numpy(),
            experiment.labels.numpy(), experiment.moments, experiment.budget.variant_bytes,
            experiment.task,
        )  # fmt: skip
        return RayMeasurement(self, self._tasks, self.ray.put(task), len(images))


@dataclass(slots=True)
class RayMeasurement:
    """Measures one network on one set of images, by a pool's workers."""

    pool: WorkerPool
    name: int
    task: Any
    images: int

    def effects(
        self,
        wanted: Mapping[Group, Sequence[int]],
        rows: Tensor | None = None,
        *,
        bfloat16: bool = False,
        tick: Tick | None = None,
    ) -> list[Effects]:
        """See :class:`EffectMeasurement`."""
        asked = [(g, list(units)) for g, units in wanted.items() if len(units)]
        chosen = torch.arange(self.images) if rows is None else rows
        parts = list(torch.split(chosen, MOST_IMAGES))
        pieces: list[Piece] = [
            (at, groups, part.numpy())
            for at, part in enumerate(parts)
            for groups in shares(asked, self.pool.count * _PIECES_A_WORKER)
        ]
        done: dict[tuple[str, int], Effects] = {}
        for at, found in self._run(pieces, bfloat16):
            for effects in found:
                done[effects.group, at] = effects
                if tick is not None:
                    tick(effects.kl.size)
        return [join([done[g.name, at] for at in range(len(parts))]) for g, _ in asked]

    def _run(self, pieces: list[Piece], bfloat16: bool) -> Iterator[tuple[int, list[Effects]]]:
        """Give the pieces out, one to each worker at a time; those of the dead again."""
        ray, pool = self.pool.ray, self.pool
        waiting = deque((piece, _LIVES) for piece in pieces)
        idle = list(pool.workers)
        busy: dict[Any, tuple[Any, Piece, int]] = {}
        while waiting or busy:
            while waiting and idle:
                piece, lives = waiting.popleft()
                worker = idle.pop()
                answer = worker.measure.remote(self.name, [self.task], *piece[1:], bfloat16)
                busy[answer] = worker, piece, lives
            (answer, *_), _ = ray.wait(list(busy), num_returns=1)
            worker, piece, lives = busy.pop(answer)
            try:
                yield piece[0], ray.get(answer)
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
def pool_of(where: str, recipe: Recipe, *, memory_budget: int | None) -> Iterator[WorkerPool]:
    """Workers on this machine (``4``) or on a cluster (``ray://HOST:PORT``).

    Args:
        where: How many, or where; on a cluster as many as it has CPUs.
        recipe: Of the network.
        memory_budget: Bytes of each worker; of a third of what is free an equal share unless said.

    Raises:
        UsageError: The network cannot be built again from its name.
        MissingDependencyError: Ray is not installed, or no cluster answers.
    """
    count = int(where) if where.isdigit() else None
    spec = recipe.spec
    if spec is None or (spec.source == "factory" and ":" not in spec.name):
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
    # At Ray's niceness of 15 a worker gets a thirtieth of a core beside any other process.
    os.environ.setdefault("RAY_worker_niceness", "0")
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
        threads = max(1, usable_cores() // found) if count is not None else 1
        budget = memory_budget if memory_budget is not None else share
        pool = WorkerPool(recipe, found, threads, budget, ray)
        pool.workers = [pool.start_worker() for _ in range(found)]
        yield pool
    finally:
        if started:
            ray.shutdown()


def shares(asked: Units, most: int) -> Iterator[Units]:
    """Neighbouring groups, in about equal shares by units; a group is never split."""
    total = sum(len(units) for _, units in asked)
    share: Units = []
    for entry in asked:
        share.append(entry)
        if sum(len(units) for _, units in share) * most >= total:
            yield share
            share = []
    if share:
        yield share
