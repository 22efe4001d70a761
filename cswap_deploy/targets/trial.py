"""A graph's first load, in a process of its own: native code may crash on it, or hang.

Where the runtime only refuses the graph nothing is said: the build itself meets the same refusal.
"""

from __future__ import annotations

from cswap_deploy.errors import BuildError
from cswap_deploy.export.child import NO_MEMORY, run_child
from cswap_deploy.targets import BuildRequest

_TRY = """
import numpy as np
path, size, *batches = sys.argv[1:]
images = [np.zeros((int(n), *map(int, size.split(","))), np.float32) for n in batches]
try:
    {load}
except Exception as err:
    if any(words in repr(err) for words in {no_memory}):
        raise
"""
_LOADS = {
    "onnxruntime": """
    import onnxruntime
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for each in images:
        session.run(None, {session.get_inputs()[0].name: each})
""",
    "openvino": """
    import openvino
    compiled = openvino.Core().compile_model(path, "CPU")
    for each in images:
        compiled(each)
""",
}
"""Runtime -> what loads a graph and runs it."""


def try_graph(runtime: str, request: BuildRequest) -> None:
    """Load and run a graph at its smallest and largest batch, where the request asks for a trial.

    Raises:
        BuildError: The runtime crashes on it, or takes more than the limits allow.
    """
    if request.trial is None:
        return
    code = _TRY.replace("{load}", _LOADS[runtime].strip()).replace("{no_memory}", repr(NO_MEMORY))
    size = ",".join(map(str, request.onnx.inputs[0].shape[1:]))
    batches = sorted({request.batch.min, request.batch.max})
    failure = run_child(code, [request.onnx.path, size, *batches], request.trial)
    if failure:
        raise BuildError(
            f"{runtime} fails on {request.onnx.path.name}, tried in a process of its own: "
            f"{failure}",
            fix="another --target, or more child-seconds and child-memory in a --config FILE.toml",
        )
