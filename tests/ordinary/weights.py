"""Weights that are shared, parametrised, lazy or of other types; modules that remember or draw."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
import torch.nn.utils.prune
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from ordinary.base import CLASSES, Around, cbr, network


@network()
class WeightNorm(Around):
    """``parametrizations.weight_norm`` on a convolution and on the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(weight_norm(nn.Conv2d(24, 24, 3, padding=1)), nn.ReLU())
        self.head = weight_norm(self.head)

    def middle(self, x: Tensor) -> Tensor:
        return self.body(x)


@network()
class SpectralNorm(Around):
    """``parametrizations.spectral_norm`` on two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            spectral_norm(nn.Conv2d(24, 24, 3, padding=1)), nn.ReLU(),
            spectral_norm(nn.Conv2d(24, 24, 1)), nn.ReLU(),
        )  # fmt: skip

    def middle(self, x: Tensor) -> Tensor:
        return self.body(x)


@network()
class Orthogonal(Around):
    """``parametrizations.orthogonal`` on a linear layer over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = orthogonal(nn.Linear(24, 24))

    def middle(self, x: Tensor) -> Tensor:
        return F.relu(self.mix(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


class _Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return (weight + weight.flip(-1)) / 2


@network()
class OwnParametrization(Around):
    """``register_parametrization`` with a module of one's own."""

    def __init__(self) -> None:
        super().__init__()
        conv = nn.Conv2d(24, 24, 3, padding=1)
        nn.utils.parametrize.register_parametrization(conv, "weight", _Symmetric())
        self.body = nn.Sequential(conv, nn.ReLU())

    def middle(self, x: Tensor) -> Tensor:
        return self.body(x)


@network()
class OldWeightNorm(Around):
    """``torch.nn.utils.weight_norm``, which works by a hook before forward."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.utils.weight_norm(nn.Conv2d(24, 24, 3, padding=1))

    def middle(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x))


@network()
class OldSpectralNorm(Around):
    """``torch.nn.utils.spectral_norm``, which works by a hook before forward."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.utils.spectral_norm(nn.Conv2d(24, 24, 3, padding=1))

    def middle(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x))


@network()
class PrunedBefore(Around):
    """``torch.nn.utils.prune``: a mask over the weight, by a hook before forward."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(24, 24, 3, padding=1)
        nn.utils.prune.l1_unstructured(self.body, "weight", 0.3)

    def middle(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x))


@network()
class TiedWeights(Around):
    """Two convolutions with one weight: ``b.weight = a.weight``."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(24, 24, 3, padding=1) for _ in range(2))
        self.b.weight = self.a.weight

    def middle(self, x: Tensor) -> Tensor:
        return F.relu(self.b(F.relu(self.a(x))))


@network()
class TiedInParallel(Around):
    """Two branches with one weight and norms of their own, added."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(24, 24, 3, padding=1, bias=False)
        self.b = nn.Conv2d(24, 24, 3, padding=2, dilation=2, bias=False)
        self.b.weight = self.a.weight
        self.left, self.right = nn.BatchNorm2d(24), nn.BatchNorm2d(24)

    def middle(self, x: Tensor) -> Tensor:
        return F.relu(self.left(self.a(x))) + F.relu(self.right(self.b(x)))


@network("any", words="does not export")
class TransposedTwin(Around):
    """An autoencoder's tied weights: ``F.linear(F.linear(x, w), w.T)``."""

    def __init__(self) -> None:
        super().__init__()
        self.code = nn.Linear(24, 12, bias=False)

    def middle(self, x: Tensor) -> Tensor:
        y = F.relu(self.code(x.permute(0, 2, 3, 1)))
        return F.linear(y, self.code.weight.T).permute(0, 3, 1, 2)


@network()
class Siamese(nn.Module):
    """One backbone sees the image and its mirror."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(cbr(3, 24, stride=2), cbr(24, 32, stride=2))
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.backbone(x).mean((2, 3)), self.backbone(x.flip(3)).amax((2, 3))
        return self.head((a - b).abs())


@network()
class UsedTwice(Around):
    """One block, three times in a row: its inputs and outputs are the same units."""

    def __init__(self) -> None:
        super().__init__()
        self.block = cbr(24, 24)

    def middle(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.block(x)
        return x


@network()
class TwoNames(Around):
    """One module under two names, both used."""

    def __init__(self) -> None:
        super().__init__()
        self.block = cbr(24, 24)
        self.alias = self.block
        self.layers = nn.ModuleList([self.block, cbr(24, 24)])

    def middle(self, x: Tensor) -> Tensor:
        return self.layers[1](x + self.alias(x))


@network()
class SharedNorm(Around):
    """Two convolutions, one batch norm after each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(24, 24, 3, padding=1, bias=False) for _ in range(2))
        self.norm = nn.BatchNorm2d(24)

    def middle(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.b(F.relu(self.norm(self.a(x))))))


@network()
class RetinaHead(Around):
    """One head on maps of two sizes, its answers averaged."""

    out = 24

    def __init__(self) -> None:
        super().__init__()
        self.down = cbr(24, 24, stride=2)
        self.shared = nn.Sequential(cbr(24, 24), cbr(24, 24))

    def middle(self, x: Tensor) -> Tensor:
        small = self.shared(self.down(x))
        return self.shared(x) + F.interpolate(small, scale_factor=2)


@network()
class KeepsActivation(Around):
    """A module that keeps its last activation, as for attention rollout."""

    def __init__(self) -> None:
        super().__init__()
        self.body = cbr(24, 24)
        self.last: Tensor | None = None

    def middle(self, x: Tensor) -> Tensor:
        self.last = self.body(x)
        return self.last


@network(raw=True)
class KeptBefore(KeepsActivation):
    """The same, run once with gradients before it is given to us."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight.data *= 20
        self(torch.randn(2, 3, 32, 32))


@network()
class CachesPositions(Around):
    """Positions are made in the first forward and kept in a dictionary (DETR, rotary caches)."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[tuple[int, int], Tensor] = {}

    def middle(self, x: Tensor) -> Tensor:
        size = (x.shape[2], x.shape[3])
        if size not in self.known:
            self.known[size] = torch.linspace(-1, 1, size[0] * size[1]).view(size)
        return x + self.known[size]


@network()
class CountsCalls(Around):
    """A buffer counts the forwards, and a hook keeps shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.shapes: list[tuple[int, ...]] = []
        self.tail.register_forward_hook(lambda _, __, y: self.shapes.append(tuple(y.shape)))

    def middle(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


@network("refused", words=r"differ|random|run to run|dropout")
class AlwaysDropout(Around):
    """``F.dropout`` that is always on."""

    def middle(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5)


@network("refused", words=r"differ|random|run to run|noise")
class DrawsNoise(Around):
    """``torch.rand_like`` in forward, also in evaluation mode."""

    def middle(self, x: Tensor) -> Tensor:
        return x + 0.5 * torch.rand_like(x)


@network("refused", words=r"differ|random|run to run|dropout")
class ModuleDropout(Around):
    """Monte Carlo dropout: ``train()`` keeps the dropout layers on."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def middle(self, x: Tensor) -> Tensor:
        return self.dropout(x)

    def train(self, mode: bool = True) -> ModuleDropout:
        super().train(mode)
        if hasattr(self, "dropout"):
            self.dropout.train()
        return self


@network()
class StochasticDepth(Around):
    """Blocks that are skipped at random in training, and never in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.rate = cbr(24, 24), 0.3

    def middle(self, x: Tensor) -> Tensor:
        if not self.training:
            return x + self.body(x)
        kept = (torch.rand(x.shape[0], 1, 1, 1) > self.rate).float()
        return x + self.body(x) * kept / (1 - self.rate)


@network("refused", words="once", raw=True)
class LazyLayers(nn.Module):
    """Lazy modules that never ran: their weights have no shape yet."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LazyConv2d(24, 3, 2), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(1),
            nn.LazyLinear(CLASSES),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@network()
class LazyThatRan(nn.Module):
    """Lazy modules that ran once."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LazyConv2d(24, 3, 2), nn.LazyBatchNorm2d(), nn.ReLU(), nn.LazyConv2d(24, 3),
            nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.LazyLinear(CLASSES),
        )  # fmt: skip
        self(torch.randn(2, 3, 32, 32))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class _Recurrent(nn.Module):
    """Convolutions, then the map's columns as a sequence."""

    def __init__(self, recurrent: nn.Module, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(cbr(3, 16, stride=2), cbr(16, 16, stride=2))
        self.recurrent = recurrent
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 3, 1, 2).flatten(2)
        return self.head(self.recurrent(x)[0][:, -1])


@network("whole", apart=True, images=8)
class LstmOverColumns(_Recurrent):
    """CRNN: an LSTM behind convolutions."""

    def __init__(self) -> None:
        super().__init__(nn.LSTM(128, 24, batch_first=True), 24)


@network("whole", apart=True, images=8)
class GruBothWays(_Recurrent):
    """A GRU of two layers that reads both ways."""

    def __init__(self) -> None:
        super().__init__(nn.GRU(128, 16, 2, batch_first=True, bidirectional=True), 32)


@network("whole", apart=True, images=8)
class PlainRecurrence(_Recurrent):
    """``nn.RNN`` behind convolutions."""

    def __init__(self) -> None:
        super().__init__(nn.RNN(128, 24, batch_first=True), 24)


@network(apart=True)
class LstmCell(Around):
    """An ``nn.LSTMCell`` in a Python loop over rows of the map."""

    out = 20

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(24, 20)

    def middle(self, x: Tensor) -> Tensor:
        state, found = None, []
        for row in F.avg_pool2d(x, 4).flatten(2).unbind(2):
            state = self.cell(row, state)
            found.append(state[0])
        return torch.stack(found, 2).unflatten(2, (4, 4))


class _Reparameterised(nn.Module):
    """RepVGG's three branches, which ``fuse`` makes one."""

    def __init__(self) -> None:
        super().__init__()
        self.three = nn.Sequential(nn.Conv2d(24, 24, 3, 1, 1, bias=False), nn.BatchNorm2d(24))
        self.one = nn.Sequential(nn.Conv2d(24, 24, 1, bias=False), nn.BatchNorm2d(24))
        self.none = nn.BatchNorm2d(24)
        self.fused: nn.Conv2d | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.fused is not None:
            return F.relu(self.fused(x))
        return F.relu(self.three(x) + self.one(x) + self.none(x))


@network()
class Reparameterisable(Around):
    """RepVGG: a 3x3, a 1x1 and an identity branch with norms, added."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(_Reparameterised(), _Reparameterised())

    def middle(self, x: Tensor) -> Tensor:
        return self.body(x)


@network()
class Frozen(Around):
    """Weights that need no gradient, some layers of them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = cbr(24, 24)
        self.requires_grad_(False)
        self.head.requires_grad_(True)

    def middle(self, x: Tensor) -> Tensor:
        return self.body(x)


def _inferred(module: nn.Module) -> nn.Module:
    with torch.inference_mode():
        for owner in module.modules():
            for name, parameter in owner.named_parameters(recurse=False):
                setattr(owner, name, nn.Parameter(parameter.clone(), requires_grad=False))
    return module


@network(finish=_inferred)
class InferenceTensors(Around):
    """Weights that were made within ``torch.inference_mode``."""

    def __init__(self) -> None:
        super().__init__()
        self.body = cbr(24, 24)

    def middle(self, x: Tensor) -> Tensor:
        return self.body(x)


class _Typed(Around):
    """Its input is brought to the type of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.body = cbr(24, 24)

    def middle(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.head.weight.dtype))


@network(finish=nn.Module.double)
class Double(_Typed):
    """A network in float64."""


@network(finish=nn.Module.half)
class Half(_Typed):
    """A network in float16."""


@network(finish=nn.Module.bfloat16)
class BrainFloat(_Typed):
    """A network in bfloat16."""


@network()
class ChannelsLast(Around):
    """A module in channels-last memory."""

    def __init__(self) -> None:
        super().__init__()
        self.body = cbr(24, 24)
        self.to(memory_format=torch.channels_last)

    def middle(self, x: Tensor) -> Tensor:
        return self.body(x)


@network()
class Unused(Around):
    """Layers that forward never reaches: an auxiliary head, a copy kept as a teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.body = cbr(24, 24)
        self.auxiliary = nn.Sequential(cbr(24, 8), nn.Flatten(1), nn.Linear(2048, CLASSES))
        self.teacher = copy.deepcopy(self.body)

    def middle(self, x: Tensor) -> Tensor:
        return self.body(x)


@network()
class NoBatchNorm(Around):
    """A parameter in a ParameterList, one in a ParameterDict, no norm on them."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.zeros(24, 24, 3, 3))])
        self.others = nn.ParameterDict({"bias": nn.Parameter(torch.zeros(24))})

    def middle(self, x: Tensor) -> Tensor:
        return F.relu(F.conv2d(x, self.weights[0], self.others["bias"], padding=1))


@network()
class Checkpointed(Around):
    """``torch.utils.checkpoint`` around a block."""

    def __init__(self) -> None:
        super().__init__()
        self.body = cbr(24, 24)

    def middle(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False)


@network()
class Mixture(Around):
    """Soft mixture of experts: two branches, weighted by a softmax for each image."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(cbr(24, 24) for _ in range(2))
        self.router = nn.Linear(24, 2)

    def middle(self, x: Tensor) -> Tensor:
        weight = self.router(x.mean((2, 3))).softmax(1)
        found = torch.stack([expert(x) for expert in self.experts], 1)
        return (found * weight[:, :, None, None, None]).sum(1)


@network("any", words="trace|export|read|groups")
class DynamicConvolution(Around):
    """CondConv: each image has a kernel of its own, mixed from two."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.router = nn.Parameter(torch.zeros(2, 24, 24, 3, 3)), nn.Linear(24, 2)

    def middle(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        weight = self.router(x.mean((2, 3))).sigmoid() @ self.kernels.flatten(1)
        y = F.conv2d(x.reshape(1, n * c, h, w), weight.view(n * 24, 24, 3, 3), None, 1, 1, 1, n)
        return F.relu(y.view(n, 24, h, w))
