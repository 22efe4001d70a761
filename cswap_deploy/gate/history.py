"""Measurements over time, in one SQLite file: trends, change points, and a runner's own noise.

Many processes may add at once (write-ahead log, a writer waits for its turn), and a killed one
leaves the file as it was before.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sqlite3
import statistics
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cswap_deploy.errors import ArtifactError, UsageError
from cswap_deploy.measure.statistics import percentile_interval
from cswap_deploy.records.comparison import Bench, Comparison, SelfTest
from cswap_deploy.records.manifest import Manifest

SCHEMA = 1
_WAIT_SECONDS = 60.0
_TABLES = """
CREATE TABLE measurements (
    id INTEGER PRIMARY KEY,
    at TEXT NOT NULL,
    runner TEXT NOT NULL,
    revision TEXT NOT NULL,
    series TEXT NOT NULL,
    value REAL NOT NULL,
    low REAL,
    high REAL,
    unit TEXT NOT NULL
);
CREATE UNIQUE INDEX by_series ON measurements (series, runner, at, value);
"""
_FEWEST = 8
"""Measurements in a series before change points are looked for."""
_STRICT = 3.0
"""Penalty of a change point, in variances times the logarithm of the length: about one false one
in a hundred series without any."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One figure of one day."""

    at: str
    """ISO 8601, UTC."""
    series: str
    """What it is of: ``resnet18-1.5x/onnxruntime/b1/p50``."""
    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    runner: str = ""
    revision: str = ""


@dataclass(frozen=True, slots=True)
class Trend:
    """One series on one runner."""

    series: str
    runner: str
    unit: str
    measurements: tuple[Measurement, ...]
    changes: tuple[int, ...]
    """Places in ``measurements`` where another level begins."""

    @property
    def last_change(self) -> float | None:
        """From the level before the last change point to the last level, as a fraction."""
        if not self.changes:
            return None
        ends = [0, *self.changes, len(self.measurements)]
        levels = [
            statistics.median(m.value for m in self.measurements[a:b])
            for a, b in zip(ends[-3:], ends[-2:], strict=False)
        ]
        return levels[1] / levels[0] - 1


def runner_name() -> str:
    """This machine's name for histories: ``CSWAP_RUNNER``, the CI service's, or the host's."""
    for variable in ("CSWAP_RUNNER", "RUNNER_NAME", "CI_RUNNER_DESCRIPTION"):
        if name := os.environ.get(variable):
            return name
    return platform.node() or "unknown"


class History:
    """A file of measurements; made where it is not there.

    Raises:
        UsageError: It cannot be opened or written.
        ArtifactError: It is no history, damaged, or of a later version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._open() as connection:
            connection.execute("BEGIN IMMEDIATE")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if version == 0 and tables == 0:
                for statement in _TABLES.split(";"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {SCHEMA}")
            elif version != SCHEMA or not _is_ours(connection):
                raise ArtifactError(
                    f"{path} is no history of version {SCHEMA} (it says {version})",
                    fix="name another file; a history is what `cswap-deploy history add` made",
                )

    def add(self, measurements: Sequence[Measurement]) -> int:
        """Add all, or none; what is there already is not added again.

        Returns:
            How many were new.
        """
        rows = [
            (m.at, m.runner or runner_name(), m.revision, m.series, m.value, m.low, m.high, m.unit)
            for m in measurements
        ]
        with self._open() as connection:
            connection.execute("BEGIN IMMEDIATE")
            before = connection.total_changes
            connection.executemany(
                "INSERT OR IGNORE INTO measurements "
                "(at, runner, revision, series, value, low, high, unit) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                rows,
            )
            return connection.total_changes - before

    def trends(self, pattern: str = "*") -> list[Trend]:
        """Every series whose name matches, oldest measurement first, runner by runner."""
        with self._open() as connection:
            rows = connection.execute(
                "SELECT at, series, value, unit, low, high, runner, revision FROM measurements "
                "WHERE series GLOB ? ORDER BY series, runner, at, id",
                (pattern,),
            ).fetchall()
        self._check(row[2] for row in rows)
        kept: dict[tuple[str, str], list[Measurement]] = {}
        for row in rows:
            one = Measurement(*row)
            kept.setdefault((one.series, one.runner), []).append(one)
        return [
            Trend(series, runner, found[0].unit, tuple(found), change_points(found))
            for (series, runner), found in kept.items()
        ]

    def smallest_effect(self, runner: str | None = None) -> float | None:
        """What comparisons on a runner tell from none, by its self-tests; ``None`` without any.

        The upper quartile of all: a runner has good days and bad ones.
        """
        with self._open() as connection:
            rows = connection.execute(
                "SELECT value FROM measurements WHERE series = ? AND runner = ?",
                (_SELF_TEST, runner or runner_name()),
            ).fetchall()
        self._check(value for (value,) in rows)
        values = sorted(value for (value,) in rows)
        return values[math.ceil(0.75 * len(values)) - 1] if values else None

    def _check(self, values: Iterable[Any]) -> None:
        """A column of SQLite holds anything, whatever its type."""
        for value in values:
            if not isinstance(value, float) or not math.isfinite(value):
                raise ArtifactError(
                    f"{self.path} is a damaged history: it holds the figure {value!r}",
                    fix="restore it, or name another file",
                )

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A transaction of its own: kept when all went well, else as if it had not been."""
        try:
            connection = sqlite3.connect(self.path, timeout=_WAIT_SECONDS, isolation_level=None)
        except sqlite3.Error as err:
            raise UsageError(f"cannot open the history {self.path}: {err}") from err
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            yield connection
            if connection.in_transaction:
                connection.execute("COMMIT")
        except UnicodeEncodeError as err:
            raise UsageError(f"the history {self.path} takes text, not {err.object!r}") from err
        except (UnicodeDecodeError, sqlite3.DatabaseError) as err:
            if isinstance(err, sqlite3.OperationalError):
                raise UsageError(f"cannot use the history {self.path}: {err}") from err
            raise ArtifactError(
                f"{self.path} is no history: {err}", fix="name another file, or restore it"
            ) from err
        finally:
            connection.close()


_SELF_TEST = "runner/self-test"


def _is_ours(connection: sqlite3.Connection) -> bool:
    names = {row[1] for row in connection.execute("PRAGMA table_info(measurements)")}
    return {"at", "runner", "revision", "series", "value", "low", "high", "unit"} <= names


def change_points(measurements: Sequence[Measurement]) -> tuple[int, ...]:
    """Where a series takes another level, by least squares on logarithms with a penalty.

    Noise is what neighbours differ by, so that a level that changes does not count as noise.

    Source:
        Killick, Fearnhead & Eckley 2012, "Optimal detection of changepoints with a linear
        computational cost", J. Am. Stat. Assoc. 107:1590 (PELT), in ``ruptures``.
    """
    values = [m.value for m in measurements]
    if len(values) < _FEWEST or min(values) <= 0:
        return ()
    import numpy as np
    import ruptures

    logs = np.log(np.asarray(values))
    # Median of absolute differences to a standard deviation, for normal noise.
    noise = float(np.median(np.abs(np.diff(logs)))) / 0.9539
    noise = max(noise, 1e-4)
    penalty = _STRICT * noise**2 * math.log(len(logs))
    ends = ruptures.Pelt(model="l2", min_size=3, jump=1).fit(logs[:, None]).predict(pen=penalty)
    return tuple(int(end) for end in ends[:-1])


def this_revision() -> str:
    """Of the code that is measured: the CI service's, else git's here; empty where none knows."""
    for variable in ("GITHUB_SHA", "CI_COMMIT_SHA"):
        if revision := os.environ.get(variable):
            return revision
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def measurements_of(path: Path, *, revision: str = "") -> list[Measurement]:
    """What a bundle, or the JSON of ``bench`` or ``compare``, has to keep.

    Raises:
        UsageError: It is something else.
        ArtifactError: A bundle is damaged.
    """
    if path.is_dir():
        from cswap_deploy.records.bundle import verify_bundle

        return _marked(_of_manifest(verify_bundle(path).manifest, path.resolve().name), revision)
    try:
        told: Any = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as err:
        raise UsageError(f"cannot read {path}: {err}") from err
    if isinstance(told, dict):
        told.pop("verdict", None)
        for kind in (Bench, Comparison, SelfTest):
            if set(told) <= set(kind.model_fields):
                try:
                    return measurements_from(kind.model_validate(told), revision)
                except ValueError as err:
                    raise UsageError(f"{path} is a damaged {kind.__name__}: {err}") from err
    raise UsageError(
        f"{path} is no bundle and no result of `cswap-deploy bench --json` or `compare --json`",
        fix="write one with `cswap-deploy bench BUNDLE --json > bench.json`",
    )


def measurements_from(
    result: Bench | Comparison | SelfTest, revision: str = ""
) -> list[Measurement]:
    """The same of a result that is at hand."""
    if isinstance(result, Bench):
        found = _of_bench(result)
    elif isinstance(result, Comparison):
        found = _of_comparison(result)
    else:
        found = [Measurement(result.created, _SELF_TEST, result.smallest, "fraction")]
    return _marked(found, revision)


def _marked(found: Sequence[Measurement], revision: str) -> list[Measurement]:
    if strange := [one.series for one in found if not math.isfinite(one.value)]:
        raise UsageError(f"the figure of {strange[0]} is not finite, so it is no measurement")
    return [replace(one, revision=revision) for one in found]


def _of_manifest(manifest: Manifest, name: str) -> list[Measurement]:
    found, at = [], manifest.created
    for result in manifest.targets:
        series = f"{name}/{result.engine.target}"
        if (x := result.latency) is not None:
            found += [
                Measurement(at, f"{series}/b{x.batch}/{p}", getattr(x, f"{p}_ms"), "ms")
                for p in ("p50", "p90", "p99")
            ]
        if (a := result.accuracy) is not None:
            top1 = a.pruned
            found.append(
                Measurement(at, f"{series}/top1", top1.top1, "fraction", top1.low, top1.high)
            )
        found.append(Measurement(at, f"{series}/size", result.engine.size_bytes, "bytes"))
    return found


def _of_bench(bench: Bench) -> list[Measurement]:
    found, at = [], bench.created
    for row in bench.rows:
        series = f"{Path(row.label).name}/{row.target}/b{row.latency.batch}"
        ends = percentile_interval(row.latency.samples_ms, 50) or (None, None)
        rate = row.throughput
        found += [
            Measurement(at, f"{series}/p50", row.latency.p50_ms, "ms", *ends),
            Measurement(
                at, f"{series}/throughput", rate.value, "images/s", rate.low, rate.high
            ),
        ]  # fmt: skip
    return found


def _of_comparison(compared: Comparison) -> list[Measurement]:
    series = f"{Path(compared.head).name}/{compared.target}/b{compared.batch}"
    return [
        Measurement(
            compared.created, f"{series}/{part.what}-ratio", part.ratio.value, "ratio",
            part.ratio.low, part.ratio.high,
        )
        for part in compared.parts
        if part.ratio is not None
    ]  # fmt: skip
