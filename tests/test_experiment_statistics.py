"""Statistics of experiments: estimates, and the crossed bootstrap against closed forms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from vi_simsiam.errors import InputError
from vi_simsiam.experiments.statistics import concentration_ratio, difference, estimate

Bits = NDArray[np.bool_]


def runs(
    rng: np.random.Generator,
    seeds: int,
    images: int,
    *,
    seed_sd: float = 0.0,
    shift: float = 0.0,
    hard: Any = 0.0,
) -> Bits:
    """Runs of an arm: a threshold on the image's difficulty, the run's skill and chance; (seeds, images)."""
    skill = rng.normal(shift, seed_sd, (seeds, 1))
    bits: Bits = rng.normal(size=(seeds, images)) + hard < skill
    return bits


def test_estimate_is_numpys_and_its_interval_scipys() -> None:
    values = [0.41, 0.43, 0.46]
    found = estimate([*values, math.nan])
    assert found.n == 3
    assert found.mean == pytest.approx(np.mean(values))
    assert found.sd == pytest.approx(np.std(values, ddof=1))
    wanted = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert found.interval() == pytest.approx((wanted.low, wanted.high))
    assert (estimate([0.4]).sd, estimate([0.4]).interval()) == (None, None)
    with pytest.raises(InputError, match="at least one finite number"):
        estimate([math.nan])


def test_one_seed_gives_the_paired_normal_interval_over_images() -> None:
    rng = np.random.default_rng(1)
    hard = rng.normal(size=200_000)
    first, second = runs(rng, 1, 200_000, shift=0.1, hard=hard), runs(rng, 1, 200_000, hard=hard)
    found = difference(first, second)
    gains = first[0].astype(float) - second[0]
    half = stats.norm.ppf(0.975) * gains.std() / math.sqrt(len(gains))
    assert found.value == pytest.approx(gains.mean(), abs=1e-15)
    assert (found.low, found.high) == pytest.approx(
        (gains.mean() - half, gains.mean() + half), abs=0.05 * half
    )
    assert not found.over_seeds
    assert half < 0.9 * stats.norm.ppf(0.975) * math.sqrt(
        (first.var() + second.var()) / len(gains)
    ), "images are paired"


def test_images_are_drawn_as_by_indices() -> None:
    """The multinomial draw of kinds of images is the draw of images: brute force with the same images for all runs."""
    rng = np.random.default_rng(2)
    hard = rng.normal(size=300)
    first, second = runs(rng, 1, 300, shift=0.3, hard=hard), runs(rng, 4, 300, hard=hard)
    chosen = rng.integers(0, 300, (20_000, 300))
    brute = (first.mean(0) - second.mean(0))[chosen].mean(1)
    found = difference(first, second)
    assert (found.low, found.high) == pytest.approx(np.quantile(brute, [0.025, 0.975]), abs=0.003)


def test_many_seeds_and_images_give_the_analytic_interval() -> None:
    """Both parts add as variances do; that of the seeds is Student's interval of two samples."""
    rng = np.random.default_rng(3)
    hard = rng.normal(size=2_000)
    first, second = (runs(rng, n, 2_000, seed_sd=0.02, hard=hard) for n in (40, 25))
    found = difference(first, second)
    over_seeds = sum(arm.mean(1).var(ddof=1) / len(arm) for arm in (first, second))
    over_images = (first.mean(0) - second.mean(0)).var() / 2_000
    half = math.sqrt(
        stats.norm.ppf(0.975) ** 2 * over_images + stats.t.ppf(0.975, 63) ** 2 * over_seeds
    )
    assert 0.1 < over_images / over_seeds < 10, "both parts matter"
    assert found.high - found.low == pytest.approx(2 * half, rel=0.05)
    assert (found.seeds, found.images, found.over_seeds) == ((40, 25), 2_000, True)


@pytest.mark.parametrize(
    ("seeds", "seed_sd", "most"), [(2, 0.3, 0.98), (3, 0.3, 0.98), (5, 0.3, 0.98), (3, 0.0, 1.0)]
)
def test_coverage_is_that_of_the_level(seeds: int, seed_sd: float, most: float) -> None:
    """Two arms that are alike: 0 is covered in about 95 % of 1,000 experiments, in more where seeds do not differ."""
    rng = np.random.default_rng(4)
    covered = 0
    for _ in range(1000):
        hard = rng.normal(size=200)
        arms = [runs(rng, seeds, 200, seed_sd=seed_sd, hard=hard) for _ in range(2)]
        found = difference(arms[0], arms[1], draws=400)
        covered += found.verdict == "not shown"
    assert 0.93 < covered / 1000 <= most


def test_one_seed_covers_the_difference_of_these_two_runs() -> None:
    rng = np.random.default_rng(5)
    truth = stats.norm.cdf(0.2 / math.sqrt(2)) - 0.5
    covered = 0
    for _ in range(1000):
        hard = rng.normal(size=400)
        found = difference(
            runs(rng, 1, 400, shift=0.2, hard=hard), runs(rng, 1, 400, hard=hard), draws=400
        )
        covered += found.low <= truth <= found.high
    assert 0.93 < covered / 1000 < 0.97


@pytest.mark.parametrize("seeds", [1, 3])
def test_swapping_the_arms_turns_the_sign(seeds: int) -> None:
    rng = np.random.default_rng(6)
    first, second = (
        runs(rng, seeds, 900, seed_sd=0.05, shift=0.4),
        runs(rng, seeds, 900, seed_sd=0.05),
    )
    there, back = difference(first, second), difference(second, first)
    width = there.high - there.low
    assert there.value == -back.value
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low), abs=0.05 * width)
    assert {there.verdict, back.verdict} == {"shown", "the other way"}


def test_identical_arms_do_not_differ() -> None:
    arm = runs(np.random.default_rng(7), 3, 500, seed_sd=0.1)
    found = difference(arm, arm)
    assert found.value == 0
    assert found.low < 0 < found.high, (
        "three other seeds of this arm would not give the same accuracy"
    )
    assert found.verdict == "not shown"
    alone = difference(arm[:1], arm[:1])
    assert (alone.value, alone.low, alone.high, alone.verdict) == (0, 0, 0, "not shown")


def test_the_interval_is_the_same_every_time_and_plain_json() -> None:
    rng = np.random.default_rng(8)
    first, second = runs(rng, 3, 100, shift=0.5), runs(rng, 2, 100)
    found = difference(first, second)
    assert found == difference(first, second)
    assert found.to_dict() == {
        "value": found.value, "low": found.low, "high": found.high, "seeds": [3, 2], "images": 100, "over_seeds": True,
        "verdict": found.verdict,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ((0, 4), (1, 4), r"first: shape \(0, 4\) is not accepted"),
        ((1, 4), (4,), r"second: shape \(4,\) is not accepted"),
        ((1, 4), (1, 5), "second: 5 images cannot stand for the 4 of first"),
    ],
)
def test_arms_that_cannot_be_compared_are_named(first: Any, second: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        difference(np.zeros(first, bool), np.zeros(second, bool))


def test_concentration_ratio_is_one_at_the_optimum() -> None:
    cosine = np.array([0.5, 0.9, 0.0, -0.2, 1.0, np.nan])
    kappa = np.array([1.0, 4.5, 1.0, 1.0, 1.0, 1.0])
    found = concentration_ratio(kappa, cosine)
    assert found[:2] == pytest.approx([1.0, 0.5])
    assert np.isnan(found[2:]).all()
