"""The command of the README, verbatim, on a stand-in of the hub."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub_stand_in import IMAGENET_COPY, HubStandIn

from cswap_deploy.records.bundle import verify_bundle

pytest.importorskip("datasets", reason="needs the extra 'hub'")
COMMAND = "cswap-deploy build resnet50 --ratio 0.4"
AFFORDABLE = """
input-size = [3, 32, 32]
rounds = 1
scoring-samples = 2
calibration-samples = 24
validation-samples = 40
latency-runs = 10
select = "unit"
"""
"""What CSWAP_CONFIG points to, so that two cores measure 11,000 units in a minute."""


def run(folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    script = shutil.which("cswap-deploy", path=str(Path(sys.executable).parent))
    assert script is not None, "the package is installed, with its command"
    config = folder / "affordable.toml"
    config.write_text(AFFORDABLE)
    path = f"{Path(script).parent}:{environment.get('PATH', '')}"
    mine = {"CSWAP_CONFIG": str(config), "CSWAP_STORE": str(folder / "store"), "PATH": path}
    return subprocess.run(
        COMMAND, shell=True, cwd=folder, env=environment | mine,
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_resnet50_is_built_from_the_hub_and_says_what_to_pass_without(tmp_path: Path) -> None:
    with HubStandIn(tmp_path) as hub:
        digest = hub.add_timm_weights("timm/resnet50.a1_in1k", "resnet50")
        hub.gated.add(("datasets", "ILSVRC/imagenet-1k"))  # no token: the copy is asked
        hub.add_images(labels=[i % 10 * 97 for i in range(80)])
        done = run(tmp_path, hub.environment())
    assert done.returncode == 0, done.stderr
    assert done.stdout == "resnet50-0.4\n"
    assert f"hf:{IMAGENET_COPY}:val" in done.stderr
    manifest = verify_bundle(tmp_path / "resnet50-0.4").manifest
    assert manifest.model.weights == "hub timm/resnet50.a1_in1k"
    assert manifest.model.weights_sha256 == digest
    assert manifest.calibration is not None
    assert manifest.validation is not None
    assert manifest.calibration.source == f"hf:{IMAGENET_COPY}:val"
    assert (manifest.calibration.count, manifest.validation.count) == (24, 40)
    assert manifest.shared_images == 0
    assert manifest.ratio_effective["params"] == pytest.approx(0.4, abs=0.005)
    assert all(parity.ok for parity in manifest.export_parity)
    (target,) = manifest.targets
    assert target.parity is not None
    assert target.parity.ok
    assert f"hf:{IMAGENET_COPY}:val" in (tmp_path / "resnet50-0.4" / "report.md").read_text()

    shutil.rmtree(tmp_path / "resnet50-0.4")
    gone = run(tmp_path, hub.environment(home="another-home"))
    assert (gone.returncode, gone.stdout) == (4, "")
    assert "cannot fetch the weights timm/resnet50.a1_in1k" in gone.stderr
    assert f"the hub at {hub.endpoint} is not reached" in gone.stderr
    assert "fix: pass --checkpoint FILE" in gone.stderr
    assert "Traceback" not in gone.stderr
    images = run(tmp_path, hub.environment())  # the weights are there, the images are gone
    assert (images.returncode, images.stdout) == (4, "")
    assert "no ImageNet-1k images for resnet50" in images.stderr
    assert "fix: pass --data DIR (class folders), --data FILE.npz or --data hf:" in images.stderr
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("resnet50")) == []
