"""Importance by weights alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cswap_deploy.config import PruneConfig
from cswap_deploy.data import Calibration
from cswap_deploy.network.units import mask_weight
from cswap_deploy.pruning.importance import View, importance_of
from cswap_deploy.pruning.prepare import Prepared, prepare


class Net(nn.Module):
    """Three convolutions without norms: torch-pruning counts those as weights, too."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)
        self.b = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(torch.relu(self.a(x)))
        return self.head(torch.relu(x).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.fixture
def prepared() -> Prepared:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 8, 8)
    return prepare(Net().eval(), images, PruneConfig(ratio=0.3, round_to=1))


def values(criterion: str, prepared: Prepared, group: str) -> np.ndarray:
    images = Calibration(prepared.example, torch.zeros(2, dtype=torch.int64))
    view = View(prepared.graph, prepared.groups, images, np.random.default_rng(0))
    return importance_of(criterion).of(view)[group]


@pytest.mark.parametrize("name", ["a", "b"])
def test_lamp_is_torch_prunings(prepared: Prepared, name: str) -> None:
    import torch_pruning as tp

    module = prepared.dense.module
    graph = tp.DependencyGraph().build_dependency(
        module, prepared.example, unwrapped_parameters=[], ignored_layers=[], ignored_params=[],
        customized_pruners={},
    )  # fmt: skip
    layer = module.get_submodule(name)
    coupled = graph.get_pruning_group(
        layer,
        tp.prune_conv_out_channels,
        list(range(layer.out_channels)),  # type: ignore[arg-type]
    )
    with torch.no_grad():
        theirs = tp.importance.LAMPImportance()(coupled).double().numpy()
    np.testing.assert_allclose(values("lamp", prepared, name), theirs, rtol=1e-5)


def test_units_that_are_gone_count_for_nothing(prepared: Prepared) -> None:
    """Their producers' weights are still there; the others' values are those of a smaller layer."""
    module = prepared.module
    squares = values("magnitude", prepared, "a") ** 2
    gone = np.argsort(squares)[[0, 7]]  # the least and the largest
    mask_weight(module.b, torch.tensor(gone))  # type: ignore[arg-type]
    squares = values("magnitude", prepared, "a") ** 2
    found = values("lamp", prepared, "a")
    assert (found[gone] == 0).all()
    for unit in set(range(8)) - {*gone.tolist()}:
        larger = [squares[u] for u in range(8) if u not in gone and squares[u] >= squares[unit]]
        assert found[unit] == pytest.approx(squares[unit] / sum(larger))
