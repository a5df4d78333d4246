"""Statistics of experiments: estimates, and the crossed bootstrap against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from vi_simsiam.experiments.statistics import difference, estimate, interval

Bits = NDArray[np.bool_]


def pair(
    seed: int, seeds: tuple[int, int], images: int, *, seed_sd: float = 0.0, shift: float = 0.0
) -> tuple[Bits, Bits]:
    """Two arms on the same images, (seeds, images) each; the first has a skill greater by `shift`.

    A run is right where its skill exceeds the image's difficulty and chance.
    """
    rng = np.random.default_rng(seed)
    hard = rng.normal(size=images)
    arms = []
    for count, mean in zip(seeds, (shift, 0.0), strict=True):
        skill = rng.normal(mean, seed_sd, (count, 1))
        arms.append(rng.normal(size=(count, images)) + hard < skill)
    return arms[0], arms[1]


def test_estimate_is_numpys_and_its_interval_scipys() -> None:
    values = [0.41, 0.43, 0.46]
    found = estimate([*values, math.nan, None])
    assert found == {"mean": np.mean(values), "sd": np.std(values, ddof=1), "n": 3}
    wanted = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert interval(found) == pytest.approx((wanted.low, wanted.high))
    alone = estimate([0.4])
    assert alone is not None
    assert (alone["sd"], interval(alone)) == (None, None)
    assert estimate([math.nan]) is None


def test_one_seed_gives_the_paired_normal_interval_over_images() -> None:
    first, second = pair(1, (1, 1), 200_000, shift=0.1)
    found = difference(first, second)
    gains = first[0].astype(float) - second[0]
    z = stats.norm.ppf(0.975)
    half = z * gains.std() / math.sqrt(len(gains))
    assert found["value"] == pytest.approx(gains.mean(), abs=1e-15)
    wanted = (gains.mean() - half, gains.mean() + half)
    assert (found["low"], found["high"]) == pytest.approx(wanted, abs=0.05 * half)
    assert not found["over_seeds"]
    unpaired = z * math.sqrt((first.var() + second.var()) / len(gains))
    assert half < 0.9 * unpaired


def test_many_seeds_and_images_give_the_analytic_interval() -> None:
    """Both parts add as variances do; that of the seeds is Student's interval of two samples."""
    first, second = pair(3, (40, 25), 2_000, seed_sd=0.02)
    found = difference(first, second)
    over_seeds = sum(arm.mean(1).var(ddof=1) / len(arm) for arm in (first, second))
    over_images = (first.mean(0) - second.mean(0)).var() / 2_000
    student, normal = stats.t.ppf(0.975, 63), stats.norm.ppf(0.975)
    half = math.sqrt(normal**2 * over_images + student**2 * over_seeds)
    assert 0.1 < over_images / over_seeds < 10, "both parts matter"
    assert found["high"] - found["low"] == pytest.approx(2 * half, rel=0.05)
    assert (found["seeds"], found["images"], found["over_seeds"]) == ([40, 25], 2_000, True)


@pytest.mark.parametrize(
    ("seeds", "seed_sd", "shift", "most"),
    [(2, 0.3, 0, 0.98), (5, 0.3, 0, 0.98), (3, 0, 0, 1.0), (1, 0, 0.2, 0.97)],
)
def test_coverage_is_that_of_the_level(
    seeds: int, seed_sd: float, shift: float, most: float
) -> None:
    """The truth is covered in about 95 % of 1,000 experiments, in more if seeds do not differ."""
    truth = stats.norm.cdf(shift / math.sqrt(2)) - 0.5
    covered = 0
    for seed in range(1000):
        arms = pair(seed, (seeds, seeds), 200, seed_sd=seed_sd, shift=shift)
        found = difference(*arms, draws=400)
        covered += found["low"] <= truth <= found["high"]
    assert 0.93 < covered / 1000 <= most


@pytest.mark.parametrize("seeds", [1, 3])
def test_swapping_the_arms_turns_the_sign(seeds: int) -> None:
    first, second = pair(6, (seeds, seeds), 900, seed_sd=0.05, shift=0.4)
    there, back = difference(first, second), difference(second, first)
    width = there["high"] - there["low"]
    assert there == difference(first, second), "the draws are the same every time"
    assert there["value"] == -back["value"]
    ends = (-back["high"], -back["low"])
    assert (there["low"], there["high"]) == pytest.approx(ends, abs=0.05 * width)
    assert (there["verdict"], back["verdict"]) == ("shown", "the other way")


def test_identical_arms_do_not_differ() -> None:
    arm, _ = pair(7, (3, 1), 500, seed_sd=0.1)
    found = difference(arm, arm)
    assert (found["value"], found["verdict"]) == (0, "not shown")
    assert found["low"] < 0 < found["high"], "other seeds would not have the same accuracy"
