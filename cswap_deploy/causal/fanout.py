"""What follows a consumer, for many removed units at once.

A consumer is linear in the unit it reads, so removing unit v needs no second forward through it:

    out[v, n, o, p] = act(scale[o] * (z[n, o, p] - sum_{b,t} W[v, o, b, t] r[v, n, b, p + t]
                                      + constant[v, o]) + shift[o] + other[n, o, p])

z is the consumer's cached output, r the unit's activation minus what takes its place, W the weights
that read the unit, constant what its constant stand-in adds; scale and shift are the batch norm
behind it, other what a residual stream adds. b counts the unit's inputs, t the kernel's taps;
outside the image r is zero.

Written in torch this reads and writes the largest tensor once per operation. On NVIDIA GPUs a
kernel (kernels/masked_fanout) reads z once for several variants and writes the result once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cswap_deploy.causal import fanout_library

ActivationKind = Literal["none", "relu", "hardtanh", "silu", "gelu", "gelu_tanh", "hardswish"]
_KINDS = ("none", "relu", "hardtanh", "silu", "gelu", "gelu_tanh", "hardswish")


@dataclass(frozen=True, slots=True)
class Activation:
    """What is applied last; ReLU6 is ``Activation("hardtanh", 0.0, 6.0)``."""

    kind: ActivationKind = "none"
    low: float = -1.0
    """Of hardtanh."""
    high: float = 1.0
    """Of hardtanh."""

    def __post_init__(self) -> None:
        """Refuse what no layer has."""
        if self.kind not in _KINDS:
            raise ValueError(f"activation: {self.kind!r} is none of {', '.join(_KINDS)}")
        if self.kind == "hardtanh" and not self.low <= self.high:
            raise ValueError(f"activation: hardtanh from {self.low} to {self.high} is empty")


@dataclass(frozen=True, slots=True)
class Window:
    """How a convolution moves over its input, (height, width) each."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    """Zeros, the same number on both sides."""
    dilation: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        """Refuse what no convolution has."""
        for name, least in (("stride", 1), ("padding", 0), ("dilation", 1)):
            value = getattr(self, name)
            if len(value) != 2 or min(value) < least:
                raise ValueError(f"window: {name} must be two numbers >= {least}, not {value}")


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


def masked_fanout(
    z: Tensor,
    r: Tensor,
    weight: Tensor,
    *,
    constant: Tensor | None = None,
    window: Window | None = None,
    epilogue: Epilogue | None = None,
) -> Tensor:
    """Compute what :func:`masked_fanout_reference` does, by the CUDA kernel where that is possible.

    The kernel accumulates in float32 whatever is stored, so it rounds once where the reference
    rounds after each operation. Where it cannot run, the reference does; :func:`fanout_backend`
    says which one, and the reason is logged once. The kernel records no gradients: tensors that
    need some go to the reference.

    Args:
        z: As for the reference, and so are all others.
        r: See there.
        weight: See there.
        constant: See there.
        window: See there.
        epilogue: See there.

    Returns:
        As the reference.

    Raises:
        ValueError: A shape, dtype or device does not fit; names the argument.
        RuntimeError: The kernel did not start; has CUDA's words.
    """
    window, epilogue = window or Window(), epilogue or Epilogue()
    _check(z, r, weight, constant, window, epilogue)
    tensors = (z, r, weight, constant, epilogue.scale, epilogue.shift, epilogue.other)
    needs_gradient = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in tensors
    )
    if needs_gradient or fanout_backend(z.device, z.dtype) == "reference":
        return _reference(z, r, weight, constant, window, epilogue)
    library = fanout_library.cuda_library(z.device)
    assert library is not None
    problem = lay_out(z, r, weight, constant=constant, window=window, epilogue=epilogue)
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


def masked_fanout_reference(
    z: Tensor,
    r: Tensor,
    weight: Tensor,
    *,
    constant: Tensor | None = None,
    window: Window | None = None,
    epilogue: Epilogue | None = None,
) -> Tensor:
    """Compute the outputs behind a consumer under V interventions, one unit in each.

    Args:
        z: (N, O, Ho, Wo) for a convolution, (N, ..., O) for a linear layer: its output with nothing
            removed.
        r: (V, N, B, H, W) or (V, N, ..., B): the activations of variant v's unit minus what takes
            their place.
        weight: (V, O, B, kh, kw) or (V, O, B): the weights that read them. Five dimensions mean a
            convolution with groups = 1.
        constant: (V, O) float32, or of z's dtype: added to the consumer's output.
        window: Of the convolution.
        epilogue: What follows the consumer.

    Returns:
        (V * N, O, Ho, Wo) or (V * N, ..., O) in z's dtype and memory format; row v * N + n is image
        n under variant v.

    Raises:
        ValueError: A shape, dtype or device does not fit; names the argument.

    Source:
        C-SWAP (arXiv:2510.18636), interventions on units; the linearity of what reads them is this
        package's, see ``effects``.
    """
    window, epilogue = window or Window(), epilogue or Epilogue()
    _check(z, r, weight, constant, window, epilogue)
    return _reference(z, r, weight, constant, window, epilogue)


def lay_out(
    z: Tensor,
    r: Tensor,
    weight: Tensor,
    *,
    constant: Tensor | None = None,
    window: Window | None = None,
    epilogue: Epilogue | None = None,
) -> fanout_library.Problem:
    """Bring the arguments of :func:`masked_fanout` into a layout the kernel reads, and make room.

    Copies only what it must: z and other where they are dense in neither layout, and the small
    weights where channels are innermost.

    Raises:
        ValueError: A shape, dtype or device does not fit; names the argument.
    """
    window, epilogue = window or Window(), epilogue or Epilogue()
    _check(z, r, weight, constant, window, epilogue)
    convolution = weight.ndim == 5
    last = _memory_format(z) if convolution else torch.contiguous_format
    z = z.contiguous(memory_format=last)
    out = torch.empty(
        (len(weight) * len(z), *z.shape[1:]), dtype=z.dtype, device=z.device, memory_format=last
    )
    # One pixel fits both layouts, and channels make the longer vectors then.
    innermost = not convolution or z.is_contiguous(memory_format=torch.channels_last)
    if convolution:
        out_size, kernel = z.shape[2:], weight.shape[3:]
    else:
        tokens = math.prod(z.shape[1:-1])
        out_size, kernel = torch.Size((1, tokens)), torch.Size((1, 1))
        r = r.reshape(*r.shape[:2], 1, tokens, r.shape[-1]).movedim(-1, 2)
        weight = weight[..., None, None]
    if innermost:  # threads side by side hold channels side by side: so must the weights
        weight = weight.movedim(1, -1).contiguous().movedim(-1, 1)
    other = epilogue.other
    return fanout_library.Problem(
        z=z,
        r=r,
        weight=weight,
        other=None if other is None else other.contiguous(memory_format=last),
        scale=_float32(epilogue.scale),
        shift=_float32(epilogue.shift),
        constant=_float32(constant),
        out=out,
        channels_innermost=innermost,
        channels=weight.shape[1],
        out_size=(out_size[0], out_size[1]),
        kernel=(kernel[0], kernel[1]),
        stride=window.stride,
        padding=window.padding,
        dilation=window.dilation,
        activation=_KINDS.index(epilogue.activation.kind),
        low=epilogue.activation.low,
        high=epilogue.activation.high,
    )


def _reference(
    z: Tensor,
    r: Tensor,
    weight: Tensor,
    constant: Tensor | None,
    window: Window,
    epilogue: Epilogue,
) -> Tensor:
    """The formula, on arguments that have been checked."""
    convolution = weight.ndim == 5

    def along_channels(values: Tensor) -> Tensor:
        values = values.to(z.dtype)
        return values[:, None, None] if convolution else values

    rows = []
    for v in range(len(weight)):
        if convolution:
            lost = F.conv2d(
                r[v], weight[v], None, window.stride, window.padding, window.dilation
            )  # fmt: skip
        else:
            lost = F.linear(r[v], weight[v])
        out = z - lost
        if constant is not None:
            out = out + along_channels(constant[v])
        if epilogue.scale is not None:
            out = out * along_channels(epilogue.scale)
        if epilogue.shift is not None:
            out = out + along_channels(epilogue.shift)
        if epilogue.other is not None:
            out = out + epilogue.other
        rows.append(_activate(out, epilogue.activation))
    if not rows:
        return z[:0]
    last = _memory_format(z) if convolution else torch.contiguous_format
    return torch.cat(rows).contiguous(memory_format=last)


def _activate(x: Tensor, activation: Activation) -> Tensor:
    match activation.kind:
        case "relu":
            return F.relu(x)
        case "hardtanh":
            return F.hardtanh(x, activation.low, activation.high)
        case "silu":
            return F.silu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "hardswish":
            return F.hardswish(x)
        case _:
            return x


def _check(
    z: Tensor,
    r: Tensor,
    weight: Tensor,
    constant: Tensor | None,
    window: Window,
    epilogue: Epilogue,
) -> None:
    """Refuse tensors that do not fit together, naming the first that does not."""
    if not z.is_floating_point():
        raise ValueError(f"z: {z.dtype} is not a floating-point dtype")
    if weight.ndim not in (3, 5):
        raise ValueError(
            f"weight: {tuple(weight.shape)} is neither (V, O, B) nor (V, O, B, kh, kw)"
        )
    variants, channels, inputs = weight.shape[:3]
    if weight.ndim == 5:
        _check_convolution(z, r, weight, window)
    else:
        if window != Window():
            raise ValueError("window: a linear layer, of weights (V, O, B), has none")
        if z.ndim < 2 or z.shape[-1] != channels:
            raise ValueError(f"z: {tuple(z.shape)} is not (N, ..., {channels}), weight's O")
        _expect("r", r, (variants, *z.shape[:-1], inputs))
    _expect("scale", epilogue.scale, (channels,))
    _expect("shift", epilogue.shift, (channels,))
    _expect("constant", constant, (variants, channels))
    _expect("other", epilogue.other, tuple(z.shape))
    stored = {"r": r, "weight": weight, "other": epilogue.other}
    wide = {"scale": epilogue.scale, "shift": epilogue.shift, "constant": constant}
    _check_kinds(z, stored, (z.dtype,))
    _check_kinds(z, wide, (z.dtype, torch.float32))


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
    if z.ndim != 4 or z.shape[1] != channels:
        raise ValueError(f"z: {tuple(z.shape)} is not (N, {channels}, Ho, Wo), weight's O")
    if r.ndim != 5 or r.shape[:3] != (variants, len(z), inputs):
        raise ValueError(
            f"r: {tuple(r.shape)} is not ({variants}, {len(z)}, {inputs}, H, W), (V, N, B, H, W)"
        )
    settings = zip(
        r.shape[3:], kernel, window.stride, window.padding, window.dilation, strict=True
    )  # fmt: skip
    expected = tuple((h + 2 * p - d * (k - 1) - 1) // s + 1 for h, k, s, p, d in settings)
    if tuple(z.shape[2:]) != expected:
        raise ValueError(
            f"z: height and width {tuple(z.shape[2:])} are not {expected}, what a "
            f"{kernel[0]}x{kernel[1]} kernel makes of r's {tuple(r.shape[3:])} with {window}"
        )


def _expect(name: str, given: Tensor | None, shape: tuple[int, ...]) -> None:
    if given is not None and tuple(given.shape) != shape:
        raise ValueError(f"{name}: {tuple(given.shape)} is not {shape}")


def _memory_format(z: Tensor) -> torch.memory_format:
    """Of a (N, C, H, W) tensor; plain where both would do."""
    last = z.is_contiguous(memory_format=torch.channels_last) and not z.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _float32(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.float().contiguous()
