"""Weighted k nearest neighbours."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_cases import feature_sets
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torch.nn import functional as F

from vi_simsiam.errors import InputError
from vi_simsiam.evaluation import knn
from vi_simsiam.evaluation.knn import KnnConfig, classify, evaluate_knn
from vi_simsiam.evaluation.results import unpack_bits
from vi_simsiam.evaluation.summary import summary_line
from vi_simsiam.inference import forward


def random_problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """300 training points in overlapping clusters of different lengths, 5 labels, 200 queries."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, 16, generator=generator)

    def draw(labels: Tensor) -> Tensor:
        points = centres[labels] + 1.5 * torch.randn(len(labels), 16, generator=generator)
        return points * torch.rand(len(labels), 1, generator=generator).add(0.1)

    labels = torch.randint(5, (300,), generator=generator)
    return draw(labels), labels, draw(torch.randint(5, (200,), generator=generator))


def decided(train: Tensor, labels: Tensor, queries: Tensor, config: KnnConfig) -> Tensor:
    """Queries whose vote no rounding in float32 can turn; nearly all of a test's must be such.

    A cosine of F products is off by (F + 4) eps at most. Two of them are subtracted in the exponent
    of a weight; and neighbours as near as that to the k-th one's cosine may replace it.
    """
    error = 2 * (train.shape[1] + 4) * torch.finfo(torch.float32).eps
    cosines = F.normalize(queries.double(), dim=1) @ F.normalize(train.double(), dim=1).T
    cosines, order = cosines.sort(dim=1, descending=True)
    weights = ((cosines - cosines[:, :1]) / config.temperature).exp()
    near = order[:, : config.k]
    votes = weights.new_zeros(len(queries), 5)
    votes.scatter_add_(1, labels[near], weights[:, : config.k])
    at_the_edge = (cosines - cosines[:, config.k - 1 : config.k]).abs() <= error
    at_the_edge &= at_the_edge.sum(1, keepdim=True) > 1
    first, second = votes.topk(2).values.unbind(1)
    rounding = error / config.temperature * votes.sum(1) + (weights * at_the_edge).sum(1)
    sure = first - second > rounding
    assert sure.double().mean() >= 0.98
    return sure


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (20, 0.07), (300, 1.0)])
def test_agrees_with_scikit_learn(k: int, temperature: float) -> None:
    train, labels, queries = random_problem()
    reference = KNeighborsClassifier(
        k,
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp((1 - distance) / temperature),
    ).fit(train.double().numpy(), labels.numpy())
    expected = reference.predict(queries.double().numpy())
    config = KnnConfig(k, temperature)
    found = classify(train, labels, queries, classes=5, config=config)
    assert len(np.unique(expected)) == 5
    sure = decided(train, labels, queries, config)
    assert found[sure].tolist() == expected[sure.numpy()].tolist()


def test_lengths_and_blocks_do_not_matter_and_a_small_temperature_means_the_nearest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train, labels, queries = random_problem()
    lengths = torch.rand(300, 1, generator=torch.Generator().manual_seed(1)).add(0.1)

    def voted(config: KnnConfig, train: Tensor = train, queries: Tensor = queries) -> Tensor:
        return classify(train, labels, queries, classes=5, config=config)

    sure = decided(train, labels, queries, KnnConfig())
    expected = voted(KnnConfig())[sure]
    assert torch.equal(voted(KnnConfig(), train * lengths, 7 * queries)[sure], expected)
    monkeypatch.setattr(forward, "_KEYS", 70)
    monkeypatch.setattr(knn, "nearest", functools.partial(forward.nearest, block=60))
    assert torch.equal(voted(KnnConfig())[sure], expected)
    sure = decided(train, labels, queries, KnnConfig(20, 1e-4))
    assert torch.equal(voted(KnnConfig(20, 1e-4))[sure], voted(KnnConfig(1))[sure])
    assert torch.equal(voted(KnnConfig(10_000)), voted(KnnConfig(300)))


def test_result_file_has_the_accuracies_and_correct_images(tmp_path: Path) -> None:
    (tmp_path / "knn.json").write_text("an older result")
    sets = feature_sets(tmp_path, val=27)
    config = KnnConfig(k=5, temperature=0.2)
    result = evaluate_knn(sets, config)
    assert json.loads((tmp_path / "knn.json").read_text()) == result
    assert [path.name for path in tmp_path.iterdir()] == ["knn.json"]
    assert result["evaluation"] == "knn"
    assert result["settings"] == {"k": 5, "temperature": 0.2}
    assert (result["train_images"], result["val_images"], result["classes"]) == (60, 27, 3)
    assert result["features"] == {"trained": 8, "untrained": 8, "pixels": 8}
    assert result["versions"]["torch"] == torch.__version__.split("+")[0]
    assert result["top1"]["trained"] == 1.0
    assert 0 < result["top1"]["untrained"] < 0.7
    for encoder, train in sets.train.items():
        val = sets.val[encoder]
        predicted = classify(train, sets.train_labels, val, classes=3, config=config)
        correct = unpack_bits(result["correct"][encoder], 27)
        assert torch.equal(correct, predicted == sets.val_labels)
        assert correct.double().mean() == pytest.approx(result["top1"][encoder])


def test_of_fewer_images_than_neighbours_all_vote(tmp_path: Path) -> None:
    sets = feature_sets(tmp_path)
    whole = evaluate_knn(sets, KnnConfig(k=60))
    assert evaluate_knn(sets, KnnConfig(k=61)) == whole
    assert whole["settings"]["k"] == 60
    assert summary_line("kNN", whole).endswith(" with k = 60, all training images")
    assert summary_line("kNN", evaluate_knn(sets, KnnConfig(k=59))).endswith(" %)")


def test_settings_are_checked() -> None:
    for name, value in (("k", 0), ("temperature", 0.0), ("temperature", np.inf)):
        with pytest.raises(InputError, match=f"{name}: {value} must be"):
            KnnConfig(**{name: value})  # type: ignore[arg-type]


@pytest.mark.gpu
def test_cuda_gives_the_same_classes() -> None:
    train, labels, queries = random_problem()
    expected = classify(train, labels, queries, classes=5, config=KnnConfig())
    found = classify(train.cuda(), labels.cuda(), queries.cuda(), classes=5, config=KnnConfig())
    assert (found.cpu() == expected).float().mean() >= 0.99
