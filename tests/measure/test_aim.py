"""ONNX Runtime as the device that a latency is aimed at: real graphs, exported and timed."""

from __future__ import annotations

import pytest
import torch
from small_networks import small_cnn, small_vit
from torch import nn

from cswap_deploy.config import Config, ExportConfig, PruneConfig
from cswap_deploy.errors import UsageError
from cswap_deploy.measure.aim import OnnxRuntimeAim, aim_at
from cswap_deploy.models.load import wrap_module
from cswap_deploy.network.deletion import remove_units
from cswap_deploy.pruning.prepare import prepare

IMAGES = torch.randn(4, 3, 16, 16)


def aimed(module: nn.Module) -> OnnxRuntimeAim:
    config = Config.model_validate(
        {
            "model": {
                "model": "net",
                "input_size": (3, 16, 16),
                "mean": (0.5,) * 3,
                "std": (0.5,) * 3,
            }
        }
    )
    spec = wrap_module(module, config.model).spec
    return OnnxRuntimeAim(spec, ExportConfig(), IMAGES[:2].numpy(), threads=1)


@pytest.mark.parametrize("make", [small_cnn, small_vit])
def test_nodes_have_the_same_names_whatever_the_widths_and_say_whose_they_are(make) -> None:
    module = make()
    network = prepare(module, IMAGES, PruneConfig(ratio=0.3, round_to=1))
    narrow = {g.name: [0] for g in network.groups if g.kind != "branch"}
    smaller = make()
    remove_units(smaller, narrow, network.groups)
    dense, narrowed = aimed(module).time([module, smaller])
    names = {node.name for node in dense.nodes}
    assert len(names) == len(dense.nodes)
    shared = names & {node.name for node in narrowed.nodes}
    assert len(shared) >= 0.8 * len(names)
    layers = {n for n, m in module.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    owners = {name.partition("/")[0] for name in names}
    assert len(layers & owners) >= 0.9 * len(layers), "a fused one is its convolution"
    for times in (dense, narrowed):
        assert times.ms > 0
        assert all(node.ms >= 0 and node.outputs for node in times.nodes)
        assert {len(node.outputs[0]) for node in times.nodes if node.op == "Conv"} <= {4}


def test_half_of_a_network_takes_less_than_all_of_it() -> None:
    wide = nn.Sequential(nn.Conv2d(3, 256, 3), nn.ReLU(), nn.Conv2d(256, 256, 3), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))
    module = nn.Sequential(wide, head).eval()
    aim = aimed(module)
    aim.time([module])
    short = nn.Sequential(wide[:2], head).eval()
    assert aim.fraction(short) < aim.fraction(module)


def test_a_target_without_a_model_is_refused_with_what_works() -> None:
    settings = {"model": {"model": "net"}, "prune": {"speedup": 1.5}}
    config = Config.model_validate(settings | {"engine": {"target": ("openvino",)}})
    with pytest.raises(UsageError, match="openvino") as failed:
        aim_at(config, aimed(small_cnn()).spec, lambda count: IMAGES[:count].numpy())
    assert failed.value.fix is not None
    assert "--target onnxruntime --target openvino" in failed.value.fix
    plain = Config.model_validate({"model": {"model": "net"}})
    assert aim_at(plain, aimed(small_cnn()).spec, lambda count: IMAGES[:count].numpy()) is None
