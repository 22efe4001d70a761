from __future__ import annotations

import torch
from torch import Tensor, nn

from cswap_deploy.models.plain import copied
from cswap_deploy.network.graph import Graph, trace
from cswap_deploy.network.offsets import with_biases


class Plain(nn.Module):
    """Layers of all kinds without biases, one of them read twice, beside one that has one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, bias=False)
        self.twice = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.up = nn.ConvTranspose2d(8, 6, 2, 2, bias=False)
        self.inner = nn.Linear(6, 6, bias=False)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.stem(x)).relu())
        return self.head(self.inner(self.up(x).mean((2, 3))).relu())


def test_a_graph_with_biases_is_that_of_a_new_trace() -> None:
    module, x = Plain().eval(), torch.randn(3, 3, 12, 12)
    graph = trace(module, x)
    bare = [name for name in graph.layers() if graph.layer(name).bias is None]
    assert bare == ["stem", "twice", "inner"]

    given = with_biases(graph, bare)

    with torch.no_grad():
        for name in bare:
            module.get_submodule(name).bias.normal_()
        want = module(x)
    other = copied(module)
    assert given.code.splitlines()[15:] == trace(module, x).code.splitlines()[15:]
    for one in (given, given.on(other), given.to(torch.device("cpu"))):
        assert isinstance(one, Graph)
        torch.testing.assert_close(one.run(x)[0], want)
        assert one.names.keys() <= one.bound.keys()
        assert {f"{name}.bias" for name in bare} <= set(one.names.values())
    with torch.no_grad():
        other.stem.bias += 1.0  # live
    assert not torch.allclose(given.on(other).run(x)[0], want)
