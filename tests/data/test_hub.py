"""Downloads, against a stand-in of the hub that runs on loopback."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from hub_stand_in import IMAGENET_COPY, HubStandIn

from cswap_deploy.data import load_samples
from cswap_deploy.errors import MissingDependencyError
from cswap_deploy.models.hub import hub_failure, reach_hub
from cswap_deploy.models.load import load_model

pytest.importorskip("datasets", reason="needs the extra 'hub'")

LOAD = """
    import json, os, sys
    from cswap_deploy.data import load_samples
    from cswap_deploy.errors import CswapError
    from cswap_deploy.models.load import load_model
    for name, data, wanted, setting in json.loads(sys.argv[1]):
        os.environ.pop("CSWAP_IMAGENET", None)
        os.environ.update({"CSWAP_IMAGENET": setting} if setting else {})
        try:
            spec = load_model(name).spec if name != "demo" else load_model(
                "demo-resnet", pretrained=False).spec
            s = load_samples(
                data=data, validation_data=None, model=spec, calibration_samples=wanted,
                validation_samples=wanted,
            )
        except CswapError as err:
            print(json.dumps({"code": err.exit_code, "error": str(err)}))
            continue
        print(json.dumps({
            "code": 0,
            "model": spec.model_dump(mode="json"),
            "calibration": s.calibration.spec.model_dump(mode="json"),
            "validation": s.validation.spec.model_dump(mode="json"),
            "shape": s.calibration.images.shape,
            "labels": [s.calibration.labels.tolist(), s.validation.labels.tolist()],
        }))
"""
Job = tuple[str, str | None, int, str | None]
"""Model (``demo`` for one with random weights), data, images for each set, CSWAP_IMAGENET."""


def run(hub: HubStandIn, *jobs: Job, **environment: str) -> tuple[list[dict[str, Any]], str]:
    """Do the jobs in one process beside the stand-in; their results, and what it said."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LOAD), json.dumps(jobs)],
        env={**hub.environment(), **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def test_downloads(tmp_path: Path) -> None:
    with HubStandIn(tmp_path) as hub:
        digest = hub.add_timm_weights("timm/resnet50.a1_in1k", "resnet50")
        hub.gated.add(("datasets", "ILSVRC/imagenet-1k"))
        hub.add_images(labels=[i % 20 * 7 for i in range(60)])
        names = ["ankle boot", "Bag", "T_shirt"]
        hub.add_images("own/pets", split="train", labels=[i % 3 for i in range(30)], names=names)
        hub.add_images("own/cows", split="train", labels=[0, 1], names=["cow", "bag"])
        hub.add_images("own/sorted", split="test", labels=[i // 30 for i in range(300)])
        done, _ = run(
            hub,
            ("resnet50", None, 25, None),
            ("resnet50", None, 500, None),
            ("demo", "hf:own/pets", 9, None),
            ("demo", "hf:own/cows:train", 9, None),
            ("demo", "hf:own/sorted:test", 30, None),
            ("demo", "hf:own/nothing", 9, None),
            ("demo", "hf:own/pets:night", 9, None),
            ("resnet50", None, 9, "ILSVRC/imagenet-1k:validation"),
        )
    default, short, pets, cows, ordered, nothing, night, gated = done

    assert default["code"] == 0, default
    assert default["model"]["weights"] == "hub timm/resnet50.a1_in1k"
    assert default["model"]["weights_sha256"] == digest
    assert default["calibration"]["source"] == f"hf:{IMAGENET_COPY}:val"
    assert (default["calibration"]["count"], default["calibration"]["classes"]) == (25, 20)
    assert default["shape"] == [25, 224, 224, 3]
    assert {i * 7 for i in range(20)} == {v for labels in default["labels"] for v in labels}

    # Images of a split that is small are divided, never shared.
    assert (short["calibration"]["count"], short["validation"]["count"]) == (30, 30)
    assert "60 images where 500 + 500 were asked for" in short["validation"]["mapping"]

    assert pets["calibration"]["source"] == "hf:own/pets:train"
    assert pets["calibration"]["class_indices"] == {"ankle boot": 9, "Bag": 8, "T_shirt": 0}
    assert sorted(pets["labels"][0]) == [0, 0, 0, 8, 8, 8, 9, 9, 9]
    assert cows["code"] == 2
    words = "1 of 2 class names in hf:own/cows:train are no classes of demo-resnet: cow"
    assert words in cows["error"]
    assert "--class-map FILE" in cows["error"]

    for labels in ordered["labels"]:  # a stream that is sorted by class
        assert sorted(labels) == sorted(list(range(10)) * 3)

    assert nothing["code"] == 4
    assert "own/nothing" in nothing["error"]
    fix = "fix: pass --data DIR (class folders), --data FILE.npz or --data hf:NAME[:split]"
    assert fix in nothing["error"]
    assert night["code"] == 2
    assert "cannot read the dataset own/pets (split night)" in night["error"]
    assert gated["code"] == 4
    assert "no ImageNet-1k images for resnet50" in gated["error"]
    assert "gated" in gated["error"]
    assert "HF_TOKEN" in gated["error"]


def test_hub_that_is_gone_is_said_at_once(tmp_path: Path) -> None:
    with HubStandIn(tmp_path) as hub:
        hub.add_timm_weights("timm/resnet18.a1_in1k", "resnet18")
        hub.add_images(labels=[i % 2 for i in range(8)])
        [before], _ = run(hub, ("resnet18", None, 4, None))
        assert before["code"] == 0, before
        environment = hub.environment()
    [weights, images], said = run(
        hub, ("resnet50", None, 4, None), ("resnet18", None, 4, None), **environment
    )
    assert "Retrying" not in said
    assert weights["code"] == 4
    assert "cannot fetch the weights timm/resnet50.a1_in1k" in weights["error"]
    assert f"the hub at {hub.endpoint} is not reached" in weights["error"]
    assert "--checkpoint FILE" in weights["error"]
    assert "HF_ENDPOINT" in weights["error"]
    # Weights that were downloaded before are used; the images are not there.
    assert images["code"] == 4
    assert "no ImageNet-1k images for resnet18" in images["error"]
    assert "pass --data DIR (class folders), --data FILE.npz or --data hf:" in images["error"]


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
    spec = load_model("resnet18", pretrained=False).spec
    with pytest.raises(MissingDependencyError, match=r"resnet18 has no --data") as err:
        load_samples(
            data=None,
            validation_data=None,
            model=spec,
            calibration_samples=4,
            validation_samples=4,
        )
    assert "pip install 'cswap-deploy[hub]', or pass --data DIR" in str(err.value)
