"""The configuration: conversion to JSON and back, and a message for every bad value."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest

from vi_simsiam.config import (
    PRESETS,
    SOFTPLUS,
    AugmentConfig,
    DecodeConfig,
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


def test_an_older_versions_configuration_keeps_its_loss() -> None:
    """Saved before link and cosine weight could be chosen; a part of a loss is no saved one."""
    saved = json.loads(json.dumps(TrainConfig(epochs=7).to_dict()))
    for name in ("concentration_link", "cosine_weight"):
        del saved["loss"][name]
    former = TrainConfig.from_dict(saved)
    assert former == TrainConfig(epochs=7, loss=SOFTPLUS)
    assert TrainConfig.from_dict(json.loads(json.dumps(former.to_dict()))) == former
    saved["method"] = "simsiam"
    assert TrainConfig.from_dict(saved) == TrainConfig(method="simsiam", epochs=7), "it has neither"
    part = TrainConfig.from_dict({"loss": {"concentration_min": 1.0}})
    assert part.loss == LossConfig(concentration_min=1.0)


def test_paper_preset_is_the_papers() -> None:
    """Section 4.1 of arXiv 2203.11437, with the literal softplus and the unscaled loss."""
    paper = preset("paper")
    loss, model = paper.loss, paper.model
    assert (paper.epochs, paper.batch_size, paper.lr) == (200, 64, 1e-3)
    assert (paper.momentum, paper.weight_decay, paper.augment.local_views) == (0.9, 1e-4, 6)
    assert (loss.concentration_scale, loss.loss_scale) == (1.0, 1.0)
    assert (loss.concentration_link, loss.cosine_weight) == ("softplus", 0.0)
    assert (model.backbone, model.dim) == ("resnet18", 2048)


BAD: dict[type, dict[str, tuple[object, ...]]] = {
    TrainConfig: {
        "epochs": (0, -3, 2.5),
        "workers": (1.5, -1),
        "lr": ("fast", True, 0.0, -0.1, math.nan, math.inf),
        "data": (3,),
        "compile": ("yes",),
        "batch_size": (1,),
        "momentum": (1.0,),
        "weight_decay": (math.nan,),
        "warmup_epochs": (100.0,),
        "clip_norm": (0.0,),
        "seed": (-1, 2**63),
        "split_seed": (-1,),
        "log_every": (0,),
        "save_every": (-1.0, math.inf),
        "method": ("byol",),
        "precision": ("fp16",),
        "kernels": ("fast",),
        "images": (1,),
        "held_out": (1.0, -0.1),
        "ema": (0.0, 1.0, math.nan),
    },
    AugmentConfig: {
        "size": (4,),
        "local_size": (4,),
        "local_views": (15,),
        "crop_scale": ((0.2,), (0.5, 0.2)),
        "crop_ratio": (1.0, (1.0, math.inf)),
        "local_scale": ((0.0, 1.0),),
        "flip_prob": (1.1,),
        "jitter": ((0.1, 0.1, 0.1, 0.6),),
        "blur_sigma": ((0.0, 1.0),),
    },
    ModelConfig: {
        "dim": (16.5, 1),
        "stem": ("tiny",),
        "projector_hidden": (0,),
        "predictor_hidden": (0,),
    },
    LossConfig: {
        "concentration_scale": (0.0,),
        "loss_scale": (math.nan,),
        "concentration_min": (-1.0,),
        "concentration_link": ("exp",),
        "concentration_gain": (0.0, math.inf),
        "cosine_weight": (-0.5, math.nan),
        "concentration": ("median",),
        "concentration_value": (1.0,),
        "concentration_max": (0.0, math.inf),
    },
    DecodeConfig: {
        "frames": ("last",),
        "background": ("no colour", "#00000080"),
        "value_range": ((1.0, 0.0), (0.0, math.inf), (1.0,), "none"),
    },
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_values_are_named(kind: type) -> None:
    for name, values in BAD[kind].items():
        for value in values:
            with pytest.raises(InputError, match=rf"^{name}: .*{re.escape(str(value))}"):
                kind(**{name: value})


def test_unknown_fields_and_presets_are_named() -> None:
    with pytest.raises(InputError, match="colour"):
        TrainConfig.from_dict({"colour": "red"})
    for augment in ({"crop_scale": [0.1]}, {"jitter": [0.1, 0.1]}, 3):
        with pytest.raises(InputError):
            TrainConfig.from_dict({"augment": augment})
    with pytest.raises(InputError, match="preset: 'fast' is none of default"):
        preset("fast")


def test_only_what_changes_the_result_differs() -> None:
    base = TrainConfig()
    place = {"workers": 3, "device": "cpu", "data_root": Path("/data"), "log_every": 1}
    assert differing_fields(base, dataclasses.replace(base, **place)) == []
    other = dataclasses.replace(base, seed=4, model=ModelConfig(dim=64))
    assert differing_fields(base, other) == ["seed: 0 -> 4", "model.dim: 2048 -> 64"]


@pytest.mark.parametrize("kind", ["folder", "pack"])
def test_a_run_finds_its_data_from_any_folder(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for given, located in (
        (f"{kind}:some/mine.pack", f"{kind}:{tmp_path / 'some' / 'mine.pack'}"),
        (f"{kind}:", f"{kind}:"),  # the error has it as given
        ("cifar10", "cifar10"),
        ("photos", f"folder:{tmp_path / 'photos'}"),
    ):
        assert TrainConfig(data=given).located().data == located


def test_parts_that_do_not_go_together_are_named() -> None:
    constant = LossConfig(concentration="constant", concentration_value=2.0)
    frozen = Path("runs/simsiam-001")
    local = ModelConfig(local_predictor=True)
    simsiam = {"method": "simsiam"}
    shuffled = LossConfig(concentration="shuffled")
    same_size = AugmentConfig(local_views=2, local_size=224)
    for kind, values, message in (
        (LossConfig, {"concentration": "constant"}, "concentration_value: None is not accepted"),
        (LossConfig, vars(constant) | {"concentration_value": 0.0}, "concentration_value: 0.0 is"),
        (
            LossConfig,
            {"concentration_max": 3.0, "concentration_min": 4.0},
            "concentration_max: 3.0 .* concentration_min, 4.0",
        ),
        (
            LossConfig,
            vars(constant) | {"concentration_max": 9.0},
            "concentration_max: 9.0 is .* None",
        ),
        (TrainConfig, simsiam | {"loss": constant}, "concentration: constant is .* vi-simsiam"),
        (
            TrainConfig,
            simsiam | {"loss": LossConfig(concentration_max=9.0)},
            "concentration_max: 9.0 is .* vi-simsiam",
        ),
        (
            TrainConfig,
            simsiam | {"frozen_run": frozen},
            "frozen_run: runs/simsiam-001 is .* vi-simsiam",
        ),
        (TrainConfig, {"frozen_run": frozen, "ema": 0.9}, "ema: 0.9 is .* frozen_run"),
        (
            TrainConfig,
            {"frozen_run": frozen, "loss": shuffled},
            "concentration: shuffled is .* frozen_run",
        ),
        (TrainConfig, {"model": local}, "local_predictor: True is"),
        (TrainConfig, {"model": local, "augment": same_size}, "local_predictor: True is"),
        (
            ModelConfig,
            {"stem": "small", "pretrained": True},
            "pretrained: ImageNet weights need stem 'imagenet'",
        ),
    ):
        with pytest.raises(InputError, match=f"^{message}"):
            kind(**values)
    assert TrainConfig(model=local, augment=AugmentConfig(local_views=2)).model.local_predictor


def test_variants_survive_json_and_are_located(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    loss = LossConfig(concentration="global", concentration_max=1e5)
    config = TrainConfig(
        frozen_run=Path("runs/a"), images=100, held_out=0.2, split_seed=3, distinct=True, loss=loss
    )
    again = TrainConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.located().frozen_run == tmp_path / "runs" / "a"
    assert differing_fields(TrainConfig(), TrainConfig(ema=0.99)) == ["ema: None -> 0.99"]
