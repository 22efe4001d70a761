"""Plain modules in the place of others answer alike, and lose what could not be copied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from cswap_deploy.errors import UsageError
from cswap_deploy.models.adapters import Attention
from cswap_deploy.models.plain import plain
from cswap_deploy.models.torchvision_shim import import_timm

X = torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(0))
PADDING = torch.tensor([[False] * 5 + [True], [False] * 6, [False] * 3 + [True] * 3])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(6)


def attention(**settings: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    return nn.MultiheadAttention(16, 4, batch_first=True, **settings).eval()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "masks",
    [
        {},
        {"key_padding_mask": PADDING},
        {"attn_mask": CAUSAL},
        {"attn_mask": CAUSAL.bool(), "key_padding_mask": PADDING},
        {"attn_mask": CAUSAL.expand(12, 6, 6)},
    ],
    ids=["none", "padding", "causal", "both", "a head's own"],
)
def test_attention_answers_as_torchs(masks: dict[str, Any], bias: bool) -> None:
    before = attention(bias=bias)
    after, notes = plain(before)
    assert isinstance(after, Attention)
    assert notes == ("nn.MultiheadAttention was given plain operations: the network itself",)
    for inputs in ((X, X, X), (X, X.flip(1), X.flip(1)), (X, X, 2 * X)):
        want, weights = before(*inputs, **masks)
        got, found = after(*inputs, **masks)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found, weights, rtol=1e-4, atol=1e-6)
        assert after(*inputs, need_weights=False, **masks)[1] is None


def test_sequence_first_and_one_sequence() -> None:
    torch.manual_seed(0)
    before = nn.MultiheadAttention(16, 4).eval()
    after, _ = plain(before)
    for x in (X, X[:, 0]):
        torch.testing.assert_close(after(x, x, x)[0], before(x, x, x)[0], rtol=1e-4, atol=1e-6)


def test_an_encoder_does_not_take_the_fused_kernel_past_it() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    before = nn.TransformerEncoder(layer, 2).eval()
    after, _ = plain(before)
    with torch.no_grad():
        torch.testing.assert_close(after(X), before(X), rtol=1e-4, atol=1e-5)
    after.layers[0].self_attn.num_heads = 3  # type: ignore[union-attr, assignment]
    with pytest.raises(RuntimeError), torch.no_grad():
        after(X)


@pytest.mark.parametrize(
    "normed",
    [parametrizations.weight_norm, parametrizations.spectral_norm, weight_norm, spectral_norm],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_computed_weights_become_parameters(normed: Any) -> None:
    torch.manual_seed(0)
    before = nn.Sequential(normed(nn.Conv2d(3, 8, 3)), nn.Flatten()).eval()
    x = torch.randn(2, 3, 8, 8)
    want = before(x)
    after, notes = plain(before)
    torch.testing.assert_close(after(x), want)
    assert {*after.state_dict()} == {"0.weight", "0.bias"}
    assert isinstance(after[0].weight, nn.Parameter)  # type: ignore[index]
    assert len(notes) == 1
    assert notes[0].endswith(": 0")


@pytest.mark.parametrize("name", ["vit_tiny_r_s16_p8_224", "nf_regnet_b0"])
def test_standardised_weights_are_folded(name: str) -> None:
    torch.manual_seed(0)
    size = {"img_size": 64} if name.startswith("vit") else {}
    before = import_timm().create_model(name, num_classes=4, **size).eval()
    x = torch.randn(2, 3, 64, 64)
    after, (note,) = plain(before)
    assert note.startswith("standardised weights were folded: ")
    with torch.no_grad():
        torch.testing.assert_close(after(x), before(x), rtol=1e-3, atol=1e-5)


class Keeps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.seen: dict[str, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.linear(x)
        self.seen["it"] = [self.last, 2 * self.last]
        return self.last


def test_a_kept_activation_does_not_hinder_a_copy() -> None:
    module = Keeps()
    module(torch.ones(2, 4))
    copy, _ = plain(module)
    assert not copy.last.requires_grad
    torch.testing.assert_close(copy(torch.ones(2, 4)), module(torch.ones(2, 4)))


def test_lazy_modules_say_how_to_finish_them() -> None:
    with pytest.raises(
        UsageError,
        match=r"Sequential has lazy modules that were never run: 0.weight, 0.bias\n  fix: run it",
    ):
        plain(nn.Sequential(nn.LazyConv2d(8, 3)))
