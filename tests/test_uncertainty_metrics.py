"""Measures of uncertainty against brute force and closed forms; calibration against samples."""

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
from torch.nn import functional as F

from vi_simsiam.config import AugmentConfig
from vi_simsiam.config import policy as named_policy
from vi_simsiam.data.cache import cached
from vi_simsiam.data.loader import MultiViewLoader
from vi_simsiam.data.sources import ArraySource
from vi_simsiam.distributions import PowerSpherical
from vi_simsiam.errors import InputError
from vi_simsiam.evaluation import metrics
from vi_simsiam.evaluation.calibration import augmented_views, calibration, pair_cosines

approx = pytest.approx
tied_or_not = pytest.mark.parametrize("tied", [False, True])


def drawn(
    count: int, *, tied: bool = False, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    generator = np.random.default_rng(seed)
    positive = generator.random(count) < 0.3
    scores = generator.normal(size=count) + positive
    return (np.round(2 * scores) if tied else scores), positive


@tied_or_not
def test_fpr_at_the_highest_threshold_that_enough_positives_reach(tied: bool) -> None:
    scores, positive = drawn(200, tied=tied)
    reached = [t for t in set(scores) if np.mean(scores[positive] >= t) >= 0.95]
    assert metrics.fpr_at_tpr(scores, positive) == np.mean(scores[~positive] >= max(reached))


def test_aurc_and_augrc_without_ties_by_their_definitions() -> None:
    scores, wrong = drawn(60)
    errors = np.cumsum(wrong[np.argsort(scores)])
    assert metrics.aurc(scores, wrong) == approx(np.mean(errors / np.arange(1, 61)), abs=1e-12)
    area = np.trapezoid([0, *(errors / 60)], np.arange(61) / 60)
    assert metrics.augrc(scores, wrong) == approx(area, abs=1e-12)


def test_tied_images_count_as_the_mean_over_their_orders() -> None:
    scores = np.array([1.0, 0.0, 1.0, 2.0, 1.0, 0.0])
    wrong = np.array([True, False, False, True, False, True])
    orders = [scores + 1e-3 * np.array(order) for order in itertools.permutations(range(6))]
    for measure in (metrics.aurc, metrics.augrc):
        found = [measure(untied, wrong) for untied in orders]
        assert measure(scores, wrong) == approx(np.mean(found), abs=1e-12)


@tied_or_not
def test_augrc_follows_from_auroc_and_accuracy(tied: bool) -> None:
    scores, wrong = drawn(300, tied=tied)
    a = 1 - wrong.mean()
    expected = (1 - roc_auc_score(wrong, scores)) * a * (1 - a) + (1 - a) ** 2 / 2
    assert metrics.augrc(scores, wrong) == approx(expected, abs=1e-12)


def test_oracle_and_chance_in_closed_form() -> None:
    _, wrong = drawn(100)
    errors = int(wrong.sum())
    area = sum(k / (100 - errors + k) for k in range(1, errors + 1)) / 100
    expected = {"aurc": area, "augrc": (errors / 100) ** 2 / 2}
    assert metrics.oracle(wrong) == approx(expected, abs=1e-12)
    chance = metrics.at_random(wrong)
    assert metrics.aurc(np.zeros(100), wrong) == approx(chance["aurc"], abs=1e-12)
    assert metrics.augrc(np.zeros(100), wrong) == approx(chance["augrc"], abs=1e-12)


def test_risk_coverage_curve_is_thinned_and_ends_at_the_error_rate() -> None:
    scores, wrong = drawn(1234)
    curve = metrics.risk_coverage(scores, wrong)
    assert len(curve["coverage"]) == len(curve["risk"]) == 50
    assert curve["coverage"][-1] == 1
    order = np.argsort(scores)
    kept = [order[: round(coverage * 1234)] for coverage in curve["coverage"]]
    assert curve["risk"] == approx([wrong[images].mean() for images in kept], abs=1e-12)
    assert curve["risk"][-1] == approx(wrong.mean(), abs=1e-12)
    assert metrics.risk_coverage(scores[:3], wrong[:3])["coverage"] == approx([1 / 3, 2 / 3, 1])


def test_measures_that_are_not_defined_are_none() -> None:
    scores, none = np.arange(5.0), np.zeros(5, dtype=bool)
    for measure in (metrics.auroc, metrics.aupr, metrics.fpr_at_tpr):
        assert measure(scores, none) is measure(scores, ~none) is None
    assert metrics.failure_figures(scores, none) == {"auroc": None, "aurc": 0, "augrc": 0}
    assert metrics.failure_figures(scores, ~none) == {"auroc": None, "aurc": 1, "augrc": 0.5}
    assert metrics.level_trend(np.ones((3, 4))) == {"spearman": None, "monotone": 0.0}


def test_detection_takes_the_foreign_images_as_positive() -> None:
    figures = metrics.detection_figures(np.array([0.0, 1, 2, 3]), np.array([2.0, 4, 5]))
    # 10 of 12 pairs are in order and one is tied; at the threshold 2, precision is 3/5.
    expected = {"auroc": 10.5 / 12, "aupr": 2 / 3 + 3 / 5 / 3, "fpr95": 0.5}
    assert figures == approx(expected, abs=1e-12)
    constant = metrics.detection_figures(np.ones(30), np.ones(20))
    assert constant == {"auroc": 0.5, "aupr": approx(0.4, abs=1e-12), "fpr95": 1}


def test_arrays_that_are_not_finite_or_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="not finite"):
        metrics.auroc(np.array([0.0, np.nan]), np.array([True, False]))
    with pytest.raises(InputError, match="not finite"):
        metrics.level_trend(np.array([[0.0], [np.inf]]))
    with pytest.raises(InputError, match="shape"):
        metrics.aurc(np.zeros(3), np.zeros(2, dtype=bool))
    with pytest.raises(InputError, match="not finite"):
        calibration(np.array([np.nan]), np.zeros(1))


def test_retrieval_against_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_BLOCK", 7 * 90)  # several blocks
    generator = np.random.default_rng(0)
    labels = np.arange(90) % 3
    points = np.eye(3)[labels] + generator.normal(size=(90, 3))
    search = NearestNeighbors(n_neighbors=2, metric="cosine", algorithm="brute").fit(points)
    expected = labels[search.kneighbors(points)[1][:, 1]] == labels
    assert 0.2 < expected.mean() < 0.9
    np.testing.assert_array_equal(metrics.retrieved(torch.from_numpy(points), labels), expected)
    scores = {"right": 1.0 * ~expected, "constant": np.ones(90)}
    figures = metrics.retrieval_figures(torch.from_numpy(points), labels, scores)
    assert figures["recall_at_1"] == approx(expected.mean())
    assert figures["scores"] == {"right": 1.0, "constant": 0.5}


def test_level_trend_by_brute_force() -> None:
    generator = np.random.default_rng(0)
    scores = np.arange(6)[:, None] + generator.normal(size=(6, 40)) * 2
    ranks = scores.ravel().argsort().argsort()
    levels = np.repeat(np.arange(6), 40)
    level_ranks = np.array([(levels < x).sum() + ((levels == x).sum() - 1) / 2 for x in levels])
    trend = metrics.level_trend(scores)
    assert trend["spearman"] == approx(np.corrcoef(ranks, level_ranks)[0, 1], abs=1e-12)
    rises = [scores[level + 1, i] > scores[level, i] for level in range(5) for i in range(40)]
    assert trend["monotone"] == approx(np.mean(rises), abs=1e-12)


def test_samples_of_the_predicted_distributions_are_calibrated() -> None:
    dim, count = 32, 30_000
    torch.manual_seed(0)
    loc = F.normalize(torch.randn(count, dim, dtype=torch.float64), dim=1)
    concentration = (dim - 1) * torch.exp(torch.randn(count, dtype=torch.float64))
    cosine = (loc * PowerSpherical(loc, concentration).sample()).sum(1)
    expected = concentration / (concentration + dim - 1)
    found = calibration(expected.numpy(), cosine.numpy())
    # T = 2 Z - 1 with Z ~ Beta((D - 1)/2 + kappa, (D - 1)/2).
    a, b = (dim - 1) / 2 + concentration, (dim - 1) / 2
    variance = (4 * a * b / (a + b) ** 2 / (a + b + 1)).mean()
    deviation = float((variance / (count / 15)).sqrt())
    assert found["error"] < 2 * deviation
    assert found["observed"] == approx(found["expected"], abs=4 * float((variance / count).sqrt()))
    assert [row["count"] for row in found["bins"]] == [2000] * 15
    expectations = [row["expected"] for row in found["bins"]]
    assert expectations == sorted(expectations)

    doubled = 2 * concentration / (2 * concentration + dim - 1)
    wrong = calibration(doubled.numpy(), cosine.numpy())
    assert wrong["error"] == approx(float((doubled - expected).mean()), abs=4 * deviation)
    assert wrong["error"] > 20 * deviation


def test_equal_expectations_share_a_bin() -> None:
    observed = np.random.default_rng(0).normal(0.4, 0.3, 1000)
    found = calibration(np.full(1000, 0.5), observed)
    assert [row["count"] for row in found["bins"]] == [found["pairs"]] == [1000]
    assert found["error"] == approx(abs(observed.mean() - 0.5), abs=1e-12)


def test_pairs_are_all_ordered_pairs_of_different_views() -> None:
    torch.manual_seed(0)
    loc = F.normalize(torch.randn(3, 2, 5), dim=-1)
    projection, concentration = 7 * torch.randn(3, 2, 5), 4 * torch.rand(3, 2)
    expected, observed = pair_cosines(loc, concentration, projection)
    pairs = list(itertools.permutations(range(3), 2))
    ratios = [concentration[v] / (concentration[v] + 4) for v, _ in pairs]
    torch.testing.assert_close(expected, torch.stack(ratios))
    cosines = [torch.cosine_similarity(loc[v], projection[g], dim=1) for v, g in pairs]
    torch.testing.assert_close(observed, torch.stack(cosines))


def test_held_out_views_are_those_of_training() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (10, 12, 16, 3), dtype=np.uint8)
    images, _ = cached(ArraySource(pixels))
    policy = AugmentConfig(size=8, local_views=3, local_size=8)
    chosen, common = np.array([1, 4, 5, 8]), {"seed": 3, "device": torch.device("cpu")}
    batches = list(augmented_views(images, chosen, policy, views=4, batch_size=3, **common))
    assert [tuple(batch.shape) for batch in batches] == [(4, 3, 3, 8, 8), (4, 1, 3, 8, 8)]
    views = torch.cat(batches, 1)
    (batch,) = MultiViewLoader(images, policy, 10, seed=3, workers=0).epoch(0)
    rows = [batch.index.tolist().index(number) for number in chosen]
    for view, trained in zip(views, batch.views[:2], strict=False):
        torch.testing.assert_close(view, trained[rows], rtol=0, atol=BATCH_ROUNDING)
    assert (views[2] - views[3]).abs().amax((1, 2, 3)).min() > 0.1
    whole = dataclasses.replace(named_policy("none"), size=8)
    (same,) = augmented_views(images, chosen, whole, views=4, **common)
    torch.testing.assert_close(same, same[:1].expand_as(same), rtol=0, atol=0)
    with pytest.raises(InputError, match="views: 1"):
        next(augmented_views(images, chosen, policy, views=1, **common))
