"""The reference against real layers; the kernel's source, run on the CPU, against the reference."""

from __future__ import annotations

import copy
import ctypes
import itertools
import mmap
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fanout_cases import (
    ACTIVATIONS,
    FLANK,
    LAYOUTS,
    WINDOWS,
    Layout,
    check,
    inside_nans,
    make_case,
    run,
)
from torch import Tensor, nn

from cswap_deploy.causal import fanout_library
from cswap_deploy.causal.fanout import (
    Activation,
    Epilogue,
    Fanout,
    lay_out,
    masked_fanout,
    masked_fanout_reference,
)
from cswap_deploy.causal.fanout_library import DTYPES, Library, Problem
from cswap_deploy.network.unfolding import Window

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
    out = masked_fanout(Fanout(z, r, weight, epilogue=epilogue))
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
        shift = norm.bias - norm.running_mean * scale
        got = masked_fanout_reference(
            Fanout(
                conv(a),
                torch.stack([a[:, unit] for unit in units]),
                torch.stack([conv.weight[:, unit] for unit in units]),
                window=Window((kernel, kernel), (stride, stride), (padding, padding)),
                epilogue=Epilogue(scale, shift, stream, Activation("relu")),
            )
        )
        wanted = torch.cat([F.relu(norm(_zeroed(conv, unit)(a)) + stream) for unit in units])
    torch.testing.assert_close(got, wanted)
    assert got.is_contiguous(memory_format=torch.channels_last) == channels_last


def test_the_reference_is_a_linear_layer_without_the_unit() -> None:
    torch.manual_seed(0)
    layer, a = nn.Linear(6, 8), torch.randn(3, 5, 6)
    with torch.no_grad():
        got = masked_fanout_reference(
            Fanout(
                layer(a),
                torch.stack([a[..., [u]] for u in range(4)]),
                torch.stack([layer.weight[:, [u]] for u in range(4)]),
                epilogue=Epilogue(activation=Activation("gelu")),
            )
        )
        wanted = torch.cat([F.gelu(_zeroed(layer, [u])(a)) for u in range(4)])
    torch.testing.assert_close(got, wanted)


def test_a_constant_takes_the_units_place() -> None:
    torch.manual_seed(0)
    layer, a = nn.Linear(6, 8), torch.randn(3, 6)
    replaced = a.clone()
    replaced[:, 2] = 0.7
    with torch.no_grad():
        weight = layer.weight[None, :, [2]]
        case = Fanout(layer(a), a[None, :, [2]], weight, constant=0.7 * weight[..., 0])
        torch.testing.assert_close(masked_fanout_reference(case), layer(replaced))


# ---- The kernel's source on the CPU -----------------------------------------------------------


def vector(host: Library, problem: Problem) -> int:
    """Elements that one thread reads and writes together."""
    found = host.handle.masked_fanout_vector(ctypes.byref(problem.params()))
    assert isinstance(found, int)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("window", WINDOWS)
def test_convolutions(host: Library, layout: Layout, dtype: torch.dtype, window: Window) -> None:
    shapes = itertools.product((1, 8), ((5, (9, 7)), (16, (8, 8)), (9, (11, 11))), (False, True))
    for seed, (inputs, (channels, size), shared) in enumerate(shapes):
        case = make_case(
            layout, dtype, window=window, inputs=inputs, channels=channels,
            size=size, shared_input=shared, seed=seed,
            activation=ACTIVATIONS[seed % len(ACTIVATIONS)],
        )  # fmt: skip
        check(run(host, lay_out(case)), case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [1, 8, 64])
def test_tokens(host: Library, dtype: torch.dtype, inputs: int) -> None:
    shapes = itertools.product((5, 16, 24), (1, 7), (False, True))
    for seed, (channels, tokens, shared) in enumerate(shapes):
        case = make_case(
            "tokens", dtype, inputs=inputs, channels=channels, size=(tokens, 1),
            shared_input=shared, seed=seed, activation=ACTIVATIONS[seed % len(ACTIVATIONS)],
        )  # fmt: skip
        check(run(host, lay_out(case)), case)


def test_linear_layers_of_two_and_four_dimensions(host: Library) -> None:
    rng = torch.Generator().manual_seed(0)
    for middle in ((), (3, 5)):
        case = Fanout(
            torch.randn((4, *middle, 8), generator=rng),
            torch.randn((2, 4, *middle, 3), generator=rng),
            torch.randn((2, 8, 3), generator=rng),
        )
        check(run(host, lay_out(case)), case)


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
        check(run(host, lay_out(case)), case)


@pytest.mark.parametrize("scale", [False, True])
def test_scale_and_shift_come_alone_too(host: Library, scale: bool) -> None:
    whole = make_case("nchw", torch.float32)
    e = whole.epilogue
    one = replace(e, shift=None) if scale else replace(e, scale=None)
    case = replace(whole, epilogue=one)
    check(run(host, lay_out(case)), case)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variants_per_tile", [1, 2, 3, 4, 16])
def test_any_number_of_variants_per_thread(
    host: Library, layout: Layout, variants_per_tile: int
) -> None:
    case = make_case(layout, torch.float32, variants=5, channels=8)
    check(run(host, lay_out(case), variants_per_tile=variants_per_tile), case)


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
    problem = lay_out(case)
    assert vector(host, problem) == expected
    for own in (FLANK, flank, FLANK - 1):  # the result's own address counts as well
        check(run(host, problem, flank=own), case)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["z", "r", "weight", "other"])
def test_one_odd_address_is_enough_for_shorter_vectors(
    host: Library, layout: Layout, name: str
) -> None:
    case = make_case(layout, torch.float16, channels=8, inputs=2, size=(4, 4))
    problem = lay_out(case)
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
        check(run(host, replace(lay_out(case), r=r)), case)


def test_weights_may_have_any_strides(host: Library) -> None:
    case = make_case("tokens", torch.float32, channels=8, inputs=2)
    plain = case.weight[..., None, None]
    buffer = torch.full((3, 8, 2, 4), float("nan"))
    every_fourth = buffer.as_strided(plain.shape, (64, 8, 4, 4, 4))
    every_fourth.copy_(plain)
    for weight in (plain, every_fourth):
        assert weight.stride(1) in (2, 8)
        check(run(host, replace(lay_out(case), weight=weight)), case)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["z", "r", "weight", "other", "scale", "shift", "constant"])
def test_nothing_is_read_beyond_the_end(host: Library, layout: Layout, name: str) -> None:
    case = make_case(
        layout, torch.float32, constant=True,
        window=Window() if layout == "tokens" else Window((3, 3), padding=(1, 1)),
    )  # fmt: skip
    problem = lay_out(case)
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
    assert vector(host, lay_out(case)) == 8
    check(run(host, lay_out(case)), case)


def test_z_of_neither_layout_is_copied(host: Library) -> None:
    case = make_case("nchw", torch.float32, channels=8, size=(6, 6))
    turned = replace(
        case,
        z=case.z.transpose(2, 3),
        r=case.r.transpose(3, 4),
        epilogue=replace(case.epilogue, other=case.epilogue.other.transpose(2, 3)),  # type: ignore[union-attr]
    )
    check(run(host, lay_out(turned)), turned)


def test_r_may_repeat_without_memory(host: Library) -> None:
    case = make_case("nchw", torch.float32, channels=8, window=Window((3, 3)))
    repeated = replace(case, r=case.r[:1].expand_as(case.r))
    check(run(host, lay_out(repeated)), repeated)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: f"{a.kind}{a.high:g}")
def test_what_is_not_finite_stays_so(host: Library, activation: Activation) -> None:
    z = torch.tensor([[float("nan"), float("inf"), -float("inf"), 1.0]])
    case = Fanout(
        z, torch.zeros(1, 1, 1), torch.zeros(1, 4, 1), epilogue=Epilogue(activation=activation)
    )
    # Infinity under GELU is infinity here and NaN in torch: both show that something is wrong.
    got, wanted = run(host, lay_out(case)), masked_fanout_reference(case)
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
    case = make_case(layout, torch.float32, channels=8, size=(4, 4))
    apart = 3 << 30  # elements: 12 GB between two variants, of a file that is mostly holes
    size = 3 * case.z.numel()
    try:
        sparse = torch.from_file(
            str(tmp_path / "sparse"), shared=True, size=2 * apart + size, dtype=torch.float32
        )
    except RuntimeError as err:
        pytest.skip(f"no sparse files here: {err}")
    problem = lay_out(case)
    params = replace(problem, out=sparse).params()
    params.out_stride_v = apart
    assert host.handle.masked_fanout_host(ctypes.byref(params), None) == 0
    rows = [sparse[v * apart : v * apart + case.z.numel()] for v in range(3)]
    one = problem.out[: len(case.z)]
    check(torch.cat([row.as_strided(one.shape, one.stride()) for row in rows]), case)


def test_the_library_refuses_what_would_overflow(host: Library) -> None:
    problem = lay_out(make_case("nchw", torch.float32))
    for name, value in (("channels", 1 << 30), ("out_height", 8), ("dtype", 7), ("activation", 9)):
        params = problem.params()
        setattr(params, name, value)
        assert host.handle.masked_fanout_host(ctypes.byref(params), None) == 1, name


def test_a_library_of_another_version_is_refused(
    host: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fanout_library, "ABI", 2)
    with pytest.raises(ValueError, match=r"has interface 0x1.*, this version needs 0x2"):
        Library(host.path, entry="masked_fanout_host")
