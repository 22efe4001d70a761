"""Cases for the kernel, and when a result is right.

A kernel may be twice as far from float64 as torch is in the same dtype, and one rounding further.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cswap_deploy.causal.fanout import (
    Activation,
    Epilogue,
    Window,
    lay_out,
    masked_fanout_reference,
)
from cswap_deploy.causal.fanout_library import Library, Problem

Layout = str
LAYOUTS = ("nchw", "channels_last", "tokens")
ACTIVATIONS = (
    Activation(),
    Activation("relu"),
    Activation("hardtanh", 0.0, 6.0),
    Activation("hardtanh", -0.5, 0.25),
    Activation("silu"),
    Activation("gelu"),
    Activation("gelu_tanh"),
    Activation("hardswish"),
)
WINDOWS = (
    ((1, 1), Window()),
    ((1, 1), Window(stride=(2, 2))),
    ((1, 1), Window(padding=(1, 2))),
    ((3, 3), Window()),
    ((3, 3), Window(padding=(1, 1))),
    ((3, 3), Window(stride=(2, 2), padding=(1, 1))),
    ((3, 3), Window(padding=(2, 2), dilation=(2, 2))),
    ((5, 5), Window(padding=(2, 2))),
    ((5, 3), Window(stride=(1, 2), padding=(2, 0), dilation=(1, 2))),
)
FLANK = 64
"""Elements in front of and behind a tensor that must be neither read nor written."""


@dataclass(frozen=True, slots=True)
class Case:
    z: Tensor
    r: Tensor
    weight: Tensor
    constant: Tensor | None = None
    window: Window = field(default_factory=Window)
    epilogue: Epilogue = field(default_factory=Epilogue)

    def reference(self, dtype: torch.dtype | None = None) -> Tensor:
        def cast(t: Tensor | None) -> Tensor | None:
            return t if t is None or dtype is None else t.to(dtype)

        e = self.epilogue
        return masked_fanout_reference(
            cast(self.z), cast(self.r), cast(self.weight), constant=cast(self.constant),
            window=self.window,
            epilogue=Epilogue(cast(e.scale), cast(e.shift), cast(e.other), e.activation),
        )  # fmt: skip

    def magnitude(self) -> Tensor:
        """Float64: what the terms of each output add up to without their signs."""

        def size(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.double().abs()

        e = self.epilogue
        return masked_fanout_reference(
            self.z.double().abs(), -self.r.double().abs(), self.weight.double().abs(),
            constant=size(self.constant), window=self.window,
            epilogue=Epilogue(size(e.scale), size(e.shift), size(e.other)),
        )  # fmt: skip

    def problem(self) -> Problem:
        return lay_out(
            self.z, self.r, self.weight, constant=self.constant, window=self.window,
            epilogue=self.epilogue,
        )  # fmt: skip

    def to(self, device: str) -> Case:
        e = self.epilogue
        z, r, weight, constant, scale, shift, other = (
            t if t is None else t.to(device)
            for t in (self.z, self.r, self.weight, self.constant, e.scale, e.shift, e.other)
        )
        return Case(
            z, r, weight, constant, self.window, Epilogue(scale, shift, other, e.activation)
        )


def make_case(
    layout: Layout,
    dtype: torch.dtype,
    *,
    kernel: tuple[int, int] = (1, 1),
    window: Window | None = None,
    variants: int = 3,
    images: int = 2,
    channels: int = 5,
    inputs: int = 1,
    size: tuple[int, int] = (9, 7),
    affine: bool = True,
    other: bool = True,
    constant: bool = False,
    activation: Activation | None = None,
    shared_input: bool = False,
    flank: int = FLANK,
    seed: int = 0,
) -> Case:
    """Random tensors, each inside a buffer of NaNs: what is read beyond them shows in the result.

    With ``shared_input`` r is a view into the consumer's input, (N, V * B, ...), as in the package.
    """
    rng = torch.Generator().manual_seed(seed)
    window = window or Window()

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return inside_nans(torch.randn(shape, generator=rng).to(dtype), flank)

    if layout == "tokens":
        z_shape, positions = (images, size[0], channels), (size[0],)
        weight = draw(variants, channels, inputs)
    else:
        settings = zip(size, kernel, window.stride, window.padding, window.dilation, strict=True)
        out_size = ((h + 2 * p - d * (k - 1) - 1) // s + 1 for h, k, s, p, d in settings)
        z_shape, positions = (images, channels, *out_size), size
        weight = draw(variants, channels, inputs, *kernel)
    if shared_input and layout == "nchw":
        r = draw(images, variants * inputs, *positions).unflatten(1, (variants, inputs))
        r = r.movedim(1, 0)
    elif shared_input:
        r = draw(images, *positions, variants * inputs).unflatten(-1, (variants, inputs))
        r = r.movedim(-2, 0)
        r = r if layout == "tokens" else r.movedim(-1, 2)
    elif layout == "tokens":
        r = draw(variants, images, *positions, inputs)
    else:
        r = draw(variants, images, inputs, *positions)

    def like_z() -> Tensor:
        if layout != "channels_last":
            return draw(*z_shape)
        return draw(z_shape[0], *z_shape[2:], z_shape[1]).movedim(-1, 1)

    return Case(
        like_z(), r, weight,
        draw(variants, channels, dtype=torch.float32) if constant else None,
        window,
        Epilogue(
            draw(channels, dtype=torch.float32) if affine else None,
            draw(channels, dtype=torch.float32) if affine else None,
            like_z() if other else None,
            activation or Activation("relu"),
        ),
    )  # fmt: skip


def inside_nans(t: Tensor, flank: int = FLANK) -> Tensor:
    buffer = t.new_full((t.numel() + 2 * flank,), float("nan"))
    view = buffer[flank : flank + t.numel()].view(t.shape)
    view.copy_(t)
    return view


def run(library: Library, problem: Problem, *, flank: int = FLANK, **settings: int) -> Tensor:
    """Run into a poisoned buffer: every element is written, and nothing around them."""
    mark = 1234.0
    buffer = problem.out.new_full((problem.out.numel() + 2 * flank,), mark)
    inner = buffer[flank : len(buffer) - flank]
    inner.fill_(float("nan"))
    out = inner.as_strided(problem.out.shape, problem.out.stride(), inner.storage_offset())
    library.run(replace(problem, out=out), stream=0, **settings)
    assert (buffer[:flank] == mark).all()
    assert (buffer[len(buffer) - flank :] == mark).all()
    return out


def check(got: Tensor, case: Case) -> None:
    """At most twice the reference's own error, and one rounding: of the value and of its sum.

    The second is float32's and counts where terms cancel or the activation cuts off most values.
    """
    exact, reference = case.reference(torch.float64), case.reference()
    assert got.shape == reference.shape
    assert got.dtype == reference.dtype
    for layout in (torch.contiguous_format, torch.channels_last):
        if got.ndim == 4:
            assert got.is_contiguous(memory_format=layout) == reference.is_contiguous(
                memory_format=layout
            )
    error = (got.double() - exact).abs()
    own = (reference.double() - exact).abs().max()
    allowed = 2 * own + torch.finfo(got.dtype).eps * exact.abs()
    allowed = allowed + torch.finfo(torch.float32).eps * case.magnitude()
    assert (error <= allowed).all(), f"{error.max():.3g} against the reference's own {own:.3g}"
