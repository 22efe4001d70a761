"""When an effect is real: worked by hand, then on a network whose units were made to be judged."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from small_networks import measure_group
from torch import Tensor, nn

from cswap_deploy.causal.effects import Effects
from cswap_deploy.causal.significance import class_samples, false_discovery, find_verdicts
from cswap_deploy.network.graph import trace
from cswap_deploy.network.groups import find_groups


def scipy_p(sample: np.ndarray, method: str) -> float:
    """SciPy's own p-value of one sample without zeros."""
    from scipy.stats import wilcoxon

    return float(wilcoxon(sample, method=method).pvalue)


# --- the statistics, by hand ---------------------------------------------------------------------


def test_p_value_of_a_signed_rank_test_by_hand() -> None:
    """Effects -.1 .2 .3 .4 .5 .6: the negative ones' ranks add up to 1.

    Of the 2^6 ways to give six ranks a sign, two have a negative sum of at most 1 (none, and rank
    1 alone), and two a positive one: p = 4 / 64 = .0625. The normal approximation says .0464.
    """
    effects = np.array([[0.3, -0.1, 0.2, 0.6, 0.5, 0.4]])
    found = find_verdicts(effects, np.zeros(6, int), alpha=0.0625, min_effect=0.0)
    # One class: its images are all images, and the two equal tests correct each other to the same.
    assert found.p_values.tolist() == [[0.0625, 0.0625]]
    assert found.verdicts == ("detrimental",)
    found = find_verdicts(effects, np.zeros(6, int), alpha=0.05, min_effect=0.0)
    assert found.verdicts == ("neutral",)
    found = find_verdicts(-effects, np.zeros(6, int), alpha=0.0625, min_effect=0.0)
    assert found.p_values.tolist() == [[0.0625, 0.0625]]
    assert found.verdicts == ("critical",)


@pytest.mark.parametrize("images", [3, 5, 6, 12, 50])
def test_small_samples_that_agree_have_the_exact_p_value(images: int) -> None:
    """All of one sign: two of 2^n ways."""
    effects = 0.1 + 0.01 * np.arange(images)[None]
    found = find_verdicts(effects, np.zeros(images, int), alpha=0.05, min_effect=0.0)
    assert found.p_values[0, 0] == 2.0 ** (1 - images)


def test_three_images_that_agree_are_no_evidence_and_twelve_are_much() -> None:
    """What the normal approximation gets wrong on either side: .109 for .25, .0022 for .0005."""

    def normal(n: int) -> float:
        mean, variance = n * (n + 1) / 4, n * (n + 1) * (2 * n + 1) / 24
        return math.erfc(mean / math.sqrt(variance) / math.sqrt(2))

    for images, truth in ((3, 0.25), (12, 2 / 4096)):
        effects = 0.1 + 0.01 * np.arange(images)[None]
        found = find_verdicts(effects, np.zeros(images, int), alpha=0.05, min_effect=0.0)
        assert found.p_values[0, 0] == pytest.approx(truth, rel=1e-12)
        assert (normal(images) < truth) is (images == 3)


def test_image_that_does_not_react_is_left_out() -> None:
    """Effects 0 .1 .2 .3: three images that agree, 2 / 2^3."""
    found = find_verdicts(
        np.array([[0.1, 0.0, 0.3, 0.2]]), np.zeros(4, int), alpha=0.05, min_effect=0.0
    )
    assert found.p_values[0, 0] == 0.25


def test_p_values_are_scipys_one_unit_at_a_time() -> None:
    """Units with no, some and many zeros, judged together, as each alone with its zeros dropped."""
    rng = np.random.default_rng(0)
    effects = rng.standard_t(2, (40, 30)) + 0.3
    for unit in range(40):
        effects[unit, rng.permutation(30)[: unit % 29]] = 0.0
    labels = np.repeat([0, 1], [12, 18])
    found = find_verdicts(effects, labels, alpha=0.05, min_effect=0.0)
    alone = np.ones((40, 3))
    for unit, row in enumerate(effects):
        for column, rows in enumerate((labels == 0, labels == 1, labels >= 0)):
            reacting = row[rows][row[rows] != 0]
            if len(reacting):
                alone[unit, column] = scipy_p(reacting, "exact")
    np.testing.assert_allclose(found.p_values, false_discovery(alone), atol=1e-12)


def test_large_samples_use_the_normal_approximation() -> None:
    rng = np.random.default_rng(0)
    effects = rng.standard_normal((5, 80)) + 0.1
    effects[4, 20:] = 0.0  # sixty react in the others, twenty here: exact again
    found = find_verdicts(effects, np.zeros(80, int), alpha=0.05, min_effect=0.0)
    alone = [scipy_p(row, "asymptotic") for row in effects[:4]]
    alone.append(scipy_p(effects[4, :20], "exact"))
    corrected = false_discovery(np.repeat(alone, 2).reshape(5, 2))
    np.testing.assert_allclose(found.p_values, corrected, atol=1e-12)


def test_one_extreme_image_does_not_decide() -> None:
    """The mean is far below zero, but five of six images gain: nothing is certain."""
    effects = np.array([[-50.0, 0.1, 0.2, 0.3, 0.4, 0.5]])
    found = find_verdicts(effects, np.zeros(6, int), alpha=0.05, min_effect=0.01)
    assert found.mean[0] < -8
    assert found.verdicts == ("neutral",)


def test_interval_of_the_mean_by_hand() -> None:
    """t(0.975, 2) = 4.302653; half width 4.302653 / sqrt(3)."""
    found = find_verdicts(np.array([[1.0, 2.0, 3.0]]), np.zeros(3, int), alpha=0.05, min_effect=0.0)
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
    """A p of 2 / 2^6 = .03 counts at 5 % alone; among nine units that show nothing it does not."""
    labels = np.zeros(6, int)
    one = np.array([0.3, 0.1, 0.2, 0.6, 0.5, 0.4])
    alone = find_verdicts(one[None], labels, alpha=0.05, min_effect=0.0)
    assert alone.verdicts == ("detrimental",)
    nothing = np.array([0.1, -0.2, 0.3, 0.4, -0.5, -0.6]) * np.arange(1, 10)[:, None]
    among = find_verdicts(np.vstack([one, nothing]), labels, alpha=0.05, min_effect=0.0)
    assert among.p_values.shape == (10, 2)
    assert among.p_values[0, 0] == pytest.approx(10 * alone.p_values[0, 0], abs=1e-9)
    assert among.verdicts == ("neutral",) * 10


def test_all_images_together_are_one_more_sample() -> None:
    """Four classes of three images: too few to be sure in any class, sure over all twelve.

    p = 2 / 2^3 in each class and 2 / 2^12 over all, times five tests.
    """
    effects = 0.2 + 0.01 * np.arange(12)[None]
    found = find_verdicts(effects, np.repeat(np.arange(4), 3), alpha=0.05, min_effect=0.01)
    assert found.p_values[0].tolist() == [0.25, 0.25, 0.25, 0.25, 5 * 2.0**-11]
    assert found.verdicts == ("detrimental",)
    assert found.harms == ((),), "no single class is sure"


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
    found = find_verdicts(effects, labels, alpha=0.05, min_effect=0.01)
    assert found.verdicts == (verdict,)


def test_smallest_effect_that_counts_is_a_setting() -> None:
    effects, labels = _sample(0.005)[None], np.zeros(12, int)
    assert find_verdicts(effects, labels, alpha=0.05, min_effect=0.01).verdicts == ("neutral",)
    assert find_verdicts(effects, labels, alpha=0.05, min_effect=0.004).verdicts == ("detrimental",)


def test_effect_without_spread_is_certain_and_zero_is_not() -> None:
    effects = np.array([[-0.5] * 12, [0.0] * 12])
    found = find_verdicts(effects, np.zeros(12, int), alpha=0.05, min_effect=0.01)
    assert found.verdicts == ("critical", "neutral")
    assert found.p_values[1].tolist() == [1.0, 1.0]


def test_single_image_is_no_evidence() -> None:
    found = find_verdicts(np.array([[-0.9]]), np.zeros(1, int), alpha=0.05, min_effect=0.01)
    assert found.verdicts == ("neutral",)
    assert (found.low[0], found.high[0]) == (-0.9, -0.9)


def test_opposite_classes_do_not_cancel() -> None:
    """The mean over all images is zero; tested per class, the unit is critical."""
    effects = np.concatenate([_sample(-0.3), _sample(0.3)])[None]
    found = find_verdicts(effects, np.repeat([0, 1], 12), alpha=0.05, min_effect=0.01)
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


# --- which classes a unit serves -----------------------------------------------------------------


def test_served_and_harmed_classes_strongest_first() -> None:
    """Unit 0 serves 9 more than 3 and harms 4; unit 1 is certain on 5 but below ``min_effect``."""
    effects = np.stack(
        [
            np.concatenate([_sample(m) for m in (-0.1, 0.2, 0.0, -0.3)]),
            np.concatenate([_sample(m) for m in (0.0, 0.0, -0.008, 0.0)]),
        ]
    )
    labels = np.repeat([3, 4, 5, 9], 12)
    found = find_verdicts(effects, labels, alpha=0.05, min_effect=0.01)
    assert found.serves == ((9, 3), ())
    assert found.harms == ((4,), ())
    assert found.verdicts == ("critical", "neutral")
    found = find_verdicts(effects, labels, alpha=0.05, min_effect=0.005)
    assert found.serves == ((9, 3), (5,))


def test_classes_that_were_tested_together_are_not_named() -> None:
    """Twelve images of class 0, and one of each of twelve others: only class 0 has a name."""
    labels = np.concatenate([np.zeros(12, int), np.arange(1, 13)])
    effects = np.concatenate([_sample(0.0), _sample(-0.3)])[None]
    found = find_verdicts(effects, labels, alpha=0.05, min_effect=0.01)
    assert found.verdicts == ("critical",)
    assert found.serves == ((),)
    found = find_verdicts(effects[:, ::-1], labels, alpha=0.05, min_effect=0.01)
    assert found.serves == ((0,),)


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
    (group,) = find_groups(trace(module, images[:2])).groups
    found = measure_group(
        trace(module, images[:2]), group, range(4), images=images, labels=labels, moments={}
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
    found = find_verdicts(effects.true_class, labels, alpha=0.05, min_effect=0.01)
    assert found.verdicts == ("critical", "neutral", "detrimental", "neutral")


def test_planted_units_serve_and_harm_the_classes_they_were_made_for(
    planted: tuple[Effects, np.ndarray],
) -> None:
    effects, labels = planted
    found = find_verdicts(effects.true_class, labels, alpha=0.05, min_effect=0.01)
    assert found.serves == ((1,), (), (), ())
    assert found.harms == ((), (), (0,), ())


def test_tiny_effect_is_certain_but_too_small(planted: tuple[Effects, np.ndarray]) -> None:
    effects, labels = planted
    found = find_verdicts(effects.true_class, labels, alpha=0.05, min_effect=0.0)
    assert found.p_values[TINY].min() < 0.01
    assert found.verdicts[USELESS] == "neutral"
    assert found.verdicts[TINY] == "critical"
