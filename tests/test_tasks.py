"""Whole builds of networks that do not classify."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import small_models
import small_tasks
import torch
from PIL import Image
from small_models import INPUT_SIZE, MEAN, STD
from torch import Tensor, nn

import cswap_deploy
from cswap_deploy.errors import StageError, UsageError
from cswap_deploy.models.outputs import named_outputs
from cswap_deploy.report.explain import explain
from cswap_deploy.report.pages import render_html, render_markdown
from cswap_deploy.runtime import cli as on_the_device

if TYPE_CHECKING:
    from conftest import Ran

pytestmark = pytest.mark.slow

Command = Callable[..., "Ran"]
SETTINGS: dict[str, Any] = {
    "input_size": INPUT_SIZE, "mean": MEAN, "std": STD, "ratio": 0.3, "rounds": 1, "round_to": 1,
    "calibration_samples": 48, "validation_samples": 32, "scoring_samples": 16,
    "latency_runs": 10,
}  # fmt: skip
OUTPUTS = {
    "headless": {"output": ("batch", 32)},
    "one_logit": {"logits": ("batch", 1)},
    "maps": {"out": ("batch", 4, 16, 16), "aux": ("batch", 4, 16, 16)},
    "detector": {"output_0": ("batch", 160, 4), "output_1": ("batch", 160, 3)},
    "fields": {
        "embedding": ("batch", 32), "logits": ("batch", 5), "best": ("batch",), "anchors": (3, 2),
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures in a folder and one below it, and nothing that says what they show."""
    root = tmp_path_factory.mktemp("photos")
    (root / "more").mkdir()
    for number, image in enumerate(small_models.pictures(90)[0]):
        folder = root / "more" if number % 3 else root
        Image.fromarray(image).save(folder / f"{number}.png")
    return root


def write_npz(path: Path, **labels: Any) -> Path:
    images, _ = small_models.pictures(90)
    np.savez(path, images=images, **labels)
    return path


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_build_of_every_kind(name: str, photos: Path, tmp_path: Path) -> None:
    bundle = cswap_deploy.build(
        f"small_tasks:{name}", data=photos, output=tmp_path / "b", store=tmp_path / "s",
        target=("onnxruntime", "openvino"), metric="small_tasks:mean_of_outputs", **SETTINGS,
    )  # fmt: skip
    import onnxruntime

    manifest, plan = bundle.manifest, bundle.plan
    assert {t.name: t.shape for t in manifest.onnx.outputs} == OUTPUTS[name]
    assert manifest.model.outputs == tuple(OUTPUTS[name])
    assert plan.task == manifest.model.task
    assert 0.2 < plan.effective("params") < 0.4
    assert all(p.ok and p.relative for p in manifest.export_parity)
    assert (manifest.torch_accuracy, manifest.calibration.labelled) == (None, False)
    assert manifest.metric.name == "small_tasks:mean_of_outputs"
    effects = [e for g in plan.groups for e in g.effects]
    assert effects
    assert all(e.verdict is None and e.true_class is None and e.kl >= 0 for e in effects)

    # what is reported is what the saved network does
    dense, pruned = getattr(small_tasks, name)(), bundle.module()
    for result in manifest.targets:
        assert (result.parity.ok, result.accuracy) == (True, None)
        assert result.outputs.images == 32
        here = {o.name: o for o in manifest.torch_outputs.outputs}
        for output in result.outputs.outputs:
            assert output.agreement == pytest.approx(here[output.name].agreement, abs=0.01)
            if output.error_db is not None and output.error_db < 60:
                assert output.error_db == pytest.approx(here[output.name].error_db, abs=0.01)
    session = onnxruntime.InferenceSession(tmp_path / "b" / "model.onnx")
    x = torch.randn(7, *INPUT_SIZE)
    with torch.no_grad():
        expected = named_outputs(pruned(x)).values()
        assert named_outputs(dense(x)).keys() == named_outputs(pruned(x)).keys()
    for value, got in zip(expected, session.run(None, {"input": x.numpy()}), strict=True):
        np.testing.assert_allclose(got, value.numpy(), rtol=1e-3, atol=1e-4)

    told = explain(plan, manifest)
    assert "No verdicts: no classes" in told.reading[1]
    for page in (render_html(manifest, plan), render_markdown(manifest, plan)):
        for words in ("Outputs", "dB", "No verdicts: no classes", "mean_of_outputs"):
            assert words in page
        assert "top-1" not in page


def test_on_the_device(
    photos: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "b"
    bundle = cswap_deploy.build(
        "small_tasks:fields", data=photos, output=folder, store=tmp_path / "s", **SETTINGS
    )
    done = command("explain", folder)
    assert (done.code, "no classes" in done.out) == (0, True)
    pictures, file = photos / "more", tmp_path / "outputs"
    assert on_the_device.main([str(folder), str(pictures), "--batch", "7", "-o", str(file)]) == 0
    assert "embedding (32)" in capsys.readouterr().out
    classifier = bundle.classifier()
    names = sorted(pictures.glob("*.png"))
    expected = classifier.run(names)
    with np.load(file) as saved:
        assert [Path(f) for f in saved["files"]] == names
        for name, value in expected.items():
            np.testing.assert_allclose(saved[name], value, rtol=1e-4, atol=1e-5)
    assert on_the_device.main([str(folder), str(names[0]), "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["images"]
    assert told["outputs"] == {"embedding": [32], "logits": [5], "best": [], "anchors": [3, 2]}
    with pytest.raises(UsageError, match="task any: it has no classes") as err:
        next(classifier.predict(names))
    assert ".run(pictures)" in str(err.value.fix)


def test_a_classifier_may_have_a_metric_and_its_logits_saved(
    pictures: tuple[Path, Path], tmp_path: Path, photos: Path
) -> None:
    settings = SETTINGS | {"data": pictures[0], "validation_data": pictures[1]}
    bundle = cswap_deploy.build(
        "small_models:small", output=tmp_path / "b", store=tmp_path / "s",
        metric="small_tasks:share_right", **settings,
    )  # fmt: skip
    accuracy, metric = bundle.manifest.torch_accuracy, bundle.manifest.metric
    assert metric.dense == pytest.approx(accuracy.dense.top1)
    assert metric.pruned == pytest.approx(accuracy.pruned.top1)
    file = tmp_path / "logits.npz"
    assert on_the_device.main([str(tmp_path / "b"), str(photos / "0.png"), "-o", str(file)]) == 0
    with np.load(file) as saved:
        assert saved["logits"].shape == (1, 5)


def test_multi_label_heads_are_said(tmp_path: Path) -> None:
    """(N, K) labels of yes or no, for a metric; a head of K logits looks like one of K classes."""
    labels = np.eye(5, dtype=np.int64)[small_models.pictures(90)[1]]
    file = write_npz(tmp_path / "m.npz", labels=labels)
    settings = SETTINGS | {"data": file, "output": tmp_path / "b", "store": tmp_path / "s"}
    with pytest.raises(UsageError, match="do not match") as err:
        cswap_deploy.build("small_models:small", **settings)
    assert "--task binary" in str(err.value.fix)
    bundle = cswap_deploy.build(
        "small_models:small", task="binary", metric="small_tasks:shares_right", **settings
    )
    assert bundle.plan.task == "binary"
    (output,) = bundle.manifest.torch_outputs.outputs
    assert (output.name, output.agreement > 0.8) == ("logits", True)
    assert 0.5 < bundle.manifest.metric.dense <= 1


@pytest.mark.parametrize(
    ("name", "precision"), [("detector", "fp16"), ("maps", "int8"), ("headless", "mixed")]
)
def test_number_formats_are_judged_by_outputs(
    name: str, precision: str, photos: Path, tmp_path: Path
) -> None:
    bundle = cswap_deploy.build(
        f"small_tasks:{name}", data=photos, output=tmp_path / "b", store=tmp_path / "s",
        precision=precision, criterion="magnitude", refit=False, **SETTINGS,
    )  # fmt: skip
    result = bundle.manifest.precision
    limit = {"fp16": 0.001}.get(precision, 0.01)
    assert (result.by_outputs, result.drop_limit) == (True, limit)
    assert result.kl <= limit
    (target,) = bundle.manifest.targets
    assert target.reduced is None
    assert all(o.error_db is None or o.error_db > 20 for o in target.reduced_outputs.outputs)
    import onnx

    graph = onnx.load(tmp_path / "b" / "model.onnx").graph
    assert [value.name for value in graph.output] == list(OUTPUTS[name])
    assert "squared change" in render_markdown(bundle.manifest, bundle.plan)


def test_what_is_not_there_is_said_with_a_fix(photos: Path, tmp_path: Path) -> None:
    settings = SETTINGS | {"output": tmp_path / "b", "store": tmp_path / "s"}
    with pytest.raises(UsageError, match="no labels are wanted for task features") as err:
        cswap_deploy.build("small_tasks:headless", **settings)
    assert "--data DIR of images" in str(err.value.fix)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no images"):
        cswap_deploy.build("small_tasks:headless", data=tmp_path / "empty", **settings)
    file = tmp_path / "x.npz"
    np.savez(file, pixels=np.zeros(3))
    with pytest.raises(UsageError, match="has no array 'images'"):
        cswap_deploy.build("small_tasks:headless", data=file, **settings)
    with pytest.raises(UsageError, match="data sets of the hub are read for classifiers"):
        cswap_deploy.build("small_tasks:headless", data="hf:some/set", **settings)
    with pytest.raises(UsageError, match="images without class folders"):
        cswap_deploy.build("small_models:small", data=photos / "more", **settings)
    with pytest.raises(UsageError, match="has no true class") as err:
        cswap_deploy.build("small_tasks:headless", data=photos, effect="true-class", **settings)
    assert "leave --effect out" in str(err.value.fix)


def test_the_method_as_published_ranks_by_the_outputs(photos: Path, tmp_path: Path) -> None:
    bundle = cswap_deploy.build(
        "small_tasks:headless", data=photos, output=tmp_path / "b", store=tmp_path / "s",
        method="paper", **(SETTINGS | {"rounds": 2}),
    )  # fmt: skip
    assert any("ranked by how far the outputs move" in note for note in bundle.manifest.fallbacks)


def test_a_rerun_reuses_and_another_metric_measures_again(photos: Path, tmp_path: Path) -> None:
    settings = SETTINGS | {"data": photos, "store": tmp_path / "s"}
    stages = [
        cswap_deploy.build(
            "small_tasks:headless", output=tmp_path / f"b{number}", metric=metric, **settings
        ).manifest.stages
        for number, metric in enumerate((None, None, "small_tasks:mean_of_outputs"))
    ]
    assert set(stages[1].values()) == {"reused"}
    assert (stages[2]["prune"], stages[2]["score"]) == ("reused", "run")


# --- networks that others wrote -----------------------------------------------------------------


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("factory", "outputs"),
    [("lraspp", {"out"}), ("fcn", {"out", "aux"}), ("fcn_resnet50", {"out", "aux"})],
)
def test_torchvisions_segmentation(factory: str, outputs: set[str], tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (14, 64, 64, 3), dtype=np.uint8)
    file = tmp_path / "images.npz"
    np.savez(file, images=images)
    settings = SETTINGS | {
        "input_size": (3, 64, 64), "round_to": 8, "calibration_samples": 8,
        "validation_samples": 6, "ratio": 0.2,
    }  # fmt: skip
    bundle = cswap_deploy.build(
        f"small_tasks:{factory}", data=file, output=tmp_path / "b", store=tmp_path / "s",
        criterion="magnitude", refit=False, **settings,
    )  # fmt: skip
    manifest = bundle.manifest
    assert (manifest.model.task, set(manifest.model.outputs)) == ("dense", outputs)
    assert {t.shape for t in manifest.onnx.outputs} == {("batch", 5, 64, 64)}
    assert 0.17 < bundle.plan.effective("params") < 0.23
    (target,) = manifest.targets
    assert target.parity.ok
    assert {o.name for o in target.outputs.outputs} == outputs
    assert all(0 < o.agreement <= 1 for o in target.outputs.outputs)


@pytest.mark.parametrize(
    ("factory", "task", "output"),
    [("dino", "features", "output"), ("dino_with_a_head", "classify", "logits")],
)
def test_a_dinov2_backbone_without_and_with_a_head(
    factory: str, task: str, output: str, pictures: tuple[Path, Path], tmp_path: Path
) -> None:
    settings = SETTINGS | {"data": pictures[0], "validation_data": pictures[1]}
    settings |= {"allow_chance": True}  # the weights are random
    bundle = cswap_deploy.build(
        f"small_tasks:{factory}", output=tmp_path / "b", store=tmp_path / "s", **settings
    )
    manifest = bundle.manifest
    assert (manifest.model.task, bundle.plan.task) == (task, task)
    assert [t.name for t in manifest.onnx.outputs] == [output]
    kinds = {g.kind for g in bundle.plan.groups if len(g.kept) < g.units}
    assert kinds <= {"heads", "neurons", "branch"}
    assert kinds
    (target,) = manifest.targets
    assert target.parity.ok
    assert (target.accuracy is None) == (task == "features")
    assert (target.outputs is None) == (task == "classify")


# --- in memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("measuring", ["exact", "adaptive", "bf16"])
@pytest.mark.parametrize("name", OUTPUTS)
def test_in_memory_with_images_alone(name: str, measuring: str) -> None:
    module = getattr(small_tasks, name)()
    images = torch.randn(40, *INPUT_SIZE)
    settings = {"ratio": 0.2, "rounds": 1, "round_to": 1, "scoring_samples": 12}
    pruned = cswap_deploy.prune(module, images, measuring=measuring, **settings)
    assert pruned.plan.pruned.params < pruned.plan.dense.params
    before, after = small_tasks.outputs_of(module, images), pruned.module(images)
    assert named_outputs(after).keys() == before.keys()


def test_in_memory_data_of_every_form() -> None:
    module, images = small_tasks.headless(), torch.randn(40, *INPUT_SIZE)
    settings: dict[str, Any] = {"ratio": 0.2, "rounds": 1, "round_to": 1, "scoring_samples": 12}
    masks = torch.zeros(40, 16, 16)
    forms = (
        images.numpy(), (images, masks), list(images.split(8)),
        [(a, b) for a, b in zip(images.split(8), masks.split(8), strict=True)],
        [(a, b, b) for a, b in zip(images.split(8), masks.split(8), strict=True)],
    )  # fmt: skip
    sizes = {cswap_deploy.prune(module, data, **settings).plan.pruned.params for data in forms}
    assert len(sizes) == 1
    cswap_deploy.prune(small_models.small(), images, task="features", **settings)


class Restless(nn.Module):
    """Two outputs, of which one is drawn anew at each run."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small_tasks.maps()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        found = self.inner(images)
        return found | {"aux": torch.dropout(found["aux"], 0.5, train=True)}


def test_one_output_that_differs_from_run_to_run_is_enough() -> None:
    with pytest.raises(StageError, match=r"gives other outputs each time .* dropout .*random"):
        cswap_deploy.prune(Restless(), torch.randn(16, *INPUT_SIZE), ratio=0.2)
