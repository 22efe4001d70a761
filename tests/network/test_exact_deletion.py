"""The network whose units are masked, and the one that has them deleted, answer alike."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from random_weights import MATRIX, counted_macs, lively, matrix_network
from torch import Tensor, nn

from cswap_deploy.causal.interventions import ablation_values, fold, input_moments
from cswap_deploy.config import PruneConfig
from cswap_deploy.errors import ArtifactError
from cswap_deploy.network.deletion import apply_plan, delete_removed
from cswap_deploy.network.sizes import SizeModel
from cswap_deploy.pruning.prepare import Prepared, prepare
from cswap_deploy.records.plan import GroupPlan, PrunePlan

IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(2))
EXPECTED_KINDS = {"vit": {"heads", "neurons"}}


@pytest.mark.parametrize("name", MATRIX)
def test_masked_and_deleted_networks_answer_alike(name: str) -> None:
    module = lively(matrix_network(name), IMAGES)
    dense = logits(module)
    prepared = prepare(module, IMAGES, PruneConfig(ratio=0.3, round_to=1))
    kinds = {g.kind for g in prepared.groups}
    assert kinds >= EXPECTED_KINDS.get(name[:3], {"channels"})
    assert_every_group_counts(prepared)

    removed = remove_at_random(prepared)
    masked = logits(prepared.module)
    smaller = delete_removed(prepared.module, removed, prepared.groups, IMAGES)
    deleted = logits(smaller)
    scale = max(1.0, float(masked.abs().max()))
    assert (masked - dense).abs().max() > 0.05 * dense.abs().max(), "removing did nothing"
    torch.testing.assert_close(deleted, masked, rtol=0, atol=1e-4 * scale)

    # The size was foretold without building it.
    for group, units in removed.items():
        prepared.sizes.remove(group, units)
    size = prepared.sizes.size()
    assert size.params == sum(p.numel() for p in smaller.parameters())
    assert size.macs == counted_macs(smaller, IMAGES)
    assert prepared.dense_size.params == sum(p.numel() for p in module.parameters())
    assert prepared.dense_size.macs == counted_macs(module, IMAGES)

    # Plan and weights alone give the same network again.
    plan = PrunePlan(
        settings=PruneConfig(criterion="random").key(), dense=prepared.dense_size, pruned=size,
        biased=prepared.biased,
        groups=tuple(
            GroupPlan(
                name=g.name, kind=g.kind, units=g.units,
                kept=tuple(u for u in range(g.units) if u not in removed[g.name]),
                attributes=tuple(f"{a.module}.{a.name}" for a in g.attributes),
            )
            for g in prepared.groups
        ),
    )  # fmt: skip
    plan = PrunePlan.model_validate_json(plan.model_dump_json())
    rebuilt = apply_plan(plan, matrix_network(name), torch.zeros(2, 3, 32, 32))
    rebuilt.load_state_dict(smaller.state_dict(), strict=True)
    assert float((logits(rebuilt) - deleted).abs().max()) == 0.0


def remove_at_random(prepared: Prepared) -> dict[str, list[int]]:
    """Mask about 40 % of every group's units, the others taking over; returns which."""
    rng = np.random.default_rng(4)
    consumers = sorted({c.layer for g in prepared.groups for c in g.consumers})
    # Eight images have fewer tokens than a transformer has channels: all could be predicted.
    joint = all(g.kind == "channels" for g in prepared.groups)
    moments = input_moments(
        prepared.graph, consumers, IMAGES, intervention="predicted" if joint else "mean", chunk=8
    )
    removed = {}
    gone: dict[str, set[int]] = {}
    for group in prepared.groups:
        count = min(group.units - 1, max(1, round(0.4 * group.units)))
        removed[group.name] = sorted(rng.choice(group.units, count, replace=False).tolist())
        for entry in group.consumers:
            index = {i for u in removed[group.name] for i in entry.indices[u]}
            gone.setdefault(entry.layer, set()).update(index)
    # Several groups may meet in one layer: what goes there goes together.
    for layer, lost in gone.items():
        (ablation_value,) = ablation_values(moments[layer], [sorted(lost)])
        fold(prepared.graph, layer, ablation_value)
    return removed


def assert_every_group_counts(prepared: Prepared) -> None:
    """Each group's units reach the logits; a mistake there would show."""
    module = copy.deepcopy(prepared.module)
    module(IMAGES[:4]).square().sum().backward()
    for group in prepared.groups:
        slopes = []
        for entry in group.consumers:
            slope = module.get_submodule(entry.layer).weight.grad
            slopes.append(float(slope.abs().max()))
        assert max(slopes) > 1e-4, group.name


def logits(module: nn.Module) -> Tensor:
    with torch.no_grad():
        return module(IMAGES)


def test_plan_for_another_architecture_is_refused() -> None:
    module = matrix_network("resnet18")
    size = SizeModel(module, IMAGES[:1], ()).size()
    plan = PrunePlan(
        settings=PruneConfig(criterion="random").key(), dense=size, pruned=size,
        groups=(GroupPlan(name="layer1.0.conv1", kind="channels", units=99, kept=(0,)),),
    )  # fmt: skip
    with pytest.raises(
        ArtifactError,
        match=r"does not fit this architecture: layer1.0.conv1 should have 99 units, the module "
        r"has 32 units\n  fix: use the model the plan was made for, with the same timm version",
    ):
        apply_plan(plan, module, IMAGES[:2])
    with pytest.raises(ArtifactError, match=r"the module has no such group"):
        apply_plan(plan, matrix_network("vit_tiny_patch16_224"), IMAGES[:2])
