"""A process of its own beside the stand-in of the hub: a job a line in, an answer a line out."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from typing import Any

from cswap_deploy.cli.main import main
from cswap_deploy.config import DataConfig, ModelConfig
from cswap_deploy.data import load_samples
from cswap_deploy.errors import CswapError
from cswap_deploy.models.load import load_model
from cswap_deploy.progress import Silent


class Told(Silent):
    """Remembers every phase: what, total, steps done, whether it ended."""

    def __init__(self) -> None:
        self.phases: list[list[Any]] = []

    def begin(self, what: str, total: int) -> None:
        self.phases.append([what, total, 0, "open"])

    def advance(self, steps: int) -> None:
        self.phases[-1][2] += steps

    def end(self) -> None:
        self.phases[-1][3] = "ended"


def load(model: str, data: str | None, wanted: int) -> dict[str, Any]:
    """A model and as many images for each set."""
    told = Told()
    config = DataConfig(data=data, calibration_samples=wanted, validation_samples=wanted)
    try:
        spec = load_model(ModelConfig(model=model)).spec
        drawn = load_samples(config, model=spec, seed=0, progress=told)
    except CswapError as err:
        return {"code": err.exit_code, "error": str(err), "phases": told.phases}
    return {
        "code": 0,
        "phases": told.phases,
        "model": spec.model_dump(mode="json"),
        "calibration": drawn.calibration.spec.model_dump(mode="json"),
        "validation": drawn.validation.spec.model_dump(mode="json"),
        "shape": drawn.calibration.images.shape,
        "labels": [drawn.calibration.labels.tolist(), drawn.validation.labels.tolist()],
    }


def command(*arguments: str) -> dict[str, Any]:
    """The command, in the folder that the process was started in."""
    sys.argv = ["cswap-deploy", *arguments]
    out, err = io.StringIO(), io.StringIO()
    code: Any = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            code = stop.code
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
for line in sys.stdin:
    name, arguments, environment = json.loads(line)
    os.environ.update(environment)
    answer = {"load": load, "command": command}[name](*arguments)
    for setting in environment:
        del os.environ[setting]
    print(json.dumps(answer), file=answers, flush=True)
