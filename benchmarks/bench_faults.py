"""Builds that are killed, and builds that race: nothing lost, nothing wrong.

    python benchmarks/bench_faults.py                # 70 kill points x 3 seeds, 4 builds racing
    python benchmarks/bench_faults.py --seeds 1 --points 14 --scenarios validate replacement
    python benchmarks/bench_faults.py --quick        # two points each, one race

A build of a tiny network gets SIGKILL, half of the times before its n-th operation on files (every
one is counted through Python's audit hook; the points are spread over all of them), half of the
times after a part of its seconds, which strikes inside native code too. Then what lies there is
judged, the same build is run again to its end, and judged again:

- a folder that is there is whole: every file has its digest, and a manifest only stands on a
  finished bundle; a bundle that was being replaced is the old one or the new one;
- every entry of the store is sound, and none that was finished is lost or made again;
- plan, weights and graph equal those of a build that nothing disturbed, byte for byte (the plan
  without its seconds), and no half-made folder is left.

Races: four processes build the same into one store at once, as usual and with ``--fresh``;
``--race-until prune`` makes them short.

The last line is one JSON object; the exit code is 1 where anything was wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import nn

from cswap_deploy.config import Config, load_config
from cswap_deploy.errors import CswapError
from cswap_deploy.pipeline import Stage, build
from cswap_deploy.records.bundle import (
    BUILD,
    MANIFEST,
    MODEL,
    PLAN,
    WEIGHTS,
    read_build,
    verify_bundle,
)
from cswap_deploy.records.files import check_output, require_files
from cswap_deploy.records.store import Store

CLASSES, SIZE = 4, 8
QUICK_SETTINGS = {
    "input_size": (3, SIZE, SIZE), "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25),
    "calibration_samples": 40, "validation_samples": 40, "scoring_samples": 10, "rounds": 2,
    "latency_runs": 10, "round_to": 1, "allow_chance": True, "threads": 1, "allow_overlap": True,
}  # fmt: skip
RATIO, OTHER_RATIO = 0.4, 0.2
TRANSIENT = ("round", "recovering")
"""Entries of the store that go when their stage is finished."""
CHANGES = {
    "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.link", "os.symlink", "os.truncate",
    "os.chmod", "os.utime",
}  # fmt: skip
"""Audit events that change files, besides ``open`` for writing."""


@dataclass(frozen=True)
class Scenario:
    """What is killed, on top of the stages that were finished before."""

    name: str
    before: Stage | None
    """The last stage of the folder that it goes on from."""
    until: Stage


SCENARIOS = (
    Scenario("prune", None, "prune"),
    Scenario("export", "prune", "export"),
    Scenario("engine", "export", "engine"),
    Scenario("validate", "engine", "validate"),
    Scenario("replacement", "validate", "validate"),
)


@dataclass(frozen=True)
class Settings:
    """What is run."""

    points: int = 70
    """Kill points for each seed, over all scenarios."""
    seeds: int = 3
    builders: int = 4
    race_until: Stage = "validate"
    scenarios: tuple[str, ...] = tuple(s.name for s in SCENARIOS)


@dataclass(frozen=True)
class Result:
    """One scenario with one seed."""

    scenario: str
    seed: int
    points: int
    killed: int
    """How many of them struck before the build was over."""
    file_operations: int
    """Of an undisturbed run."""
    build_seconds: float
    total_seconds: float
    states: dict[str, int] = field(default_factory=dict)
    """What the output was after the kill: ``absent``, ``before``, ``after``, ``broken``."""
    faults: tuple[str, ...] = ()


class Network(nn.Module):
    """Two convolutions behind a stem, about 1,500 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.first = nn.Conv2d(8, 12, 3, 1, 1)
        self.second = nn.Conv2d(12, 8, 3, 1, 1)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, 8, 8) -> (N, 4)."""
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.second(torch.relu(self.first(x))))
        logits: torch.Tensor = self.head(x.mean((2, 3)))
        return logits


def network(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Network().eval()


# --- one build in a process of its own ------------------------------------------------------------


def in_a_fork(work: Callable[[], Any], folder: Path) -> tuple[int, Callable[[], Any]]:
    """Start work in a copy of this process, whose imports are done; its id, and what awaits it.

    The second gives the work's result, or the exception that ended it; ``None`` when it was killed.
    """
    answer = folder / "answer.pickle"
    answer.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            answer.write_bytes(pickle.dumps(work()))
            code = 0
        except BaseException as err:  # noqa: BLE001 - told to the parent
            answer.write_bytes(pickle.dumps(f"{type(err).__name__}: {err}"))
        finally:
            os._exit(code)

    def result() -> Any:
        status = os.waitpid(child, 0)[1]
        return None if os.WIFSIGNALED(status) else pickle.loads(answer.read_bytes())

    return child, result


def config_of(place: Path, seed: int, **changes: Any) -> Config:
    settings = {
        **QUICK_SETTINGS, "model": "tiny", "seed": seed, "ratio": RATIO,
        "data": str(place.parent / "data.npz"), "output": place / "out", "store": place / "store",
    }  # fmt: skip
    return load_config(**(settings | changes))


def run(config: Config, until: Stage, *, goes_on: bool) -> dict[str, str]:
    """The build; stage -> ``run`` or ``reused``."""
    source = config.bundle_path() if goes_on else None
    made = build(config, module=network(config.run.seed), until=until, source=source)
    return dict(made.stages)


def action(scenario: Scenario, place: Path, seed: int) -> Callable[[], dict[str, str]]:
    if scenario.name == "replacement":
        config = config_of(place, seed, ratio=OTHER_RATIO)
        return lambda: run(config, "validate", goes_on=False)
    goes_on = scenario.before is not None
    return lambda: run(config_of(place, seed), scenario.until, goes_on=goes_on)


def counting(place: Path, fatal: int, work: Callable[[], Any]) -> Callable[[], tuple[Any, int]]:
    """Count the operations on files below a place; SIGKILL before the ``fatal``-th one."""
    root, count = str(place), 0

    def hook(event: str, given: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open":
            path, _, flags = given
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            counts = writes and str(path).startswith(root)
        else:  # below a folder that is open, names alone are told
            counts = event in CHANGES and (str(given[0]).startswith(root) or given[-1] != -1)
        if counts:
            count += 1
            if count == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    def counted() -> tuple[Any, int]:
        sys.addaudithook(hook)
        return work(), count

    return counted


# --- what lies there ------------------------------------------------------------------------------


def content(folder: Path) -> dict[str, Any]:
    """What must be equal: the plan without its seconds, weights, graph."""
    found: dict[str, Any] = {}
    plan = json.loads((folder / PLAN).read_bytes())
    for each in plan["rounds"]:
        each.pop("seconds")
    found[PLAN] = plan
    for name in (WEIGHTS, MODEL):
        if (folder / name).is_file():
            found[name] = (folder / name).read_bytes()
    return found


def faults_of_output(folder: Path) -> list[str]:
    """Why a reader would refuse a folder."""
    try:
        if (folder / MANIFEST).is_file():
            verify_bundle(folder)
        require_files(folder, read_build(folder).files, fix="")
    except CswapError as err:
        return [f"half-written output: {err}"]
    return []


def left_over(place: Path) -> list[str]:
    return [f"left over: {p}" for p in place.rglob("*") if ".partial-" in p.name]


def stages_in(store: Store) -> Counter[str]:
    return Counter(e.stage for e in store.entries() if e.stage not in TRANSIENT)


# --- kills ----------------------------------------------------------------------------------------


@dataclass
class Cycle:
    """One scenario with one seed: the state before, and what an undisturbed run makes of it."""

    scenario: Scenario
    seed: int
    folder: Path
    before: Path
    expected: dict[str, Any]
    old: dict[str, Any] | None
    operations: int
    seconds: float

    @classmethod
    def of(cls, scenario: Scenario, seed: int, folder: Path) -> Cycle:
        before, place = folder / "before", folder / "place"
        shutil.rmtree(before, ignore_errors=True)
        before.mkdir()
        for state in steps_to(scenario, before, seed):
            _, result = in_a_fork(state, folder)
            if not isinstance(told := result(), dict):
                raise SystemExit(f"cannot prepare {scenario.name}: {told}")
        out = before / "out"
        old = content(out) if out.is_dir() else None
        copy(before, place)
        start = time.perf_counter()
        work = action(scenario, place, seed)
        _, result = in_a_fork(counting(place, -1, work), folder)
        told = result()
        if not isinstance(told, tuple):
            raise SystemExit(f"{scenario.name} fails undisturbed: {told}")
        seconds = time.perf_counter() - start
        return cls(
            scenario, seed, folder, before, content(place / "out"), old, told[1], seconds
        )  # fmt: skip

    def kill(self, at: float, *, by_time: bool) -> tuple[bool, str, list[str]]:
        """Strike at a part of the run; whether it struck in time, the output then, the faults."""
        place = self.folder / "place"
        copy(self.before, place)
        store = Store(place / "store")
        before = stages_in(store)
        fatal = -1 if by_time else 1 + int(at * self.operations)
        work = counting(place, fatal, action(self.scenario, place, self.seed))
        child, result = in_a_fork(work, self.folder)
        if by_time:
            time.sleep(at * self.seconds)
            os.kill(child, signal.SIGKILL)
        killed = result() is None
        faults = [f"damaged entry: {words}" for words in store.verify().values()]
        there = stages_in(store)
        faults += [f"lost from the store: {name}" for name in before - there]
        state = self.state(faults)
        _, result = in_a_fork(action(self.scenario, place, self.seed), self.folder)
        faults += self.judge_second(result(), there)
        return killed, state, faults

    def state(self, faults: list[str]) -> str:
        """What the output is after the kill, as the next command finds it."""
        out = self.folder / "place" / "out"
        if (out / MANIFEST).is_file() or (out / BUILD).is_file():  # what a reader would take
            faults += faults_of_output(out)
        try:
            check_output(out)  # every build begins so: it puts back what was being replaced
        except CswapError as err:
            faults.append(f"the output is not taken again: {err}")
            return "broken"
        if not out.is_dir():
            if self.old is not None:
                faults.append("the folder that was there is lost")
            return "absent"
        if wrong := faults_of_output(out):
            faults += wrong
            return "broken"
        found = content(out)
        if found == self.expected and (self.old != self.expected or self.finished(out)):
            return "after"
        if found != self.old:
            faults.append("the output is neither the old one nor the new one")
        return "before"

    def finished(self, out: Path) -> bool:
        before = self.before / "out"
        return sorted(p.name for p in out.iterdir()) != sorted(p.name for p in before.iterdir())

    def judge_second(self, told: Any, there: Counter[str]) -> list[str]:
        """The same build again, after the kill."""
        place = self.folder / "place"
        if not isinstance(told, dict):
            return [f"the second run fails: {told}"]
        faults = faults_of_output(place / "out")
        now = content(place / "out")
        faults += [f"{name} differs" for name, was in self.expected.items() if now[name] != was]
        goes_on = self.scenario.name != "replacement"
        faults += [
            f"{name} was finished and is made again"
            for name, state in told.items()
            if state == "run" and there[name] > (0 if goes_on else 1)
        ]
        Store(place / "store").clean()
        return faults + left_over(place)


def steps_to(scenario: Scenario, place: Path, seed: int) -> Iterator[Callable[[], dict[str, str]]]:
    """The builds that make the state before the one that is killed."""
    if scenario.name == "replacement":
        other = config_of(place, seed, ratio=OTHER_RATIO, output=place / "unused")
        yield lambda: run(other, "engine", goes_on=False)
        yield lambda: run(config_of(place, seed), "validate", goes_on=False)
    elif scenario.before is not None:
        yield lambda: run(config_of(place, seed), scenario.before or "prune", goes_on=False)


def copy(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    shutil.rmtree(target / "unused", ignore_errors=True)


def kills(scenario: Scenario, seed: int, points: int, folder: Path) -> Result:
    """Kill a scenario at points that are spread over it."""
    start = time.perf_counter()
    cycle = Cycle.of(scenario, seed, folder)
    jitter = np.random.default_rng(seed).random(points)
    killed, states, faults = 0, Counter[str](), []
    for number in range(points):
        by_time, at = number % 2 == 1, (number + float(jitter[number])) / points
        struck, state, wrong = cycle.kill(at, by_time=by_time)
        killed += struck
        states[state] += 1
        where = f"{'seconds' if by_time else 'operations'} {at:.0%}"
        faults += [f"{scenario.name}, seed {seed}, {where}: {each}" for each in wrong]
    return Result(
        scenario.name, seed, points, killed, cycle.operations, round(cycle.seconds, 2),
        round(time.perf_counter() - start, 1), dict(states), tuple(faults),
    )  # fmt: skip


# --- races ----------------------------------------------------------------------------------------


def race(settings: Settings, seed: int, folder: Path, *, fresh: bool) -> Result:
    """Several processes build the same at once, into one store."""
    start = time.perf_counter()
    place = folder / "place"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    waiting = []
    for number in range(settings.builders):
        answers = folder / f"builder-{number}"
        answers.mkdir(exist_ok=True)
        config = config_of(place, seed, output=place / f"out-{number}", resume=not fresh)
        work = partial(run, config, settings.race_until, goes_on=False)
        waiting.append(in_a_fork(work, answers)[1])
    faults = [f"a builder fails: {t}" for result in waiting if not isinstance(t := result(), dict)]
    outputs = sorted(place.glob("out-*"))
    if not faults:
        faults += [f"{p.name}: {words}" for p in outputs for words in faults_of_output(p)]
        contents = [content(path) for path in outputs]
        faults += [f"{outputs[i].name} differs" for i, c in enumerate(contents) if c != contents[0]]
    store = Store(place / "store")
    faults += [f"damaged entry: {words}" for words in store.verify().values()]
    store.clean()
    faults += left_over(place)
    name = "race, --fresh" if fresh else "race"
    return Result(
        name, seed, settings.builders, 0, 0, 0.0, round(time.perf_counter() - start, 1), {},
        tuple(faults),
    )  # fmt: skip


# --- the run --------------------------------------------------------------------------------------


def measure(settings: Settings) -> Iterator[Result]:
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (100, SIZE, SIZE, 3)).astype(np.uint8)
        np.savez(folder / "data.npz", images=images, labels=np.arange(100) % CLASSES)
        # Warm up here, so that no fork spends seconds on what is done once in a process.
        chosen = [s for s in SCENARIOS if s.name in settings.scenarios]
        (folder / "warm").mkdir()
        stages = {s.until for s in chosen} | ({settings.race_until} if settings.builders else set())
        furthest = max(stages, key=get_args(Stage).index)
        run(config_of(folder / "warm", 0), furthest, goes_on=False)
        each = -(-settings.points // len(chosen)) if chosen else 0
        for seed in range(settings.seeds):
            for scenario in chosen:
                yield kills(scenario, seed, each, folder)
            for fresh in (False, True) if settings.builders else ():
                yield race(settings, seed, folder, fresh=fresh)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, usual = parser.add_argument, Settings()
    add("--points", type=int, default=usual.points, help="kill points for each seed")
    add("--seeds", type=int, default=usual.seeds)
    add("--builders", type=int, default=usual.builders, help="that race; 0: no race")
    add("--race-until", choices=get_args(Stage), default=usual.race_until, help="the last stage")
    add("--scenarios", nargs="*", default=usual.scenarios, choices=[s.name for s in SCENARIOS])
    add("--quick", action="store_true")
    args = parser.parse_args()
    settings = Settings(
        args.points, args.seeds, args.builders, args.race_until, tuple(args.scenarios)
    )
    if args.quick:
        settings = Settings(points=2 * len(SCENARIOS), seeds=1)
    torch.set_num_threads(1)
    found = []
    for result in measure(settings):
        found.append(result)
        states = ", ".join(f"{count} {state}" for state, count in sorted(result.states.items()))
        print(
            f"{result.scenario:14} seed {result.seed}: {result.points} points, {result.killed} "
            f"killed in time, {len(result.faults)} faults; output then: {states or '-'}; "
            f"{result.file_operations} operations, {result.total_seconds:.0f} s",
            flush=True,
        )
        for fault in result.faults:
            print(f"  {fault}", flush=True)
    faults = sum(len(result.faults) for result in found)
    kill_points = sum(r.points for r in found if not r.scenario.startswith("race"))
    print(
        json.dumps(
            {
                "settings": asdict(settings), "kill_points": kill_points, "faults": faults,
                "results": [asdict(result) for result in found],
            }
        )
    )  # fmt: skip
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
