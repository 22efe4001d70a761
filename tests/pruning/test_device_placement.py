"""The prune stage on a device whose tensors refuse to meet others: what a GPU would refuse.

There is no GPU here, so the device is a fake: a CPU tensor inside a subclass that carries no
device of its own but refuses any operation with a tensor that was not brought there. It is named
``cpu:0``, which PyTorch tells from ``cpu`` until a tensor is made.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import small_models
import torch
from small_networks import small_cnn, small_vit
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_any, tree_map

from cswap_deploy.config import PruneConfig
from cswap_deploy.data.calibration import Calibration
from cswap_deploy.network.placing import HOST
from cswap_deploy.progress import Silent
from cswap_deploy.pruning import prune as stage
from cswap_deploy.pruning.prune import prune

THERE = torch.device("cpu", 0)


class MixedError(RuntimeError):
    """Tensors of the host met tensors of the device."""


class There(Tensor):
    """A tensor on the device."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> There:
        # With storage of its own: kernels such as batch norm's look at it.
        found = Tensor._make_subclass(cls, inner.detach(), inner.requires_grad)
        found.inner = inner.detach()
        return found

    def __deepcopy__(self, memo: Any) -> There:
        found = There(self.inner.clone()).requires_grad_(self.requires_grad)
        found._is_param = getattr(self, "_is_param", False)
        memo[id(self)] = found
        return found

    def __repr__(self) -> str:  # type: ignore[override]
        return f"There({self.inner})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # As on a GPU, a number of the host may meet anything.
        if tree_any(lambda v: _here(v) and v.ndim > 0, (args, kwargs)):
            raise MixedError(f"{func} of the host's tensors and the device's")
        found = func(*tree_map(_inner, args), **tree_map(_inner, kwargs or {}))
        if func._schema.is_mutable:
            return args[0] if "out" not in (kwargs or {}) else kwargs["out"]  # type: ignore[index]
        return tree_map(_there, found)


class Device(TorchFunctionMode):
    """Brings there what is sent to ``cpu:0`` or made on it, and back what is sent to ``cpu``."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func == Tensor.device.__get__ and isinstance(args[0], There):  # type: ignore[attr-defined]
            return THERE
        if func == Tensor.to and isinstance(args[1], torch.device):
            value = args[0].inner if isinstance(args[0], There) else args[0]
            return There(value) if args[1] == THERE else value
        found = func(*args, **kwargs)
        return tree_map(_there, found) if kwargs.get("device") == THERE else found


def _here(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, There)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, There) else value


def _there(value: Any) -> Any:
    return There(value) if _here(value) else value


@contextmanager
def device() -> Iterator[None]:
    with Device():
        yield


def pictures() -> Calibration:
    pixels, labels = small_models.pictures(48)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.25)
    return Calibration(images, torch.from_numpy(labels))


def pruned(module: nn.Module, **settings: Any) -> Any:
    config = PruneConfig(**({"ratio": 0.3, "rounds": 2} | settings))
    return prune(module, pictures(), config=config, progress=Silent())


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything that is pruned in the test is pruned on the device."""
    monkeypatch.setattr(stage, "device_for", lambda config: THERE)
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # type: ignore[no-untyped-call]
    with device():
        yield
    torch.__future__.set_overwrite_module_params_on_conversion(before)  # type: ignore[no-untyped-call]


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "adaptive": (small_cnn, {"measuring": "adaptive"}),
    "exact": (small_cnn, {"measuring": "exact", "scoring_samples": 8}),
    "vit": (small_vit, {"measuring": "adaptive"}),
    "paper": (small_cnn, {"method": "paper", "scoring_samples": 8}),
    "mean": (small_cnn, {"intervention": "mean", "measuring": "adaptive"}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_plan_is_the_plain_run_s(name: str, request: pytest.FixtureRequest) -> None:
    make, settings = CASES[name]
    plain = pruned(make(), **settings)
    request.getfixturevalue("there")
    tagged = pruned(make(), **settings)
    drop = {"rounds": {"__all__": {"seconds"}}}
    assert tagged.plan.model_dump(exclude=drop) == plain.plan.model_dump(exclude=drop)
    for (key, value), other in zip(
        tagged.module.state_dict().items(), plain.module.state_dict().values(), strict=True
    ):
        assert not isinstance(value, There), f"{key} was left there"
        assert torch.equal(value, other), key


@pytest.mark.parametrize(
    "where",
    ["causal.interventions", "causal.measurement", "causal.fisher", "network.walk",
     "network.unfolding", "pruning.refit", "pruning.producers", "causal.mixtures"],
)  # fmt: skip
def test_a_transfer_that_is_left_out_is_noticed(
    where: str, there: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(f"cswap_deploy.{where}")
    monkeypatch.setattr(module, "placed", lambda value, device: value)
    with pytest.raises(MixedError):
        pruned(small_vit(), measuring="adaptive", ratio_of="channels")


def test_the_host_is_no_device() -> None:
    with device():
        value = torch.ones(2).to(THERE)
        assert value.device == THERE
        assert torch.zeros(2, device=value.device).device == THERE
        with pytest.raises(MixedError):
            value + torch.ones(2)
        assert not isinstance(value.to(HOST), There)
        assert torch.equal((value * 2).to(HOST), torch.full((2,), 2.0))
