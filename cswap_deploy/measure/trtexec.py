"""The command of NVIDIA's own tool that repeats a latency measurement."""

from __future__ import annotations

import math
import shlex

from cswap_deploy.records.engine import EngineArtifact
from cswap_deploy.records.measurements import Latency

TOOLS = {"tensorrt": "trtexec", "tensorrt-rtx": "tensorrt_rtx"}
_SINCE_OTHER_DEFAULTS = {"tensorrt": (11,), "tensorrt-rtx": (1, 5)}
"""Versions from which the tool leaves out the copies, spins, and replays a CUDA graph unless told
otherwise, by options that older ones refuse; the older options are ignored there, with a warning.
RTX's documentation shows the older ways for 1.4 and the newer for 1.6; for 1.5, whose command line
is not documented, options that would be refused are better than options that would be ignored."""
_SINCE_GRAPH_STRATEGY = (1, 2)
"""Version of RTX."""


def trtexec_line(engine: EngineArtifact, latency: Latency) -> str:
    """The ``trtexec`` (for RTX ``tensorrt_rtx``) command that times an engine in the same way.

    Everything that was pinned is spelled out, since defaults differ: TensorRT 10 copies, blocks and
    launches kernel by kernel; TensorRT 11 leaves the copies out, spins and replays a CUDA graph.
    Where a newer tool has no option for its own default, a comment says so. ``--exposeDMA`` makes
    it wait for each call before the next; without, it has two under way. Its "Latency" is the sum
    of the three parts by CUDA events, not the host's clock; "GPU Compute Time" is
    ``latency.device``. It feeds random data.

    Raises:
        ValueError: The target has no such tool, the engine is without weights, or the latency does
            not say how it was measured.

    Source:
        TensorRT documentation, "Command-Line Programs"; ``InferenceOptions::parse`` and
        ``IterationBase`` of TensorRT's samples, 10 and 11; TensorRT-RTX documentation,
        "Performance Benchmarking", "Working with RTX CUDA Graphs".
    """
    how, target = latency.settings, engine.target
    if target not in TOOLS:
        raise ValueError(f"{target} has no trtexec")
    if engine.stripped:
        raise ValueError("trtexec would time an engine without its weights")
    if "shape" not in how or "cuda_graph" not in how:
        raise ValueError("the latency does not say how it was measured")
    version = tuple(int(part) for part in engine.versions[target].split(".")[:2])
    newer = version >= _SINCE_OTHER_DEFAULTS[target]
    transfers, graph = bool(how["transfers"]), bool(how["cuda_graph"])
    spins = how["synchronisation"] != "blocking"
    options = [
        f"--loadEngine={engine.path}",
        f"--shapes={how['input']}:{'x'.join(map(str, how['shape']))}",
        f"--infStreams={how['streams']}",
        f"--iterations={how['runs']}",
        "--duration=0",
        f"--warmUp={math.ceil(how['warmup_ms'])}",
        f"--avgRuns={how['runs']}",
        "--percentile=50,90,99",
        "--exposeDMA",
    ]
    if engine.options is not None and engine.options.version_compatible:
        options.append("--versionCompatible")  # lets it run the code that the engine brings
    if newer:
        pinned = [
            (transfers, "--includeDataTransfers", "no data transfers"),
            (not spins, "--noSpinWait", "spin wait"),
            (not graph, "--noCudaGraph", "CUDA graph"),
        ]
    else:
        pinned = [
            (not transfers, "--noDataTransfers", "data transfers"),
            (spins, "--useSpinWait", "blocking wait"),
            (graph, "--useCudaGraph", "no CUDA graph"),
        ]
    if target == "tensorrt-rtx" and version >= _SINCE_GRAPH_STRATEGY:
        strategy = f"--rtxCudaGraphStrategy={'wholeGraph' if graph else 'disable'}"
        pinned[2] = (True, strategy, "")
    options += [option for wanted, option, _ in pinned if wanted]
    left = [default for wanted, _, default in pinned if not wanted]
    line = " ".join((TOOLS[target], *map(shlex.quote, options)))
    return f"{line}  # by default: {', '.join(left)}" if left else line
