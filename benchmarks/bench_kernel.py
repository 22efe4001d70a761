"""How close the CUDA kernel `masked_fanout` comes to the speed of memory, and how torch compares.

    python benchmarks/bench_kernel.py             # needs an NVIDIA GPU; exits with 4 without one
    python benchmarks/bench_kernel.py --quick     # smaller; without a GPU says so and exits with 0

Each case is verified against float64 first. Then kernel, torch and a device-to-device copy of the
same output run in turn, so that clocks and neighbours hit all alike. Torch runs twice: as the
reference, written to be read, and batched, as the package runs it without the kernel; the faster
counts. A copy moves twice the output's bytes; the kernel moves the output, z, r, the weights and
the residual once. The last line is one JSON object with the raw samples.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cswap_deploy.causal import fanout_library
from cswap_deploy.causal.fanout import (
    Activation,
    Epilogue,
    Fanout,
    fanout_backend,
    lay_out,
    masked_fanout,
    masked_fanout_reference,
)
from cswap_deploy.errors import CswapError, MissingDependencyError, StageError
from cswap_deploy.network.unfolding import Window


@dataclass(frozen=True)
class Shape:
    """One consumer and what follows it."""

    name: str
    channels: int
    size: tuple[int, int]
    """Of the input, or (1, tokens)."""
    kernel: int = 1
    stride: int = 1
    unit_inputs: int = 1
    tokens: bool = False
    other: bool = False
    activation: Activation = Activation("relu")  # noqa: RUF009 (frozen)


SHAPES = (
    Shape("resnet50.layer3.conv2", 256, (14, 14), kernel=3),
    Shape("resnet50.layer3.conv3", 1024, (14, 14), other=True),
    Shape("resnet50.layer4.0.conv2", 512, (14, 14), kernel=3, stride=2),
    Shape("resnet50.layer4.conv2", 512, (7, 7), kernel=3),
    Shape("resnet50.layer4.conv3", 2048, (7, 7), other=True),
    Shape("vit_s.mlp.fc2", 384, (1, 197), tokens=True, other=True, activation=Activation()),
    Shape(
        "vit_s.attn.proj (head of 64)", 384, (1, 197), unit_inputs=64, tokens=True, other=True,
        activation=Activation(),
    ),
)  # fmt: skip
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Config:
    images: int = 32
    out_mib: int = 1024
    """Far above any L2 cache; sets the number of variants."""
    rounds: int = 20
    warm_up: int = 3
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Result:
    case: str
    dtype: str
    layout: str
    variants: int
    kernel_error: float
    """Largest distance from float64, on the variants that were verified."""
    reference_error: float
    kernel_ms: list[float]
    """The launch alone."""
    call_ms: list[float]
    """With what Python does around it."""
    reference_ms: list[float]
    batched_ms: list[float]
    copy_ms: list[float]
    speedup: float
    """The faster torch over the call, medians."""
    fraction_of_copy_bandwidth: float


def some(inputs: Fanout, variants: list[int]) -> Fanout:
    return replace(inputs, r=inputs.r[variants], weight=inputs.weight[variants])


def double(inputs: Fanout) -> Fanout:
    def wide(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.double()

    e = inputs.epilogue
    return Fanout(
        inputs.z.double(), inputs.r.double(), inputs.weight.double(), window=inputs.window,
        epilogue=Epilogue(wide(e.scale), wide(e.shift), wide(e.other), e.activation),
    )  # fmt: skip


def make(shape: Shape, dtype: torch.dtype, *, channels_last: bool, config: Config) -> Fanout:
    rng = torch.Generator("cuda").manual_seed(0)

    def draw(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=rng, device="cuda").to(dtype)

    n, channels, inputs = config.images, shape.channels, shape.unit_inputs
    out_size = [(side - 1) // shape.stride + 1 for side in shape.size]  # padding keeps the size
    z_shape = (n, out_size[1], channels) if shape.tokens else (n, channels, *out_size)
    z = draw(*z_shape)
    other = draw(*z_shape) if shape.other else None
    variants = max(1, (config.out_mib << 20) // (z.numel() * z.element_size()))
    if shape.tokens:
        r, weight = draw(variants, n, shape.size[1], inputs), draw(variants, channels, inputs)
    else:
        r = draw(variants, n, inputs, *shape.size)
        weight = draw(variants, channels, inputs, shape.kernel, shape.kernel)
    if channels_last:
        z = z.contiguous(memory_format=torch.channels_last)
        other = None if other is None else other.contiguous(memory_format=torch.channels_last)
    kernel, stride, padding = shape.kernel, shape.stride, shape.kernel // 2
    scale, shift = (draw(channels, dtype=torch.float32) for _ in range(2))
    return Fanout(
        z, r, weight, window=Window((kernel, kernel), (stride, stride), (padding, padding)),
        epilogue=Epilogue(scale, shift, other, shape.activation),
    )  # fmt: skip


def batched(inputs: Fanout) -> Tensor:
    """The formula in as few passes over the whole output as torch's own operations need."""
    z, epilogue = inputs.z, inputs.epilogue
    variants, convolution = len(inputs.weight), inputs.weight.ndim == 5
    out = z.repeat(variants, *[1] * (z.ndim - 1))
    if convolution and z.is_contiguous(memory_format=torch.channels_last):
        out = out.contiguous(memory_format=torch.channels_last)
    for part, r, weight in zip(out.chunk(variants), inputs.r, inputs.weight, strict=True):
        if convolution:
            window = inputs.window
            part.sub_(F.conv2d(r, weight, None, window.stride, window.padding, window.dilation))
        else:
            part.sub_(F.linear(r, weight))
    along = (-1, 1, 1) if convolution else (-1,)
    assert epilogue.scale is not None
    assert epilogue.shift is not None
    out.mul_(epilogue.scale.to(z.dtype).view(along)).add_(epilogue.shift.to(z.dtype).view(along))
    if epilogue.other is not None:
        out.unflatten(0, (variants, len(z))).add_(epilogue.other)
    return out.relu_() if epilogue.activation.kind == "relu" else out


def verify(inputs: Fanout) -> tuple[float, float]:
    """Errors of kernel and reference against float64, on the first, a middle and the last variant.

    Raises:
        StageError: The kernel is more than twice as wrong as the reference, plus one rounding.
    """
    last = len(inputs.weight) - 1
    chosen = sorted({0, last // 2, last})
    images = len(inputs.z)
    whole = masked_fanout(inputs).unflatten(0, (last + 1, images))
    got = whole[chosen].flatten(0, 1).double()
    del whole
    again = batched(inputs).unflatten(0, (last + 1, images))[chosen].flatten(0, 1).double()
    few = some(inputs, chosen)
    exact = masked_fanout_reference(double(few))
    reference = masked_fanout_reference(few).double()
    kernel_error = float((got - exact).abs().max())
    reference_error = float((reference - exact).abs().max())
    floor = torch.finfo(inputs.z.dtype).eps * float(exact.abs().max())
    assert float((again - exact).abs().max()) <= 4 * reference_error + floor, "batched is wrong"
    if not kernel_error <= 2 * reference_error + floor:
        raise StageError(
            f"masked_fanout is wrong: {kernel_error:.3g} from float64, "
            f"the reference only {reference_error:.3g}"
        )
    return kernel_error, reference_error


def interleaved(runs: list[Callable[[], object]], config: Config) -> list[list[float]]:
    """Milliseconds of each run in each round, by CUDA events."""
    samples: list[list[float]] = [[] for _ in runs]
    for at in range(config.warm_up + config.rounds):
        for one, found in zip(runs, samples, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            one()
            end.record()
            end.synchronize()
            if at >= config.warm_up:
                found.append(round(begin.elapsed_time(end), 5))
    return samples


def measure(shape: Shape, dtype: str, *, channels_last: bool, config: Config) -> Result:
    inputs = make(shape, DTYPES[dtype], channels_last=channels_last, config=config)
    kernel_error, reference_error = verify(inputs)
    problem = lay_out(inputs)
    library = fanout_library.cuda_library(inputs.z.device)
    assert library is not None
    stream = torch.cuda.current_stream().cuda_stream
    target = torch.empty_like(problem.out)
    kernel_ms, call_ms, reference_ms, batched_ms, copy_ms = interleaved(
        [
            lambda: library.run(problem, stream=stream),
            lambda: masked_fanout(inputs),
            lambda: masked_fanout_reference(inputs),
            lambda: batched(inputs),
            lambda: target.copy_(problem.out),
        ],
        config,
    )
    moved = sum(
        t.numel() * t.element_size()
        for t in (problem.out, inputs.z, inputs.r, inputs.weight, inputs.epilogue.other)
        if t is not None
    )
    copied = 2 * target.numel() * target.element_size()
    middle = statistics.median
    return Result(
        case=shape.name,
        dtype=dtype,
        layout="tokens" if shape.tokens else "channels-last" if channels_last else "NCHW",
        variants=len(inputs.weight),
        kernel_error=kernel_error,
        reference_error=reference_error,
        kernel_ms=kernel_ms,
        call_ms=call_ms,
        reference_ms=reference_ms,
        batched_ms=batched_ms,
        copy_ms=copy_ms,
        speedup=round(min(middle(reference_ms), middle(batched_ms)) / middle(call_ms), 3),
        fraction_of_copy_bandwidth=round(
            (moved / middle(kernel_ms)) / (copied / middle(copy_ms)), 3
        ),
    )


def require_gpu() -> None:
    """Say what is missing before anything is measured."""
    if not torch.cuda.is_available():
        raise MissingDependencyError(
            f"torch {torch.__version__} sees no NVIDIA GPU, which this benchmark measures on",
            fix="run it on a machine with a GPU and a CUDA build of torch",
        )
    if fanout_backend("cuda") != "cuda":
        raise MissingDependencyError(
            "the kernel runs on this GPU neither installed nor built (see the warning above)",
            fix="pip install ./kernels",
        )


def machine() -> dict[str, str | None]:
    """What the figures belong to."""
    smi = shutil.which("nvidia-smi")
    driver = None
    if smi is not None:
        asked = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "gpu": torch.cuda.get_device_name(),
        "compute_capability": "{}.{}".format(*torch.cuda.get_device_capability()),
        "driver": driver,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    try:
        require_gpu()
    except MissingDependencyError as err:
        if not quick:
            _stop(err)
        print(f"nothing was measured: {err}")
        print(json.dumps({"machine": None, "results": []}))
        return
    # Tensor cores' TF32 would make the reference less exact than float32 and the check too kind.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    config = Config(out_mib=128, rounds=5, dtypes=("float16",)) if quick else Config()
    results = []
    for shape in SHAPES:
        for dtype in config.dtypes:
            for channels_last in (False,) if shape.tokens else (False, True):
                try:
                    r = measure(shape, dtype, channels_last=channels_last, config=config)
                except StageError as err:
                    _stop(err)
                results.append(r)
                print(
                    f"{r.case:30} {r.dtype:9} {r.layout:13} {r.variants:4} variants "
                    f"kernel {statistics.median(r.kernel_ms):7.3f} ms "
                    f"torch {r.speedup * statistics.median(r.call_ms):8.3f} ms ({r.speedup:.1f}x) "
                    f"{r.fraction_of_copy_bandwidth:.0%} of copy bandwidth",
                    flush=True,
                )
    print(json.dumps({"machine": machine(), "results": [asdict(r) for r in results]}))


def _stop(err: CswapError) -> None:
    print(err, file=sys.stderr)
    sys.exit(err.exit_code)


if __name__ == "__main__":
    main()
