"""The configuration: a trip through JSON, and every bad value named."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest

from vi_simsiam.config import (
    PRESETS,
    AugmentConfig,
    LossConfig,
    ModelConfig,
    TrainConfig,
    differing_fields,
    preset,
)
from vi_simsiam.errors import InputError


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_survive_json(name: str) -> None:
    config = preset(name)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_paper_preset_is_the_papers() -> None:
    """Section 4.1 of arXiv 2203.11437, with the literal softplus concentration and the unscaled loss."""
    paper = preset("paper")
    assert (paper.epochs, paper.batch_size, paper.lr, paper.momentum, paper.weight_decay) == (200, 64, 1e-3, 0.9, 1e-4)
    assert (paper.loss.concentration_scale, paper.loss.loss_scale) == (1.0, 1.0)
    assert (paper.model.backbone, paper.model.dim, paper.augment.local_views) == ("resnet18", 2048, 6)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (TrainConfig, {"epochs": 0}),
        (TrainConfig, {"epochs": -3}),
        (TrainConfig, {"epochs": 2.5}),
        (TrainConfig, {"workers": 1.5}),
        (ModelConfig, {"dim": 16.5}),
        (TrainConfig, {"batch_size": 1}),
        (TrainConfig, {"lr": 0.0}),
        (TrainConfig, {"lr": -0.1}),
        (TrainConfig, {"lr": math.nan}),
        (TrainConfig, {"lr": math.inf}),
        (TrainConfig, {"momentum": 1.0}),
        (TrainConfig, {"weight_decay": math.nan}),
        (TrainConfig, {"warmup_epochs": 100.0}),
        (TrainConfig, {"clip_norm": 0.0}),
        (TrainConfig, {"seed": -1}),
        (TrainConfig, {"workers": -1}),
        (TrainConfig, {"log_every": 0}),
        (TrainConfig, {"method": "byol"}),
        (TrainConfig, {"precision": "fp16"}),
        (ModelConfig, {"dim": 1}),
        (ModelConfig, {"stem": "tiny"}),
        (ModelConfig, {"projector_hidden": 0}),
        (ModelConfig, {"predictor_hidden": 0}),
        (LossConfig, {"concentration_scale": 0.0}),
        (LossConfig, {"loss_scale": math.nan}),
        (LossConfig, {"concentration_min": -1.0}),
        (AugmentConfig, {"size": 4}),
        (AugmentConfig, {"local_size": 4}),
        (AugmentConfig, {"local_views": 15}),
        (AugmentConfig, {"crop_scale": (0.5, 0.2)}),
        (AugmentConfig, {"local_scale": (0.0, 1.0)}),
        (AugmentConfig, {"flip_prob": 1.1}),
        (AugmentConfig, {"jitter": (0.1, 0.1, 0.1, 0.6)}),
        (AugmentConfig, {"blur_sigma": (0.0, 1.0)}),
    ],
)
def test_bad_values_are_named(kind: type, values: dict[str, object]) -> None:
    ((name, value),) = values.items()
    with pytest.raises(InputError, match=rf"^{name}: .*{re.escape(str(value))}"):
        kind(**values)


def test_pretrained_weights_need_their_stem() -> None:
    with pytest.raises(InputError, match="pretrained: ImageNet weights need stem 'imagenet'"):
        ModelConfig(stem="small", pretrained=True)


def test_unknown_fields_and_presets_are_named() -> None:
    with pytest.raises(InputError, match="colour"):
        TrainConfig.from_dict({"colour": "red"})
    for damaged in ({"augment": {"crop_scale": [0.1]}}, {"augment": {"jitter": [0.1, 0.1]}}, {"augment": 3}):
        with pytest.raises(InputError):
            TrainConfig.from_dict(damaged)
    with pytest.raises(InputError, match="preset: 'fast' is none of default"):
        preset("fast")


def test_only_what_changes_the_result_differs() -> None:
    base = TrainConfig()
    elsewhere = dataclasses.replace(base, workers=3, device="cpu", data_root=Path("/data"), log_every=1)
    assert differing_fields(base, elsewhere) == []
    other = dataclasses.replace(base, seed=4, model=ModelConfig(dim=64))
    assert differing_fields(base, other) == ["seed: 0 -> 4", "model.dim: 2048 -> 64"]


@pytest.mark.parametrize("kind", ["folder", "pack"])
def test_a_run_finds_its_data_from_any_folder(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert TrainConfig(data=f"{kind}:some/mine.pack").located().data == f"{kind}:{tmp_path / 'some' / 'mine.pack'}"
    assert TrainConfig(data=f"{kind}:").located().data == f"{kind}:", "named as it was given in the error"
    assert TrainConfig(data="cifar10").located().data == "cifar10"
