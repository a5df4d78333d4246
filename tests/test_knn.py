"""Weighted k nearest neighbours."""

from __future__ import annotations

import json
from dataclasses import replace
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


def random_problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Overlapping clusters of different lengths: 300 training points, their 5 labels, 200 queries."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, 16, generator=generator)

    def draw(labels: Tensor) -> Tensor:
        points = centres[labels] + 1.5 * torch.randn(len(labels), 16, generator=generator)
        return points * torch.rand(len(labels), 1, generator=generator).add(0.1)

    labels = torch.randint(5, (300,), generator=generator)
    return draw(labels), labels, draw(torch.randint(5, (200,), generator=generator))


def decided(train: Tensor, labels: Tensor, queries: Tensor, config: KnnConfig) -> Tensor:
    """Whether no rounding in float32 can turn the vote about each query; nearly all of a test's must be such.

    A cosine of F products is off by (F + 4) eps at most. Two of them are subtracted in the exponent of a weight; and
    neighbours whose cosines are no further from the k-th one's may change places with it.
    """
    error = 2 * (train.shape[1] + 4) * torch.finfo(torch.float32).eps
    cosines = F.normalize(queries.double(), dim=1) @ F.normalize(train.double(), dim=1).T
    cosines, order = cosines.sort(dim=1, descending=True)
    weights = ((cosines - cosines[:, :1]) / config.temperature).exp()
    votes = weights.new_zeros(len(queries), 5).scatter_add_(
        1, labels[order[:, : config.k]], weights[:, : config.k]
    )
    at_the_edge = (cosines - cosines[:, config.k - 1 : config.k]).abs() <= error
    at_the_edge &= at_the_edge.sum(1, keepdim=True) > 1
    first, second = votes.topk(2).values.unbind(1)
    sure = first - second > error / config.temperature * votes.sum(1) + (weights * at_the_edge).sum(
        1
    )
    assert sure.double().mean() >= 0.98
    return sure


@pytest.mark.parametrize(
    ("k", "temperature"), [(1, 0.1), (7, 0.1), (20, 0.07), (200, 0.5), (300, 1.0)]
)
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


def test_near_neighbours_outvote_many_distant_ones() -> None:
    train = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-0.1, 1.0]])
    labels = torch.tensor([0, 1, 1])
    query = torch.tensor([[1.0, 0.1]])
    assert classify(train, labels, query, classes=2, config=KnnConfig(3, 0.1)).tolist() == [0]
    assert classify(train, labels, query, classes=2, config=KnnConfig(3, 100.0)).tolist() == [1]


def test_length_of_features_does_not_matter() -> None:
    train, labels, queries = random_problem()
    lengths = torch.rand(300, 1, generator=torch.Generator().manual_seed(1)).add(0.1)
    config = KnnConfig(20)
    expected = classify(train, labels, queries, classes=5, config=config)
    sure = decided(train, labels, queries, config)
    found = classify(train * lengths, labels, 7 * queries, classes=5, config=config)
    assert torch.equal(found[sure], expected[sure])


def test_small_temperature_means_the_nearest_neighbour() -> None:
    train, labels, queries = random_problem()
    config = KnnConfig(20, 1e-4)
    sure = decided(train, labels, queries, config)
    found = classify(train, labels, queries, classes=5, config=config)
    assert torch.equal(
        found[sure], classify(train, labels, queries, classes=5, config=KnnConfig(1))[sure]
    )


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    train, labels, queries = random_problem()
    expected = classify(train, labels, queries, classes=5, config=KnnConfig())
    sure = decided(train, labels, queries, KnnConfig())
    monkeypatch.setattr(knn, "_BLOCK", 7 * len(train))
    assert torch.equal(
        classify(train, labels, queries, classes=5, config=KnnConfig())[sure], expected[sure]
    )


def test_every_image_is_its_own_nearest_neighbour(tmp_path: Path) -> None:
    sets = feature_sets(tmp_path)
    result = evaluate_knn(
        replace(sets, val=sets.train, val_labels=sets.train_labels), KnnConfig(k=1)
    )
    assert result["top1"] == {"trained": 1.0, "untrained": 1.0, "pixels": 1.0}


def test_result_file_says_what_was_measured(tmp_path: Path) -> None:
    (tmp_path / "knn.json").write_text("an older result")
    result = evaluate_knn(feature_sets(tmp_path), KnnConfig(k=5, temperature=0.2))
    assert json.loads((tmp_path / "knn.json").read_text()) == result
    assert [path.name for path in tmp_path.iterdir()] == ["knn.json"]
    assert result["evaluation"] == "knn"
    assert result["settings"] == {"k": 5, "temperature": 0.2}
    assert (result["train_images"], result["val_images"], result["classes"]) == (60, 30, 3)
    assert result["features"] == {"trained": 8, "untrained": 8, "pixels": 8}
    assert result["versions"]["torch"] == torch.__version__.split("+")[0]
    assert result["top1"]["trained"] == 1.0
    assert result["top1"]["untrained"] < 0.7


def test_result_says_which_images_were_classified_correctly(tmp_path: Path) -> None:
    sets = feature_sets(tmp_path, val=27)
    result = evaluate_knn(sets, KnnConfig(k=5))
    for encoder, train in sets.train.items():
        predicted = classify(
            train, sets.train_labels, sets.val[encoder], classes=3, config=KnnConfig(k=5)
        )
        correct = unpack_bits(result["correct"][encoder], 27)
        assert torch.equal(correct, predicted == sets.val_labels)
        assert correct.double().mean() == pytest.approx(result["top1"][encoder])
    assert 0 < result["top1"]["untrained"] < 1


def test_of_fewer_images_than_neighbours_all_vote(tmp_path: Path) -> None:
    whole = evaluate_knn(feature_sets(tmp_path), KnnConfig(k=60))
    assert evaluate_knn(feature_sets(tmp_path), KnnConfig(k=61)) == whole
    assert whole["settings"]["k"] == 60
    assert summary_line("kNN", whole).endswith(" with k = 60, all training images")
    assert summary_line("kNN", evaluate_knn(feature_sets(tmp_path), KnnConfig(k=59))).endswith(
        " %)"
    )
    train, labels, queries = random_problem()
    config = KnnConfig(k=len(train))
    expected = classify(train, labels, queries, classes=5, config=config)
    assert torch.equal(
        classify(train, labels, queries, classes=5, config=replace(config, k=10_000)), expected
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"k": 0}, "k: 0 must be at least 1"),
        ({"temperature": 0.0}, "temperature: 0.0 must be a positive number"),
        ({"temperature": float("inf")}, "temperature: inf must be a positive number"),
        ({"temperature": float("nan")}, "temperature: nan must be a positive number"),
    ],
)
def test_settings_are_checked(values: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        KnnConfig(**values)  # type: ignore[arg-type]


@pytest.mark.gpu
def test_cuda_gives_the_same_classes() -> None:
    train, labels, queries = random_problem()
    expected = classify(train, labels, queries, classes=5, config=KnnConfig())
    found = classify(train.cuda(), labels.cuda(), queries.cuda(), classes=5, config=KnnConfig())
    assert (found.cpu() == expected).float().mean() >= 0.99
