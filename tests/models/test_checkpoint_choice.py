"""Which of a checkpoint's weights are taken, under which names, and why others do not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from cswap_deploy.config import ModelConfig, load_config
from cswap_deploy.errors import UsageError
from cswap_deploy.models.load import LoadedModel, load_model
from cswap_deploy.models.torchvision_shim import import_timm

State = dict[str, Tensor]
PREPARED: dict[str, Any] = {
    "input_size": small_models.INPUT_SIZE, "mean": small_models.MEAN, "std": small_models.STD,
}  # fmt: skip


def own() -> State:
    return dict(small_models.other().state_dict())


def under(prefix: str, state: State | None = None) -> State:
    return {f"{prefix}{k}": v for k, v in (state or own()).items()}


def zeros(prefix: str = "") -> State:
    return {f"{prefix}{k}": v * 0 for k, v in own().items()}


def load(path: Path, **more: Any) -> LoadedModel:
    return load_model(
        ModelConfig(checkpoint=path, **({"model": "small_models:small"} | PREPARED | more))
    )


def refused(path: Path, **more: Any) -> str:
    with pytest.raises(UsageError) as err:
        load(path, **more)
    return str(err.value)


def is_own(loaded: LoadedModel) -> bool:
    return torch.equal(loaded.module.head.bias, own()["head.bias"])  # type: ignore[union-attr, arg-type]


def averaged() -> State:
    return dict(AveragedModel(small_models.other()).state_dict())


def compiled() -> State:
    module: Any = torch.compile(nn.Sequential(small_models.other())[0])
    return dict(module.state_dict())


LOSS = {"loss.weight": torch.ones(5)}
FILES: dict[str, Callable[[], Any]] = {
    "lightning": lambda: {"state_dict": under("model."), "epoch": 3, "optimizer_states": []},
    "lightning and a loss": lambda: {"state_dict": under("model.") | LOSS},
    "averaged model": averaged,
    "compiled": compiled,
    "parallel and compiled": lambda: under("module._orig_mod."),
    "compiled and parallel": lambda: under("_orig_mod.module."),
    "lightning and compiled": lambda: {"state_dict": under("model._orig_mod.")},
    "any prefix": lambda: under("net.backbone.encoder."),
    "any wrapper": lambda: {"weights": {"best": own()}, "config": {"lr": 0.1}},
    "criterion": lambda: under("student.") | {"criterion.centre": torch.zeros(3)},
    "flat with extras": lambda: own() | LOSS | {"teacher.fc.weight": torch.zeros(2)},
    "thop": lambda: own() | {"stem.total_ops": torch.zeros(1), "total_params": torch.zeros(1)},
    "half": lambda: {k: v.half() if v.is_floating_point() else v for k, v in own().items()},
    "optimizer beside": lambda: {
        "model": own(), "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_weights_are_found(tmp_path: Path, name: str) -> None:
    torch.save(FILES[name](), tmp_path / "w.pth")
    loaded = load(tmp_path / "w.pth")
    for key, value in own().items():
        torch.testing.assert_close(
            loaded.module.state_dict()[key], value, rtol=1e-3, atol=1e-3, check_dtype=False
        )


def test_what_is_left_out_is_named(tmp_path: Path) -> None:
    extra = {"loss.weight": torch.ones(5), "criterion.centre": torch.zeros(3)}
    save_file(under("model.") | extra, tmp_path / "w.safetensors")
    (note,) = load(tmp_path / "w.safetensors").notes
    assert "2 tensors left out" in note
    assert "loss.weight, criterion.centre" in note or "criterion.centre, loss.weight" in note
    many = {f"teacher.{i}.weight": torch.zeros(1) for i in range(50)}
    save_file(under("model.") | many | extra, tmp_path / "w.safetensors")
    (note,) = load(tmp_path / "w.safetensors").notes
    assert "52 tensors left out" in note
    assert "teacher.* (50)" in note
    assert "loss.*" in note


def test_nothing_is_left_out_of_a_file_that_lacks_something(tmp_path: Path) -> None:
    state = under("model.") | LOSS
    del state["model.conv1.weight"]
    save_file(state, tmp_path / "w.safetensors")
    said = refused(tmp_path / "w.safetensors")
    assert "1 missing: conv1.weight" in said
    assert "1 unexpected: loss.weight" in said


@pytest.mark.parametrize(
    "extra",
    ["conv1.0.weight", "head.norm.weight", "conv2.gamma"],
)
@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_larger_network_s_weights_do_not_fit(tmp_path: Path, extra: str, prefix: str) -> None:
    save_file(under(prefix) | {prefix + extra: torch.zeros(4)}, tmp_path / "w.safetensors")
    said = refused(tmp_path / "w.safetensors")
    assert f"1 unexpected: {prefix}{extra}" in said
    assert "fix: pass the MODEL that the checkpoint was trained as" in said


def test_resnet34_s_weights_are_no_resnet18_s(tmp_path: Path) -> None:
    module = import_timm().create_model("resnet34")
    save_file(module.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match=r"unexpected: layer1\.2\."):
        load_model(ModelConfig(model="resnet18", checkpoint=tmp_path / "w.safetensors"))


BOTH: dict[str, tuple[Callable[[], Any], str, str]] = {
    "timm": (
        lambda: {"state_dict": zeros(), "state_dict_ema": own()}, "state_dict_ema", "state_dict",
    ),
    "reversed": (lambda: {"ema": own(), "model": zeros()}, "ema", "model"),
    "by prefix": (
        lambda: {"state_dict": zeros("model.") | under("ema_model.module.")},
        "state_dict.ema_model.module", "state_dict.model",
    ),
    "compiled": (
        lambda: {"model_ema": under("_orig_mod."), "model": zeros("_orig_mod.")},
        "model_ema._orig_mod", "model._orig_mod",
    ),
    "teacher": (
        lambda: {"state_dict": zeros("teacher.") | under("model.")},
        "state_dict.model", "state_dict.teacher",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BOTH)
def test_which_was_taken_and_how_to_take_the_other(tmp_path: Path, name: str) -> None:
    make, taken, other = BOTH[name]
    path = tmp_path / "w.pth"
    torch.save(make(), path)
    loaded = load(path)
    assert is_own(loaded)
    assert loaded.spec.weights == f"{path} ({taken})"
    told = loaded.notes[0]
    assert f"taken was {taken}" in told
    assert f"--checkpoint-key {other}" in told
    again = load(path, checkpoint_key=other)
    assert again.spec.weights == f"{path} ({other})"
    assert not torch.any(again.module.head.bias)  # type: ignore[union-attr, arg-type]
    assert "several sets" not in " ".join(again.notes)
    assert is_own(load(path, checkpoint_key=taken))


def test_a_key_may_be_short(tmp_path: Path) -> None:
    torch.save({"state_dict": zeros("model.") | under("teacher.net.")}, tmp_path / "w.pth")
    assert is_own(load(tmp_path / "w.pth", checkpoint_key="teacher"))
    assert is_own(load(tmp_path / "w.pth", checkpoint_key="teacher.net."))
    save_file(zeros("a.") | under("b."), tmp_path / "w.safetensors")
    assert is_own(load(tmp_path / "w.safetensors", checkpoint_key="b"))


def test_averaged_weights_that_lack_buffers_are_not_taken(tmp_path: Path) -> None:
    parameters = {k: v * 0 for k, v in small_models.other().named_parameters()}
    torch.save({"model": own(), "ema": parameters}, tmp_path / "w.pth")
    loaded = load(tmp_path / "w.pth")
    assert is_own(loaded)
    assert "taken was model" in loaded.notes[0]
    assert "ema has only" in loaded.notes[0]


def test_a_key_that_is_not_there(tmp_path: Path) -> None:
    torch.save({"model": own(), "ema": own()}, tmp_path / "w.pth")
    said = refused(tmp_path / "w.pth", checkpoint_key="emma")
    assert "holds no weights of this network under --checkpoint-key emma" in said
    assert "it has model, ema\n  fix: pass one of these" in said
    save_file(own(), tmp_path / "w.safetensors")
    said = refused(tmp_path / "w.safetensors", checkpoint_key="ema")
    assert "under --checkpoint-key ema; it has the file's top" in said
    assert "fix: leave --checkpoint-key out" in said
    with pytest.raises(UsageError, match="checkpoint_key chooses among the weights"):
        load_config(model="demo-resnet", checkpoint_key="ema")


def test_one_set_is_not_spoken_of(tmp_path: Path) -> None:
    save_file(own(), tmp_path / "w.safetensors")
    loaded = load(tmp_path / "w.safetensors")
    assert loaded.notes == ()
    assert loaded.spec.weights == str(tmp_path / "w.safetensors")


# --- what differs --------------------------------------------------------------------------------

TRAINED = "pass the MODEL that the checkpoint was trained as"


def timm_file(path: Path, name: str, **arguments: Any) -> Path:
    save_file(import_timm().create_model(name, **arguments).state_dict(), path)
    return path


@pytest.mark.parametrize(
    ("name", "arguments", "words", "flags"),
    [
        ("test_resnet", {"in_chans": 1}, "takes images of 1 channel, this one of 3",
         {"input_size": (1, 160, 160)}),
        ("test_vit", {"in_chans": 1}, "takes images of 1 channel", {"input_size": (1, 160, 160)}),
        ("test_vit", {"img_size": 96}, "the size of images differs", {"input_size": (3, 96, 96)}),
        ("test_vit", {"img_size": 64, "in_chans": 1, "num_classes": 7}, "the size of images",
         {"input_size": (1, 64, 64)}),
        ("test_resnet", {"in_chans": 5}, "takes images of 5 channels",
         {"input_size": (5, 160, 160), "mean": (0.5,) * 5, "std": (0.5,) * 5}),
    ],
)  # fmt: skip
def test_a_timm_network_of_other_inputs(
    tmp_path: Path, name: str, arguments: dict[str, Any], words: str, flags: dict[str, Any]
) -> None:
    path = timm_file(tmp_path / "w.safetensors", name, **arguments)
    with pytest.raises(UsageError) as err:
        load_model(ModelConfig(model=name, checkpoint=path))
    said = str(err.value)
    assert words in said
    assert TRAINED not in said
    assert f"fix: pass --input-size {','.join(map(str, flags['input_size']))}" in said
    loaded = load_model(ModelConfig(model=name, checkpoint=path, **flags))
    assert loaded.spec.preprocessing.input_size == flags["input_size"]


def test_other_tokens_are_no_other_size_of_images(tmp_path: Path) -> None:
    path = timm_file(tmp_path / "w.safetensors", "deit_tiny_distilled_patch16_224")
    with pytest.raises(UsageError, match=TRAINED):
        load_model(ModelConfig(model="deit_tiny_patch16_224", checkpoint=path))


def test_a_wrapped_timm_network_of_other_classes(tmp_path: Path) -> None:
    module = import_timm().create_model("test_resnet", num_classes=5)
    torch.save({"state_dict": under("model.", module.state_dict()) | LOSS}, tmp_path / "w.ckpt")
    loaded = load_model(ModelConfig(model="test_resnet", checkpoint=tmp_path / "w.ckpt"))
    assert loaded.spec.num_classes == 5
    assert "loss.weight" in loaded.notes[0]


class Flat(nn.Module):
    """Its linear layer reads the whole map."""

    def __init__(self, channels: int = 3, size: int = 16, classes: int = 5, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, 2, 1)
        self.norm = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width * size * size // 4, 6)
        self.head = nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.fc(self.norm(self.stem(x)).flatten(1)))
        return out


@pytest.mark.parametrize(
    ("other", "words", "fix"),
    [
        ({"channels": 1}, "takes images of 1 channel, this one of 3", "--input-size 1,16,16"),
        ({"size": 32}, "fc.weight reads 1,024 values of each, for 16 x 16 it is 256", "H,W"),
        ({"classes": 7}, "has 7 classes, this one 5", "pass a MODEL with 7 classes"),
        ({"classes": 7, "channels": 1}, "has 7 classes, this one 5", "--input-size 1,16,16"),
        ({"width": 8}, "of another shape", TRAINED),
    ],
)
def test_a_factory_s_network_of_other_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: dict[str, int], words: str, fix: str
) -> None:
    monkeypatch.setattr(small_models, "flat", Flat, raising=False)
    save_file(Flat(**other).state_dict(), tmp_path / "w.safetensors")
    said = refused(tmp_path / "w.safetensors", model="small_models:flat")
    assert words in said
    assert fix in said
    assert (TRAINED in said) == (fix == TRAINED)


def test_a_backbone_without_its_classifier(tmp_path: Path) -> None:
    state = {k: v for k, v in own().items() if not k.startswith("head.")}
    save_file(state, tmp_path / "w.safetensors")
    said = refused(tmp_path / "w.safetensors")
    assert "the checkpoint has no classifier (head)" in said
    assert "fix: pass weights that were saved with the classifier" in said


def test_a_demo_of_other_classes(tmp_path: Path) -> None:
    state = dict(load_model(ModelConfig(model="demo-resnet")).module.state_dict())
    state |= {"linear.weight": torch.zeros(7, 64), "linear.bias": torch.zeros(7)}
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match="has 7 classes, this one 10") as err:
        load_model(ModelConfig(model="demo-resnet", checkpoint=tmp_path / "w.safetensors"))
    assert TRAINED not in str(err.value)
