"""Uncertainty scores against direct computation and scikit-learn."""

from __future__ import annotations

import io
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
from torch.nn import functional as F

from vi_simsiam.data.loader import eval_loader
from vi_simsiam.data.sources import ArraySource
from vi_simsiam.data.views import eval_square
from vi_simsiam.errors import InputError
from vi_simsiam.evaluation import scores
from vi_simsiam.evaluation.logistic import LogisticProbe
from vi_simsiam.evaluation.scores import Network, Reference, disagreement, eval_pixels, image_scores
from vi_simsiam.inference import neighbours
from vi_simsiam.models import VISimSiam


def coloured(count: int = 9, side: int = 20) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, side, side + 4, 3), dtype=np.uint8)


def test_pixels_are_those_of_the_evaluation_view() -> None:
    source = ArraySource(coloured())
    (pixels,) = eval_pixels(source, 12, 0)
    assert pixels.dtype == np.uint8
    crop = [eval_square(12)(source.image(i)) for i in range(len(source))]
    np.testing.assert_array_equal(pixels, np.stack([np.asarray(image) for image in crop]))
    ((views, _),) = eval_loader(source, 12, 100, 0)
    # Either rounds a share of 255, a difference, and a quotient by 0.224 of up to 2.7.
    rounding = 12 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(scores.views_of(pixels), views, rtol=0, atol=rounding)


def test_one_pass_gives_the_lengths_of_all_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "_BATCH", 4)  # several batches
    torch.manual_seed(0)
    model = VISimSiam("resnet18", dim=16, projector_hidden=8, predictor_hidden=8, stem="small")
    model(list(torch.randn(2, 8, 3, 8, 8)))  # running statistics of their own
    model.train()
    observed = Network(model, CPU).observe(eval_pixels(ArraySource(coloured()), 16, 0))
    assert model.training
    assert not model.backbone.layer1._forward_hooks
    model.eval()
    (views,) = (batch for batch, _ in eval_loader(ArraySource(coloured()), 16, 100, 0))
    norms = {}
    with torch.no_grad():
        inner = views
        for name, layer in model.backbone.named_children():
            inner = layer(inner) if name not in ("avgpool", "fc") else inner
            if name in scores.LAYERS:
                norms[name] = inner.mean((2, 3)).norm(dim=1)
        norms["embedding"] = (embedding := model.backbone(views)).norm(dim=1)
        norms["projection"] = (projection := model.projector(embedding)).norm(dim=1)
        prediction = model.predictor(projection)
        norms["prediction"] = prediction[:, :16].norm(dim=1)
        concentration = model.distribution(views).concentration
    torch.testing.assert_close(observed.embedding, embedding, rtol=1e-4, atol=1e-5)
    expected = {"kappa": -concentration, **{f"{name}_norm": -norm for name, norm in norms.items()}}
    for name, value in expected.items():
        np.testing.assert_allclose(observed.scores[name], value.numpy(), rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(
        observed.scores["layer4_norm"], observed.scores["embedding_norm"], rtol=1e-5
    )
    assert set(observed.scores) == {*expected, "edge_energy", "contrast", "jpeg_size"}
    assert observed.scores["kappa"].std() > 0


def test_damaged_weights_and_no_images_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with pytest.raises(InputError, match="none"):
        Network(run.model, CPU).observe([])
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
    probe = LogisticProbe.fit(train, torch.from_numpy(labels), ("a", "b", "c"))
    return Reference(train, labels, probe, CPU), train, labels, queries


def test_nearest_neighbours_against_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "_KEYS", 25)  # several blocks
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
    np.testing.assert_allclose(measured.scores(queries)["mahalanobis"], expected, rtol=1e-6)


def test_scores_of_the_probe() -> None:
    measured, _, _, queries = reference()
    assert measured.probe is not None
    logits = measured.probe.logits(queries).double().numpy()
    found = measured.scores(queries)
    np.testing.assert_allclose(found["energy"], -logsumexp(logits, axis=1), rtol=1e-9)
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(found["softmax"], 1 - shares.max(1), atol=1e-12)
    assert set(reference(labelled=False)[0].scores(queries)) == {"knn_distance", "mahalanobis"}
