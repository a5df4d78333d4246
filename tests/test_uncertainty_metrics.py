"""Figures of uncertainty against brute force, closed forms and libraries; calibration against samples that are calibrated."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors
from test_augment import BATCH_ROUNDING
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from vi_simsiam.config import AugmentConfig
from vi_simsiam.config import policy as named_policy
from vi_simsiam.data.cache import cached
from vi_simsiam.data.loader import MultiViewLoader
from vi_simsiam.data.sources import ArraySource
from vi_simsiam.distributions import PowerSpherical
from vi_simsiam.errors import InputError
from vi_simsiam.evaluation import metrics
from vi_simsiam.evaluation.calibration import augmented_views, calibration, pair_cosines


def drawn(
    count: int, *, tied: bool = False, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    generator = np.random.default_rng(seed)
    positive = generator.random(count) < 0.3
    scores = generator.normal(size=count) + positive
    return (np.round(2 * scores) if tied else scores), positive


@pytest.mark.parametrize("tied", [False, True])
def test_auroc_is_the_share_of_pairs_in_order(tied: bool) -> None:
    scores, positive = drawn(200, tied=tied)
    pairs = scores[positive][:, None] - scores[~positive][None]
    assert metrics.auroc(scores, positive) == pytest.approx(
        np.mean(pairs > 0) + np.mean(pairs == 0) / 2, abs=1e-12
    )
    peer = binary_auroc(torch.from_numpy(scores).sigmoid(), torch.from_numpy(positive).int())
    assert metrics.auroc(scores, positive) == pytest.approx(float(peer), abs=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_aupr_is_average_precision(tied: bool) -> None:
    scores, positive = drawn(200, tied=tied)
    expected, recall_before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        flagged = scores >= threshold
        recall = positive[flagged].sum() / positive.sum()
        expected += (recall - recall_before) * positive[flagged].mean()
        recall_before = recall
    assert metrics.aupr(scores, positive) == pytest.approx(expected, abs=1e-12)
    peer = binary_average_precision(
        torch.from_numpy(scores).sigmoid(), torch.from_numpy(positive).int()
    )
    assert metrics.aupr(scores, positive) == pytest.approx(float(peer), abs=1e-6)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tpr", [0.5, 0.95, 1.0])
def test_fpr_at_the_highest_threshold_that_enough_positives_reach(tied: bool, tpr: float) -> None:
    scores, positive = drawn(200, tied=tied)
    reached = [t for t in set(scores) if np.mean(scores[positive] >= t) >= tpr]
    assert metrics.fpr_at_tpr(scores, positive, tpr) == np.mean(scores[~positive] >= max(reached))


def test_aurc_and_augrc_without_ties_by_their_definitions() -> None:
    scores, wrong = drawn(60)
    order = sorted(range(60), key=lambda i: scores[i])
    risks = [sum(wrong[j] for j in order[:k]) / k for k in range(1, 61)]
    assert metrics.aurc(scores, wrong) == pytest.approx(sum(risks) / 60, abs=1e-12)
    generalised = [0.0] + [sum(wrong[j] for j in order[:k]) / 60 for k in range(1, 61)]
    assert metrics.augrc(scores, wrong) == pytest.approx(
        np.trapezoid(generalised, np.arange(61) / 60), abs=1e-12
    )


def test_tied_images_count_as_the_mean_over_their_orders() -> None:
    scores = np.array([1.0, 0.0, 1.0, 2.0, 1.0, 0.0])
    wrong = np.array([True, False, False, True, False, True])
    found: dict[str, list[float | None]] = {"aurc": [], "augrc": []}
    for order in itertools.permutations(range(6)):
        untied = scores + 1e-3 * np.array(order)
        found["aurc"].append(metrics.aurc(untied, wrong))
        found["augrc"].append(metrics.augrc(untied, wrong))
    assert metrics.aurc(scores, wrong) == pytest.approx(np.mean(found["aurc"]), abs=1e-12)
    assert metrics.augrc(scores, wrong) == pytest.approx(np.mean(found["augrc"]), abs=1e-12)


@pytest.mark.parametrize("tied", [False, True])
def test_augrc_follows_from_auroc_and_accuracy(tied: bool) -> None:
    scores, wrong = drawn(300, tied=tied)
    a = 1 - wrong.mean()
    expected = (1 - roc_auc_score(wrong, scores)) * a * (1 - a) + (1 - a) ** 2 / 2
    assert metrics.augrc(scores, wrong) == pytest.approx(expected, abs=1e-12)


def test_oracle_and_chance_in_closed_form() -> None:
    _, wrong = drawn(100)
    errors = int(wrong.sum())
    oracle = metrics.oracle(wrong)
    assert oracle["aurc"] == pytest.approx(
        sum(k / (100 - errors + k) for k in range(1, errors + 1)) / 100, abs=1e-12
    )
    assert oracle["augrc"] == pytest.approx((errors / 100) ** 2 / 2, abs=1e-12)
    chance = metrics.at_random(wrong)
    assert metrics.aurc(np.zeros(100), wrong) == pytest.approx(chance["aurc"], abs=1e-12)
    assert metrics.augrc(np.zeros(100), wrong) == pytest.approx(chance["augrc"], abs=1e-12)
    generator = np.random.default_rng(1)
    shuffled = [metrics.aurc(generator.random(100), wrong) for _ in range(400)]
    deviation = float(np.std(shuffled)) / 20
    assert chance["aurc"] == pytest.approx(np.mean(shuffled), abs=4 * deviation)


def test_risk_coverage_curve_is_thinned_and_ends_at_the_error_rate() -> None:
    scores, wrong = drawn(1234)
    curve = metrics.risk_coverage(scores, wrong)
    assert len(curve["coverage"]) == len(curve["risk"]) == 50
    assert curve["coverage"][-1] == 1
    assert curve["risk"][-1] == pytest.approx(wrong.mean(), abs=1e-12)
    order = np.argsort(scores)
    for coverage, risk in zip(curve["coverage"], curve["risk"], strict=True):
        kept = order[: round(coverage * 1234)]
        assert risk == pytest.approx(wrong[kept].mean(), abs=1e-12)
    assert metrics.risk_coverage(scores[:3], wrong[:3])["coverage"] == pytest.approx(
        [1 / 3, 2 / 3, 1]
    )


def test_figures_that_are_not_defined_are_none() -> None:
    scores, none = np.arange(5.0), np.zeros(5, dtype=bool)
    for flags in (none, ~none):
        assert (
            metrics.auroc(scores, flags)
            is metrics.aupr(scores, flags)
            is metrics.fpr_at_tpr(scores, flags)
            is None
        )
    assert metrics.aurc(scores, none) == metrics.augrc(scores, none) == 0
    assert metrics.aurc(scores, ~none) == 1
    assert metrics.augrc(scores, ~none) == 0.5
    empty, flags = np.zeros(0), np.zeros(0, dtype=bool)
    assert (
        metrics.aurc(empty, flags)
        is metrics.augrc(empty, flags)
        is metrics.auroc(empty, flags)
        is None
    )
    assert metrics.at_random(flags) == metrics.oracle(flags) == {"aurc": None, "augrc": None}
    assert metrics.risk_coverage(empty, flags) == {"coverage": [], "risk": []}
    assert metrics.level_trend(np.ones((3, 4))) == {"spearman": None, "monotone": 0.0}
    assert metrics.level_trend(np.ones((3, 0))) == {"spearman": None, "monotone": None}


def test_a_constant_score_is_chance() -> None:
    _, positive = drawn(50)
    assert metrics.auroc(np.ones(50), positive) == 0.5
    assert metrics.aupr(np.ones(50), positive) == pytest.approx(positive.mean(), abs=1e-12)
    assert metrics.fpr_at_tpr(np.ones(50), positive) == 1


def test_scores_that_are_not_finite_or_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="not finite"):
        metrics.auroc(np.array([0.0, np.nan]), np.array([True, False]))
    with pytest.raises(InputError, match="not finite"):
        metrics.level_trend(np.array([[0.0], [np.inf]]))
    with pytest.raises(InputError, match="shape"):
        metrics.aurc(np.zeros(3), np.zeros(2, dtype=bool))
    with pytest.raises(InputError, match="at least 2"):
        metrics.retrieved(torch.ones(1, 3), np.zeros(1, np.int64))


def test_detection_takes_the_foreign_images_as_positive() -> None:
    figures = metrics.detection_figures(np.array([0.0, 1, 2, 3]), np.array([2.5, 4, 5]))
    assert figures["auroc"] == pytest.approx(11 / 12)
    assert figures["fpr95"] == 0.25


def test_retrieval_against_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_BLOCK", 7 * 90)  # several blocks
    generator = np.random.default_rng(0)
    labels = np.arange(90) % 3
    points = np.eye(3)[labels] + generator.normal(size=(90, 3))
    neighbours = (
        NearestNeighbors(n_neighbors=2, metric="cosine", algorithm="brute")
        .fit(points)
        .kneighbors(points)[1]
    )
    expected = labels[neighbours[:, 1]] == labels
    assert 0.2 < expected.mean() < 0.9
    np.testing.assert_array_equal(metrics.retrieved(torch.from_numpy(points), labels), expected)


def test_level_trend_by_brute_force() -> None:
    generator = np.random.default_rng(0)
    scores = np.arange(6)[:, None] + generator.normal(size=(6, 40)) * 2
    ranks = scores.ravel().argsort().argsort()
    levels = np.repeat(np.arange(6), 40)
    level_ranks = np.array([(levels < x).sum() + ((levels == x).sum() - 1) / 2 for x in levels])
    trend = metrics.level_trend(scores)
    assert trend["spearman"] == pytest.approx(np.corrcoef(ranks, level_ranks)[0, 1], abs=1e-12)
    rises = [scores[level + 1, i] > scores[level, i] for level in range(5) for i in range(40)]
    assert trend["monotone"] == pytest.approx(np.mean(rises), abs=1e-12)


def spherical_pairs(dim: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Concentrations, and the cosines of samples with the mean directions of their distributions."""
    torch.manual_seed(0)
    loc = torch.nn.functional.normalize(torch.randn(count, dim, dtype=torch.float64), dim=1)
    concentration = (dim - 1) * torch.exp(torch.randn(count, dtype=torch.float64))
    sample = PowerSpherical(loc, concentration).sample()
    return concentration, (loc * sample).sum(1)


def test_samples_of_the_predicted_distributions_are_calibrated() -> None:
    dim, count = 32, 30_000
    concentration, cosine = spherical_pairs(dim, count)
    expected = concentration / (concentration + dim - 1)
    found = calibration(expected.numpy(), cosine.numpy())
    # T = 2 Z - 1 with Z ~ Beta((D - 1)/2 + kappa, (D - 1)/2).
    a, b = (dim - 1) / 2 + concentration, (dim - 1) / 2
    variance = 4 * a * b / (a + b) ** 2 / (a + b + 1)
    deviation = float((variance.mean() / (count / 15)).sqrt())
    assert found["error"] < 2 * deviation
    assert found["observed"] == pytest.approx(
        found["expected"], abs=4 * float((variance.mean() / count).sqrt())
    )
    assert [row["count"] for row in found["bins"]] == [2000] * 15
    expectations = [row["expected"] for row in found["bins"]]
    assert expectations == sorted(expectations)

    doubled = 2 * concentration / (2 * concentration + dim - 1)
    wrong = calibration(doubled.numpy(), cosine.numpy())
    assert wrong["error"] == pytest.approx(float((doubled - expected).mean()), abs=4 * deviation)
    assert wrong["error"] > 20 * deviation


def test_equal_expectations_share_a_bin() -> None:
    observed = np.random.default_rng(0).normal(0.4, 0.3, 1000)
    found = calibration(np.full(1000, 0.5), observed)
    assert [row["count"] for row in found["bins"]] == [1000]
    assert found["error"] == pytest.approx(abs(observed.mean() - 0.5), abs=1e-12)
    assert found["pairs"] == 1000


def test_calibration_refuses_what_it_cannot_use() -> None:
    with pytest.raises(InputError, match="P >= 1"):
        calibration(np.zeros(0), np.zeros(0))
    with pytest.raises(InputError, match="not finite"):
        calibration(np.array([np.nan]), np.zeros(1))
    with pytest.raises(InputError, match="bins: 0"):
        calibration(np.zeros(3), np.zeros(3), bins=0)


def test_pairs_are_all_ordered_pairs_of_different_views() -> None:
    torch.manual_seed(0)
    loc = torch.nn.functional.normalize(torch.randn(3, 2, 5), dim=-1)
    projection, concentration = 7 * torch.randn(3, 2, 5), 4 * torch.rand(3, 2)
    expected, observed = pair_cosines(loc, concentration, projection)
    by_hand = [
        (
            concentration[v, i] / (concentration[v, i] + 4),
            torch.cosine_similarity(loc[v, i], projection[g, i], dim=0),
        )
        for v in range(3)
        for g in range(3)
        if v != g
        for i in range(2)
    ]
    torch.testing.assert_close(expected.flatten(), torch.stack([pair[0] for pair in by_hand]))
    torch.testing.assert_close(observed.flatten(), torch.stack([pair[1] for pair in by_hand]))


def test_held_out_views_are_those_of_training() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (10, 12, 16, 3), dtype=np.uint8)
    images, _ = cached(ArraySource(pixels))
    policy = AugmentConfig(size=8, local_views=3, local_size=8)
    chosen = np.array([1, 4, 5, 8])
    batches = list(
        augmented_views(
            images, chosen, policy, views=4, seed=3, device=torch.device("cpu"), batch_size=3
        )
    )
    assert [tuple(batch.shape) for batch in batches] == [(4, 3, 3, 8, 8), (4, 1, 3, 8, 8)]
    views = torch.cat(batches, 1)
    (batch,) = MultiViewLoader(images, policy, 10, seed=3, workers=0).epoch(0)
    rows = [batch.index.tolist().index(number) for number in chosen]
    for view in range(2):
        torch.testing.assert_close(
            views[view], batch.views[view][rows], rtol=0, atol=BATCH_ROUNDING
        )
    assert (views[2] - views[3]).abs().amax((1, 2, 3)).min() > 0.1
    whole = dataclasses.replace(named_policy("none"), size=8)
    (same,) = augmented_views(images, chosen, whole, views=4, seed=3, device=torch.device("cpu"))
    torch.testing.assert_close(same, same[:1].expand_as(same), rtol=0, atol=0)
    with pytest.raises(InputError, match="views: 1"):
        next(augmented_views(images, chosen, policy, views=1, seed=3, device=torch.device("cpu")))
