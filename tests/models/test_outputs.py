"""What networks return, and what that is taken for."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import small_tasks
import torch
from small_models import INPUT_SIZE, MEAN, STD
from torch import nn

from cswap_deploy.config import ModelConfig
from cswap_deploy.errors import UsageError
from cswap_deploy.models.load import LoadedModel, load_model
from cswap_deploy.models.outputs import named_outputs

A, B, C = torch.zeros(1, 2), torch.ones(1, 3), torch.zeros(1)
Pair = namedtuple("Pair", "boxes scores")


@pytest.mark.parametrize(
    ("returned", "names"),
    [
        (A, ["output"]),
        ((A, B), ["output_0", "output_1"]),
        ([A, (B, C)], ["output_0", "output_1_0", "output_1_1"]),
        (OrderedDict(out=A, aux=B), ["out", "aux"]),
        ({"maps": [A, B], "maps_0": C}, ["maps_0", "maps_1", "maps_0_"]),
        (Pair(A, B), ["boxes", "scores"]),
        (small_tasks.Found(A, B, C, C), ["embedding", "logits", "best", "anchors"]),
        ({"x": None, "n": 3, "y": A}, ["y"]),
    ],
)
def test_every_tensor_has_a_name(returned: Any, names: list[str]) -> None:
    assert list(named_outputs(returned)) == names


@pytest.mark.parametrize(("returned", "said"), [(None, "NoneType"), ({"a": {1, 2}}, "set")])
def test_what_holds_no_tensors_is_named(returned: Any, said: str) -> None:
    with pytest.raises(UsageError, match=f"returns .*{said}") as err:
        named_outputs(returned)
    assert "dict" in str(err.value.fix)


def load(name: str, task: Any = "auto") -> LoadedModel:
    steps = {"input_size": INPUT_SIZE, "mean": MEAN, "std": STD}
    return load_model(ModelConfig(model=name, task=task, **steps))


@pytest.mark.parametrize(
    ("factory", "task", "names", "classes"),
    [
        ("small_models:small", "classify", ("logits",), 5),
        ("small_tasks:headless", "features", ("output",), 0),
        ("small_tasks:one_logit", "binary", ("logits",), 0),
        ("small_tasks:maps", "dense", ("out", "aux"), 0),
        ("small_tasks:detector", "any", ("output_0", "output_1"), 0),
        ("small_tasks:fields", "any", ("embedding", "logits", "best", "anchors"), 0),
    ],
)
def test_the_task_is_recognised(
    factory: str, task: str, names: tuple[str, ...], classes: int
) -> None:
    spec = load(factory).spec
    assert (spec.task, spec.outputs, spec.num_classes) == (task, names, classes)


def test_timm_without_and_with_classes() -> None:
    """A DINOv2 backbone says that it has no classes."""
    settings = {"pretrained": False, "input_size": (3, 28, 28)}
    spec = load_model(ModelConfig(model="vit_small_patch14_dinov2", **settings)).spec
    assert (spec.task, spec.outputs, spec.num_classes) == ("features", ("output",), 0)
    spec = load_model(ModelConfig(model="test_vit", pretrained=False)).spec
    assert (spec.task, spec.num_classes) == ("classify", 1000)


def test_what_the_user_says_is_taken_where_it_fits() -> None:
    assert load("small_models:small", "binary").spec.task == "binary"
    assert load("small_models:small", "any").spec.outputs == ("output",)
    assert load("small_tasks:one_logit", "classify").spec.task == "binary"
    for name, task in (("small_tasks:maps", "classify"), ("small_tasks:detector", "binary")):
        with pytest.raises(UsageError, match=r"are wanted") as err:
            load(name, task)
        assert "--task features, dense, detect or any" in str(err.value)
    with pytest.raises(UsageError, match=r"maps \(1, classes, H, W\)") as err:
        load("small_models:small", "dense")
    assert err.value.fix == "pass --task any"
    with pytest.raises(ValueError, match="task"):
        load("small_models:small", "pose")


def test_yes_or_no_in_several_shapes() -> None:
    spec = load("small_tasks:probabilities", "binary").spec
    assert (spec.task, spec.outputs) == ("binary", ("logits",))
    assert load("small_tasks:twice", "binary").spec.outputs == ("linear", "again", "stem.weight")


def test_an_output_named_as_the_input_is_refused_at_once() -> None:
    from cswap_deploy.models.load import wrap_module

    class Echo(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"input": x.mean((2, 3))}

    steps = {"input_size": INPUT_SIZE, "mean": MEAN, "std": STD}
    with pytest.raises(UsageError, match="output cannot be named 'input'") as err:
        wrap_module(Echo(), ModelConfig(model="Echo", **steps))
    assert "another key" in str(err.value.fix)


def test_decisions_alone_are_refused() -> None:
    from cswap_deploy.models.load import wrap_module

    class Best(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((2, 3)).argmax(1)

    steps = {"input_size": INPUT_SIZE, "mean": MEAN, "std": STD}
    with pytest.raises(UsageError, match="no floating-point number") as err:
        wrap_module(Best(), ModelConfig(model="Best", **steps))
    assert "chosen from" in str(err.value.fix)


def test_a_network_whose_rows_are_not_images_is_refused_by_name() -> None:
    from cswap_deploy.errors import ExportError
    from cswap_deploy.network.graph import trace

    class Flat(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"boxes": x.flatten(0, 1)}

    with pytest.raises(ExportError, match=r"output boxes of Flat has shape .*one row an image"):
        trace(Flat(), torch.zeros(2, 3, 4, 4))
    with pytest.raises(ExportError, match=r"non-maximum suppression|cannot trace"):
        trace(small_tasks.selecting(), torch.randn(2, 3, 16, 16))
