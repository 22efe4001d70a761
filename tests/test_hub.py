"""Downloads and builds from the hub, against a stand-in of it that runs on loopback."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hub_stand_in import IMAGENET_COPY, HubStandIn

from cswap_deploy.config import DataConfig, ModelConfig
from cswap_deploy.data import load_samples
from cswap_deploy.errors import MissingDependencyError
from cswap_deploy.models.hub import hub_failure, reach_hub
from cswap_deploy.models.load import load_model
from cswap_deploy.progress import Silent
from cswap_deploy.records.bundle import verify_bundle

needs_datasets = pytest.mark.skipif(find_spec("datasets") is None, reason="needs the extra 'hub'")
AFFORDABLE = """
input-size = [3, 64, 64]
rounds = 1
scoring-samples = 2
round-to = 1
calibration-samples = 24
validation-samples = 30
latency-runs = 10
select = "unit"
allow-chance = true
"""
"""What CSWAP_CONFIG points to."""


@dataclass(frozen=True, slots=True)
class Worker:
    """The one process that downloads: the libraries read HF_ENDPOINT when they are imported."""

    hub: HubStandIn
    digest: str
    """Of the weights of test_resnet."""
    process: subprocess.Popen[str]

    def _ask(self, name: str, arguments: tuple[Any, ...], environment: dict[str, str]) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps([name, arguments, environment]), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        assert answer, self.said()
        return json.loads(answer)

    def load(self, model: str, data: str | None, wanted: int, **environment: str) -> Any:
        return self._ask("load", (model, data, wanted), environment)

    def command(self, *arguments: str) -> Any:
        environment = {
            "CSWAP_CONFIG": str(self.hub.folder / "affordable.toml"),
            "CSWAP_STORE": str(self.hub.folder / "store"),
        }
        return self._ask("command", arguments, environment)

    def said(self) -> str:
        """What went to stderr outside of commands."""
        return (self.hub.folder / "stderr.txt").read_text()


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    folder = tmp_path_factory.mktemp("hub")
    (folder / "affordable.toml").write_text(AFFORDABLE)
    with HubStandIn(folder) as hub, (folder / "stderr.txt").open("w") as stderr:
        digest = hub.add_timm_weights("timm/test_resnet.r160_in1k", "test_resnet")
        hub.gated.add(("datasets", "ILSVRC/imagenet-1k"))  # no token: the copy is asked
        hub.add_images(labels=[i % 20 * 7 for i in range(60)])
        names = ["ankle boot", "Bag", "T_shirt"]
        hub.add_images("own/pets", split="train", labels=[i % 3 for i in range(30)], names=names)
        hub.add_images("own/cows", split="train", labels=[0, 1], names=["cow", "bag"])
        hub.add_images("own/sorted", split="test", labels=[i // 30 for i in range(300)])
        with subprocess.Popen(
            [sys.executable, Path(__file__).with_name("hub_worker.py")],
            cwd=folder, env=hub.environment(), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
        ) as process:  # fmt: skip
            yield Worker(hub, digest, process)
            process.kill()  # nothing is left to say, and an orderly end takes seconds


@needs_datasets
def test_imagenet_is_streamed_from_the_first_copy_that_answers(worker: Worker) -> None:
    got = worker.load("test_resnet", None, 25)
    assert got["code"] == 0, got
    assert got["model"]["weights"] == "hub timm/test_resnet.r160_in1k"
    assert got["model"]["weights_sha256"] == worker.digest
    assert got["calibration"]["source"] == f"hf:{IMAGENET_COPY}:val"
    assert (got["calibration"]["count"], got["calibration"]["classes"]) == (25, 20)
    assert got["shape"] == [25, 160, 160, 3]
    assert {i * 7 for i in range(20)} == {v for labels in got["labels"] for v in labels}
    # The gated original is asked first; then 50 images are wanted and 4 more are read.
    assert got["phases"] == [
        ["streaming images of ILSVRC/imagenet-1k", 54, 0, "ended"],
        [f"streaming images of {IMAGENET_COPY}", 54, 54, "ended"],
        ["decoding calibration images", 25, 25, "ended"],
        ["decoding validation images", 25, 25, "ended"],
    ]

    # Images of a split that is small are divided, never shared.
    short = worker.load("test_resnet", None, 500)
    assert (short["calibration"]["count"], short["validation"]["count"]) == (30, 30)
    assert "60 images where 500 + 500 were asked for" in short["validation"]["mapping"]

    gated = worker.load("test_resnet", None, 9, CSWAP_IMAGENET="ILSVRC/imagenet-1k:validation")
    assert gated["code"] == 4
    assert "no ImageNet-1k images for test_resnet" in gated["error"]
    assert "gated" in gated["error"]
    assert "HF_TOKEN" in gated["error"]


@needs_datasets
def test_datasets_of_ones_own(worker: Worker) -> None:
    pets = worker.load("demo-resnet", "hf:own/pets", 9)
    assert pets["calibration"]["source"] == "hf:own/pets:train"
    assert pets["calibration"]["class_indices"] == {"ankle boot": 9, "Bag": 8, "T_shirt": 0}
    assert sorted(pets["labels"][0]) == [0, 0, 0, 8, 8, 8, 9, 9, 9]
    cows = worker.load("demo-resnet", "hf:own/cows:train", 9)
    assert cows["code"] == 2
    words = "1 of 2 class names in hf:own/cows:train are no classes of demo-resnet: cow"
    assert words in cows["error"]
    assert "--class-map FILE" in cows["error"]

    ordered = worker.load("demo-resnet", "hf:own/sorted:test", 30)
    for labels in ordered["labels"]:  # a stream that is sorted by class
        assert sorted(labels) == sorted(list(range(10)) * 3)

    nothing = worker.load("demo-resnet", "hf:own/nothing", 9)
    assert nothing["code"] == 4
    assert "own/nothing" in nothing["error"]
    fix = "fix: pass --data DIR (class folders), --data FILE.npz or --data hf:NAME[:split]"
    assert fix in nothing["error"]
    assert nothing["phases"] == [["streaming images of own/nothing", 22, 0, "ended"]]
    night = worker.load("demo-resnet", "hf:own/pets:night", 9)
    assert night["code"] == 2
    assert "cannot read the dataset own/pets (split night)" in night["error"]


@needs_datasets
@pytest.mark.slow
def test_resnet_is_built_from_the_hub(worker: Worker) -> None:
    done = worker.command("build", "test_resnet", "--ratio", "0.4")
    assert done["code"] == 0, done["err"]
    assert done["out"] == "test_resnet-0.4\n"
    assert f"streaming images of {IMAGENET_COPY}" in done["err"]
    assert f"hf:{IMAGENET_COPY}:val" in done["err"]
    bundle = worker.hub.folder / "test_resnet-0.4"
    manifest = verify_bundle(bundle).manifest
    assert manifest.model.weights == "hub timm/test_resnet.r160_in1k"
    assert manifest.model.weights_sha256 == worker.digest
    assert manifest.calibration is not None
    assert manifest.validation is not None
    assert manifest.calibration.source == f"hf:{IMAGENET_COPY}:val"
    assert (manifest.calibration.count, manifest.validation.count) == (24, 30)
    assert manifest.shared_images == 0
    assert manifest.ratio_effective["params"] == pytest.approx(0.4, abs=0.005)
    assert all(parity.ok for parity in manifest.export_parity)
    (target,) = manifest.targets
    assert target.parity is not None
    assert target.parity.ok
    assert f"hf:{IMAGENET_COPY}:val" in (bundle / "report.md").read_text()


@needs_datasets
def test_hub_that_is_gone_is_said_at_once(worker: Worker) -> None:
    """The last one here: the hub does not come back."""
    assert worker.load("test_resnet", None, 4)["code"] == 0
    worker.hub.stop()
    weights = worker.command("build", "test_vit", "--ratio", "0.4", "-o", "gone")
    assert (weights["code"], weights["out"]) == (4, "")
    assert "cannot fetch the weights timm/test_vit.r160_in1k" in weights["err"]
    assert f"the hub at {worker.hub.endpoint} is not reached" in weights["err"]
    assert "fix: pass --checkpoint FILE" in weights["err"]
    assert "HF_ENDPOINT" in weights["err"]
    # Weights that were downloaded before are used; the images are not there.
    images = worker.command("build", "test_resnet", "--ratio", "0.4", "-o", "gone")
    assert (images["code"], images["out"]) == (4, "")
    assert "no ImageNet-1k images for test_resnet" in images["err"]
    assert "fix: pass --data DIR (class folders), --data FILE.npz or --data hf:" in images["err"]
    assert not list(worker.hub.folder.glob("gone*"))
    for words in (weights["err"], images["err"], worker.said()):
        assert "Traceback" not in words
        assert "Retrying" not in words


def test_offline_mode_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MissingDependencyError, match="HF_HUB_OFFLINE is set") as err:
        reach_hub("models/a/b", what="the weights a/b", fix="pass --checkpoint FILE")
    assert str(err.value).endswith("fix: pass --checkpoint FILE")


def test_only_the_network_is_blamed_on_the_hub() -> None:
    assert hub_failure(ConnectionRefusedError("no"))
    assert not hub_failure(FileNotFoundError("x"))
    assert not hub_failure(ValueError("x"))


def test_without_datasets_the_fix_names_the_extra_and_the_flag(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    spec = load_model(ModelConfig(model="test_resnet", pretrained=False)).spec
    with pytest.raises(MissingDependencyError, match=r"test_resnet has no --data") as err:
        load_samples(DataConfig(), model=spec, seed=0, progress=Silent())
    assert "pip install 'cswap-deploy[hub]', or pass --data DIR" in str(err.value)
