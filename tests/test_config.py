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
    SOFTPLUS,
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
    """Section 4.1 of arXiv 2203.11437, with the literal softplus concentration and the unscaled loss."""
    paper = preset("paper")
    assert (paper.epochs, paper.batch_size, paper.lr, paper.momentum, paper.weight_decay) == (
        200,
        64,
        1e-3,
        0.9,
        1e-4,
    )
    assert (paper.loss.concentration_scale, paper.loss.loss_scale) == (1.0, 1.0)
    assert (paper.loss.concentration_link, paper.loss.cosine_weight) == ("softplus", 0.0)
    assert (paper.model.backbone, paper.model.dim, paper.augment.local_views) == (
        "resnet18",
        2048,
        6,
    )


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (TrainConfig, {"epochs": 0}),
        (TrainConfig, {"epochs": -3}),
        (TrainConfig, {"epochs": 2.5}),
        (TrainConfig, {"workers": 1.5}),
        (TrainConfig, {"lr": "fast"}),
        (TrainConfig, {"lr": True}),
        (TrainConfig, {"data": 3}),
        (TrainConfig, {"compile": "yes"}),
        (AugmentConfig, {"crop_scale": (0.2,)}),
        (AugmentConfig, {"crop_ratio": 1.0}),
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
        (LossConfig, {"concentration_link": "exp"}),
        (LossConfig, {"concentration_gain": 0.0}),
        (LossConfig, {"concentration_gain": math.inf}),
        (LossConfig, {"cosine_weight": -0.5}),
        (LossConfig, {"cosine_weight": math.nan}),
        (LossConfig, {"concentration": "median"}),
        (LossConfig, {"concentration_value": 1.0}),
        (LossConfig, {"concentration_max": 0.0}),
        (LossConfig, {"concentration_max": math.inf}),
        (TrainConfig, {"images": 1}),
        (TrainConfig, {"held_out": 1.0}),
        (TrainConfig, {"held_out": -0.1}),
        (TrainConfig, {"split_seed": -1}),
        (TrainConfig, {"ema": 0.0}),
        (TrainConfig, {"ema": 1.0}),
        (TrainConfig, {"ema": math.nan}),
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
    for damaged in (
        {"augment": {"crop_scale": [0.1]}},
        {"augment": {"jitter": [0.1, 0.1]}},
        {"augment": 3},
    ):
        with pytest.raises(InputError):
            TrainConfig.from_dict(damaged)
    with pytest.raises(InputError, match="preset: 'fast' is none of default"):
        preset("fast")


def test_only_what_changes_the_result_differs() -> None:
    base = TrainConfig()
    elsewhere = dataclasses.replace(
        base, workers=3, device="cpu", data_root=Path("/data"), log_every=1
    )
    assert differing_fields(base, elsewhere) == []
    other = dataclasses.replace(base, seed=4, model=ModelConfig(dim=64))
    assert differing_fields(base, other) == ["seed: 0 -> 4", "model.dim: 2048 -> 64"]


@pytest.mark.parametrize("kind", ["folder", "pack"])
def test_a_run_finds_its_data_from_any_folder(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        TrainConfig(data=f"{kind}:some/mine.pack").located().data
        == f"{kind}:{tmp_path / 'some' / 'mine.pack'}"
    )
    assert TrainConfig(data=f"{kind}:").located().data == f"{kind}:", (
        "named as it was given in the error"
    )
    assert TrainConfig(data="cifar10").located().data == "cifar10"
    (tmp_path / "photos").mkdir()
    assert TrainConfig(data="photos").located().data == f"folder:{tmp_path / 'photos'}"


def test_parts_that_do_not_go_together_are_named() -> None:
    constant = LossConfig(concentration="constant", concentration_value=2.0)
    frozen = Path("runs/simsiam-001")
    local = ModelConfig(local_predictor=True)
    for message, make in (
        ("concentration_value: None is not accepted", lambda: LossConfig(concentration="constant")),
        ("concentration_value: 0.0 is", lambda: LossConfig(concentration="constant", concentration_value=0.0)),
        ("concentration_max: 3.0 is .* above concentration_min, 4.0", lambda: LossConfig(concentration_max=3.0, concentration_min=4.0)),
        ("concentration_max: 9.0 is .* None", lambda: dataclasses.replace(constant, concentration_max=9.0)),
        ("concentration: constant is .* vi-simsiam", lambda: TrainConfig(method="simsiam", loss=constant)),
        ("concentration_max: 9.0 is .* vi-simsiam", lambda: TrainConfig(method="simsiam", loss=LossConfig(concentration_max=9.0))),
        ("frozen_run: runs/simsiam-001 is .* vi-simsiam", lambda: TrainConfig(method="simsiam", frozen_run=frozen)),
        ("ema: 0.9 is .* frozen_run", lambda: TrainConfig(frozen_run=frozen, ema=0.9)),
        ("concentration: shuffled is .* frozen_run", lambda: TrainConfig(frozen_run=frozen, loss=LossConfig(concentration="shuffled"))),
        ("local_predictor: True is", lambda: TrainConfig(model=local)),
        ("local_predictor: True is", lambda: TrainConfig(model=local, augment=AugmentConfig(local_views=2, local_size=224))),
    ):  # fmt: skip
        with pytest.raises(InputError, match=rf"^{message}"):
            make()
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
