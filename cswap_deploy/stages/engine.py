"""One target's engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cswap_deploy.artifacts import (
    BatchRange,
    TargetResult,
    read_value,
)
from cswap_deploy.stages.run import (
    MODEL,
    ExportRecord,
    Run,
    once,
)
from cswap_deploy.store import stage_key

if TYPE_CHECKING:
    pass


_VERSION = 1
"""Raised when this stage's code changes what it writes."""


def engine_stage(run: Run, target: str, exported: Path) -> Path:
    """One target's engine; a folder with ``result.json`` and, where it has one, its file."""
    from cswap_deploy.targets import get_target

    config = run.config
    run.progress.stage("engine", target)
    adapter = get_target(target)
    record = read_value(exported / "export.json", ExportRecord)
    key = run.keys[f"engine/{target}"] = stage_key(
        "engine",
        version=_VERSION,
        inputs={"onnx": record.model.sha256},
        settings={"target": target, "max_batch": config.max_batch, "opt": config.latency_batch},
        tools=adapter.versions(),
    )

    def make(out: Path) -> None:
        graph = record.model.model_copy(update={"path": exported / MODEL})
        batch = BatchRange(min=1, opt=config.latency_batch, max=config.max_batch)
        engine = adapter.build(graph, batch=batch, out_dir=out)
        inside = engine.path.is_relative_to(out)
        relative = engine.path.relative_to(out) if inside else Path("..") / MODEL
        result = TargetResult(engine=engine.model_copy(update={"path": relative}))
        (out / "result.json").write_text(result.canonical_json())

    folder = once(run, f"engine/{target}", key, make)
    engine = read_value(folder / "result.json", TargetResult).engine
    run.fallbacks += engine.notes
    state = "" if engine.runnable else f"; not run here: {engine.reason}"
    run.progress.done(
        f"{engine.size_bytes / 2**20:.2f} MiB in {engine.build_seconds:.1f} s{state}",
        reused=run.stages[f"engine/{target}"] == "reused",
    )
    return folder
