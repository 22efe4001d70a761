"""Peak memory of a process that loads an engine and runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from cswap_deploy.errors import StageError
from cswap_deploy.records.engine import EngineArtifact

_CHILD = """
import json, resource, sys
from pathlib import Path
import numpy as np
from cswap_deploy.records.engine import EngineArtifact
from cswap_deploy.targets import get_target
given = json.loads(sys.stdin.read())
engine = EngineArtifact.model_validate(given["engine"])
session = get_target(engine.target).load(
    engine, threads=given["threads"], onnx=Path(given["onnx"])
)
images = np.zeros(given["shape"], dtype=np.float32)
for _ in range(10):
    session.run(images)
print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, flush=True)
session.close()
"""


def peak_memory(engine: EngineArtifact, onnx: Path, *, batch: int, threads: int | None) -> int:
    """Bytes that a fresh process holds at its peak: interpreter, runtime, weights, activations.

    Raises:
        StageError: The process fails.
    """
    from cswap_deploy.export.onnx import describe_onnx

    shape = [batch, *describe_onnx(onnx).inputs[0].shape[1:]]
    given = {
        "engine": engine.model_dump(mode="json"), "onnx": str(onnx), "threads": threads,
        "shape": shape,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-P", "-c", _CHILD], input=json.dumps(given), capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    for line in done.stdout.splitlines():
        if line.startswith("PEAK "):
            return int(line.split()[1])
    words = done.stderr.strip().splitlines()
    raise StageError(
        f"a process that runs {engine.path} ended with {done.returncode}: "
        f"{words[-1] if words else 'no reason given'}"
    )
