"""Weights from files: what is read, what is refused, and that nothing runs."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cswap_deploy.config import ModelConfig
from cswap_deploy.errors import UsageError
from cswap_deploy.models.checkpoints import load_in_order, read_checkpoint
from cswap_deploy.models.load import load_model, weights_digest


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s, "optimizer": {"lr": 0.1}},
        lambda s: {"model_state": s, "args": argparse.Namespace(lr=0.1)},
        lambda s: {"state_dict": {k: v * 0 for k, v in s.items()}, "state_dict_ema": s},
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {"state_dict": {f"module._orig_mod.{k}": v for k, v in s.items()}},
    ],
)
def test_torch_files_are_unwrapped(tmp_path: Path, wrap: Any) -> None:
    state = net().state_dict()
    torch.save(wrap(dict(state)), tmp_path / "w.pth")
    got = read_checkpoint(tmp_path / "w.pth")
    assert got.keys() == state.keys()
    assert all(torch.equal(got[k], state[k]) for k in state)


def test_safetensors_whatever_its_suffix(tmp_path: Path) -> None:
    state = net().state_dict()
    save_file(state, tmp_path / "weights.bin")
    assert read_checkpoint(tmp_path / "weights.bin").keys() == state.keys()


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.target}",)


def test_pickle_that_wants_to_run_code_is_refused(tmp_path: Path) -> None:
    target, file = tmp_path / "owned", tmp_path / "evil.pth"
    torch.save({"state_dict": net().state_dict(), "x": Malicious(target)}, file)
    with pytest.raises(UsageError, match="nothing of it was run") as err:
        load_model(ModelConfig(model="demo-resnet", checkpoint=file))
    assert err.value.exit_code == 2
    assert "posix.system" in str(err.value)
    assert "save its state_dict with safetensors.torch.save_file" in str(err.value)
    assert not target.exists()
    torch.load(file, weights_only=False)  # the file is as dangerous as it looks
    assert target.exists()


def test_whole_modules_and_scripts_are_refused(tmp_path: Path) -> None:
    torch.save(net(), tmp_path / "module.pth")
    with pytest.raises(UsageError, match=r"torch\.nn\.modules\.container\.Sequential"):
        read_checkpoint(tmp_path / "module.pth")
    torch.jit.save(torch.jit.script(net()), tmp_path / "script.pt")
    with pytest.raises(UsageError, match=r"script\.pt"):
        read_checkpoint(tmp_path / "script.pt")


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        read_checkpoint(tmp_path / "none.pth")
    with pytest.raises(UsageError, match="is not a file"):
        read_checkpoint(tmp_path)
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(UsageError, match="is a text file, not the weights: 'hello'"):
        read_checkpoint(tmp_path / "text.pth")
    (tmp_path / "noise.pth").write_bytes(bytes(range(256)))
    with pytest.raises(UsageError, match=r"neither a safetensors file nor|nothing of it was run"):
        read_checkpoint(tmp_path / "noise.pth")
    (tmp_path / "empty.pth").write_bytes(b"")
    with pytest.raises(UsageError, match="is empty"):
        read_checkpoint(tmp_path / "empty.pth")
    save_file(net().state_dict(), tmp_path / "w.safetensors")
    whole = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(whole[:-5])
    with pytest.raises(UsageError, match="not a whole safetensors file"):
        read_checkpoint(tmp_path / "w.safetensors")
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "numbers.pth")
    with pytest.raises(UsageError, match="holds no weights: a dict with epoch, lr"):
        read_checkpoint(tmp_path / "numbers.pth")
    torch.save({"a": torch.tensor([1.0, float("nan")])}, tmp_path / "nan.pth")
    with pytest.raises(UsageError, match="not finite in 1 of 1 tensors: a"):
        read_checkpoint(tmp_path / "nan.pth")


def test_wrong_checkpoint_is_counted_and_named(tmp_path: Path) -> None:
    state = dict(load_model(ModelConfig(model="demo-resnet", pretrained=False)).module.state_dict())
    for key in ("conv1.weight", "bn1.bias"):
        del state[key]
    state["extra.weight"] = torch.zeros(1)
    state["linear.weight"] = torch.zeros(11, 64)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UsageError) as err:
        load_model(ModelConfig(model="demo-resnet", checkpoint=tmp_path / "w.safetensors"))
    said = str(err.value)
    assert "does not fit demo-resnet" in said
    assert "2 missing: conv1.weight, bn1.bias" in said
    assert "1 unexpected: extra.weight" in said
    assert "1 of another shape: linear.weight (11, 64), wanted (10, 64)" in said


def test_fine_tuned_head_sets_the_classes(tmp_path: Path) -> None:
    from cswap_deploy.models.torchvision_shim import import_timm

    module = import_timm().create_model("test_resnet", num_classes=5)
    save_file(module.state_dict(), tmp_path / "five.safetensors")
    loaded = load_model(ModelConfig(model="test_resnet", checkpoint=tmp_path / "five.safetensors"))
    assert (loaded.spec.num_classes, loaded.spec.label_space) == (5, None)
    assert loaded.spec.arguments == {"num_classes": 5}
    assert loaded.spec.weights_sha256 == weights_digest(module)


def test_digest_sees_name_shape_type_and_bytes() -> None:
    one = nn.Linear(2, 3)
    digests = {weights_digest(one)}
    with torch.no_grad():
        one.weight[0, 0] += 1
    digests.add(weights_digest(one))
    digests.add(weights_digest(nn.Sequential(one)))
    digests.add(weights_digest(one.double()))
    assert len(digests) == 4


def test_weights_in_order_must_fit_in_every_shape() -> None:
    module = net()
    state = {f"x{i}.{k}": v + 1 for i, (k, v) in enumerate(module.state_dict().items())}
    load_in_order(module, state, where="here")
    assert torch.equal(module[0].weight, state["x0.0.weight"])
    swapped = dict(reversed(state.items()))
    with pytest.raises(UsageError, match="here: "):
        load_in_order(module, swapped, where="here")
    state.popitem()
    state.popitem()
    with pytest.raises(UsageError, match="here has 5 tensors, the model 6"):
        load_in_order(module, state, where="here")
