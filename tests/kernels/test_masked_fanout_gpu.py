"""The kernel on a GPU, against the reference on the CPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from fanout_cases import ACTIVATIONS, LAYOUTS, WINDOWS, Layout, changed, check, make_case
from torch import Tensor

from cswap_deploy.causal import fanout_library
from cswap_deploy.causal.fanout import (
    Fanout,
    fanout_backend,
    lay_out,
    masked_fanout,
)
from cswap_deploy.causal.fanout_library import DTYPES, Library


@pytest.fixture(scope="session")
def cuda() -> Library:
    """The kernel on the first GPU; a GPU that cannot run it fails the tests, with the reason."""
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    found = fanout_library.find_library(0)
    assert isinstance(found, Library), found
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gpu_matches_the_reference(cuda: Library, layout: Layout, dtype: torch.dtype) -> None:
    windows = WINDOWS[:1] if layout == "tokens" else WINDOWS
    shapes = itertools.product(windows, (1, 8), ((5, (9, 7)), (16, (8, 8)), (40, (14, 14))))
    for seed, (window, inputs, (channels, size)) in enumerate(shapes):
        case = make_case(
            layout, dtype, window=window, inputs=inputs, channels=channels,
            size=size, seed=seed, shared_input=seed % 2 == 1, constant=seed % 3 == 0,
            activation=ACTIVATIONS[seed % len(ACTIVATIONS)],
        )  # fmt: skip
        on_gpu = changed(case, Tensor.cuda)
        stream = torch.cuda.current_stream().cuda_stream
        problem = lay_out(on_gpu)
        problem.out.fill_(float("nan"))
        cuda.run(problem, stream=stream)
        check(problem.out.cpu(), case)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gpu_serves_many_variants(cuda: Library, layout: Layout) -> None:
    case = make_case(layout, torch.float16, variants=70, images=3, channels=64, size=(14, 14))
    on_gpu = changed(case, Tensor.cuda)
    assert fanout_backend("cuda", torch.float16) == "cuda"
    got = masked_fanout(on_gpu)
    check(got.cpu(), case)


@pytest.mark.gpu
def test_gpu_joins_the_current_stream(cuda: Library) -> None:
    case = make_case("nchw", torch.float32, channels=64, size=(28, 28))
    case = changed(case, Tensor.cuda)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # z is written late: whoever does not wait reads the old one
        case.z.mul_(2)
        got = masked_fanout(case)
    side.synchronize()
    check(got.cpu(), changed(case, Tensor.cpu))


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
    got = masked_fanout(Fanout(z, r, weight))
    assert got.numel() > 1 << 31
    for v in range(3):
        for part in (slice(0, 64), slice(channels - 64, channels)):
            case = Fanout(z[:, part].cpu(), r[[v]].cpu(), weight[[v], part].cpu())
            check(got[[v], part].cpu(), case)
