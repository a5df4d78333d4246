"""Linear probe."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from evaluation_cases import feature_sets, gray_source, make_run
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from vi_simsiam.data.datasets import open_dataset
from vi_simsiam.errors import InputError
from vi_simsiam.evaluation import linear
from vi_simsiam.evaluation.features import FeatureSets, collect
from vi_simsiam.evaluation.linear import (
    LinearConfig,
    LinearProbe,
    accuracy,
    evaluate_linear,
    hold_out,
    linear_preset,
)

SHORT = LinearConfig(min_steps=0)
"""100 steps where one batch holds all images."""


def only(sets: FeatureSets, *encoders: str) -> FeatureSets:
    train, val = ({name: split[name] for name in encoders} for split in (sets.train, sets.val))
    return replace(sets, train=train, val=val)


def test_separable_features_are_learned_and_noise_is_not(tmp_path: Path) -> None:
    sets = feature_sets(tmp_path, train=300, val=90)
    result = evaluate_linear(only(sets, "trained", "untrained"))
    assert result["top1"]["trained"] == result["train_top1"]["trained"] == 1.0
    assert result["top1"]["untrained"] < 0.5


def test_is_as_good_as_logistic_regression() -> None:
    splits = open_dataset("fashion-mini")
    assert splits.val is not None
    images, labels = [], []
    for source in (splits.train, splits.val):
        pixels = source.images[:, ::2, ::2].reshape(-1, 196) / 255.0
        images.append(torch.from_numpy(pixels).float())
        labels.append(torch.from_numpy(source.labels))
    train, train_labels = images[0][::4], labels[0][::4]
    probe = LinearProbe.fit(train, train_labels, 10, LinearConfig())
    found = accuracy(probe(images[1]), labels[1], 1)
    train, val = ((x - probe.shift) * probe.scale for x in (train, images[1]))
    reference = LogisticRegression(C=0.01, max_iter=300, tol=1e-3).fit(train, train_labels)
    best = reference.score(val, labels[1])
    assert best > 0.75
    assert found >= best - 0.015


def test_a_step_is_scaled_by_the_trust_ratio_at_weight_decay_0() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = 0.01 * torch.randn(3, 4, generator=generator)
    features, labels = 1000 * torch.randn(12, 4, generator=generator), torch.arange(12) % 3
    config = LinearConfig(epochs=1, min_steps=1, standardize=False)
    found = LinearProbe.fit(features, labels, 3, config).layer
    before = nn.Linear(4, 3)
    before.weight.data, before.bias.data = weight, torch.zeros(3)
    nn.functional.cross_entropy(before(features), labels).backward()
    gradient = before.weight.grad
    # LARS: w <- w - lr * 0.001 * |w| / |g| * g, so the gradient's length does not matter.
    step = 1.6 * 0.001 * weight.norm() * gradient / gradient.norm()
    torch.testing.assert_close(found.weight, weight - step, rtol=1e-5, atol=1e-7)


def test_every_epoch_shows_every_image_once_at_the_rates_of_a_cosine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rates: list[float] = []
    seen: list[int] = []
    cross_entropy = torch.nn.functional.cross_entropy

    class Recorder(torch.optim.SGD):
        def step(self, closure: None = None) -> None:
            rates.append(self.param_groups[0]["lr"])

    def record(logits: Tensor, labels: Tensor) -> Tensor:
        seen.extend(labels.tolist())
        return cross_entropy(logits, labels)

    monkeypatch.setattr("timm.optim.Lars", lambda parameters, *_, **__: Recorder(parameters, 1))
    monkeypatch.setattr(linear.F, "cross_entropy", record)
    inputs = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    config = LinearConfig(lr=2.0, batch_size=4, epochs=2, min_steps=7)
    LinearProbe.fit(inputs, torch.arange(12), 12, config)
    assert rates == [pytest.approx(1 + math.cos(math.pi * step / 7)) for step in range(7)]
    assert sorted(seen[:12]) == sorted(seen[12:24]) == list(range(12))
    assert seen[:12] != seen[12:24]


def test_seed_determines_the_probe() -> None:
    sets = feature_sets(Path())
    train, labels = sets.train["untrained"], sets.train_labels
    state = torch.get_rng_state()
    first, again, other = (
        LinearProbe.fit(train, labels, 3, replace(SHORT, epochs=5, seed=seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first(train), again(train))
    assert not torch.equal(first.layer.weight, other.layer.weight)


def test_constant_features_do_no_harm() -> None:
    sets = feature_sets(Path(), train=300)
    train = torch.cat([sets.train["trained"], torch.full((300, 1), 3.0)], 1)
    queries = torch.cat([sets.val["trained"], torch.full((30, 1), 3.5)], 1)
    logits = LinearProbe.fit(train, sets.train_labels, 3, LinearConfig())(queries)
    assert accuracy(logits, sets.val_labels, 1) == 1.0
    flat = LinearProbe.fit(torch.ones(10, 2), torch.arange(10) % 2, 2, replace(SHORT, epochs=2))
    assert torch.isfinite(flat(torch.ones(1, 2))).all()


def test_held_out_images_are_not_trained_on(tmp_path: Path) -> None:
    config = LinearConfig(held_out=0.2, epochs=10)
    sets = only(feature_sets(tmp_path, train=100), "trained")
    clean = evaluate_linear(sets, config)
    _, held_out = hold_out(100, 0.2, config.seed)
    spoiled = {name: x.clone() for name, x in sets.train.items()}
    labels = sets.train_labels.clone()
    for x in spoiled.values():
        x[held_out] = -1e6 * x[held_out]
    labels[held_out] = (labels[held_out] + 1) % 3
    found = evaluate_linear(replace(sets, train=spoiled, train_labels=labels), config)
    assert clean["held_out_images"] == 20
    assert clean["settings"]["steps"] == 500
    for name in ("top1", "top5", "train_top1"):
        assert found[name] == clean[name]
    assert clean["held_out_top1"]["trained"] == 1.0
    assert found["held_out_top1"]["trained"] < 0.5


def test_hold_out_splits_at_random_by_the_seed() -> None:
    kept, held_out = hold_out(50, 0.2, 0)
    assert len(held_out) == 10
    assert sorted([*kept.tolist(), *held_out.tolist()]) == list(range(50))
    assert torch.equal(held_out, hold_out(50, 0.2, 0)[1])
    assert not torch.equal(held_out, hold_out(50, 0.2, 1)[1])
    assert [part.tolist() for part in hold_out(50, 0.0, 0)] == [list(range(50)), []]
    for share in (0.2, 0.9):
        with pytest.raises(InputError, match=rf"held_out: {share} of 2 training images"):
            hold_out(2, share, 0)


def test_top5_counts_no_more_than_there_are_classes(tmp_path: Path) -> None:
    for classes, counted in ((2, 2), (8, 5)):
        sets = feature_sets(tmp_path, classes=classes)
        result = evaluate_linear(sets, LinearConfig(epochs=1, min_steps=0))
        assert result["top5_counts"] == counted
        assert (result["top5"]["untrained"] == 1.0) == (counted == classes)
        assert result["top5"]["untrained"] >= result["top1"]["untrained"]


def test_paper_preset_is_the_papers_protocol(tmp_path: Path) -> None:
    paper = linear_preset("paper")
    assert (paper.lr, paper.momentum, paper.weight_decay, paper.batch_size) == (1.6, 0.9, 0.0, 512)
    assert (paper.held_out, paper.standardize, paper.augmented) == (0.2, False, None)
    sets = collect(make_run(tmp_path, train=gray_source(24), val=gray_source(10)))
    result = evaluate_linear(sets, replace(paper, epochs=3))
    facts = {"optimizer": "LARS", "schedule": "cosine", "steps": 3, "epochs": 3}
    augmented = {"augmented": 3, "augmented_encoders": ["trained"]}
    assert result["settings"] | facts | augmented == result["settings"]
    assert {"epochs", "augmented"} <= set(result["settings"]["inferred"])
    assert result["held_out_images"] == 5
    assert set(result["held_out_top1"]) == {"trained", "untrained", "pixels"}
    plain = evaluate_linear(sets, replace(paper, epochs=3, held_out=0.0, augmented=0))
    assert plain["settings"]["augmented_encoders"] == []
    assert plain["held_out_top1"] is None
    with pytest.raises(InputError, match="preset: 'papier' is none of default, paper"):
        linear_preset("papier")


@pytest.mark.parametrize(("passes", "drawn"), [(4, 4), (5, 6)])
def test_epochs_take_turns_with_the_passes_and_leave_the_held_out_images_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: int, drawn: int
) -> None:
    """Few passes are drawn once and kept, more of them anew. Features hold image and pass."""
    sets = only(feature_sets(tmp_path, train=60), "trained")
    computed, seen = [], []

    def augmented() -> Iterator[tuple[Tensor, Tensor]]:
        for number in itertools.count():
            computed.append(number)
            index = torch.randperm(60)[number % 2 :]
            yield index[:, None].float().expand(-1, 8) + number / 100, index

    forward, cross_entropy = nn.Linear.forward, nn.functional.cross_entropy

    def record(layer: nn.Linear, inputs: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            seen.append(inputs[:, 0])
        return forward(layer, inputs)

    def check(logits: Tensor, labels: Tensor) -> Tensor:
        assert torch.equal(labels, sets.train_labels[seen[-1].long()]), "labels of other images"
        return cross_entropy(logits, labels)

    monkeypatch.setattr(nn.Linear, "forward", record)
    monkeypatch.setattr(linear.F, "cross_entropy", check)
    settings = {"epochs": 6, "min_steps": 0, "batch_size": 100, "augmented": passes}
    config = LinearConfig(**settings, held_out=0.2, standardize=False)
    evaluate_linear(replace(sets, augmented=augmented), config)
    assert len(computed) == drawn
    turns = [{number % passes} for number in range(6)]
    assert [{round(100 * float(x % 1)) for x in batch} for batch in seen] == turns
    kept, _ = hold_out(60, 0.2, 0)
    images = [{int(x) for x in batch} for batch in seen]
    assert images[0] == images[2] == set(kept.tolist())
    assert images[1] <= images[0]


@pytest.mark.gpu
def test_cuda_learns_what_the_cpu_learns(tmp_path: Path) -> None:
    sets = feature_sets(tmp_path, noise=0.4)
    expected = evaluate_linear(sets)["top1"]["trained"]
    found = evaluate_linear(replace(sets, device=torch.device("cuda")))
    assert found["device"] == "cuda"
    assert found["top1"]["trained"] == pytest.approx(expected, abs=0.05)
