"""Attention in the forms in which people write it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cswap_deploy.models.torchvision_shim import import_timm
from ordinary.base import CLASSES, Around, Tokens, network


def attended(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Softmax attention of (N, heads, T, D), heads joined again: (N, T, heads * D)."""
    weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + bias).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


@network()
class MultiheadAttention(Tokens):
    """``nn.MultiheadAttention``, batch first, without weights returned."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def mix(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


@network()
class SequenceFirst(Tokens):
    """``nn.MultiheadAttention`` as it is by default: sequence first, weights returned, no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, bias=False)

    def mix(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return self.attention(x, x, x)[0].transpose(0, 1)


@network()
class CrossAttention(Tokens):
    """Queries of one width read keys and values of others (``kdim``, ``vdim``)."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(32, 20)
        self.attention = nn.MultiheadAttention(32, 4, kdim=20, vdim=20, batch_first=True)

    def mix(self, x: Tensor) -> Tensor:
        y = self.other(x)
        return self.attention(x, y, y)[0]


@network()
class TransformerEncoder(nn.Module):
    """``nn.TransformerEncoder`` of two layers, with a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)
        return self.head(self.encoder(x)[:, 0])


@network()
class NormFirstEncoder(nn.Module):
    """``nn.TransformerEncoderLayer`` with norms first and GELU, behind convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 8, 8)
        self.layer = nn.TransformerEncoderLayer(
            32, 4, 64, activation="gelu", norm_first=True, batch_first=True
        )
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.stem(x).flatten(2).mT).mean(1))


@network()
class TransformerDecoder(nn.Module):
    """DETR's kind: learned queries read the map by ``nn.TransformerDecoderLayer``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 8, 8)
        self.queries = nn.Parameter(torch.randn(4, 32))
        self.layer = nn.TransformerDecoderLayer(32, 4, 64, batch_first=True)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        memory = self.stem(x).flatten(2).mT
        queries = self.queries.expand(x.shape[0], -1, -1)
        return self.head(self.layer(queries, memory).mean(1))


@network()
class TorchvisionTransformer(nn.Module):
    """torchvision's VisionTransformer."""

    def __init__(self) -> None:
        import_timm()  # mends torchvision beside a CPU build of torch
        from torchvision.models.vision_transformer import VisionTransformer

        super().__init__()
        self.vit = VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.vit(x)


class _Separate(Tokens):
    """Queries, keys and values by linear layers of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.project = (nn.Linear(32, 32) for _ in range(4))


@network()
class SeparateLinears(_Separate):
    """Queries, keys and values by three linear layers."""

    def mix(self, x: Tensor) -> Tensor:
        q, k, v = (self.split_heads(layer(x)) for layer in (self.q, self.k, self.v))
        return self.project(attended(q, k, v))


@network()
class ByView(_Separate):
    """Heads by ``view(n, t, heads, -1)``, scale from the shape, fused attention."""

    def mix(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = (
            layer(x).view(n, t, self.heads, c // self.heads).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        x = F.scaled_dot_product_attention(q, k, v)
        return self.project(x.transpose(1, 2).contiguous().view(n, t, c))


@network()
class Fused(Tokens):
    """One qkv layer, ``reshape(n, t, 3, heads, -1).permute(2, 0, 3, 1, 4)``, a stored scale."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.project = nn.Linear(32, 96, bias=False), nn.Linear(32, 32)
        self.scale = 8**-0.5

    def mix(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, 8).permute(2, 0, 3, 1, 4)
        weights = (q * self.scale @ k.transpose(-2, -1)).softmax(-1)
        return self.project((weights @ v).transpose(1, 2).reshape(n, t, 32))


@network()
class FusedChunks(Tokens):
    """One qkv layer in three chunks, heads by ``unflatten``."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.project = nn.Linear(32, 96), nn.Linear(32, 32)

    def mix(self, x: Tensor) -> Tensor:
        q, k, v = (self.split_heads(part) for part in self.qkv(x).chunk(3, -1))
        return self.project(attended(q, k, v))


@network()
class HeadsOutside(Tokens):
    """One qkv layer whose heads come first: ``reshape(n, t, heads, 3 * d)``, then chunks."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.project = nn.Linear(32, 96), nn.Linear(32, 32)

    def mix(self, x: Tensor) -> Tensor:
        q, k, v = self.split_heads(self.qkv(x)).chunk(3, -1)
        return self.project(attended(q, k, v))


@network()
class TalkingHeads(_Separate):
    """Talking heads: linear layers mix the heads before and after the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(4, 4), nn.Linear(4, 4)

    def mix(self, x: Tensor) -> Tensor:
        q, k, v = (self.split_heads(layer(x)) for layer in (self.q, self.k, self.v))
        scores = (q @ k.mT / math.sqrt(8)).permute(0, 2, 3, 1)
        weights = self.after(self.before(scores).softmax(2)).permute(0, 3, 1, 2)
        return self.project((weights @ v).transpose(1, 2).flatten(2))


@network()
class GroupedQueries(Tokens):
    """Grouped-query attention: four heads of queries, two of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.project = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)

    def mix(self, x: Tensor) -> Tensor:
        q = self.split_heads(self.q(x))
        k, v = (self.split_heads(part, 2) for part in self.kv(x).chunk(2, -1))
        k, v = (part.repeat_interleave(2, 1) for part in (k, v))
        return self.project(attended(q, k, v))


@network()
class OneKeyForAll(Tokens):
    """Multi-query attention: one head of keys and values for all queries."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 8), nn.Linear(32, 8)
        self.project = nn.Linear(32, 32)

    def mix(self, x: Tensor) -> Tensor:
        k, v = self.k(x).unsqueeze(1), self.v(x).unsqueeze(1)
        return self.project(attended(self.split_heads(self.q(x)), k, v))


@network()
class RelativePositions(_Separate):
    """Swin's table of relative positions, one column for each head, read by an index buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.bias_table = nn.Parameter(torch.zeros(49, 4))
        at = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"))
        near = at.flatten(1)[:, :, None] - at.flatten(1)[:, None] + 3
        self.register_buffer("index", near[0] * 7 + near[1])

    def mix(self, x: Tensor) -> Tensor:
        q, k, v = (self.split_heads(layer(x)) for layer in (self.q, self.k, self.v))
        bias = self.bias_table[self.index.view(-1)].view(16, 16, -1).permute(2, 0, 1)
        return self.project(attended(q, k, v, bias.unsqueeze(0)))


@network()
class HeadBiases(_Separate):
    """LeViT's kind: a bias for each head and offset, indexed; values wider than keys."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.project = nn.Linear(32, 64), nn.Linear(64, 32)
        self.attention_biases = nn.Parameter(torch.zeros(4, 16))
        distance = (torch.arange(16)[:, None] - torch.arange(16)).abs()
        self.register_buffer("index", distance, persistent=False)

    def mix(self, x: Tensor) -> Tensor:
        q, k, v = (self.split_heads(layer(x)) for layer in (self.q, self.k, self.v))
        return self.project(attended(q, k, v, self.attention_biases[:, self.index]))


@network()
class ContinuousPositions(_Separate):
    """Swin V2: cosine attention with a scale for each head, its biases from a small MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.ones(4, 1, 1))
        self.positions = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 4, bias=False))
        at = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))
        self.register_buffer("offsets", at[:, None] - at)

    def mix(self, x: Tensor) -> Tensor:
        q, k, v = (self.split_heads(layer(x)) for layer in (self.q, self.k, self.v))
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
        scores = scores * self.logit_scale.clamp(max=4.6).exp()
        bias = 4 * torch.sigmoid(self.positions(self.offsets)).permute(2, 0, 1)
        return self.project(((scores + bias).softmax(-1) @ v).transpose(1, 2).flatten(2))


@network()
class Rotary(_Separate):
    """Rotary positions: pairs of a head's dimensions turned by buffers of sines and cosines."""

    def __init__(self) -> None:
        super().__init__()
        angles = torch.arange(16.0)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])
        self.register_buffer("sin", angles.sin().repeat_interleave(2, 1))
        self.register_buffer("cos", angles.cos().repeat_interleave(2, 1))

    def turned(self, x: Tensor) -> Tensor:
        other = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        return x * self.cos + other * self.sin

    def mix(self, x: Tensor) -> Tensor:
        q, k, v = (self.split_heads(layer(x)) for layer in (self.q, self.k, self.v))
        return self.project(attended(self.turned(q), self.turned(k), v))


@network()
class NormedQueries(_Separate):
    """A layer norm over each head's queries and keys (ViT-22B)."""

    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm = nn.LayerNorm(8), nn.LayerNorm(8)

    def mix(self, x: Tensor) -> Tensor:
        q, k, v = (self.split_heads(layer(x)) for layer in (self.q, self.k, self.v))
        return self.project(attended(self.q_norm(q), self.k_norm(k), v))


@network()
class LinearAttention(_Separate):
    """Linear attention: keys times values first, no softmax over tokens."""

    def mix(self, x: Tensor) -> Tensor:
        q, k, v = (self.split_heads(layer(x)) for layer in (self.q, self.k, self.v))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        x = q @ (k.mT @ v) / (q @ k.sum(2, keepdim=True).mT + 1e-6)
        return self.project(x.transpose(1, 2).flatten(2))


@network()
class ChannelAttention(Tokens):
    """XCiT: attention between channels of a head, with a temperature for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.project = nn.Linear(32, 96), nn.Linear(32, 32)
        self.temperature = nn.Parameter(torch.ones(4, 1, 1))

    def mix(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, -1).permute(2, 0, 3, 4, 1)
        weights = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * self.temperature
        return self.project((weights.softmax(-1) @ v).permute(0, 3, 1, 2).reshape(n, t, c))


@network()
class EinsumAttention(_Separate):
    """Attention by ``torch.einsum`` on (n, t, heads, d)."""

    def mix(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (4, 8)) for layer in (self.q, self.k, self.v))
        weights = torch.einsum("nqhd,nkhd->nhqk", q, k).div(8**0.5).softmax(-1)
        return self.project(torch.einsum("nhqk,nkhd->nqhd", weights, v).flatten(2))


@network()
class NonLocal(Around):
    """The non-local block: attention over positions by 1x1 convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.theta, self.phi, self.g = (nn.Conv2d(24, 12, 1) for _ in range(3))
        self.out_of = nn.Conv2d(12, 24, 1)

    def middle(self, x: Tensor) -> Tensor:
        y = F.max_pool2d(x, 2)
        q = self.theta(x).flatten(2).mT
        k, v = self.phi(y).flatten(2), self.g(y).flatten(2).mT
        y = ((q @ k).softmax(-1) @ v).mT.reshape(x.shape[0], 12, *x.shape[2:])
        return x + self.out_of(y)


@network()
class BottleneckAttention(Around):
    """BoTNet: one 1x1 convolution makes q, k and v, split and put into heads by view."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out_of = nn.Conv2d(24, 96, 1, bias=False), nn.Conv2d(32, 24, 1)

    def middle(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        q, k, v = torch.split(self.qkv(x), 32, 1)
        q, k, v = (part.reshape(n * 4, 8, h * w) for part in (q, k, v))
        weights = (q.mT @ k * 8**-0.5).softmax(-1)
        return x + self.out_of((v @ weights.mT).reshape(n, 32, h, w))


@network()
class AttentionPool(nn.Module):
    """CLIP's attention pool: the mean as a token asks all positions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 8, 8), nn.ReLU())
        self.position = nn.Parameter(torch.zeros(17, 32))
        self.attention = nn.MultiheadAttention(32, 4)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).permute(2, 0, 1)
        x = torch.cat([x.mean(0, keepdim=True), x]) + self.position[:, None]
        return self.head(self.attention(x[:1], x, x, need_weights=False)[0][0])


@network()
class MlpMixer(Tokens):
    """MLP-Mixer: an MLP over tokens instead of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.over = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def mix(self, x: Tensor) -> Tensor:
        return self.over(x.transpose(1, 2)).transpose(1, 2)


@network()
class GatedMlp(Tokens):
    """SwiGLU beside the residual stream: one layer, halves multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.out_of = nn.Linear(32, 96), nn.Linear(48, 32)

    def mix(self, x: Tensor) -> Tensor:
        gate, value = self.both(x).chunk(2, -1)
        return self.out_of(F.silu(gate) * value)


@network()
class TwoOutputsOneStream(Tokens):
    """DeiT distilled: two class tokens, two heads, their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.tokens = nn.Parameter(torch.randn(1, 2, 32))
        self.other = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT + self.position
        x = torch.cat([self.tokens.expand(x.shape[0], -1, -1), x], 1)
        y = self.norm1(x)
        x = x + self.attention(y, y, y)[0]
        x = self.norm(x + self.mlp(self.norm2(x)))
        return (self.head(x[:, 0]) + self.other(x[:, 1])) / 2
