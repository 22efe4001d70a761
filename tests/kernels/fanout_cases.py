"""Cases for the kernel, and when a result is right.

A kernel may be twice as far from float64 as torch is in the same dtype, and one rounding further.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from cswap_deploy.causal.fanout import Activation, Epilogue, Fanout, masked_fanout_reference
from cswap_deploy.causal.fanout_library import Library, Problem
from cswap_deploy.network.unfolding import Window

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
    Window(),
    Window(stride=(2, 2)),
    Window(padding=(1, 2)),
    Window((3, 3)),
    Window((3, 3), padding=(1, 1)),
    Window((3, 3), stride=(2, 2), padding=(1, 1)),
    Window((3, 3), padding=(2, 2), dilation=(2, 2)),
    Window((5, 5), padding=(2, 2)),
    Window((5, 3), stride=(1, 2), padding=(2, 0), dilation=(1, 2)),
)
FLANK = 64
"""Elements in front of and behind a tensor that must be neither read nor written."""


def changed(case: Fanout, change: Callable[[Tensor], Tensor]) -> Fanout:
    """The same with every tensor changed."""

    def one(t: Tensor | None) -> Tensor | None:
        return None if t is None else change(t)

    e = case.epilogue
    return Fanout(
        change(case.z), change(case.r), change(case.weight), one(case.constant), case.window,
        Epilogue(one(e.scale), one(e.shift), one(e.other), e.activation),
    )  # fmt: skip


def magnitude(case: Fanout) -> Tensor:
    """Float64: what the terms of each output add up to without their signs."""
    case = changed(case, lambda t: t.double().abs())
    epilogue = replace(case.epilogue, activation=Activation())
    return masked_fanout_reference(replace(case, r=-case.r, epilogue=epilogue))


def make_case(
    layout: Layout,
    dtype: torch.dtype,
    *,
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
) -> Fanout:
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
        z_shape, positions = (images, channels, *window.output_size(size)), size
        weight = draw(variants, channels, inputs, *window.kernel)
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

    return Fanout(
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


def check(got: Tensor, case: Fanout) -> None:
    """At most twice the reference's own error, and one rounding: of the value and of its sum.

    The second is float32's and counts where terms cancel or the activation cuts off most values.
    """
    exact = masked_fanout_reference(changed(case, lambda t: t.double()))
    reference = masked_fanout_reference(case)
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
    allowed = allowed + torch.finfo(torch.float32).eps * magnitude(case)
    assert (error <= allowed).all(), f"{error.max():.3g} against the reference's own {own:.3g}"
