"""TensorRT for RTX: engines built ahead of time, on a machine without a GPU."""

from __future__ import annotations

from cswap_deploy.targets.tensorrt import TensorRt


class TensorRtRtx(TensorRt):
    """One portable engine; the kernels are compiled on the device, when it is first loaded.

    The builder's default set of devices is kept: compute capability 8.0, 8.6, 8.9, 12.0 and later.
    Turing (7.5) must be asked for alone, and its float32 matrix products are refused there
    (tensorrt-rtx 1.7: "Cannot compile operation for Turing (SM75): FP32 GEMM is not supported").

    Source:
        TensorRT-RTX documentation, "CPU-Only AOT and TensorRT-RTX Engines".
    """

    name = "tensorrt-rtx"
