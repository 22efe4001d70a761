"""Views, flattening, windows, shapes fixed at trace time, maps of other dimensions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ordinary.base import CLASSES, Around, cbr, network


class _Flat(nn.Module):
    """Convolutions to 32 channels of 8x8, then linear layers on the flat map."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(cbr(3, 24, stride=2), cbr(24, 32, stride=2))
        self.hidden = nn.Linear(32 * 8 * 8, 16)
        self.head = nn.Linear(16, CLASSES)


@network()
class ViewByBatch(_Flat):
    """``x.view(x.size(0), -1)`` before a linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.head(F.relu(self.hidden(x.view(x.size(0), -1))))


@network()
class ViewByNumber(_Flat):
    """``x.view(-1, 2048)`` before a linear layer: the width is a constant."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(self.features(x).view(-1, 2048))))


@network()
class ReshapeByShape(_Flat):
    """``x.reshape(x.shape[0], x.shape[1] * x.shape[2] * x.shape[3])``."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = x.reshape(x.shape[0], x.shape[1] * x.shape[2] * x.shape[3])
        return self.head(F.relu(self.hidden(x)))


@network()
class FlattenTwice(_Flat):
    """``flatten(2)``, an operation on positions, ``flatten(1)``."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).flatten(2)
        return self.head(F.relu(self.hidden((x - x.mean(2, keepdim=True)).flatten(1))))


@network()
class FlattenRowsLast(_Flat):
    """Channels are last when the map is flattened: ``permute(0, 2, 3, 1).flatten(1)``."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(self.features(x).permute(0, 2, 3, 1).flatten(1))))


@network()
class NormOfFlat(_Flat):
    """BatchNorm1d after flattening, and one after the hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm1d(2048), nn.BatchNorm1d(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.hidden(self.norm1(torch.flatten(self.features(x), 1)))
        return self.head(F.relu(self.norm2(x)))


@network()
class Upshuffle(Around):
    """PixelShuffle: four channels become one of twice the size."""

    out = 8

    def __init__(self) -> None:
        super().__init__()
        self.expand = cbr(24, 32)
        self.shuffle = nn.PixelShuffle(2)

    def middle(self, x: Tensor) -> Tensor:
        return self.shuffle(self.expand(x))


@network()
class Downshuffle(Around):
    """PixelUnshuffle: one channel becomes four of half the size."""

    out = 24

    def __init__(self) -> None:
        super().__init__()
        self.reduce = cbr(96, 24, 1)
        self.shuffle = nn.PixelUnshuffle(2)

    def middle(self, x: Tensor) -> Tensor:
        return self.reduce(self.shuffle(x))


@network()
class SuperResolved(Around):
    """Two PixelShuffles by the function, activations between."""

    out = 6

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(24, 48, 3, padding=1), nn.Conv2d(12, 24, 3, padding=1)

    def middle(self, x: Tensor) -> Tensor:
        x = F.pixel_shuffle(F.relu(self.first(F.max_pool2d(x, 2))), 2)
        return F.pixel_shuffle(F.relu(self.second(x)), 2)


@network()
class SpaceToDepth(Around):
    """Space to depth by view and permute."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce = cbr(96, 24, 1)

    def middle(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        x = x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).contiguous()
        return self.reduce(x.view(n, 4 * c, h // 2, w // 2))


@network()
class Focus(Around):
    """YOLO's Focus: strided slices, concatenated, of the image and of a map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = cbr(12, 24)
        self.reduce = cbr(96, 24)

    def middle(self, x: Tensor) -> Tensor:
        return self.reduce(self.parts(x))

    def parts(self, x: Tensor) -> Tensor:
        return torch.cat([x[..., i::2, j::2] for j in (0, 1) for i in (0, 1)], 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.parts(x))


@network()
class PatchMerging(Around):
    """Swin's patch merging: four neighbours, a norm over all of them, a linear layer."""

    out = 32

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.merge = nn.LayerNorm(96), nn.Linear(96, 32)

    def middle(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        parts = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.merge(self.norm(torch.cat(parts, -1))).permute(0, 3, 1, 2)


@network()
class FixedWindows(Around):
    """MobileViT's unfolding into patches by numbers that are fixed when it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(24, 24)

    def middle(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        x = x.reshape(n * c * (h // 2), 2, w // 2, 2).transpose(1, 2)
        x = x.reshape(n, c, (h // 2) * (w // 2), 4).transpose(1, 3)
        x = torch.relu(self.mix(x)).transpose(1, 3)
        x = x.reshape(n * c * (h // 2), w // 2, 2, 2).transpose(1, 2)
        return x.reshape(n, c, h, w)


@network()
class Unfolded(Around):
    """``F.unfold`` by constant numbers, a linear layer on each patch, ``F.fold``."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(96, 96)

    def middle(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, 2, stride=2).transpose(1, 2)
        return F.fold(torch.relu(self.mix(patches)).transpose(1, 2), (16, 16), 2, stride=2)


@network()
class ShiftedWindows(Around):
    """``torch.roll``, a norm, and a linear layer over the positions of each 4x4 window."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(16, 16)

    def middle(self, x: Tensor) -> Tensor:
        n, c = x.shape[:2]
        x = torch.roll(x, (-2, -2), (2, 3)).reshape(n, c, 4, 4, 4, 4).transpose(3, 4)
        x = self.mix(x.reshape(n, c, 16, 16)).reshape(n, c, 4, 4, 4, 4).transpose(3, 4)
        return torch.roll(x.reshape(n, c, 16, 16), (2, 2), (2, 3))


@network()
class RolledChannels(Around):
    """S2-MLP and ShiftNet: parts of the channels are shifted by a pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.point = cbr(24, 24, 1)

    def middle(self, x: Tensor) -> Tensor:
        a, b, c = x.split(8, 1)
        return self.point(torch.cat([torch.roll(a, 1, 2), torch.roll(b, -1, 3), c], 1))


@network("any", words="batch")
class DividesTheBatch(Around):
    """Arithmetic on the batch: the rows of two halves, put together again."""

    def middle(self, x: Tensor) -> Tensor:
        half = x.shape[0] - x.shape[0] // 2
        return torch.cat([x[:half], x[half:]])


@network("any", words="batch")
class FirstImage(Around):
    """Every image is compared with the first of its batch."""

    def middle(self, x: Tensor) -> Tensor:
        return x - 0.1 * x[0]


@network("any", words="batch|trace")
class OneByOne(Around):
    """A Python loop over the images of the batch."""

    def middle(self, x: Tensor) -> Tensor:
        return torch.stack([torch.relu(image - image.mean()) for image in x])


@network()
class ShapeDecides(Around):
    """Control flow on shapes: large maps are pooled."""

    def middle(self, x: Tensor) -> Tensor:
        while x.shape[-1] > 8:
            x = F.avg_pool2d(x, 2)
        return x if x.shape[1] % 2 else F.relu6(x)


@network("any", words="trace|control flow|data-dependent")
class ValueDecides(Around):
    """Control flow on a value that the images decide."""

    def middle(self, x: Tensor) -> Tensor:
        return x * 2 if x.mean() > 0 else x


@network()
class Einsum(Around):
    """A 1x1 convolution written as ``torch.einsum`` over a parameter."""

    out = 20

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(20, 24))

    def middle(self, x: Tensor) -> Tensor:
        return torch.relu(torch.einsum("nchw,oc->nohw", x, self.weight))


@network()
class EinsumOverPositions(Around):
    """``torch.einsum`` mixes positions and leaves channels."""

    def __init__(self) -> None:
        super().__init__()
        self.columns = nn.Parameter(torch.zeros(16, 16))

    def middle(self, x: Tensor) -> Tensor:
        return torch.einsum("nchw,vw->nchv", x, self.columns)


@network()
class Resized(Around):
    """``F.interpolate`` by scale and to the size of another map, added together."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.lateral = cbr(24, 24, stride=2), cbr(24, 24, 1)

    def middle(self, x: Tensor) -> Tensor:
        y = F.interpolate(self.down(x), size=x.shape[-2:], mode="bilinear", align_corners=False)
        return F.interpolate(y + self.lateral(x), scale_factor=0.5, mode="nearest")


@network()
class Pyramid(Around):
    """Adaptive pools of four sizes, brought back and concatenated (PSPNet)."""

    out = 56

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(cbr(24, 8, 1) for _ in range(4))

    def middle(self, x: Tensor) -> Tensor:
        found = [x]
        for size, branch in zip((1, 2, 4, 8), self.branches, strict=True):
            found.append(F.interpolate(branch(F.adaptive_avg_pool2d(x, size)), x.shape[-2:]))
        return torch.cat(found, 1)


@network()
class TwoPools(nn.Module):
    """Mean and maximum pools, concatenated before the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(cbr(3, 24, stride=2), cbr(24, 32, stride=2))
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        pools = F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1)
        return self.head(torch.cat(pools, 1).flatten(1))


@network()
class AsVolume(Around):
    """Conv3d over channels as depth, by unsqueeze."""

    out = 48

    def __init__(self) -> None:
        super().__init__()
        self.volume = nn.Conv3d(1, 2, 3, padding=1)

    def middle(self, x: Tensor) -> Tensor:
        return torch.relu(self.volume(x.unsqueeze(1))).flatten(1, 2)


@network()
class OfVolumes(nn.Module):
    """Conv3d and BatchNorm3d over depth made of the three colours."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, 16, 3, padding=1, stride=(1, 2, 2))
        self.norm = nn.BatchNorm3d(16)
        self.second = nn.Conv3d(16, 24, (3, 3, 3), stride=2, padding=1)
        self.head = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x[:, None])))
        return self.head(F.relu(self.second(x)).mean((2, 3, 4)))


@network()
class OfRows(nn.Module):
    """A Conv1d network on the image as a sequence of pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv1d(3, 32, 7, 4, padding=3), nn.BatchNorm1d(32)
        self.second, self.third = nn.Conv1d(32, 48, 5, 4, 2), nn.Conv1d(48, 32, 3, 2, 1)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x.flatten(2))))
        return self.head(F.gelu(self.third(F.relu(self.second(x)))).mean(-1))


@network()
class RowsThenColumns(Around):
    """Conv1d along rows, the batch and the height as one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.along = nn.Conv1d(24, 24, 3, padding=1)

    def middle(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = x.permute(0, 2, 1, 3).reshape(n * h, c, w)
        return torch.relu(self.along(y)).reshape(n, h, c, w).permute(0, 2, 1, 3)


@network("any", words="complex|export")
class Fourier(Around):
    """GFNet: a filter on the Fourier transform of the map."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.zeros(24, 16, 9, 2))

    def middle(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(x, norm="ortho") * torch.view_as_complex(self.filter)
        return torch.fft.irfft2(spectrum, s=(16, 16), norm="ortho")


@network("any", words="complex|export")
class FNet(nn.Module):
    """FNet: the real part of a Fourier transform over tokens and channels."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 32, 8, 8), nn.LayerNorm(32)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = self.norm(x + torch.fft.fft2(x).real * 0.1)
        return self.head((x + self.mlp(x)).mean(1))


@network()
class Hypercolumns(nn.Module):
    """Maps of three depths, brought to one size and concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = cbr(3, 16), cbr(16, 24, stride=2), cbr(24, 32, stride=2)
        self.point = cbr(72, 24, 1)
        self.head = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(a)
        c = self.c(b)
        maps = [F.interpolate(m, size=16, mode="bilinear") for m in (a, b, c)]
        return self.head(self.point(torch.cat(maps, 1)).amax((2, 3)))


@network()
class PaddedShortcut(Around):
    """CIFAR ResNets' option A: a strided shortcut, its channels padded with zeros."""

    out = 32

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(cbr(24, 32, stride=2), nn.Conv2d(32, 32, 3, padding=1))

    def middle(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))
