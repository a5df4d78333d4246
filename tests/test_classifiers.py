"""Logistic regression and weighted k nearest neighbours on frozen features."""

from __future__ import annotations

import functools
import math
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_cases import feature_sets
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn import functional as F

from vi_simsiam.engine import forward, knn
from vi_simsiam.engine.knn import KnnConfig, classify
from vi_simsiam.errors import InputError
from vi_simsiam.evaluation.features import ENCODERS
from vi_simsiam.evaluation.knn import evaluate_knn
from vi_simsiam.evaluation.linear import hold_out
from vi_simsiam.evaluation.logistic import LogisticConfig, LogisticProbe, evaluate_logistic
from vi_simsiam.evaluation.results import summary_lines, unpack_bits


def problem(count: int = 400, classes: int = 4, noise: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Overlapping clusters with features of different scales: (count, F), labels, 200 queries.

    Six features separate the classes, `noise` ones do not: with them a weak penalty overfits.
    """
    generator = torch.Generator().manual_seed(0)
    width = 6 + noise
    centres = F.pad(torch.randn(classes, 6, generator=generator), (0, noise))
    scales, shift = torch.logspace(-0.7, 0.7, width), torch.linspace(-3, 3, width)

    def draw(labels: Tensor) -> Tensor:
        points = centres[labels] + torch.randn(len(labels), width, generator=generator)
        return points * scales + shift

    labels = torch.arange(count) % classes
    return draw(labels), labels, draw(torch.arange(200) % classes)


@pytest.mark.parametrize(("classes", "c"), [(2, 0.01), (4, 1.0)])
def test_agrees_with_scikit_learn_in_float64(classes: int, c: float) -> None:
    train, labels, queries = problem(classes=classes)
    scaler = StandardScaler().fit(train.double())
    reference = LogisticRegression(C=c, tol=1e-10, max_iter=10_000)
    reference.fit(scaler.transform(train.double()), labels)
    expected = reference.predict_proba(scaler.transform(queries.double()))
    probe = LogisticProbe.fit(train, labels, classes, LogisticConfig(c=c, tolerance=1e-6))
    found = probe.logits(queries).softmax(1)
    assert found.dtype == torch.float32
    # In float32 the solver ends where the loss no longer falls. Around its minimum the loss is a
    # parabola, so that a loss off by k eps leaves probabilities off by about sqrt(k eps); a sum of
    # some tens of roundings is allowed for.
    np.testing.assert_allclose(found, expected, atol=np.sqrt(32 * np.finfo(np.float32).eps))
    assert (probe.c, probe.held_out_loss, probe.warnings) == (c, {}, ())
    assert probe.iterations > 1


def test_c_is_the_best_of_the_grid_on_the_held_out_fifth() -> None:
    train, labels, _ = problem(count=120, noise=60)
    config = LogisticConfig(grid=(1e-3, 1e-1, 1e-2, 10.0, 100.0), tolerance=1e-6, seed=3)
    probe = LogisticProbe.fit(train, labels, 4, config)
    kept, held_out = hold_out(120, 0.2, 3)
    scaler = StandardScaler().fit(train[kept].double())
    inputs, others = (scaler.transform(train[part].double()) for part in (kept, held_out))
    expected = {}
    for c in config.grid:
        reference = LogisticRegression(C=c, tol=1e-8, max_iter=10_000).fit(inputs, labels[kept])
        expected[c] = log_loss(labels[held_out], reference.predict_proba(others))
    assert probe.c == min(expected, key=expected.__getitem__)
    assert probe.c not in (1e-3, 100.0)
    # It ends where the loss rises.
    losses = list(probe.held_out_loss.values())
    assert list(probe.held_out_loss) == sorted(config.grid)[: len(losses)]
    assert len(losses) < len(config.grid)
    assert losses[:-1] == sorted(losses[:-1], reverse=True)
    assert losses[-1] > losses[-2]
    tried = {c: pytest.approx(expected[c], abs=1e-3) for c in probe.held_out_loss}
    assert probe.held_out_loss == tried
    refitted = LogisticProbe.fit(train, labels, 4, replace(config, c=probe.c))
    assert torch.equal(refitted.weight, probe.weight)


def test_classes_without_training_images_have_probability_0() -> None:
    train, labels, queries = problem(classes=3)
    full = LogisticProbe.fit(train, labels, 3, LogisticConfig(c=0.1))
    probe = LogisticProbe.fit(train, labels + (labels > 0), 5, LogisticConfig(c=0.1))
    assert torch.equal(probe.weight[[0, 2, 3]], full.weight), "the same fit, done twice"
    assert torch.equal(probe.bias[[0, 2, 3]], full.bias)
    found, expected = probe.logits(queries).softmax(1), full.logits(queries).softmax(1)
    assert (found[:, [1, 4]] == 0).all()
    # Products with five rows and with three may round differently: a logit by the rounding of each
    # of its terms, and a probability by twice the largest of that, and by that of the softmax.
    terms = ((queries - full.shift) * full.scale).abs() @ full.weight.abs().T + full.bias.abs()
    eps = torch.finfo(torch.float32).eps
    rounding = (2 * (queries.shape[1] + 1) * terms.max().item() + 8) * eps
    torch.testing.assert_close(found[:, [0, 2, 3]], expected, rtol=rounding, atol=0)


def test_solver_that_does_not_converge_is_reported_and_not_printed(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = evaluate_logistic(feature_sets(tmp_path), LogisticConfig(c=1.0, max_iterations=2))
    assert result["converged"] == dict.fromkeys(ENCODERS, False)
    assert result["iterations"]["trained"] == 2
    (warning,) = result["warnings"]["trained"]
    assert warning.startswith("C = 1.0: lbfgs failed to converge after 2 iteration")


def test_result_file_holds_settings_and_the_probes_accuracies(tmp_path: Path) -> None:
    sets = feature_sets(tmp_path, train=120, val=50, classes=6)
    state = np.random.get_state()[1].copy()
    result = evaluate_logistic(sets)
    assert (np.random.get_state()[1] == state).all()
    assert result["converged"] == dict.fromkeys(ENCODERS, True)
    assert result["warnings"] == {encoder: [] for encoder in ENCODERS}
    assert result["top1"]["trained"] == result["train_top1"]["trained"] == 1.0
    assert result["top1"]["untrained"] < result["top5"]["untrained"] < 1
    assert result["top5_counts"] == 5
    facts = {"solver": "lbfgs", "penalty": "l2", "dtype": "float32", "standardize": True}
    assert result["settings"] | facts == result["settings"]
    for encoder in ENCODERS:
        probe = LogisticProbe.fit(sets.train[encoder], sets.train_labels, 6)
        assert result["c"][encoder] == probe.c
        logits = probe.logits(sets.val[encoder])
        correct = unpack_bits(result["correct"][encoder], 50)
        assert torch.equal(correct, logits.argmax(1) == sets.val_labels)
        five = (logits.topk(5).indices == sets.val_labels[:, None]).any(1)
        assert result["top5"][encoder] == pytest.approx(five.double().mean())


def test_a_handful_of_images_uses_the_smallest_c() -> None:
    """A fifth of two is none; `vi-simsiam logistic` has no option that would help."""
    probe = LogisticProbe.fit(torch.eye(2), torch.tensor([0, 1]), 2)
    assert (probe.c, probe.held_out_loss) == (1e-3, {})
    assert probe.logits(torch.eye(2)).argmax(1).tolist() == [0, 1]
    train, _, queries = problem(count=6)
    probe = LogisticProbe.fit(train, torch.arange(6), 6, LogisticConfig(grid=(0.5, 0.25)))
    assert (probe.c, probe.held_out_loss) == (0.25, {})
    assert torch.isfinite(probe.logits(queries)).all()


def test_one_class_and_no_penalty_are_refused() -> None:
    with pytest.raises(InputError, match="one class; at least two"):
        LogisticProbe.fit(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64), 3)
    for c in (0.0, math.inf):
        with pytest.raises(InputError, match=f"c: {c} .* a positive number"):
            LogisticConfig(c=c)


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
def test_neighbours_agree_with_scikit_learn(k: int, temperature: float) -> None:
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


def test_of_fewer_images_than_neighbours_all_vote(tmp_path: Path) -> None:
    sets = feature_sets(tmp_path)
    whole = evaluate_knn(sets, KnnConfig(k=60))
    assert evaluate_knn(sets, KnnConfig(k=61)) == whole
    assert whole["settings"]["k"] == 60
    lines = summary_lines({"kNN": whole, "fewer": evaluate_knn(sets, KnnConfig(k=59))})
    with_k = [line.endswith(" with k = 60, all training images") for line in lines]
    assert with_k == [True, False, False, False], "few labels have the nearest image's class"


def test_accuracy_from_few_labels_is_the_mean_over_draws_of_some_of_each_class(
    tmp_path: Path,
) -> None:
    """One of a class's 20 images equals its validation image, the others are near the next one."""
    sides = torch.eye(3)
    train = torch.cat([(sides.roll(1, 0) + 0.3 * sides).repeat(19, 1), sides])
    labels = torch.arange(3).repeat(20)
    sets = replace(
        feature_sets(tmp_path),
        classes=("a", "b", "c"),
        train={"trained": train},
        train_labels=labels,
        val={"trained": sides},
        val_labels=torch.arange(3),
    )
    found = evaluate_knn(sets)
    assert found["top1"]["trained"] == 0.0
    # The equal image is one of the ten of twenty in half of all draws: 30 trials of 1/2 (5 sd).
    assert 0.05 < found["few_labels_top1"]["trained"] < 0.95
    few = replace(sets, train={"trained": train[-3:]}, train_labels=labels[-3:])
    assert evaluate_knn(few)["few_labels_top1"]["trained"] == 1.0


def test_settings_of_neighbours_are_checked() -> None:
    for name, value in (("k", 0), ("temperature", 0.0), ("temperature", np.inf)):
        with pytest.raises(InputError, match=f"{name}: {value} is not accepted"):
            KnnConfig(**{name: value})  # type: ignore[arg-type]


@pytest.mark.gpu
def test_cuda_gives_the_same_neighbours() -> None:
    train, labels, queries = random_problem()
    expected = classify(train, labels, queries, classes=5, config=KnnConfig())
    found = classify(train.cuda(), labels.cuda(), queries.cuda(), classes=5, config=KnnConfig())
    assert (found.cpu() == expected).float().mean() >= 0.99
