"""One target's engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cswap_deploy.records.manifest import TargetResult
from cswap_deploy.records.store import stage_key
from cswap_deploy.records.value import read_value
from cswap_deploy.stages.precision import Graphs
from cswap_deploy.stages.run import MODEL, Run, calibration_inputs, few_images, once

_VERSION = 4
"""Raised when this stage's code changes what it writes."""


def engine_stage(run: Run, target: str, graphs: Graphs) -> Path:
    """One target's engine; a folder with ``result.json`` and, where it has one, its file."""
    from cswap_deploy.targets import MOST_INT8_IMAGES, Int8, get_target

    config = run.config
    run.progress.stage("engine", target)
    adapter = get_target(target)
    # Such a runtime quantises by itself: the layers it fuses are not those of TensorRT.
    itself = adapter.own_int8 and config.int8
    graph = graphs.float32 if itself else graphs.model
    settings: dict[str, Any] = {
        "target": target,
        "batch": str(config.batch),
        "options": config.engine_options.model_dump(mode="json"),
    }
    inputs: dict[str, Any] = {"onnx": graph.sha256, "machine": adapter.here()}
    if itself:
        settings |= {"precision": config.precision, "keep_fp32": config.keep_fp32}
        inputs |= calibration_inputs(run)
    key = run.keys[f"engine/{target}"] = stage_key(
        "engine", version=_VERSION, inputs=inputs, settings=settings, tools=adapter.versions()
    )

    def make(out: Path) -> None:
        run.progress.begin(f"building the {target} engine", 0)
        engine = adapter.build(
            graph, batch=config.batch, out_dir=out, options=config.engine_options,
            int8=Int8(few_images(run, MOST_INT8_IMAGES), config.keep_fp32) if itself else None,
            progress=run.progress, store=run.store.root,
        )  # fmt: skip
        run.progress.end()
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
