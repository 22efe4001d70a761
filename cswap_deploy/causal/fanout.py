"""What follows a consumer, for many removed units at once.

A consumer is linear in the unit it reads, so removing unit v needs no second forward through it:

    out[v, n, o, p] = act(scale[o] * (z[n, o, p] - sum_{b,t} W[v, o, b, t] r[v, n, b, p + t]
                                      + constant[v, o]) + shift[o] + other[n, o, p])

z is the consumer's cached output, r the unit's activation minus what takes its place, W the weights
that read the unit, constant what its constant ablation value adds; scale and shift are the batch
norm behind it, other what a residual stream adds. b counts the unit's inputs, t the kernel's taps;
outside the image r is zero.

Torch reads and writes the largest tensor once per operation; on NVIDIA GPUs a kernel
(kernels/masked_fanout) reads z once for several variants and writes the result once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from cswap_deploy.causal import fanout_library
from cswap_deploy.network.nodes import memory_format_of
from cswap_deploy.network.unfolding import Window

ActivationKind = Literal["none", "relu", "hardtanh", "silu", "gelu", "gelu_tanh", "hardswish"]
_KINDS: tuple[str, ...] = get_args(ActivationKind)
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "silu": F.silu, "gelu": F.gelu, "hardswish": F.hardswish,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Activation:
    """What is applied last; ReLU6 is ``Activation("hardtanh", 0.0, 6.0)``."""

    kind: ActivationKind = "none"
    low: float = -1.0
    """Lower limit of hardtanh."""
    high: float = 1.0
    """Upper limit of hardtanh."""

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"activation: {self.kind!r} is none of {', '.join(_KINDS)}")
        if self.kind == "hardtanh" and not self.low <= self.high:
            raise ValueError(f"activation: hardtanh from {self.low} to {self.high} is empty")


@dataclass(frozen=True, slots=True)
class Epilogue:
    """What follows the consumer, the same for all variants."""

    scale: Tensor | None = None
    """(O,) float32, or of z's dtype."""
    shift: Tensor | None = None
    """(O,) float32, or of z's dtype."""
    other: Tensor | None = None
    """Like z: what a residual stream adds before the activation."""
    activation: Activation = field(default_factory=Activation)


@dataclass(frozen=True, slots=True)
class Fanout:
    """A consumer under V interventions, one unit in each; checked when it is made.

    Raises:
        ValueError: A shape, dtype or device does not fit; names the argument.
    """

    z: Tensor
    """(N, O, Ho, Wo) for a convolution, (N, ..., O) for a linear layer: its output with nothing
    removed."""
    r: Tensor
    """(V, N, B, H, W) or (V, N, ..., B): the activations of variant v's unit minus what takes their
    place."""
    weight: Tensor
    """(V, O, B, kh, kw) or (V, O, B): the weights that read them. Five dimensions mean a
    convolution with groups = 1."""
    constant: Tensor | None = None
    """(V, O) float32, or of z's dtype: added to the consumer's output."""
    window: Window = field(default_factory=Window)
    epilogue: Epilogue = field(default_factory=Epilogue)

    def __post_init__(self) -> None:
        z, r, weight, epilogue = self.z, self.r, self.weight, self.epilogue
        if not z.is_floating_point():
            raise ValueError(f"z: {z.dtype} is not a floating-point dtype")
        if weight.ndim not in (3, 5):
            raise ValueError(
                f"weight: {tuple(weight.shape)} is neither (V, O, B) nor (V, O, B, kh, kw)"
            )
        variants, channels, inputs = weight.shape[:3]
        if self.convolution:
            _check_convolution(z, r, weight, self.window)
        else:
            if self.window != Window():
                raise ValueError("window: a linear layer, of weights (V, O, B), has none")
            if z.ndim < 2 or z.shape[-1] != channels:
                raise ValueError(f"z: {tuple(z.shape)} is not (N, ..., {channels}), weight's O")
            _expect("r", r, (variants, *z.shape[:-1], inputs))
        _expect("scale", epilogue.scale, (channels,))
        _expect("shift", epilogue.shift, (channels,))
        _expect("constant", self.constant, (variants, channels))
        _expect("other", epilogue.other, tuple(z.shape))
        stored = {"r": r, "weight": weight, "other": epilogue.other}
        wide = {"scale": epilogue.scale, "shift": epilogue.shift, "constant": self.constant}
        _check_kinds(z, stored, (z.dtype,))
        _check_kinds(z, wide, (z.dtype, torch.float32))

    @property
    def convolution(self) -> bool:
        """Whether the consumer is one; otherwise it is a linear layer."""
        return self.weight.ndim == 5

    @property
    def needs_gradient(self) -> bool:
        """Whether a backward pass will want to go through the result."""
        e = self.epilogue
        tensors = (self.z, self.r, self.weight, self.constant, e.scale, e.shift, e.other)
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def masked_fanout(fanout: Fanout) -> Tensor:
    """Compute what :func:`masked_fanout_reference` does, by the CUDA kernel where that is possible.

    The kernel accumulates in float32 whatever is stored, so it rounds once where the reference
    rounds after each operation. Where it cannot run, the reference does; :func:`fanout_backend`
    says which one, and the reason is logged once. The kernel records no gradients: tensors that
    need some go to the reference.

    Raises:
        RuntimeError: The kernel did not start; has CUDA's words.
    """
    z = fanout.z
    if fanout.needs_gradient or fanout_backend(z.device, z.dtype) == "reference":
        return masked_fanout_reference(fanout)
    library = fanout_library.cuda_library(z.device)
    assert library is not None
    problem = lay_out(fanout)
    if problem.out.numel() > 0:
        with torch.cuda.device(z.device):
            library.run(problem, stream=torch.cuda.current_stream(z.device).cuda_stream)
    return problem.out


def fanout_backend(
    device: torch.device | str, dtype: torch.dtype = torch.float32
) -> Literal["cuda", "reference"]:
    """Which implementation :func:`masked_fanout` uses for tensors of a device and dtype.

    The first call for a CUDA device looks for the kernel and, where a compiler is at hand, builds
    it, which takes up to a minute once per machine. Setting ``CSWAP_KERNELS=off`` prevents both.
    """
    device = torch.device(device)
    if device.type != "cuda" or dtype not in fanout_library.DTYPES:
        return "reference"
    return "reference" if fanout_library.cuda_library(device) is None else "cuda"


def masked_fanout_reference(fanout: Fanout) -> Tensor:
    """Compute the outputs behind a consumer under V interventions, by the formula above.

    Returns:
        (V * N, O, Ho, Wo) or (V * N, ..., O) in z's dtype and memory format; row v * N + n is image
        n under variant v.
    """
    z, window, epilogue = fanout.z, fanout.window, fanout.epilogue

    def along_channels(values: Tensor) -> Tensor:
        values = values.to(z.dtype)
        return values[:, None, None] if fanout.convolution else values

    rows = []
    for v, (r, weight) in enumerate(zip(fanout.r, fanout.weight, strict=True)):
        if fanout.convolution:
            lost = F.conv2d(r, weight, None, window.stride, window.padding, window.dilation)
        else:
            lost = F.linear(r, weight)
        out = z - lost
        if fanout.constant is not None:
            out = out + along_channels(fanout.constant[v])
        if epilogue.scale is not None:
            out = out * along_channels(epilogue.scale)
        if epilogue.shift is not None:
            out = out + along_channels(epilogue.shift)
        if epilogue.other is not None:
            out = out + epilogue.other
        rows.append(_activate(out, epilogue.activation))
    if not rows:
        return z[:0]
    return torch.cat(rows).contiguous(memory_format=_memory_format(fanout))


def lay_out(fanout: Fanout) -> fanout_library.Problem:
    """Bring the tensors into a layout the kernel reads, and make room for the result.

    Copies only what it must: z and other where they are dense in neither layout, and the small
    weights where channels are innermost.
    """
    z, r, weight, epilogue = fanout.z, fanout.r, fanout.weight, fanout.epilogue
    last = _memory_format(fanout)
    z = z.contiguous(memory_format=last)
    out = torch.empty(
        (len(weight) * len(z), *z.shape[1:]), dtype=z.dtype, device=z.device, memory_format=last
    )
    # One pixel fits both layouts, and channels make the longer vectors then.
    innermost = not fanout.convolution or z.is_contiguous(memory_format=torch.channels_last)
    height, width = z.shape[2:] if fanout.convolution else (1, math.prod(z.shape[1:-1]))
    if not fanout.convolution:
        r = r.reshape(*r.shape[:2], height, width, r.shape[-1]).movedim(-1, 2)
        weight = weight[..., None, None]
    if innermost:  # threads side by side hold channels side by side: so must the weights
        weight = weight.movedim(1, -1).contiguous().movedim(-1, 1)
    other, activation = epilogue.other, epilogue.activation
    return fanout_library.Problem(
        z=z, r=r, weight=weight, out=out,
        other=None if other is None else other.contiguous(memory_format=last),
        scale=_float32(epilogue.scale), shift=_float32(epilogue.shift),
        constant=_float32(fanout.constant), channels_innermost=innermost,
        channels=weight.shape[1], out_size=(height, width), window=fanout.window,
        activation=_KINDS.index(activation.kind), low=activation.low, high=activation.high,
    )  # fmt: skip


def _activate(x: Tensor, activation: Activation) -> Tensor:
    if activation.kind == "hardtanh":
        return F.hardtanh(x, activation.low, activation.high)
    function = _FUNCTIONS.get(activation.kind)
    return x if function is None else function(x)


def _check_kinds(
    z: Tensor, tensors: dict[str, Tensor | None], dtypes: tuple[torch.dtype, ...]
) -> None:
    for name, given in tensors.items():
        if given is None:
            continue
        if given.device != z.device:
            raise ValueError(f"{name}: is on {given.device}, z on {z.device}")
        if given.dtype not in dtypes:
            raise ValueError(f"{name}: {given.dtype} does not go with z's {z.dtype}")


def _check_convolution(z: Tensor, r: Tensor, weight: Tensor, window: Window) -> None:
    variants, channels, inputs, *kernel = weight.shape
    if tuple(kernel) != window.kernel:
        raise ValueError(f"window: kernel {window.kernel} is not weight's {tuple(kernel)}")
    if z.ndim != 4 or z.shape[1] != channels:
        raise ValueError(f"z: {tuple(z.shape)} is not (N, {channels}, Ho, Wo), weight's O")
    if r.ndim != 5 or r.shape[:3] != (variants, len(z), inputs):
        raise ValueError(
            f"r: {tuple(r.shape)} is not ({variants}, {len(z)}, {inputs}, H, W), (V, N, B, H, W)"
        )
    expected = window.output_size(r.shape[3:])
    if tuple(z.shape[2:]) != expected:
        raise ValueError(
            f"z: height and width {tuple(z.shape[2:])} are not {expected}, what {window} makes of "
            f"r's {tuple(r.shape[3:])}"
        )


def _expect(name: str, given: Tensor | None, shape: tuple[int, ...]) -> None:
    if given is not None and tuple(given.shape) != shape:
        raise ValueError(f"{name}: {tuple(given.shape)} is not {shape}")


def _memory_format(fanout: Fanout) -> torch.memory_format:
    """The result's: that of z; plain where both would do."""
    if not fanout.convolution or fanout.z.is_contiguous():
        return torch.contiguous_format
    return memory_format_of(fanout.z)


def _float32(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.float().contiguous()
