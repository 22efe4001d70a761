"""The kernel's own source, built for the CPU, against the reference; the same on a GPU.

A kernel may be twice as far from float64 as torch is in the same dtype, and one rounding further.
"""

from __future__ import annotations

import copy
import ctypes
import itertools
import mmap
import os
import shutil
import subprocess
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cswap_deploy.causal import fanout, fanout_library
from cswap_deploy.causal.fanout import (
    Activation,
    Epilogue,
    Window,
    fanout_backend,
    lay_out,
    masked_fanout,
    masked_fanout_reference,
)
from cswap_deploy.causal.fanout_library import DTYPES, SOURCES, Library, Problem

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


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """The kernel's tiles on the CPU."""
    compiler = next((c for c in ("g++", "c++", "clang++") if shutil.which(c)), None)
    if compiler is None:
        pytest.skip("no C++ compiler (g++, c++ or clang++)")
    made = tmp_path_factory.mktemp("masked_fanout") / "host.so"
    subprocess.run(
        [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared",
         str(SOURCES / "host.cpp"), "-o", str(made)],
        check=True,
    )  # fmt: skip
    return Library(made, entry="masked_fanout_host")


def vector(host: Library, problem: Problem) -> int:
    """Elements that one thread reads and writes together."""
    found = host.handle.masked_fanout_vector(ctypes.byref(problem.params()))
    assert isinstance(found, int)
    return found


# ---- The formula ------------------------------------------------------------------------------


def test_worked_by_hand() -> None:
    # One image of two tokens, two neurons, two output features; act = ReLU.
    z = torch.tensor([[[10.0, 20.0], [30.0, 40.0]]])
    r = torch.tensor([[[[1.0], [2.0]]], [[[3.0], [50.0]]]])
    weight = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])
    epilogue = Epilogue(
        scale=torch.tensor([2.0, 1.0]), shift=torch.tensor([1.0, -5.0]), other=torch.ones(1, 2, 2),
        activation=Activation("relu"),
    )  # fmt: skip
    out = masked_fanout(z, r, weight, epilogue=epilogue)
    # Neuron 0, token 0, feature 0: 2 * (10 - 1 * 1) + 1 + 1. Neuron 1, token 1: far below zero.
    assert out.tolist() == [
        [[20.0, 14.0], [58.0, 32.0]],
        [[4.0, 4.0], [0.0, 0.0]],
    ]


def _zeroed(layer: nn.Conv2d | nn.Linear, inputs: list[int]) -> nn.Module:
    masked = copy.deepcopy(layer)
    masked.weight.data[:, inputs] = 0.0
    return masked


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(1, 1, 0), (3, 1, 1), (3, 2, 1)])
def test_the_reference_is_a_convolution_without_the_unit(
    kernel: int, stride: int, padding: int, channels_last: bool
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 8, kernel, stride=stride, padding=padding, bias=False)
    norm = nn.BatchNorm2d(8).eval()
    norm.weight.data.uniform_(0.5, 2)
    norm.bias.data.uniform_(-1, 1)
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    units = [[0, 1], [4, 2], [3, 5]]
    a = torch.randn(2, 6, 7, 9)
    if channels_last:
        a = a.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        stream = torch.randn_like(conv(a))
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        got = masked_fanout_reference(
            conv(a),
            torch.stack([a[:, unit] for unit in units]),
            torch.stack([conv.weight[:, unit] for unit in units]),
            window=Window((stride, stride), (padding, padding)),
            epilogue=Epilogue(
                scale, norm.bias - norm.running_mean * scale, stream, Activation("relu")
            ),
        )
        wanted = torch.cat([F.relu(norm(_zeroed(conv, unit)(a)) + stream) for unit in units])
    torch.testing.assert_close(got, wanted)
    assert got.is_contiguous(memory_format=torch.channels_last) == channels_last


def test_the_reference_is_a_linear_layer_without_the_unit() -> None:
    torch.manual_seed(0)
    layer, a = nn.Linear(6, 8), torch.randn(3, 5, 6)
    with torch.no_grad():
        got = masked_fanout_reference(
            layer(a),
            torch.stack([a[..., [u]] for u in range(4)]),
            torch.stack([layer.weight[:, [u]] for u in range(4)]),
            epilogue=Epilogue(activation=Activation("gelu")),
        )
        wanted = torch.cat([F.gelu(_zeroed(layer, [u])(a)) for u in range(4)])
    torch.testing.assert_close(got, wanted)


def test_a_constant_takes_the_units_place() -> None:
    torch.manual_seed(0)
    layer, a = nn.Linear(6, 8), torch.randn(3, 6)
    replaced = a.clone()
    replaced[:, 2] = 0.7
    with torch.no_grad():
        got = masked_fanout_reference(
            layer(a), a[None, :, [2]], layer.weight[None, :, [2]],
            constant=0.7 * layer.weight[None, :, 2],
        )  # fmt: skip
        torch.testing.assert_close(got, layer(replaced))


# ---- The kernel's source on the CPU -----------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize(("kernel", "window"), WINDOWS)
def test_convolutions(
    host: Library, layout: Layout, dtype: torch.dtype, kernel: tuple[int, int], window: Window
) -> None:
    shapes = itertools.product((1, 8), ((5, (9, 7)), (16, (8, 8)), (9, (11, 11))), (False, True))
    for seed, (inputs, (channels, size), shared) in enumerate(shapes):
        case = make_case(
            layout, dtype, kernel=kernel, window=window, inputs=inputs, channels=channels,
            size=size, shared_input=shared, seed=seed,
            activation=ACTIVATIONS[seed % len(ACTIVATIONS)],
        )  # fmt: skip
        check(run(host, case.problem()), case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [1, 8, 64])
def test_tokens(host: Library, dtype: torch.dtype, inputs: int) -> None:
    shapes = itertools.product((5, 16, 24), (1, 7), (False, True))
    for seed, (channels, tokens, shared) in enumerate(shapes):
        case = make_case(
            "tokens", dtype, inputs=inputs, channels=channels, size=(tokens, 1),
            shared_input=shared, seed=seed, activation=ACTIVATIONS[seed % len(ACTIVATIONS)],
        )  # fmt: skip
        check(run(host, case.problem()), case)


def test_linear_layers_of_two_and_four_dimensions(host: Library) -> None:
    rng = torch.Generator().manual_seed(0)
    for middle in ((), (3, 5)):
        case = Case(
            torch.randn((4, *middle, 8), generator=rng),
            torch.randn((2, 4, *middle, 3), generator=rng),
            torch.randn((2, 8, 3), generator=rng),
        )
        check(run(host, case.problem()), case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: f"{a.kind}{a.high:g}")
def test_activations(
    host: Library, layout: Layout, dtype: torch.dtype, activation: Activation
) -> None:
    for affine, other, constant in itertools.product((False, True), repeat=3):
        case = make_case(
            layout, dtype, channels=8, affine=affine, other=other, constant=constant,
            activation=activation,
        )  # fmt: skip
        check(run(host, case.problem()), case)


@pytest.mark.parametrize("scale", [False, True])
def test_scale_and_shift_come_alone_too(host: Library, scale: bool) -> None:
    whole = make_case("nchw", torch.float32)
    e = whole.epilogue
    one = replace(e, shift=None) if scale else replace(e, scale=None)
    case = replace(whole, epilogue=one)
    check(run(host, case.problem()), case)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variants_per_tile", [1, 2, 3, 4, 16])
def test_any_number_of_variants_per_thread(
    host: Library, layout: Layout, variants_per_tile: int
) -> None:
    case = make_case(layout, torch.float32, variants=5, channels=8, kernel=(1, 1))
    check(run(host, case.problem(), variants_per_tile=variants_per_tile), case)


@pytest.mark.parametrize(
    ("layout", "dtype", "channels", "size", "flank", "expected"),
    [
        ("nchw", torch.float32, 5, (4, 4), 64, 4),
        ("nchw", torch.float16, 5, (4, 4), 64, 8),
        ("nchw", torch.bfloat16, 5, (14, 14), 64, 4),  # 196 positions: 8 bytes, not 16
        ("nchw", torch.float16, 8, (7, 7), 64, 1),
        ("nchw", torch.float32, 5, (4, 4), 63, 1),  # the address is odd
        ("nchw", torch.float16, 5, (4, 4), 60, 4),
        ("channels_last", torch.float16, 8, (7, 7), 64, 8),
        ("channels_last", torch.float16, 12, (7, 7), 64, 4),
        ("channels_last", torch.float32, 6, (7, 7), 64, 1),
        ("tokens", torch.bfloat16, 24, (7, 1), 64, 8),
        ("tokens", torch.bfloat16, 24, (7, 1), 61, 1),
    ],
)
def test_vectors_are_as_long_as_shape_and_address_allow(
    host: Library,
    layout: Layout,
    dtype: torch.dtype,
    channels: int,
    size: tuple[int, int],
    flank: int,
    expected: int,
) -> None:
    case = make_case(layout, dtype, channels=channels, size=size, flank=flank)
    problem = case.problem()
    assert vector(host, problem) == expected
    for own in (FLANK, flank, FLANK - 1):  # the result's own address counts as well
        check(run(host, problem, flank=own), case)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["z", "r", "weight", "other"])
def test_one_odd_address_is_enough_for_shorter_vectors(
    host: Library, layout: Layout, name: str
) -> None:
    case = make_case(layout, torch.float16, channels=8, inputs=2, size=(4, 4))
    problem = case.problem()
    odd = getattr(problem, name)
    flat = inside_nans(odd.as_strided((odd.numel(),), (1,)).clone(), FLANK - 1)
    moved = flat.as_strided(odd.shape, odd.stride(), flat.storage_offset())
    check(run(host, replace(problem, **{name: moved})), case)


def test_r_may_have_any_strides(host: Library) -> None:
    case = make_case("nchw", torch.float32, channels=8, inputs=2, size=(4, 4))
    apart = torch.full((3, 2, 2, 17), float("nan"))[..., :16].unflatten(-1, (4, 4))
    apart.copy_(case.r)
    every_second = torch.full((3, 2, 2, 4, 8), float("nan"))[..., ::2]
    every_second.copy_(case.r)
    innermost = case.r.movedim(2, -1).contiguous().movedim(-1, 2)
    for r in (apart, every_second, innermost):
        assert not r.is_contiguous()
        check(run(host, replace(case.problem(), r=r)), case)


def test_weights_may_have_any_strides(host: Library) -> None:
    case = make_case("tokens", torch.float32, channels=8, inputs=2)
    plain = case.weight[..., None, None]
    buffer = torch.full((3, 8, 2, 4), float("nan"))
    every_fourth = buffer.as_strided(plain.shape, (64, 8, 4, 4, 4))
    every_fourth.copy_(plain)
    for weight in (plain, every_fourth):
        assert weight.stride(1) in (2, 8)
        check(run(host, replace(case.problem(), weight=weight)), case)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["z", "r", "weight", "other", "scale", "shift", "constant"])
def test_nothing_is_read_beyond_the_end(host: Library, layout: Layout, name: str) -> None:
    case = make_case(
        layout, torch.float32, kernel=(1, 1) if layout == "tokens" else (3, 3), constant=True,
        window=Window() if layout == "tokens" else Window(padding=(1, 1)),
    )  # fmt: skip
    problem = case.problem()
    problem = replace(problem, **{name: before_a_hole(getattr(problem, name))})
    params = problem.params()
    child = os.fork()
    if child == 0:  # nothing but the call: a read beyond the end stops this process
        os._exit(host.handle.masked_fanout_host(ctypes.byref(params), None))
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def before_a_hole(t: Tensor) -> Tensor:
    """A copy that ends where a page that cannot be read begins."""
    count, item = t.numel(), t.element_size()
    pages = -(-count * item // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    whole = torch.frombuffer(memory, dtype=t.dtype)
    flat = whole[: pages * mmap.PAGESIZE // item][-count:]
    flat.copy_(t.as_strided((count,), (1,)))
    hole = ctypes.c_void_p(whole.data_ptr() + pages * mmap.PAGESIZE)
    assert ctypes.CDLL(None).mprotect(hole, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    return flat.as_strided(t.shape, t.stride(), flat.storage_offset())


def test_one_pixel_is_read_along_the_channels(host: Library) -> None:
    case = make_case("nchw", torch.float16, channels=16, size=(1, 1))
    assert vector(host, case.problem()) == 8
    check(run(host, case.problem()), case)


def test_z_of_neither_layout_is_copied(host: Library) -> None:
    case = make_case("nchw", torch.float32, channels=8, size=(6, 6))
    turned = replace(
        case,
        z=case.z.transpose(2, 3),
        r=case.r.transpose(3, 4),
        epilogue=replace(case.epilogue, other=case.epilogue.other.transpose(2, 3)),  # type: ignore[union-attr]
    )
    check(run(host, turned.problem()), turned)


def test_r_may_repeat_without_memory(host: Library) -> None:
    case = make_case("nchw", torch.float32, channels=8, kernel=(3, 3))
    repeated = replace(case, r=case.r[:1].expand_as(case.r))
    check(run(host, repeated.problem()), repeated)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: f"{a.kind}{a.high:g}")
def test_what_is_not_finite_stays_so(host: Library, activation: Activation) -> None:
    z = torch.tensor([[float("nan"), float("inf"), -float("inf"), 1.0]])
    case = Case(
        z, torch.zeros(1, 1, 1), torch.zeros(1, 4, 1), epilogue=Epilogue(activation=activation)
    )
    # Infinity under GELU is infinity here and NaN in torch: both show that something is wrong.
    got, wanted = run(host, case.problem()), case.reference()
    assert got.isfinite().tolist() == wanted.isfinite().tolist()
    assert got[0, 0].isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conversions_are_torchs(host: Library, dtype: torch.dtype) -> None:
    widen, narrow = host.handle.masked_fanout_widen, host.handle.masked_fanout_narrow
    widen.restype, widen.argtypes = ctypes.c_float, (ctypes.c_uint16, ctypes.c_int)
    narrow.restype, narrow.argtypes = ctypes.c_uint16, (ctypes.c_float, ctypes.c_int)
    brain = dtype == torch.bfloat16
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)
    wide = torch.tensor([widen(bits, brain) for bits in range(1 << 16)])
    torch.testing.assert_close(wide, every.float(), rtol=0, atol=0, equal_nan=True)
    # Between two neighbours: the middle is a tie, and goes to the even one.
    finite = every[every.isfinite()].float().sort().values.unique()
    middle = (finite[1:] + finite[:-1]) / 2
    values = torch.cat(
        [every.float(), middle, middle.nextafter(finite[1:]), middle.nextafter(finite[:-1]),
         torch.tensor([65519.0, 65520.0, 65521.0, 1e30, 1e-30, 3.4e38])]
    )  # fmt: skip
    values = torch.cat([values, -values])
    got = torch.tensor([narrow(x, brain) for x in values.tolist()], dtype=torch.int32)
    torch.testing.assert_close(
        got.to(torch.uint16).view(dtype), values.to(dtype), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_variants_may_lie_beyond_32_bits(host: Library, layout: Layout, tmp_path: Path) -> None:
    case = make_case(layout, torch.float32, channels=8, size=(4, 4), kernel=(1, 1))
    apart = 3 << 30  # elements: 12 GB between two variants, of a file that is mostly holes
    size = 3 * case.z.numel()
    try:
        sparse = torch.from_file(
            str(tmp_path / "sparse"), shared=True, size=2 * apart + size, dtype=torch.float32
        )
    except RuntimeError as err:
        pytest.skip(f"no sparse files here: {err}")
    problem = case.problem()
    params = replace(problem, out=sparse).params()
    params.out_stride_v = apart
    assert host.handle.masked_fanout_host(ctypes.byref(params), None) == 0
    rows = [sparse[v * apart : v * apart + case.z.numel()] for v in range(3)]
    one = problem.out[: len(case.z)]
    check(torch.cat([row.as_strided(one.shape, one.stride()) for row in rows]), case)


def test_the_library_refuses_what_would_overflow(host: Library) -> None:
    problem = make_case("nchw", torch.float32).problem()
    for name, value in (("channels", 1 << 30), ("out_height", 8), ("dtype", 7), ("activation", 9)):
        params = problem.params()
        setattr(params, name, value)
        assert host.handle.masked_fanout_host(ctypes.byref(params), None) == 1, name


def test_a_library_of_another_version_is_refused(
    host: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fanout_library, "_ABI", 2)
    with pytest.raises(ValueError, match=r"has interface 0x1.*, this version needs 0x2"):
        Library(host.path, entry="masked_fanout_host")


# ---- What users see ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"r": torch.zeros(3, 2, 1, 5, 5)}, r"^z: height and width \(4, 4\) are not \(5, 5\)"),
        ({"r": torch.zeros(2, 2, 1, 4, 4)}, r"^r: .* is not \(3, 2, 1, H, W\)"),
        ({"r": torch.zeros(3, 2, 1, 4, 4).half()}, r"^r: torch.float16 does not go with z's"),
        ({"r": torch.zeros(3, 2, 1, 4, 4, device="meta")}, r"^r: is on meta, z on cpu"),
        ({"weight": torch.zeros(3, 5)}, r"^weight: \(3, 5\) is neither"),
        ({"weight": torch.zeros(3, 6, 1, 1, 1)}, r"^z: .* is not \(N, 6, Ho, Wo\)"),
        ({"z": torch.zeros(2, 5, 4, 4, dtype=torch.int32)}, r"^z: torch.int32 is not a floating"),
        ({"constant": torch.zeros(5)}, r"^constant: \(5,\) is not \(3, 5\)"),
        ({"epilogue": Epilogue(scale=torch.zeros(4))}, r"^scale: \(4,\) is not \(5,\)"),
        ({"epilogue": Epilogue(shift=torch.zeros(5).half())}, r"^shift: torch.float16 does not"),
        ({"epilogue": Epilogue(other=torch.zeros(2, 5, 4))}, r"^other: \(2, 5, 4\) is not"),
    ],
)
def test_an_error_names_the_argument(change: dict[str, object], words: str) -> None:
    arguments = {
        "z": torch.zeros(2, 5, 4, 4),
        "r": torch.zeros(3, 2, 1, 4, 4),
        "weight": torch.zeros(3, 5, 1, 1, 1),
        **change,
    }
    for function in (masked_fanout, masked_fanout_reference, lay_out):
        with pytest.raises(ValueError, match=words):
            function(**arguments)  # type: ignore[arg-type]


def test_linear_layers_have_no_window() -> None:
    with pytest.raises(ValueError, match="window: a linear layer"):
        masked_fanout(
            torch.zeros(2, 5), torch.zeros(3, 2, 1), torch.zeros(3, 5, 1),
            window=Window(stride=(2, 2)),
        )  # fmt: skip


def test_settings_that_no_layer_has() -> None:
    with pytest.raises(ValueError, match="activation: 'tanh' is none of none, relu"):
        Activation("tanh")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"hardtanh from 1\.0 to 0\.0 is empty"):
        Activation("hardtanh", 1.0, 0.0)
    with pytest.raises(ValueError, match=r"stride must be two numbers >= 1, not \(0, 1\)"):
        Window(stride=(0, 1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_the_cpu_the_reference_runs(layout: Layout) -> None:
    case = make_case(layout, torch.float32)
    assert fanout_backend("cpu") == "reference"
    got = masked_fanout(case.z, case.r, case.weight, epilogue=case.epilogue)
    torch.testing.assert_close(got, case.reference(), rtol=0, atol=0)


@pytest.mark.parametrize(("variants", "images"), [(0, 2), (3, 0)])
def test_nothing_in_nothing_out(variants: int, images: int) -> None:
    case = make_case("nchw", torch.float32, variants=variants, images=images)
    assert case.reference().shape == (0, 5, 9, 7)
    assert case.problem().out.shape == (0, 5, 9, 7)


# ---- Building and finding the library ---------------------------------------------------------


@pytest.fixture
def nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts a stand-in for nvcc first; its body sees the output's path in $out."""

    def make(body: str) -> Path:
        home = tmp_path / "cuda"
        (home / "bin").mkdir(parents=True, exist_ok=True)
        script = home / "bin" / "nvcc"
        script.write_text(
            '#!/bin/sh\nif [ "$1" = --version ]; then echo "release 1"; exit; fi\n'
            f'echo run >> {tmp_path}/runs\nfor out; do :; done\n{body}\n'
        )  # fmt: skip
        script.chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(home))
        return tmp_path / "runs"

    return make


def test_a_build_is_kept_and_found_by_its_sources(
    nvcc: Callable[[str], Path], tmp_path: Path
) -> None:
    runs, cache = nvcc('echo library > "$out"'), tmp_path / "cache"
    first = fanout_library.build_library((8, 6), cache_dir=cache)
    assert first.read_text() == "library\n"
    assert fanout_library.build_library((8, 6), cache_dir=cache) == first
    assert len(runs.read_text().splitlines()) == 1
    assert fanout_library.build_library((9, 0), cache_dir=cache) != first
    sources = shutil.copytree(SOURCES, tmp_path / "sources")
    with (sources / "masked_fanout.h").open("a") as file:
        file.write("// changed\n")
    assert fanout_library.build_library((8, 6), cache_dir=cache, sources=sources) != first


def test_a_build_that_fails_leaves_nothing_and_says_why(
    nvcc: Callable[[str], Path], tmp_path: Path
) -> None:
    nvcc('echo half > "$out"; echo "error: no such architecture" >&2; exit 1')
    with pytest.raises(OSError, match=r"nvcc failed: error: no such architecture"):
        fanout_library.build_library((8, 6), cache_dir=tmp_path / "cache")
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] in ([], [".lock"])


def test_without_sources_nothing_is_built(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="sources are not there"):
        fanout_library.build_library((8, 6), cache_dir=tmp_path, sources=tmp_path)


def test_a_fallback_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(fanout_library.SWITCH, "off")
    fanout_library._for_device.cache_clear()
    try:
        assert fanout_backend("cuda:0") == "reference"
        assert fanout_backend("cuda:0", torch.float16) == "reference"
    finally:
        fanout_library._for_device.cache_clear()
    assert [r.getMessage() for r in caplog.records] == [
        "masked_fanout runs on torch, not on its CUDA kernel: CSWAP_KERNELS=off"
    ]


def test_every_reason_for_a_fallback_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    monkeypatch.setattr(fanout_library, "import_module", _raise(ImportError("no")))
    monkeypatch.setattr(fanout_library, "find_nvcc", lambda: None)
    monkeypatch.setattr(fanout_library.platformdirs, "user_cache_path", lambda _: tmp_path)
    found = fanout_library._find(0)
    assert found == (
        "cswap_kernels is not installed (pip install ./kernels); "
        "nvcc was found neither in CUDA_HOME, on PATH nor in /usr/local/cuda"
    )


def _raise(error: Exception) -> Callable[[str], object]:
    def function(_: str) -> object:
        raise error

    return function


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch, host: Library) -> None:
    """CPU tensors take the way of CUDA tensors, to the host build."""
    monkeypatch.setattr(fanout, "fanout_backend", lambda *_: "cuda")
    monkeypatch.setattr(fanout_library, "cuda_library", lambda _: host)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))


@pytest.mark.usefixtures("pretend")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_library_is_called_with_everything(layout: Layout) -> None:
    case = make_case(layout, torch.float32, constant=True)
    got = masked_fanout(
        case.z, case.r, case.weight, constant=case.constant, window=case.window,
        epilogue=case.epilogue,
    )  # fmt: skip
    check(got, case)


@pytest.mark.usefixtures("pretend")
@pytest.mark.parametrize(("variants", "images"), [(0, 2), (3, 0)])
def test_the_library_is_not_called_for_nothing(variants: int, images: int) -> None:
    case = make_case("tokens", torch.float32, variants=variants, images=images)
    assert masked_fanout(case.z, case.r, case.weight).shape == (0, 9, 5)


@pytest.mark.usefixtures("pretend")
def test_gradients_come_from_the_reference() -> None:
    case = make_case("nchw", torch.float32)
    r = case.r.clone().requires_grad_()
    masked_fanout(case.z, r, case.weight).sum().backward()
    assert r.grad is not None
    with torch.no_grad():
        assert not masked_fanout(case.z, r, case.weight).requires_grad


@pytest.mark.usefixtures("pretend")
def test_a_launch_that_fails_says_with_which_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DTYPES, torch.float32, 9)
    case = make_case("nchw", torch.float32)
    words = r"masked_fanout did not start: error 1 \(z \(2, 5, 9, 7\), r \(3, 2, 1, 9, 7\)"
    with pytest.raises(RuntimeError, match=words):
        masked_fanout(case.z, case.r, case.weight)


def test_float64_is_the_references() -> None:
    assert fanout_backend("cuda:0", torch.float64) == "reference"


def _setup() -> object:
    import importlib.util

    spec = importlib.util.spec_from_file_location("setup_kernels", SOURCES.parent / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_package_is_built_for_what_nvcc_knows() -> None:
    flags = _setup().gencode({"75", "80", "90", "100", "121"})  # type: ignore[attr-defined]
    assert flags == [
        "-gencode=arch=compute_75,code=sm_75",
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]


@pytest.mark.slow
def test_nvcc_compiles_for_every_architecture(tmp_path: Path) -> None:
    nvcc = fanout_library.find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    made = tmp_path / "all.so"
    _setup().compile_library(nvcc, made)  # type: ignore[attr-defined]
    handle = ctypes.CDLL(str(made))  # every symbol resolves
    assert handle.masked_fanout_abi() == 1 << 16 | ctypes.sizeof(fanout_library.Params)


# ---- On a GPU ---------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def cuda() -> Library:
    """The kernel on the first GPU; a GPU that cannot run it fails the tests, with the reason."""
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    found = fanout_library._find(0)
    assert isinstance(found, Library), found
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gpu_matches_the_reference(cuda: Library, layout: Layout, dtype: torch.dtype) -> None:
    windows = WINDOWS[:1] if layout == "tokens" else WINDOWS
    shapes = itertools.product(windows, (1, 8), ((5, (9, 7)), (16, (8, 8)), (40, (14, 14))))
    for seed, ((kernel, window), inputs, (channels, size)) in enumerate(shapes):
        case = make_case(
            layout, dtype, kernel=kernel, window=window, inputs=inputs, channels=channels,
            size=size, seed=seed, shared_input=seed % 2 == 1, constant=seed % 3 == 0,
            activation=ACTIVATIONS[seed % len(ACTIVATIONS)],
        )  # fmt: skip
        on_gpu = case.to("cuda")
        stream = torch.cuda.current_stream().cuda_stream
        problem = on_gpu.problem()
        problem.out.fill_(float("nan"))
        cuda.run(problem, stream=stream)
        check(problem.out.cpu(), case)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gpu_serves_many_variants(cuda: Library, layout: Layout) -> None:
    case = make_case(layout, torch.float16, variants=70, images=3, channels=64, size=(14, 14))
    on_gpu = case.to("cuda")
    assert fanout_backend("cuda", torch.float16) == "cuda"
    got = masked_fanout(on_gpu.z, on_gpu.r, on_gpu.weight, epilogue=on_gpu.epilogue)
    check(got.cpu(), case)


@pytest.mark.gpu
def test_gpu_joins_the_current_stream(cuda: Library) -> None:
    case = make_case("nchw", torch.float32, channels=64, size=(28, 28)).to("cuda")
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # z is written late: whoever does not wait reads the old one
        case.z.mul_(2)
        got = masked_fanout(case.z, case.r, case.weight, epilogue=case.epilogue)
    side.synchronize()
    check(got.cpu(), case.to("cpu"))


@pytest.mark.gpu
@pytest.mark.slow
def test_gpu_indexes_beyond_32_bits(cuda: Library) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 12 << 30:
        pytest.skip("needs 12 GiB of GPU memory")
    channels = 2**20

    def draw(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float16, device="cuda").normal_()

    z, r = draw(1, channels, 28, 28), draw(3, 1, 1, 28, 28)
    weight = draw(3, channels, 1, 1, 1)
    got = masked_fanout(z, r, weight)
    assert got.numel() > 1 << 31
    for v in range(3):
        for part in (slice(0, 64), slice(channels - 64, channels)):
            case = Case(z[:, part].cpu(), r[[v]].cpu(), weight[[v], part].cpu())
            check(got[[v], part].cpu(), case)
