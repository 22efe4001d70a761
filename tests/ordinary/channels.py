"""Slices, splits, shuffles and concatenations of channels; gates; norms; other convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ordinary.base import CLASSES, Around, cbr, network


@network()
class SlicedGate(Around):
    """``y[:, :24] * sigmoid(y[:, 24:])``."""

    def __init__(self) -> None:
        super().__init__()
        self.both = cbr(24, 48)

    def middle(self, x: Tensor) -> Tensor:
        y = self.both(x)
        return y[:, :24] * torch.sigmoid(y[:, 24:])


@network()
class Glu(Around):
    """``F.glu`` over channels, after a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Sequential(nn.Conv2d(24, 48, 3, padding=1), nn.BatchNorm2d(48))

    def middle(self, x: Tensor) -> Tensor:
        return F.glu(self.both(x), 1)


@network()
class PartialConvolution(Around):
    """FasterNet: a convolution over the first quarter of the channels, by split and cat."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.mlp = nn.Sequential(cbr(24, 48, 1), nn.Conv2d(48, 24, 1, bias=False))

    def middle(self, x: Tensor) -> Tensor:
        a, b = torch.split(x, [6, 18], 1)
        return x + self.mlp(torch.cat([self.part(a), b], 1))


@network()
class PartialInPlace(Around):
    """FasterNet's other form: the slice of a clone is written."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Conv2d(6, 6, 3, padding=1, bias=False)

    def middle(self, x: Tensor) -> Tensor:
        x = x.clone()
        x[:, :6] = self.part(x[:, :6])
        return x


class _ShuffleUnit(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.branch = nn.Sequential(
            cbr(half, half, 1),
            nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False), nn.BatchNorm2d(half),
            cbr(half, half, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        n, c, h, w = x.shape
        x = torch.cat([a, self.branch(b)], 1)
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


@network()
class ShuffleNet(Around):
    """ShuffleNetV2: halves, one of them convolved, concatenated and shuffled."""

    def __init__(self) -> None:
        super().__init__()
        self.units = nn.Sequential(_ShuffleUnit(24), _ShuffleUnit(24))

    def middle(self, x: Tensor) -> Tensor:
        return self.units(x)


@network()
class ShuffledGroups(Around):
    """ShuffleNetV1: grouped convolutions with ``nn.ChannelShuffle`` between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = cbr(24, 24, 1, groups=3), cbr(24, 24, groups=3)
        self.shuffle = nn.ChannelShuffle(3)

    def middle(self, x: Tensor) -> Tensor:
        return x + self.second(self.shuffle(self.first(x)))


@network()
class Unbound(Around):
    """``unflatten`` and ``unbind`` of channels into three."""

    out = 16

    def __init__(self) -> None:
        super().__init__()
        self.three = cbr(24, 48)

    def middle(self, x: Tensor) -> Tensor:
        a, b, c = self.three(x).unflatten(1, (3, 16)).unbind(1)
        return a * torch.sigmoid(b) + c


@network()
class EvenAndOdd(Around):
    """Channels by strided slices: even ones and odd ones."""

    out = 12

    def middle(self, x: Tensor) -> Tensor:
        return x[:, ::2] - x[:, 1::2]


@network()
class Picked(Around):
    """Channels by a list of indices, and by ``index_select`` on a buffer."""

    out = 16

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.arange(23, 11, -1))

    def middle(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, [0, 5, 2, 7]], x.index_select(1, self.order)], 1)


@network()
class Narrowed(Around):
    """``narrow``: all channels but the first four, which go past the block."""

    def __init__(self) -> None:
        super().__init__()
        self.rest = cbr(20, 20)

    def middle(self, x: Tensor) -> Tensor:
        return torch.cat([x.narrow(1, 0, 4), self.rest(x.narrow(1, 4, 20))], 1)


@network()
class GatedFeedForward(Around):
    """Restormer's gated feed-forward: a depthwise convolution, ``chunk``, GELU times the other."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Conv2d(24, 64, 1)
        self.depthwise = nn.Conv2d(64, 64, 3, padding=1, groups=64)
        self.out_of = nn.Conv2d(32, 24, 1)

    def middle(self, x: Tensor) -> Tensor:
        a, b = self.depthwise(self.into(x)).chunk(2, dim=1)
        return x + self.out_of(F.gelu(a) * b)


@network()
class SimpleGate(Around):
    """NAFNet: halves multiplied, and a channel attention of one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.attend = nn.Conv2d(24, 48, 1), nn.Conv2d(24, 24, 1)
        self.out_of = nn.Conv2d(24, 24, 1)
        self.beta = nn.Parameter(torch.zeros(1, 24, 1, 1))

    def middle(self, x: Tensor) -> Tensor:
        a, b = self.into(x).chunk(2, 1)
        y = a * b
        y = y * self.attend(F.adaptive_avg_pool2d(y, 1))
        return x + self.out_of(y) * self.beta


@network()
class Res2Net(Around):
    """Res2Net: parts of the channels, each convolved after the one before is added."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out_of = cbr(24, 32, 1), nn.Conv2d(32, 24, 1, bias=False)
        self.parts = nn.ModuleList(cbr(8, 8) for _ in range(3))

    def middle(self, x: Tensor) -> Tensor:
        first, *rest = torch.split(self.into(x), 8, 1)
        found, last = [first], None
        for part, conv in zip(rest, self.parts, strict=True):
            last = conv(part if last is None else part + last)
            found.append(last)
        return F.relu(x + self.out_of(torch.cat(found, 1)))


@network()
class ElanSplit(Around):
    """YOLOv8's C2f: halves, of which one goes on through bottlenecks; all are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out_of = cbr(24, 32, 1), cbr(64, 24, 1)
        self.blocks = nn.ModuleList(nn.Sequential(cbr(16, 16), cbr(16, 16)) for _ in range(2))

    def middle(self, x: Tensor) -> Tensor:
        found = list(self.into(x).chunk(2, 1))
        for block in self.blocks:
            found.append(found[-1] + block(found[-1]))
        return self.out_of(torch.cat(found, 1))


@network()
class DenseBlock(Around):
    """DenseNet: every layer reads all maps before it."""

    out = 48

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(w), nn.ReLU(), nn.Conv2d(w, 8, 3, padding=1, bias=False))
            for w in (24, 32, 40)
        )

    def middle(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


@network()
class Inception(Around):
    """Four branches, concatenated; one of them pools."""

    out = 40

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = cbr(24, 8, 1), nn.Sequential(cbr(24, 8, 1), cbr(8, 16))
        self.c = nn.Sequential(cbr(24, 8, 1), cbr(8, 8, 5))
        self.d = nn.Sequential(nn.MaxPool2d(3, 1, 1), cbr(24, 8, 1))

    def middle(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x), self.c(x), self.d(x)], 1)


@network()
class GhostModule(Around):
    """GhostNet: a depthwise convolution makes half of the channels, the sum is cut to size."""

    out = 30

    def __init__(self) -> None:
        super().__init__()
        self.primary, self.cheap = cbr(24, 16, 1), cbr(16, 16, groups=16)

    def middle(self, x: Tensor) -> Tensor:
        y = self.primary(x)
        return torch.cat([y, self.cheap(y)], 1)[:, :30]


@network()
class DoubledDepthwise(Around):
    """A depthwise convolution with a depth multiplier of two, and one of three."""

    out = 144

    def __init__(self) -> None:
        super().__init__()
        self.two, self.three = cbr(24, 48, groups=24), cbr(48, 144, groups=48)

    def middle(self, x: Tensor) -> Tensor:
        return self.three(self.two(x))


@network()
class GroupedChain(Around):
    """Grouped convolutions of four and of six groups, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.four, self.six = cbr(24, 48, groups=4), cbr(48, 24, groups=6)

    def middle(self, x: Tensor) -> Tensor:
        return self.six(self.four(x))


@network()
class Transposed(Around):
    """A U-Net of two levels: a transposed convolution, concatenated with the map it came from."""

    out = 48

    def __init__(self) -> None:
        super().__init__()
        self.down = cbr(24, 32, stride=2)
        self.up, self.norm = nn.ConvTranspose2d(32, 24, 2, stride=2), nn.BatchNorm2d(24)

    def middle(self, x: Tensor) -> Tensor:
        return torch.cat([x, F.relu(self.norm(self.up(self.down(x))))], 1)


@network()
class TransposedGroups(Around):
    """A grouped transposed convolution and a depthwise one, with output padding."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.ConvTranspose2d(24, 24, 3, 2, 1, output_padding=1, groups=4)
        self.depthwise = nn.ConvTranspose2d(24, 24, 4, 2, 1, groups=24, bias=False)

    def middle(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(x, 4)
        return F.relu(self.depthwise(F.relu(self.grouped(x))))


@network()
class Maxout(Around):
    """Maxout: the larger of two channels, by view and ``max``."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces = nn.Conv2d(24, 48, 3, padding=1)

    def middle(self, x: Tensor) -> Tensor:
        y = self.pieces(x)
        return y.view(y.shape[0], 24, 2, *y.shape[2:]).amax(2)


@network()
class MaxFeatureMap(Around):
    """LightCNN: the larger of two halves."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces = cbr(24, 48)

    def middle(self, x: Tensor) -> Tensor:
        return torch.maximum(*torch.chunk(self.pieces(x), 2, 1))


@network()
class ConcatenatedRelu(Around):
    """CReLU: the map and its negative, concatenated."""

    out = 48

    def middle(self, x: Tensor) -> Tensor:
        x = x - 0.5
        return F.relu(torch.cat([x, -x], 1))


@network()
class SqueezeByConvolution(Around):
    """Squeeze-and-excitation by 1x1 convolutions, hard sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(24, 8, 1), nn.Conv2d(8, 24, 1)

    def middle(self, x: Tensor) -> Tensor:
        gate = self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1))))
        return x * F.hardsigmoid(gate)


@network()
class SqueezeByLinear(Around):
    """Squeeze-and-excitation by linear layers: ``view(b, c)`` there, ``view(b, c, 1, 1)`` back."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(24, 6), nn.ReLU(), nn.Linear(6, 24), nn.Sigmoid())

    def middle(self, x: Tensor) -> Tensor:
        b, c = x.shape[:2]
        gate = self.gate(F.adaptive_avg_pool2d(x, 1).view(b, c)).view(b, c, 1, 1)
        return x * gate.expand_as(x)


@network()
class EfficientAttention(Around):
    """ECA: a Conv1d over the channels of the pooled map."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.over = cbr(24, 24), nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def middle(self, x: Tensor) -> Tensor:
        x = self.body(x)
        gate = self.over(x.mean((2, 3), keepdim=True).squeeze(-1).transpose(-1, -2))
        return x * torch.sigmoid(gate.transpose(-1, -2).unsqueeze(-1))


@network()
class EfficientAttentionByView(Around):
    """ECA as timm writes it: ``mean``, ``view(n, 1, -1)``, Conv1d, ``view(n, -1, 1, 1)``."""

    def __init__(self) -> None:
        super().__init__()
        self.over = nn.Conv1d(1, 1, 5, padding=2)

    def middle(self, x: Tensor) -> Tensor:
        gate = self.over(x.mean((2, 3)).view(x.shape[0], 1, -1))
        return x * gate.view(x.shape[0], -1, 1, 1).sigmoid()


@network()
class BlockAttention(Around):
    """CBAM: a channel gate of two pools and one MLP, and a spatial gate of channel statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Conv2d(24, 6, 1), nn.ReLU(), nn.Conv2d(6, 24, 1))
        self.spatial = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def middle(self, x: Tensor) -> Tensor:
        gate = self.mlp(F.adaptive_avg_pool2d(x, 1)) + self.mlp(F.adaptive_max_pool2d(x, 1))
        x = x * torch.sigmoid(gate)
        seen = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.spatial(seen))


@network()
class CoordinateAttention(Around):
    """Coordinate attention: pools of rows and of columns, one convolution, split again."""

    def __init__(self) -> None:
        super().__init__()
        self.both = cbr(24, 8, 1)
        self.rows, self.columns = nn.Conv2d(8, 24, 1), nn.Conv2d(8, 24, 1)

    def middle(self, x: Tensor) -> Tensor:
        rows, columns = x.mean(3, keepdim=True), x.mean(2, keepdim=True).transpose(2, 3)
        y = self.both(torch.cat([rows, columns], 2))
        rows, columns = y.split([x.shape[2], x.shape[3]], 2)
        gate = self.rows(rows).sigmoid() * self.columns(columns.transpose(2, 3)).sigmoid()
        return x * gate


@network()
class SimpleAttention(Around):
    """SimAM: attention without parameters, from each channel's variance."""

    def middle(self, x: Tensor) -> Tensor:
        d = (x - x.mean((2, 3), keepdim=True)).square()
        v = d.sum((2, 3), keepdim=True) / (x.shape[2] * x.shape[3] - 1)
        return x * torch.sigmoid(d / (4 * (v + 1e-4)) + 0.5)


@network()
class SpatialGate(Around):
    """One map multiplies all channels."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Conv2d(24, 1, 1)

    def middle(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.gate(x))


@network("whole")
class SpatialGatingUnit(nn.Module):
    """gMLP: halves of the tokens' channels, one normed and mixed over tokens, multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.norm, self.into = nn.LayerNorm(32), nn.Linear(32, 64)
        self.gate_norm, self.over = nn.LayerNorm(32), nn.Linear(16, 16)
        self.out_of, self.head = nn.Linear(32, 32), nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        a, b = F.gelu(self.into(self.norm(x))).chunk(2, -1)
        b = self.over(self.gate_norm(b).transpose(1, 2)).transpose(1, 2)
        return self.head((x + self.out_of(a * b)).mean(1))


@network()
class SelectiveKernel(Around):
    """SKNet: a softmax over two branches decides, channel by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = cbr(24, 24), cbr(24, 24, 5)
        self.squeeze, self.select = cbr(24, 8, 1), nn.Conv2d(8, 48, 1)

    def middle(self, x: Tensor) -> Tensor:
        y = torch.stack([self.a(x), self.b(x)], 1)
        weight = self.select(self.squeeze(y.sum(1).mean((2, 3), keepdim=True)))
        weight = weight.view(-1, 2, 24, 1, 1).softmax(1)
        return (y * weight).sum(1)


@network()
class SplitAttention(Around):
    """ResNeSt: a grouped convolution's two radices, summed under a softmax over them."""

    def __init__(self) -> None:
        super().__init__()
        self.radices = cbr(24, 48, groups=2)
        self.squeeze, self.select = cbr(24, 8, 1), nn.Conv2d(8, 48, 1)

    def middle(self, x: Tensor) -> Tensor:
        y = self.radices(x)
        parts = y.reshape(y.shape[0], 2, 24, *y.shape[2:])
        weight = self.select(self.squeeze(parts.sum(1).mean((2, 3), keepdim=True)))
        weight = weight.view(y.shape[0], 1, 2, 24).transpose(1, 2).softmax(1)
        return (parts * weight.reshape(y.shape[0], 2, 24, 1, 1)).sum(1)


@network()
class ResponseNorm(Around):
    """ConvNeXt V2's global response norm, over channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out_of = nn.Linear(24, 48), nn.Linear(48, 24)
        self.gamma, self.beta = (nn.Parameter(torch.zeros(1, 1, 1, 48)) for _ in range(2))

    def middle(self, x: Tensor) -> Tensor:
        y = F.gelu(self.into(x.permute(0, 2, 3, 1)))
        size = y.norm(p=2, dim=(1, 2), keepdim=True)
        size = size / (size.mean(-1, keepdim=True) + 1e-6)
        y = self.gamma * (y * size) + self.beta + y
        return x + self.out_of(y).permute(0, 3, 1, 2)


@network()
class LocalResponseNorm(Around):
    """AlexNet's local response norm: a channel is divided by its neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm = cbr(24, 24), nn.LocalResponseNorm(5, alpha=0.5)

    def middle(self, x: Tensor) -> Tensor:
        return self.body(self.norm(x))


class _LayerNorm2d(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        var = (x - mean).square().mean(1, keepdim=True)
        x = (x - mean) * torch.rsqrt(var + 1e-6)
        return x * self.weight[:, None, None] + self.bias[:, None, None]


@network()
class ConvNeXt(Around):
    """ConvNeXt's block: depthwise 7x7, a layer norm of one's own, layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(24, 24, 7, padding=3, groups=24), _LayerNorm2d(24)
        self.into, self.out_of = nn.Conv2d(24, 64, 1), nn.Conv2d(64, 24, 1)
        self.gamma = nn.Parameter(torch.full((24, 1, 1), 1e-6))

    def middle(self, x: Tensor) -> Tensor:
        y = self.out_of(F.gelu(self.into(self.norm(self.depthwise(x)))))
        return x + self.gamma * y


class _RmsNorm2d(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * self.scale.view(1, -1, 1, 1) * x.shape[1] ** 0.5


@network()
class RootMeanSquare(Around):
    """An RMS norm over channels that takes their number from the shape."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm = cbr(24, 24), _RmsNorm2d(24)

    def middle(self, x: Tensor) -> Tensor:
        return self.norm(self.body(x))


@network()
class RmsOfLinear(Around):
    """``nn.RMSNorm`` on channels last, a linear layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.RMSNorm(24), nn.Linear(24, 24)

    def middle(self, x: Tensor) -> Tensor:
        return self.mix(self.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


@network()
class InstanceNorm(Around):
    """InstanceNorm, with and without weights of its own: no channel knows of another."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(24, 24, 3, padding=1)
        self.norm = nn.InstanceNorm2d(24, affine=True)
        self.second, self.plain = nn.Conv2d(24, 24, 3, padding=1), nn.InstanceNorm2d(24)

    def middle(self, x: Tensor) -> Tensor:
        return F.relu(self.plain(self.second(F.relu(self.norm(self.first(x))))))


@network()
class TrackedInstanceNorm(Around):
    """InstanceNorm that keeps running statistics and uses them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(24, 24, 3, padding=1)
        self.norm = nn.InstanceNorm2d(24, affine=True, track_running_stats=True)

    def middle(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.body(x)))


@network()
class GroupNorms(Around):
    """GroupNorm of six groups, of one (a layer norm) and of one for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(24, 24, 3, padding=1), nn.GroupNorm(groups, 24), nn.ReLU())
                for groups in (6, 1, 24)
            )
        )

    def middle(self, x: Tensor) -> Tensor:
        return self.layers(x)


@network()
class WeightStandardised(Around):
    """A convolution whose weight is standardised in forward (BiT, NFNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(24, 24, 3, padding=1)
        self.gain = nn.Parameter(torch.ones(24, 1, 1, 1))

    def middle(self, x: Tensor) -> Tensor:
        w = self.conv.weight
        var, mean = torch.var_mean(w, dim=(1, 2, 3), keepdim=True)
        return F.relu(
            F.conv2d(x, self.gain * (w - mean) / (var + 1e-5).sqrt(), self.conv.bias, 1, 1)
        )


@network()
class ParametricRelu(Around):
    """PReLU with a slope for each channel, and one with one slope."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.slopes = nn.Conv2d(24, 24, 3, padding=1), nn.PReLU(24)
        self.second, self.slope = nn.Conv2d(24, 24, 3, padding=1), nn.PReLU()

    def middle(self, x: Tensor) -> Tensor:
        return self.slope(self.second(self.slopes(self.first(x))))


@network()
class LearnedGates(Around):
    """ReZero's single gate, a per-channel scale, and a per-channel offset (parameters)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = cbr(24, 24), cbr(24, 24)
        self.gate = nn.Parameter(torch.full((1,), 0.8))
        self.scale = nn.Parameter(torch.ones(24, 1, 1))
        self.offset = nn.Parameter(torch.zeros(1, 24, 1, 1))

    def middle(self, x: Tensor) -> Tensor:
        x = x + self.gate * self.a(x)
        return x + self.scale * self.b(x) + self.offset


@network()
class ChannelConstants(Around):
    """Buffers as constants of each channel, and a list of numbers made in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.body = cbr(24, 24)
        self.register_buffer("mean", torch.linspace(-0.5, 0.5, 24).view(1, 24, 1, 1))
        self.register_buffer("steps", torch.rand(24) + 0.5, persistent=False)

    def middle(self, x: Tensor) -> Tensor:
        x = (self.body(x) - self.mean) / self.steps[:, None, None]
        return x * torch.tensor([1.0 + i / 24 for i in range(24)]).view(1, -1, 1, 1)


@network()
class FixedBlur(Around):
    """BlurPool: a fixed kernel, expanded to a depthwise convolution in forward."""

    def __init__(self) -> None:
        super().__init__()
        kernel = torch.tensor([1.0, 2.0, 1.0])
        self.register_buffer("kernel", (kernel[:, None] * kernel / 16)[None, None])

    def middle(self, x: Tensor) -> Tensor:
        kernel = self.kernel.expand(x.shape[1], -1, -1, -1)
        return F.conv2d(F.pad(x, (1, 1, 1, 1), "reflect"), kernel, stride=2, groups=x.shape[1])


@network()
class Bilinear(nn.Module):
    """``nn.Bilinear`` of two heads on one map."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(cbr(3, 24, stride=2), cbr(24, 32, stride=2))
        self.a, self.b = nn.Linear(32, 12), nn.Linear(32, 8)
        self.both = nn.Bilinear(12, 8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).mean((2, 3))
        return self.both(F.relu(self.a(x)), self.b(x))


@network()
class BilinearPool(nn.Module):
    """Products of all pairs of channels, pooled (fine-grained classification)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(cbr(3, 24, stride=2), cbr(24, 12, stride=2))
        self.head = nn.Linear(144, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).flatten(2)
        return self.head((x @ x.transpose(1, 2) / x.shape[2]).flatten(1))


@network()
class Codebook(Around):
    """Vector quantisation: each position becomes the nearest entry of an embedding."""

    out = 16

    def __init__(self) -> None:
        super().__init__()
        self.into, self.codes = nn.Conv2d(24, 8, 1), nn.Embedding(32, 16)
        self.keys = nn.Parameter(torch.randn(32, 8))

    def middle(self, x: Tensor) -> Tensor:
        y = self.into(x).permute(0, 2, 3, 1)
        nearest = (y @ self.keys.T).argmax(-1)
        return self.codes(nearest).permute(0, 3, 1, 2)


@network()
class SoftCodebook(nn.Module):
    """NetVLAD: soft assignment to centres, residuals summed, normalised, flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(cbr(3, 24, stride=2), cbr(24, 16, stride=2))
        self.assign, self.centres = nn.Conv2d(16, 4, 1), nn.Parameter(torch.zeros(4, 16))
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        near = self.assign(x).flatten(2).softmax(1)
        x = near @ x.flatten(2).transpose(1, 2) - near.sum(2)[..., None] * self.centres
        return self.head(F.normalize(x, dim=2).flatten(1))


@network()
class ClassifierByConvolution(nn.Module):
    """SqueezeNet: fire modules, and a 1x1 convolution as the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.squeeze = cbr(3, 24, stride=2), cbr(24, 12, 1)
        self.left, self.right = cbr(12, 24, 1), cbr(12, 24)
        self.head = nn.Conv2d(48, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(self.stem(x))
        x = torch.cat([self.left(x), self.right(x)], 1)
        return self.head(x).mean((2, 3))


@network("whole")
class SingleChannels(nn.Module):
    """Groups of one and two units: all of a group could go at once."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = cbr(3, 2), cbr(2, 1), cbr(1, 2)
        self.head = nn.Linear(2, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(self.b(self.a(x))).mean((2, 3)))


@network()
class NarrowNeck(Around):
    """A group of two units between wide ones, and one with a single unit."""

    def __init__(self) -> None:
        super().__init__()
        self.two, self.wide = cbr(24, 2, 1), cbr(2, 24)
        self.one, self.again = cbr(24, 1, 1), cbr(1, 24)

    def middle(self, x: Tensor) -> Tensor:
        return self.wide(self.two(x)) + self.again(self.one(x))


@network()
class DeadLayer(Around):
    """A branch whose weights are all zero: every unit of it can go."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out_of = cbr(24, 24), nn.Conv2d(24, 24, 1)

    def middle(self, x: Tensor) -> Tensor:
        return x + 0.0 * self.out_of(self.into(x))
