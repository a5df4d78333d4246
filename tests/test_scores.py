"""Uncertainty scores, their measures and their calibration, against direct computation."""

from __future__ import annotations

import io
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_cases import CPU, make_run
from numpy.typing import NDArray
from PIL import Image
from scipy.special import logsumexp
from sklearn.covariance import LedoitWolf
from sklearn.neighbors import NearestNeighbors
from test_augment import BATCH_ROUNDING
from torch.nn import functional as F

from vi_simsiam.config import AugmentConfig
from vi_simsiam.data.loader import MultiViewLoader, eval_loader, eval_pixels
from vi_simsiam.data.sources import ArraySource
from vi_simsiam.distributions import PowerSpherical
from vi_simsiam.engine import forward
from vi_simsiam.engine.forward import random_views
from vi_simsiam.errors import InputError
from vi_simsiam.evaluation import metrics
from vi_simsiam.evaluation.logistic import LogisticProbe
from vi_simsiam.evaluation.metrics import calibration
from vi_simsiam.evaluation.scores import (
    Network,
    Reference,
    disagreement,
    image_scores,
    pair_cosines,
    views_of,
)
from vi_simsiam.models import VISimSiam
from vi_simsiam.stages import RESNET


def coloured(count: int = 9, side: int = 20) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, side, side + 4, 3), dtype=np.uint8)


def pixels_of(images: NDArray[np.uint8], size: int, batch: int = 100) -> list[NDArray[np.uint8]]:
    return [pixels for pixels, _ in eval_pixels(ArraySource(images), size, batch, 0)]


def test_views_are_those_of_the_evaluation() -> None:
    (pixels,) = pixels_of(coloured(), 12)
    ((views, _),) = eval_loader(ArraySource(coloured()), 12, 100, 0)
    # Either rounds a share of 255, a difference, and a quotient by 0.224 of up to 2.7.
    rounding = 12 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(views_of(pixels), views, rtol=0, atol=rounding)


def test_one_pass_gives_the_lengths_of_all_features() -> None:
    torch.manual_seed(0)
    model = VISimSiam("resnet18", dim=16, projector_hidden=8, predictor_hidden=8, stem="small")
    model(list(torch.randn(2, 8, 3, 8, 8)))  # running statistics of their own
    model.train()
    found, observed = Network(model, CPU).observe(pixels_of(coloured(), 16, batch=4))
    assert model.training
    assert not model.backbone.layer1._forward_hooks
    model.eval()
    (views,) = (batch for batch, _ in eval_loader(ArraySource(coloured()), 16, 100, 0))
    norms = {}
    with torch.no_grad():
        inner = views
        for name, layer in model.backbone.named_children():
            inner = layer(inner) if name not in ("avgpool", "fc") else inner
            if name in RESNET:
                norms[name] = inner.mean((2, 3)).norm(dim=1)
        norms["embedding"] = (embedding := model.backbone(views)).norm(dim=1)
        norms["projection"] = (projection := model.projector(embedding)).norm(dim=1)
        prediction = model.predictor(projection)
        norms["prediction"] = prediction[:, :16].norm(dim=1)
        concentration = model.distribution(views).concentration
    torch.testing.assert_close(found, embedding, rtol=1e-4, atol=1e-5)
    expected = {"kappa": -concentration, **{f"{name}_norm": -norm for name, norm in norms.items()}}
    for name, value in expected.items():
        np.testing.assert_allclose(observed[name], value.numpy(), rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(observed["layer4_norm"], observed["embedding_norm"], rtol=1e-5)
    assert set(observed) == {*expected, "edge_energy", "contrast", "jpeg_size"}
    assert observed["kappa"].std() > 0


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    next(run.model.predictor.parameters()).data.fill_(math.nan)
    with pytest.raises(InputError, match="not finite"):
        Network(run.model, CPU).observe([coloured(2, 8)[:, :, :8]])


def test_statistics_of_pixels_in_closed_form() -> None:
    flat = np.full((16, 16, 3), 90, np.uint8)
    side = np.arange(16.0)
    channels = np.ones(3)
    ramp = 3 * side[None, :, None] * np.ones((16, 1, 1)) * channels
    slope = (3 * side[:, None] + 4 * side)[..., None] * channels
    half = np.where(side < 8, 0.0, 200.0)[:, None, None] * np.ones((16, 16, 3))
    found = image_scores(np.stack([flat, ramp, slope, half]).astype(np.uint8))
    np.testing.assert_allclose(-found["edge_energy"], [0, 3, 5, 200 / 15], rtol=1e-5, atol=1e-5)
    contrast = [0, 3 * np.std(side), slope[..., 0].std(), 100]
    np.testing.assert_allclose(-found["contrast"], contrast, rtol=1e-5, atol=1e-4)
    red = np.zeros((1, 4, 4, 3), np.uint8)
    red[0, :2, :, 0] = 100
    np.testing.assert_allclose(-image_scores(red)["contrast"], 0.299 * 50, rtol=1e-5)
    Image.fromarray(red[0]).save(buffer := io.BytesIO(), "JPEG", quality=75)
    assert -image_scores(red)["jpeg_size"] == len(buffer.getvalue())


def test_disagreement_is_one_minus_the_mean_cosine_of_pairs() -> None:
    torch.manual_seed(0)
    embeddings = torch.randn(4, 6, 10)
    first, second = embeddings[torch.combinations(torch.arange(4))].unbind(1)
    mean = F.cosine_similarity(first, second, dim=2).double().mean(0)
    np.testing.assert_allclose(disagreement(embeddings), 1 - mean.numpy(), atol=1e-6)
    np.testing.assert_allclose(disagreement(embeddings[:1].expand(3, 6, 10)), 0, atol=1e-12)


def reference(
    labelled: bool = True,
) -> tuple[Reference, torch.Tensor, NDArray[np.int64], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = np.arange(60) % 3
    spread = torch.tensor([3.0, 1, 0.3, 1, 1])
    train = 4 * torch.eye(5)[labels] + spread * torch.randn(60, 5, generator=generator)
    queries = 3 * torch.randn(17, 5, generator=generator)
    if not labelled:
        return Reference(train, None, None, CPU), train, labels, queries
    probe = LogisticProbe.fit(train, torch.from_numpy(labels), 3)
    return Reference(train, labels, probe, CPU), train, labels, queries


def test_nearest_neighbours_against_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "_KEYS", 25)  # several blocks
    measured, train, _, queries = reference()
    search = NearestNeighbors(n_neighbors=20, metric="cosine").fit(train.numpy())
    distances = search.kneighbors(queries.numpy())[0].mean(1)
    found = measured.scores(queries)["knn_distance"]
    np.testing.assert_allclose(found, distances, atol=1e-5)
    for few in (train[:3], torch.ones(30, 5)):  # fewer than the neighbours; all the same
        found = Reference(few, None, None, CPU).scores(queries)
        assert all(np.isfinite(values).all() for values in found.values())


@pytest.mark.parametrize("labelled", [True, False])
def test_mahalanobis_by_its_definition(labelled: bool) -> None:
    measured, train, labels, queries = reference(labelled)
    groups = labels if labelled else np.zeros(60, np.int64)
    points = train.double().numpy()
    means = [points[groups == group].mean(0) for group in sorted(set(groups))]
    centred = points - np.stack(means)[groups]
    covariance = LedoitWolf(assume_centered=True).fit(centred).covariance_
    away = queries.double().numpy()[:, None] - np.stack(means)
    squares = (away * np.linalg.solve(covariance, away.swapaxes(1, 2)).swapaxes(1, 2)).sum(2)
    expected = squares.min(1)
    found = measured.scores(queries)
    np.testing.assert_allclose(found["mahalanobis"], expected, rtol=1e-6)
    if labelled:  # beside it, the score that needs none
        alone = Reference(train, None, None, CPU).scores(queries)["mahalanobis"]
        np.testing.assert_allclose(found["mahalanobis_label_free"], alone, rtol=1e-6)


def test_scores_of_the_probe() -> None:
    measured, _, _, queries = reference()
    assert measured.probe is not None
    logits = measured.probe.logits(queries).double().numpy()
    found = measured.scores(queries)
    np.testing.assert_allclose(found["energy"], -logsumexp(logits, axis=1), rtol=1e-9)
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(found["softmax"], 1 - shares.max(1), atol=1e-12)
    assert set(reference(labelled=False)[0].scores(queries)) == {"knn_distance", "mahalanobis"}


approx = pytest.approx


def drawn(count: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    generator = np.random.default_rng(0)
    positive = generator.random(count) < 0.3
    return generator.normal(size=count) + positive, positive


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


def test_oracle_and_chance_in_closed_form() -> None:
    _, wrong = drawn(100)
    errors = int(wrong.sum())
    area = sum(k / (100 - errors + k) for k in range(1, errors + 1)) / 100
    expected = {"aurc": area, "augrc": (errors / 100) ** 2 / 2}
    assert metrics.oracle(wrong) == approx(expected, abs=1e-12)
    assert metrics.aurc(np.zeros(100), wrong) == approx(errors / 100, abs=1e-12)
    assert metrics.augrc(np.zeros(100), wrong) == approx(errors / 200, abs=1e-12)


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
    for measure in (metrics.auroc, metrics.aupr, metrics.fpr95):
        assert measure(scores, none) is measure(scores, ~none) is None
    assert (metrics.aurc(scores, none), metrics.augrc(scores, none)) == (0, 0)
    assert (metrics.aurc(scores, ~none), metrics.augrc(scores, ~none)) == (1, 0.5)
    constant = {"spearman": None, "monotone": 0.0, "aurocs": [0.5, 0.5]}
    assert metrics.level_trend(np.ones((3, 4))) == constant


def test_detection_takes_the_foreign_images_as_positive() -> None:
    figures = metrics.detection_figures(np.array([0.0, 1, 2, 3]), np.array([2.0, 4, 5]))
    # 10 of 12 pairs are in order and one is tied; at the threshold 2, precision is 3/5.
    expected = {"auroc": 10.5 / 12, "aupr": 2 / 3 + 3 / 5 / 3, "fpr95": 0.5}
    assert figures == approx(expected, abs=1e-12)
    constant = metrics.detection_figures(np.ones(30), np.ones(20))
    assert constant == {"auroc": 0.5, "aupr": approx(0.4, abs=1e-12), "fpr95": 1}


def test_retrieval_against_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "_KEYS", 7)  # several blocks
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
    above = [np.mean(level[:, None] > scores[0]) for level in scores[1:]]
    assert trend["aurocs"] == approx(above, abs=1e-12)


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


def test_views_are_those_of_training_and_further_ones() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (10, 12, 16, 3), dtype=np.uint8)
    policy, chosen = AugmentConfig(size=8, local_views=3, local_size=8), np.array([1, 4, 5, 8])
    options = {"views": 4, "seed": 3, "device": CPU, "later_epochs": False}
    views = random_views(list(pixels[chosen]), chosen, policy, **options)
    assert views.shape == (4, 4, 3, 8, 8)
    (batch,) = MultiViewLoader(ArraySource(pixels), policy, 10, seed=3, workers=0).epoch(0)
    rows = [batch.index.tolist().index(number) for number in chosen]
    for view, trained in zip(views, batch.views[:2], strict=False):
        torch.testing.assert_close(view, trained[rows], rtol=0, atol=BATCH_ROUNDING)
    assert (views[2] - views[3]).abs().amax((1, 2, 3)).min() > 0.1
