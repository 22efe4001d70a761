"""Networks of many timm families are built right; ten of them end to end, at ratio 0.4.

Weights are random and images are noise with labels: what is tested is that the pipeline holds, not
how accurate its result is. Every unit is measured and removed by the causal method, in one round.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from random_weights import MATRIX, SAME_NETWORK, lively, matrix_network
from timm_matrix import (
    CASES,
    COARSE,
    FAST,
    LONG,
    MOST_REFUSED,
    REFUSED,
    Row,
    family,
    read_rows,
    row_of,
    short_table,
    table_within,
    write_table,
)

import cswap_deploy
from cswap_deploy.models.torchvision_shim import import_timm
from cswap_deploy.records.bundle import verify_bundle

ROOT = Path(__file__).parents[2]
LAST_RUN = ROOT / "benchmarks/results/matrix.json"
CLASSES = 10
SIZE = (3, 32, 32)
END_TO_END = ("resnet18", "vit_tiny_patch16_224")
"""In every run; ``pytest -m matrix`` builds the others."""


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
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in END_TO_END else pytest.mark.matrix) for n in MATRIX],
)
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
        select="set" if name in END_TO_END else "unit",
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n in FAST else pytest.mark.matrix)
        for n in CASES
        if n not in LONG
    ],
)
def test_a_network_of_each_family_is_built_right(name: str, tmp_path: Path) -> None:
    row = row_of(name, tmp_path)
    if name in REFUSED:
        assert row.verdict == "refused"
        assert re.search(REFUSED[name], row.reason)
        return
    assert row.verdict in ("works", "parts whole"), f"{row.verdict}: {row.reason}"
    before, after = row.params
    assert 1 - after / before == pytest.approx(0.2, abs=0.2 if name in COARSE else 0.02)


def test_the_matrix_is_wide() -> None:
    names = CASES.keys() - LONG
    assert len(names) >= 60
    assert len({family(name) for name in names}) >= 40
    assert len(FAST) >= 12
    assert CASES.keys() >= FAST
    assert REFUSED.keys() <= CASES.keys()
    assert len(REFUSED) <= MOST_REFUSED


ROWS = [
    Row("a", "f", "works", 1.0, params=(2000, 1600), groups=3),
    Row("b", "f", "works", 1.0, params=(10, 8), groups=1),
    Row("c", "g", "parts whole", 1.0, params=(9, 7), excluded={"x.1": "feeds | y", "x.2": "no"}),
    Row("d", "g", "refused", 1.0, "it is random\n  fix: call eval()"),
    Row(
        "e", "h", "refused", 1.0, "nothing is left\n    x.1: feeds y\n    x.2: feeds y\n  fix: none"
    ),
    Row(
        "f",
        "h",
        "parts whole",
        1.0,
        params=(9, 7),
        excluded={
            "x": "1 of its 9 units stay: no",
            "y": "deleting breaks it: [2, 3]",
            "z": "meets a.1.b, so",
        },
    ),
]


def test_a_page_gets_the_table_between_its_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- matrix:begin -->\nold\n<!-- matrix:end -->\nafter\n")
    for _ in range(2):
        write_table(page, ROWS)
        text = page.read_text()
        assert text.startswith("before\n<!-- matrix:begin -->\n| ")
        assert text.endswith("|\n<!-- matrix:end -->\nafter\n")
        assert table_within(text) == short_table(ROWS)
    assert "old" not in text
    assert text.splitlines()[4:7] == [
        "| works | 2 | a, b |",
        "| works, these parts whole | 2 | no: c, f; deleting breaks it: f; feeds \\| y: c; "
        "meets another layer, so: f |",
        "| refused | 2 | d: it is random; e: nothing is left (feeds y) |",
    ]


def test_the_readme_has_the_table_of_the_last_run() -> None:
    if not LAST_RUN.exists():
        pytest.skip("no run of the whole matrix is kept")
    assert table_within((ROOT / "README.md").read_text()) == short_table(read_rows(LAST_RUN))
