"""When an effect is real: worked by hand, then on a network whose units were made to be judged."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cswap_deploy.causal.effects import Effects, measure_group
from cswap_deploy.causal.partition import trace
from cswap_deploy.causal.significance import class_samples, false_discovery, judge
from cswap_deploy.pruning.groups import find_groups

# --- the statistics, by hand ---------------------------------------------------------------------


def test_p_value_of_a_signed_rank_test_by_hand() -> None:
    """Effects -.1 .2 .3 .4 .5 .6: the negative ones' ranks add up to 1.

    Under no effect that sum has mean n (n + 1) / 4 = 10.5 and variance n (n + 1) (2n + 1) / 24 =
    22.75, so z = (1 - 10.5) / sqrt(22.75) = -1.99173, and p = erfc(1.99173 / sqrt 2) = .0464.
    """
    by_hand = math.erfc((10.5 - 1) / math.sqrt(22.75) / math.sqrt(2))
    assert by_hand == pytest.approx(0.0464, abs=1e-5)
    effects = np.array([[0.3, -0.1, 0.2, 0.6, 0.5, 0.4]])
    found = judge(effects, np.zeros(6, int), alpha=0.05, min_effect=0.0)
    # One class: its images are all images, and the two equal tests correct each other to the same.
    np.testing.assert_allclose(found.p_values, [[by_hand, by_hand]], atol=1e-12)
    assert found.verdicts == ("detrimental",)
    found = judge(effects, np.zeros(6, int), alpha=0.04, min_effect=0.0)
    assert found.verdicts == ("neutral",)
    found = judge(-effects, np.zeros(6, int), alpha=0.05, min_effect=0.0)
    np.testing.assert_allclose(found.p_values, [[by_hand, by_hand]], atol=1e-12)
    assert found.verdicts == ("critical",)


def test_image_that_does_not_react_counts_half_on_each_side() -> None:
    """Effects 0 .1 .2 .3: the zero's rank 1 is split, .5 against 9.5; mean 5, variance 7.5."""
    by_hand = math.erfc((5 - 0.5) / math.sqrt(7.5) / math.sqrt(2))
    found = judge(np.array([[0.1, 0.0, 0.3, 0.2]]), np.zeros(4, int), alpha=0.05, min_effect=0.0)
    assert found.p_values[0, 0] == pytest.approx(by_hand, abs=1e-12)


def test_one_extreme_image_does_not_decide() -> None:
    """The mean is far below zero, but five of six images gain: nothing is certain."""
    effects = np.array([[-50.0, 0.1, 0.2, 0.3, 0.4, 0.5]])
    found = judge(effects, np.zeros(6, int), alpha=0.05, min_effect=0.01)
    assert found.mean[0] < -8
    assert found.verdicts == ("neutral",)


def test_interval_of_the_mean_by_hand() -> None:
    """t(0.975, 2) = 4.302653; half width 4.302653 / sqrt(3)."""
    found = judge(np.array([[1.0, 2.0, 3.0]]), np.zeros(3, int), alpha=0.05, min_effect=0.0)
    half = 4.302652729911275 / math.sqrt(3)
    assert found.mean[0] == 2.0
    assert found.low[0] == pytest.approx(2 - half, abs=1e-9)
    assert found.high[0] == pytest.approx(2 + half, abs=1e-9)


def test_benjamini_hochberg_by_hand() -> None:
    """Sorted p (i of 4) times 4/i, then the smallest of each and its successors.

    .005 -> .020, .020 -> .040, .030 -> .040, .040 -> .040; .020's own 4/2 * .020 = .040.
    """
    p = np.array([[0.040, 0.005], [0.030, 0.020]])
    np.testing.assert_allclose(false_discovery(p), [[0.040, 0.020], [0.040, 0.040]], atol=1e-12)


def test_benjamini_hochberg_takes_the_smaller_of_what_follows() -> None:
    """.010 * 3 = .030; .040 * 3/2 = .060 but .041 * 3/3 = .041 follows."""
    found = false_discovery(np.array([0.010, 0.040, 0.041]))
    np.testing.assert_allclose(found, [0.030, 0.041, 0.041], atol=1e-12)


def test_all_units_and_classes_are_corrected_together() -> None:
    """The p of .0464 counts at 5 % alone; among nine units that show nothing it does not."""
    labels = np.zeros(6, int)
    one = np.array([0.3, -0.1, 0.2, 0.6, 0.5, 0.4])
    alone = judge(one[None], labels, alpha=0.05, min_effect=0.0)
    assert alone.verdicts == ("detrimental",)
    nothing = np.array([0.1, -0.2, 0.3, 0.4, -0.5, -0.6]) * np.arange(1, 10)[:, None]
    among = judge(np.vstack([one, nothing]), labels, alpha=0.05, min_effect=0.0)
    assert among.p_values.shape == (10, 2)
    assert among.p_values[0, 0] == pytest.approx(10 * alone.p_values[0, 0], abs=1e-9)
    assert among.verdicts == ("neutral",) * 10


def test_all_images_together_are_one_more_sample() -> None:
    """Four classes of three images: too few to be sure in any class, sure over all twelve."""
    effects = 0.2 + 0.01 * np.arange(12)[None]
    found = judge(effects, np.repeat(np.arange(4), 3), alpha=0.05, min_effect=0.01)
    assert (found.p_values[0, :4] > 0.05).all()
    assert found.p_values[0, 4] < 0.05
    assert found.verdicts == ("detrimental",)


# --- the rules -----------------------------------------------------------------------------------


def _sample(mean: float) -> np.ndarray:
    """Twelve images that agree; about zero, they do not."""
    return mean + 0.001 * (np.arange(12) - 5.5)


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        (-0.2, 0.0, "critical"),
        (0.2, 0.0, "detrimental"),
        (0.2, -0.2, "critical"),  # what hurts one class is kept, whatever it does to the others
        (0.0, 0.0, "neutral"),
        (-0.005, 0.005, "neutral"),  # certain, and below min_effect
    ],
)
def test_verdicts(first: float, second: float, verdict: str) -> None:
    effects = np.concatenate([_sample(first), _sample(second)])[None]
    labels = np.repeat([3, 7], 12)
    found = judge(effects, labels, alpha=0.05, min_effect=0.01)
    assert found.verdicts == (verdict,)


def test_smallest_effect_that_counts_is_a_setting() -> None:
    effects, labels = _sample(0.005)[None], np.zeros(12, int)
    assert judge(effects, labels, alpha=0.05, min_effect=0.01).verdicts == ("neutral",)
    assert judge(effects, labels, alpha=0.05, min_effect=0.004).verdicts == ("detrimental",)


def test_effect_without_spread_is_certain_and_zero_is_not() -> None:
    effects = np.array([[-0.5] * 12, [0.0] * 12])
    found = judge(effects, np.zeros(12, int), alpha=0.05, min_effect=0.01)
    assert found.verdicts == ("critical", "neutral")
    assert found.p_values[1].tolist() == [1.0, 1.0]


def test_single_image_is_no_evidence() -> None:
    found = judge(np.array([[-0.9]]), np.zeros(1, int), alpha=0.05, min_effect=0.01)
    assert found.verdicts == ("neutral",)
    assert (found.low[0], found.high[0]) == (-0.9, -0.9)


def test_opposite_classes_do_not_cancel() -> None:
    """The mean over all images is zero; tested per class, the unit is critical."""
    effects = np.concatenate([_sample(-0.3), _sample(0.3)])[None]
    found = judge(effects, np.repeat([0, 1], 12), alpha=0.05, min_effect=0.01)
    assert found.mean[0] == pytest.approx(0.0, abs=1e-12)
    assert found.verdicts == ("critical",)


def test_small_classes_share_a_sample() -> None:
    labels = np.array([0, 0, 0, 1, 2, 2, 0])
    assert [r.tolist() for r in class_samples(labels)] == [[0, 1, 2, 6], [3, 4, 5]]


def test_two_small_images_join_the_last_class() -> None:
    labels = np.array([0, 0, 0, 5, 5, 5, 1, 2])
    assert [r.tolist() for r in class_samples(labels)] == [[0, 1, 2], [3, 4, 5, 6, 7]]


def test_only_small_classes_are_one_sample() -> None:
    assert [r.tolist() for r in class_samples(np.array([4, 9]))] == [[0, 1]]


# --- planted units -------------------------------------------------------------------------------

CRITICAL, USELESS, HARMFUL, TINY = range(4)


class Planted(nn.Module):
    """Four units, one for each input channel, with consumers set by hand.

    Channel 0 shows the true class (1 for class 1, 0 for class 0) and decides it: critical.
    Channel 1 is bright, but nothing reads it: useless, neutral.
    Channel 2 lights up for class 0 only, and speaks for class 1: harmful, detrimental.
    Channel 3 speaks for class 0, weakly: certain, but below ``min_effect``: neutral.
    """

    def __init__(self) -> None:
        super().__init__()
        self.units = nn.Conv2d(4, 4, 1)
        self.classifier = nn.Linear(4, 2)
        with torch.no_grad():
            self.units.weight.copy_(torch.eye(4)[..., None, None])
            self.units.bias.zero_()
            self.classifier.weight.copy_(
                torch.tensor([[-2.0, 0.0, 0.0, 1e-3], [2.0, 0.0, 1.0, 0.0]])
            )
            self.classifier.bias.copy_(torch.tensor([1.0, -1.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.relu(self.units(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def planted() -> tuple[Effects, np.ndarray]:
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(24) % 2
    images = torch.zeros(24, 4, 4, 4)
    images[:, 0] = labels.view(-1, 1, 1).float()
    images[:, 1] = 1.0
    images[:, 2] = 1.0 - labels.view(-1, 1, 1).float()
    images[:, 3] = 1.0
    images *= 1 + 0.05 * torch.rand(24, 4, 4, 4, generator=g)
    module = Planted().eval()
    (group,) = find_groups(module, images[:2]).groups
    found = measure_group(
        trace(module, images[:2]), group, range(4), images=images, labels=labels, means=None
    )
    return found, labels.numpy()


def test_planted_effects_by_hand(planted: tuple[Effects, np.ndarray]) -> None:
    """Class 0, harmful unit about 1: logits 1 and -1 + h; without it 1 and -1."""
    effects, labels = planted
    zero, one = effects.true_class[:, labels == 0], effects.true_class[:, labels == 1]
    assert np.all(effects.true_class[USELESS] == 0.0)
    assert np.all(zero[HARMFUL] > 0.15)  # p rises from sigmoid(1) = .73 to sigmoid(2) = .88
    assert np.all(zero[HARMFUL] < 0.30)
    assert np.all(one[HARMFUL] == 0.0)
    assert np.all(one[CRITICAL] < -0.8)  # p falls from sigmoid(2) = .88 to sigmoid(-2) = .12
    assert np.all(zero[TINY] < 0.0)
    assert np.all(np.abs(zero[TINY]) < 1e-3)


def test_planted_units_get_their_verdicts(planted: tuple[Effects, np.ndarray]) -> None:
    effects, labels = planted
    found = judge(effects.true_class, labels, alpha=0.05, min_effect=0.01)
    assert found.verdicts == ("critical", "neutral", "detrimental", "neutral")


def test_tiny_effect_is_certain_but_too_small(planted: tuple[Effects, np.ndarray]) -> None:
    effects, labels = planted
    found = judge(effects.true_class, labels, alpha=0.05, min_effect=0.0)
    assert found.p_values[TINY].min() < 0.01
    assert found.verdicts[USELESS] == "neutral"
    assert found.verdicts[TINY] == "critical"
