"""What cannot be pruned says so by name, and the rest still is."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from random_weights import lively
from torch import Tensor, nn

from cswap_deploy.config import PruneConfig
from cswap_deploy.data import Calibration
from cswap_deploy.errors import ExportError, PruneError, UsageError
from cswap_deploy.network.deletion import exact_groups, remove_units
from cswap_deploy.network.graph import trace
from cswap_deploy.network.groups import find_groups
from cswap_deploy.progress import Silent
from cswap_deploy.pruning.prepare import Prepared, prepare
from cswap_deploy.pruning.prune import Pruned, prune

IMAGES = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(16) % 4


class Padded(nn.Module):
    """A ResNet with shortcut option A: every second pixel, zero channels on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 8)
        self.first = nn.Sequential(_conv(8, 8), nn.ReLU(), _conv(8, 8))
        self.second = nn.Sequential(_conv(8, 16, stride=2), nn.ReLU(), _conv(16, 16))
        self.linear = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.first(x) + x)
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        x = F.relu(self.second(x) + shortcut)
        return self.linear(x.mean((2, 3)))


class Shuffled(nn.Module):
    """Channels change places between two convolutions, and a plain pair follows."""

    def __init__(self) -> None:
        super().__init__()
        self.before = _conv(3, 8)
        self.after = _conv(8, 12)
        self.last = _conv(12, 6)
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.before(x))
        x = x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)
        x = F.relu(self.last(F.relu(self.after(x))))
        return self.linear(x.mean((2, 3)))


class Branching(nn.Module):
    """Its path depends on what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = torch.relu(x) if x.sum() > 0 else torch.sigmoid(x)
        return self.linear(x.mean((2, 3)))


def plain() -> nn.Module:
    return made(
        nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 10, 3), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 4),
        )
    )  # fmt: skip


def made(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return lively(module, IMAGES)


def asked(**settings: Any) -> PruneConfig:
    return PruneConfig(**({"round_to": 1, "rounds": 2, "scoring_samples": 8} | settings))


def ready(module: nn.Module, **settings: Any) -> Prepared:
    return prepare(module, IMAGES, asked(**settings))


def pruned(module: nn.Module, **settings: Any) -> Pruned:
    """By magnitude and without refit unless said: quick, and it reaches the same ratios."""
    settings = {"criterion": "magnitude", "refit": False} | settings
    return prune(module, Calibration(IMAGES, LABELS), config=asked(**settings), progress=Silent())


def logits(module: nn.Module) -> Tensor:
    with torch.no_grad():
        return module(IMAGES)


# --- deleting is not masking ---------------------------------------------------------------------


def test_channels_that_meet_padding_stay_by_name_and_the_rest_is_pruned() -> None:
    module = made(Padded())
    prepared = ready(module, ratio=0.3)
    assert prepared.excluded == {
        "second.2.0": "8 of its 16 units stay: meets values whose size is fixed"
    }
    groups = {g.name: g for g in prepared.groups}
    assert groups.keys() == {"stem.0", "first.0.0", "second.0.0", "first"}
    assert groups["first"].kind == "branch"
    # The stream goes on between the padding.
    assert {m.tensor for m in groups["stem.0"].members} >= {"second.2.0.weight", "linear.weight"}
    result = pruned(module, ratio=0.3)
    assert result.plan.effective("params") == pytest.approx(0.3, abs=0.03)
    stem, wide = result.module.stem[0].out_channels, result.module.second[2][0].out_channels
    assert stem < 8
    assert wide == stem + 8


def test_what_the_guard_leaves_out_would_really_have_been_wrong() -> None:
    """Without the guard, deleting a shuffled channel changes the output: the guard is needed."""
    module = made(Shuffled())
    structure = find_groups(trace(module, IMAGES[:2]))
    wrong = {g.name: g for g in structure.groups}
    kept, left_out = exact_groups(module, IMAGES[:2], structure.groups)
    assert left_out, "this shuffle can be pruned now: plant another fault"
    assert {g.name for g in kept} | left_out.keys() == wrong.keys()
    for name in left_out:
        assert _difference_of_deleting(wrong[name], made(Shuffled())) > 1e-2
    for group in kept:
        assert _difference_of_deleting(group, made(Shuffled())) < 1e-4
    assert {g.name for g in kept} >= {"after.0", "last.0"}


def _difference_of_deleting(group: Any, module: nn.Module) -> float:
    """Largest change of the logits when a unit that is masked is deleted too."""
    unit = group.units // 2
    for entry in group.consumers:
        module.get_submodule(entry.layer).weight.data[:, list(entry.indices[unit])] = 0.0
    before = logits(module)
    try:
        remove_units(module, {group.name: [unit]}, [group])
        return float((logits(module) - before).abs().max())
    except (RuntimeError, ValueError):
        return float("inf")


def test_groups_that_delete_as_they_mask_are_all_kept() -> None:
    module = plain()
    groups = find_groups(trace(module, IMAGES[:2])).groups
    kept, left_out = exact_groups(module, IMAGES[:2], groups)
    assert [g.name for g in kept] == ["0", "2"]
    assert left_out == {}


# --- ratios --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of", "what"), [("params", "parameters"), ("channels", "units"), ("macs", "MACs")]
)
def test_ratio_out_of_reach_says_the_range(of: Any, what: str) -> None:
    with pytest.raises(PruneError) as caught:
        ready(plain(), ratio=0.97, ratio_of=of)
    words = re.fullmatch(
        rf"--ratio 0\.97 of the {what} cannot be met: this network can lose ([\d.]+)% to "
        rf"([\d.]+)% of its [\d,]+ {what}\n  fix: pass a ratio from ([\d.]+) to ([\d.]+), or 0 to "
        r"export the dense model",
        str(caught.value),
    )
    assert words is not None, str(caught.value)
    least, most = float(words[3]), float(words[4])
    assert 0 < least < most < 0.97
    assert float(words[2]) == pytest.approx(100 * most, abs=0.02)
    assert caught.value.exit_code == 5
    # The range is true at both ends.
    for ratio in (least, most):
        result = pruned(plain(), ratio=ratio, ratio_of=of)
        assert result.plan.effective(of) == pytest.approx(ratio, abs=1.1 * least)
    with pytest.raises(PruneError, match="cannot be met"):
        ready(plain(), ratio=most + 0.001, ratio_of=of)


def test_ratio_that_would_remove_nothing_says_the_range() -> None:
    with pytest.raises(PruneError, match=r"--ratio 0\.001 of the units cannot be met") as caught:
        ready(plain(), ratio=0.001, ratio_of="channels")
    assert "can lose 5.56% to 88.89% of its 18 units" in str(caught.value)
    assert "pass a ratio from 0.0556 to 0.8888, or 0 to export the dense model" in str(caught.value)


def test_range_follows_round_to() -> None:
    with pytest.raises(PruneError, match=r"can lose 11\.11% to 55\.56% of its 18 units"):
        ready(plain(), ratio=0.8, ratio_of="channels", round_to=4)  # 8 -> 4, and 10 -> 8 -> 4
    with pytest.raises(PruneError, match=r"can lose 11\.11% to 11\.11% of its 18 units"):
        ready(plain(), ratio=0.8, ratio_of="channels", round_to=8)  # only 10 -> 8


def test_auto_rounding_spares_small_groups() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 31, 3), nn.ReLU(), nn.Conv2d(31, 36, 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(36, 4),
    ).eval()  # fmt: skip
    assert ready(module, round_to="auto").limits.alignments == {"0": 8, "2": 1, "4": 1}


@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.6])
def test_auto_rounding_keeps_widths_aligned_and_meets_the_ratio(ratio: float) -> None:
    """Steps of eight are coarse here; the last ones are split so that the ratio is met."""
    module = made(
        nn.Sequential(
            nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 48, 3), nn.ReLU(),
            nn.Conv2d(48, 32, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4),
        )
    )  # fmt: skip
    prepared = ready(module, ratio=ratio, round_to="auto")
    total = prepared.dense_size.params
    one = max(prepared.sizes.saving(g.name, [0], "params") for g in prepared.groups)
    eight = min(prepared.sizes.saving(g.name, range(8), "params") for g in prepared.groups)
    assert one < eight / 2, "steps of eight would do"
    plan = pruned(module, ratio=ratio, round_to="auto").plan
    assert abs(plan.effective("params") - ratio) <= one / total
    odd = [g.name for g in plan.groups if len(g.kept) % 8]
    assert len(odd) <= 2, odd


def test_auto_rounding_may_remove_less_than_eight() -> None:
    """The range counts single units, as the last round does."""
    module = made(
        nn.Sequential(
            nn.Conv2d(3, 64, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4)
        )
    )
    plan = pruned(module, ratio=0.05, round_to="auto").plan
    assert len(plan.groups[0].kept) == 61
    with pytest.raises(PruneError, match=r"can lose 1\.56% to 87\.\d+% of its 2,052 parameters"):
        ready(module, ratio=0.9, round_to="auto")


# --- nothing to prune, nothing to trace ----------------------------------------------------------


def test_network_with_nothing_to_remove_is_an_error() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4)).eval()
    with pytest.raises(PruneError, match="Sequential has no structure that can be removed"):
        ready(module)


def test_reasons_are_named_when_all_is_excluded() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(1, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 4),
    ).eval()  # fmt: skip
    with pytest.raises(
        PruneError,
        match="Sequential has no structure that can be removed\n"
        "    0: feeds GroupNorm, which normalises across channels\n"
        "  fix: pass --ratio 0 to export the dense model",
    ):
        ready(module)


def test_network_that_branches_on_values_cannot_be_traced() -> None:
    torch.manual_seed(0)
    with pytest.raises(
        ExportError,
        match=rf"torch.export {re.escape(torch.__version__)} cannot trace Branching with a dynamic "
        r"batch: [\s\S]+\n  fix: keep Python control flow on tensor values, and batch arithmetic,",
    ) as caught:
        ready(Branching().eval())
    assert caught.value.exit_code == 5
    assert any("data-dependent" in line for line in caught.value.log)


def test_unknown_criterion_names_the_known() -> None:
    with pytest.raises(
        UsageError,
        match=r"unknown criterion 'taylor'\n  fix: one of: cswap, lamp, magnitude, magnitude-l1, "
        r"random$",
    ):
        pruned(plain(), criterion="taylor")


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
    )
