"""Linear probe."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from evaluation_cases import feature_sets
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from vi_simsiam.data.datasets import open_dataset
from vi_simsiam.errors import InputError
from vi_simsiam.evaluation import linear
from vi_simsiam.evaluation.features import FeatureSets
from vi_simsiam.evaluation.linear import (
    LINEAR_PRESETS,
    LinearConfig,
    LinearProbe,
    accuracy,
    build_optimizer,
    evaluate_linear,
    hold_out,
    linear_preset,
)
from vi_simsiam.evaluation.results import unpack_bits

SHORT = LinearConfig(min_steps=0)
"""100 steps where one batch holds all images."""


def only(sets: FeatureSets, *encoders: str) -> FeatureSets:
    train, val = ({name: split[name] for name in encoders} for split in (sets.train, sets.val))
    return replace(sets, train=train, val=val)


def test_separable_features_are_learned_and_noise_is_not(tmp_path: Path) -> None:
    few = evaluate_linear(only(feature_sets(tmp_path, train=12), "trained"))
    assert few["train_top1"]["trained"] == 1.0
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


def test_steps_are_scaled_by_the_trust_ratio_at_weight_decay_0() -> None:
    layer = nn.Linear(4, 3)
    optimizer = build_optimizer(layer, LinearConfig(weight_decay=0.0, momentum=0.0))
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    generator = torch.Generator().manual_seed(0)
    gradients = [1000 * torch.randn(shape, generator=generator) for shape in ((3, 4), (3,))]
    layer.weight.grad, layer.bias.grad = (g.clone() for g in gradients)
    optimizer.step()
    # LARS: w <- w - lr * 0.001 * |w| / |g| * g, so the gradient's length does not matter.
    for after, before, gradient in zip(layer.parameters(), (weight, bias), gradients, strict=True):
        step = 1.6 * 0.001 * before.norm() * gradient / gradient.norm()
        torch.testing.assert_close(after.detach(), before - step, rtol=1e-6, atol=1e-7)


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

    monkeypatch.setattr(linear, "build_optimizer", lambda layer, _: Recorder(layer.parameters(), 1))
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


def test_standardised_probe_ignores_shift_and_scale_of_features() -> None:
    sets = feature_sets(Path())
    train, queries = sets.train["trained"].double(), sets.val["trained"].double()
    scale = torch.logspace(-0.5, 0.5, 8, dtype=torch.float64)
    shift = torch.linspace(-5, 5, 8, dtype=torch.float64)

    def logits(train: Tensor, queries: Tensor) -> Tensor:
        return LinearProbe.fit(train.float(), sets.train_labels, 3, SHORT)(queries.float())

    moved = logits(train * scale + shift, queries * scale + shift)
    torch.testing.assert_close(moved, logits(train, queries), rtol=1e-2, atol=1e-2)


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


def test_accuracy_counts_labels_among_the_highest() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0], [3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    labels = torch.tensor([0, 2, 0])
    shares = [accuracy(logits, labels, counted) for counted in (1, 2, 3, 4)]
    assert shares == [1 / 3, 1 / 3, 2 / 3, 1.0]


def test_top5_counts_no_more_than_there_are_classes(tmp_path: Path) -> None:
    for classes, counted in ((2, 2), (5, 5), (8, 5)):
        sets = feature_sets(tmp_path, classes=classes)
        result = evaluate_linear(sets, LinearConfig(epochs=1, min_steps=0))
        assert result["top5_counts"] == counted
        assert (result["top5"]["untrained"] == 1.0) == (counted == classes)
        assert result["top5"]["untrained"] >= result["top1"]["untrained"]


def test_result_file_holds_settings_and_correct_images(tmp_path: Path) -> None:
    sets, config = feature_sets(tmp_path), replace(linear_preset("paper"), augmented=0)
    result = evaluate_linear(sets, config)
    assert json.loads((tmp_path / "linear.json").read_text()) == json.loads(json.dumps(result))
    assert [path.name for path in tmp_path.iterdir()] == ["linear.json"]
    settings = result["settings"]
    facts = {"optimizer": "LARS", "schedule": "cosine", "steps": 90, "epochs": 90, "augmented": 0}
    assert settings | facts == settings
    assert "epochs" in settings["inferred"]
    assert settings["augmented_encoders"] == []
    assert result["held_out_images"] == 12
    assert set(result["held_out_top1"]) == {"trained", "untrained", "pixels"}
    assert {"timm", "torchmetrics", "torch", "vi-simsiam"} <= set(result["versions"])
    config = LinearConfig(epochs=5, min_steps=0)
    result = evaluate_linear(sets, config)
    assert result["held_out_top1"] is None
    for encoder, train in sets.train.items():
        probe = LinearProbe.fit(train, sets.train_labels, 3, config)
        correct = unpack_bits(result["correct"][encoder], 30)
        assert torch.equal(correct, probe(sets.val[encoder]).argmax(1) == sets.val_labels)
        assert correct.double().mean() == pytest.approx(result["top1"][encoder])


def test_paper_preset_is_the_papers_protocol() -> None:
    paper = LINEAR_PRESETS["paper"]
    assert (paper.lr, paper.momentum, paper.weight_decay, paper.batch_size) == (1.6, 0.9, 0.0, 512)
    assert (paper.held_out, paper.standardize, paper.augmented) == (0.2, False, None)
    labels = torch.arange(10) % 2
    probe = LinearProbe.fit(torch.full((10, 2), 7.0), labels, 2, replace(paper, epochs=1))
    assert (probe.shift.tolist(), probe.scale.tolist()) == ([0, 0], [1, 1])


def test_settings_are_checked() -> None:
    cases: list[tuple[str, float, str]] = [
        ("lr", 0.0, "a positive number"),
        ("lr", math.nan, "a positive number"),
        ("momentum", 1.0, "at least 0 and below 1"),
        ("weight_decay", -1e-4, "at least 0"),
        ("batch_size", 0, "at least 1"),
        ("epochs", 0, "at least 1"),
        ("min_steps", -1, "at least 0"),
        ("held_out", 1.0, "at least 0 and below 1"),
        ("augmented", -1, "at least 0, or None"),
        ("seed", -1, "at least 0"),
    ]
    for name, value, accepted in cases:
        with pytest.raises(InputError, match=f"{name}: {value} .* {accepted}"):
            LinearConfig(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="preset: 'papier' is none of default, paper"):
        linear_preset("papier")


@pytest.mark.gpu
def test_cuda_learns_what_the_cpu_learns(tmp_path: Path) -> None:
    sets = feature_sets(tmp_path, noise=0.4)
    expected = evaluate_linear(sets)["top1"]["trained"]
    found = evaluate_linear(replace(sets, device=torch.device("cuda")))
    assert found["device"] == "cuda"
    assert found["top1"]["trained"] == pytest.approx(expected, abs=0.05)
