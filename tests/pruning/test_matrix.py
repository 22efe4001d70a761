"""Every model of the matrix builds end to end at ratio 0.4, with random weights and fake images.

The images are noise with labels: what is tested is that the pipeline holds, not how accurate its
result is. Every unit is measured and removed by the causal method, on one image in one round.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from random_weights import MATRIX, SAME_NETWORK, lively, matrix_network

import cswap_deploy
from cswap_deploy.models.torchvision_shim import import_timm
from cswap_deploy.records.bundle import verify_bundle

CLASSES = 10
SIZE = (3, 32, 32)
TRIES_SETS = ("resnet18", "vit_tiny_patch16_224")


@pytest.fixture(scope="module")
def fake_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise, one colour cast for each of ten classes."""
    rng = np.random.default_rng(0)
    labels = np.arange(40) % CLASSES
    casts = rng.integers(0, 128, (CLASSES, 1, 1, 3))
    images = (rng.integers(0, 128, (40, 32, 32, 3)) + casts[labels]).astype(np.uint8)
    path = tmp_path_factory.mktemp("data") / "fake.npz"
    np.savez(path, images=images, labels=labels)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", MATRIX)
def test_builds_end_to_end(name: str, fake_images: Path, tmp_path: Path) -> None:
    module = matrix_network(name)
    lively(module, torch.randn(32, *SIZE, generator=torch.Generator().manual_seed(1)))
    dense_params = sum(p.numel() for p in module.parameters())

    bundle = cswap_deploy.build(
        module,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        data=fake_images,
        ratio=0.4,
        input_size=SIZE,
        rounds=1,
        scoring_samples=1,
        # Trying sets solves every layer many times over: two of them show that it works.
        select="set" if name in TRIES_SETS else "unit",
        calibration_samples=8,
        validation_samples=8,
        latency_runs=10,
        threads=1,
        store=tmp_path / "store",
        output=tmp_path / "bundle",
    )

    manifest = verify_bundle(bundle.path).manifest
    assert manifest.dense.params == dense_params
    # Closer than one bundle of units in each of these networks.
    assert manifest.ratio_effective["params"] == pytest.approx(0.4, abs=0.005)
    assert bundle.plan.rounds[0].removed == sum(g.units - len(g.kept) for g in bundle.plan.groups)
    assert bundle.plan.criterion == "cswap"
    assert bundle.plan.rounds[0].measured == sum(g.units for g in bundle.plan.groups)
    assert all(p.ok for p in manifest.export_parity)
    (target,) = manifest.targets
    assert target.parity is not None
    assert target.parity.ok
    assert_onnx_runs(bundle.path, manifest.pruned.params)


@pytest.mark.parametrize(("name", "twin"), SAME_NETWORK.items())
def test_twins_are_one_network(name: str, twin: str) -> None:
    one, other = (import_timm().create_model(n) for n in (name, twin))
    assert str(one) == str(other)
    assert [(k, v.shape) for k, v in one.state_dict().items()] == [
        (k, v.shape) for k, v in other.state_dict().items()
    ]


def assert_onnx_runs(bundle: Path, params: int) -> None:
    """The shipped graph runs at two batch sizes, and holds the pruned weights, not the dense."""
    import onnxruntime

    session = onnxruntime.InferenceSession(
        bundle / "model.onnx", providers=["CPUExecutionProvider"]
    )
    for batch in (1, 3):
        images = np.random.default_rng(0).normal(size=(batch, *SIZE)).astype(np.float32)
        (logits,) = session.run(None, {session.get_inputs()[0].name: images})
        assert logits.shape == (batch, CLASSES)
        assert np.isfinite(logits).all()
    size = (bundle / "model.onnx").stat().st_size
    assert 0.95 * params < size / 4 < 1.1 * params + 200_000
