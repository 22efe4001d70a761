"""Two small networks that hold every kind of unit, and effects measured the slow, obvious way."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cswap_deploy.causal.effects import Effects
from cswap_deploy.causal.experiment import Experiment
from cswap_deploy.causal.interventions import Moments
from cswap_deploy.causal.measurement import LocalMeasurement
from cswap_deploy.causal.memory import Budget
from cswap_deploy.config import Task
from cswap_deploy.models.torchvision_shim import import_timm
from cswap_deploy.network.graph import Graph, trace
from cswap_deploy.network.groups import find_groups
from cswap_deploy.network.units import Group
from cswap_deploy.network.walk import Batches
from cswap_deploy.pruning.refit import Refit, refit, solvable
from cswap_deploy.pruning.targets import Targets
from cswap_deploy.pruning.trials import Ground

CLASSES = 5


class SmallCNN(nn.Module):
    """A residual stream, a depthwise and a grouped convolution, squeeze-and-excitation, strides."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 8, 3, padding=1)
        self.expand = _conv(8, 12, 1)
        self.depthwise = _conv(12, 12, 3, padding=1, groups=12)
        self.squeeze = nn.Conv2d(12, 4, 1)
        self.excite = nn.Conv2d(4, 12, 1)
        self.project = _conv(12, 8, 1)
        self.down = _conv(8, 12, 3, stride=2, padding=1)
        self.grouped = _conv(12, 12, 3, padding=1, groups=3)
        self.out = _conv(12, 10, 1)
        self.shortcut = _conv(8, 10, 1, stride=2)
        self.classifier = nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = F.relu(self.depthwise(F.relu(self.expand(x))))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        x = x + self.project(y * gate)
        y = F.relu(self.grouped(F.relu(self.down(x))))
        x = F.relu(self.out(y) + self.shortcut(x))
        return self.classifier(x.mean((2, 3)))


def small_cnn() -> nn.Module:
    torch.manual_seed(0)
    module = lively(SmallCNN())
    module.squeeze.bias.data += 2.0  # alive on every image
    module.classifier.weight.data *= 0.3  # no prediction is certain, so every unit moves it
    return module


def small_vit() -> nn.Module:
    torch.manual_seed(0)
    vit = import_timm().models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, mlp_ratio=1,
        num_classes=CLASSES,
    )  # fmt: skip
    module = lively(vit)
    module.head.weight.data *= 0.5
    return module


def lively(module: nn.Module) -> nn.Module:
    """Statistics and weights such that every unit counts for the output."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean, -0.3, 0.3)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, -0.2, 0.4)
        elif isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.uniform_(layer.bias, -0.2, 0.4)
    return module.eval()


def pictures(n: int, size: int = 16) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, size, size, generator=g), torch.arange(n) % CLASSES


@cache
def traced(make: Callable[[], nn.Module]) -> tuple[Graph, dict[str, Group]]:
    """A network's graph, and its groups by name; shared: who changes weights works on a copy."""
    module, (images, _) = make(), pictures(2)
    return trace(module, images), {g.name: g for g in find_groups(trace(module, images)).groups}


def slow_means(module: nn.Module, layers: set[str], images: Tensor) -> dict[str, Tensor]:
    """Mean input of each channel of some layers, by hooks on the whole network."""
    found = {}
    handles = []
    for name in layers:
        layer = module.get_submodule(name)

        def hook(layer: nn.Module, args: tuple[Tensor], name: str = name) -> None:
            dims = (0, 2, 3) if isinstance(layer, nn.Conv2d) else tuple(range(args[0].ndim - 1))
            found[name] = args[0].double().mean(dims).float()

        handles.append(layer.register_forward_pre_hook(hook))
    with torch.no_grad():
        module(images)
    for handle in handles:
        handle.remove()
    return found


def slow_effect(
    module: nn.Module,
    group: Group,
    unit: int,
    images: Tensor,
    labels: Tensor,
    means: dict[str, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """(N,) true-class effect and (N,) KL of one unit: the whole network again, inputs zeroed."""
    masked = copy.deepcopy(module)
    for entry in group.consumers:
        layer = masked.get_submodule(entry.layer)
        index = list(entry.indices[unit])
        if means is not None:
            bias = constant_output(layer, index, means[entry.layer])
            bias = bias if layer.bias is None else layer.bias.detach() + bias
            layer.bias = nn.Parameter(bias)

        def zero(layer: nn.Module, args: tuple[Tensor], index: list[int] = index) -> Tensor:
            x = args[0].clone()
            if isinstance(layer, nn.Conv2d):
                x[:, index] = 0.0
            else:
                x[..., index] = 0.0
            return x

        layer.register_forward_pre_hook(zero)
    with torch.no_grad():
        before = F.log_softmax(module(images).double(), 1)
        after = F.log_softmax(masked(images).double(), 1)
    rows = torch.arange(len(labels))
    p, q = before.exp()[rows, labels], after.exp()[rows, labels]
    return q / p - 1, (before.exp() * (before - after)).sum(1)


def constant_output(layer: nn.Module, index: list[int], mean: Tensor) -> Tensor:
    """(O,) what a layer gives where these inputs are constant and all others are zero."""
    constant = torch.zeros_like(mean)
    constant[index] = mean[index]
    weight = layer.weight.detach()
    if isinstance(layer, nn.Linear):
        return weight @ constant
    patch = constant.view(1, -1, 1, 1).expand(1, -1, *layer.kernel_size)
    return F.conv2d(patch, weight, groups=layer.groups).flatten()


def _conv(inputs: int, outputs: int, kernel: int, **settings: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, bias=False, **settings), nn.BatchNorm2d(outputs)
    )


def measure_group(
    graph: Graph,
    group: Group,
    units: Sequence[int],
    *,
    images: Tensor,
    labels: Tensor,
    moments: Mapping[str, Moments],
    variant_bytes: int = 32 << 20,
    tick: Callable[[int], None] | None = None,
) -> Effects:
    """Exact effects of some units of one group."""
    experiment = Experiment(graph, images, labels, moments, Budget(1 << 30, variant_bytes))
    (found,) = LocalMeasurement(experiment).effects({group: units}, tick=tick)
    return found


def targets_of(dense: Graph, images: Tensor, *, rows: int = 65_536, size: int = 64) -> Targets:
    """Of all layers of a network that can be refitted."""
    batches = Batches(images, torch.arange(len(images)), size, dense.device)
    return Targets(dense, solvable(dense), batches, rows, 1 << 30)


def refitted(
    pruned: Graph, dense: Graph, kept: Mapping[str, Tensor], images: Tensor, **settings: Any
) -> Refit:
    """Refit layers of a network in place."""
    return refit(pruned, targets_of(dense, images), kept, most_bytes=1 << 30, **settings)


def ground_of(dense: Graph, images: Tensor, task: Task = "classify") -> Ground:
    """What candidates are tried on, with all images in their order."""
    batches = Batches(images, torch.arange(len(images)), 64, dense.device)
    return Ground(dense, batches, 1 << 30, task)
