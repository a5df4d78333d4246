"""What a training prints of itself at the end, and how long it says that it will take."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from vi_simsiam.config import AugmentConfig, LossConfig, ModelConfig, TrainConfig, preset
from vi_simsiam.engine.duration import duration, duration_line
from vi_simsiam.engine.verdict import verdict

GOOD = {"cosine": 0.7, "z_std": 0.95, "kappa": 2.3}


@pytest.mark.parametrize(
    ("metrics", "start"),
    [
        ({}, "learned: cosine 0.70"),
        ({"cosine": 0.04}, "barely learned: cosine 0.04"),
        ({"cosine": -0.001}, "barely learned: cosine 0.00"),
        ({"z_std": 0.1}, "dead: z-std 0.10"),
        ({"z_std": 0.1, "cosine": 0.99}, "dead: z-std 0.10"),
        ({"kappa": 0.003, "cosine": 0.2}, "dead: kappa/(D-1) 0.003"),
    ],
)
def test_the_verdict_names_its_figure_and_a_way_on(metrics: dict[str, float], start: str) -> None:
    text = verdict(preset("demo"), GOOD | metrics)
    assert text.startswith(start)
    assert "\n" not in text
    assert ("try " in text) == bool(metrics)


def test_a_small_kappa_is_judged_by_its_weight_in_the_loss() -> None:
    """The paper's literal kappa is small beside D, but its loss is not divided by D - 1; SimSiam has none."""
    small = GOOD | {"kappa": 0.003}
    assert verdict(preset("paper"), small).startswith("learned")  # 0.003 x 2047 x 1 = 6
    assert verdict(TrainConfig(), small).startswith("dead")
    start = GOOD | {"kappa": 0.04, "cosine": 0.03}  # where softplus(-3) lets it start: not dead, and nothing learned
    assert verdict(TrainConfig(), start).startswith("barely")
    assert verdict(TrainConfig(loss=LossConfig(loss_scale=1.0)), small).startswith("learned")
    detached = TrainConfig(loss=LossConfig(concentration="detached"))
    assert verdict(detached, small).startswith("learned"), "the network is trained by the cosine"
    simsiam = {name: value for name, value in GOOD.items() if name != "kappa"}
    assert verdict(TrainConfig(method="simsiam"), simsiam).startswith("learned")


def test_the_advice_is_not_what_was_done() -> None:
    flat = GOOD | {"cosine": 0.0}
    assert "--crop-scale 0.5 1" in verdict(preset("demo"), flat)
    mild = TrainConfig(augment=AugmentConfig(crop_scale=(0.5, 1.0)))
    assert "--crop-scale" not in verdict(mild, flat)


def test_a_fitted_kappa_has_a_verdict_of_its_own() -> None:
    config = TrainConfig(frozen_run=Path("runs/simsiam"))
    assert verdict(config, GOOD | {"cosine": 0.02}) == "kappa fitted: kappa/(D-1) 2.3 at a mean cosine of 0.02"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "about 1 s"), (40, "about 40 s"), (150, "about 2 min"), (3 * 3600, "about 3 h"), (4e5, "about 5 days")],
)
def test_times_are_rounded(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_short_run_gets_no_advice() -> None:
    assert duration_line(preset("demo"), 8000, 150) == "about 2 min to go on this CPU"


@pytest.mark.parametrize(
    ("config", "images", "hours", "options"),
    [
        (TrainConfig(epochs=200, augment=AugmentConfig(size=128)), 9469, 6, r"--size 64 --epochs \d+"),
        (TrainConfig(augment=AugmentConfig(local_views=6)), 9469, 100, r"--local-views 0 --size 64 --epochs \d+"),
        (
            TrainConfig(epochs=40, augment=AugmentConfig(size=32), model=ModelConfig(stem="small")),
            50_000, 18, r"--stem imagenet --epochs 4",
        ),
        (TrainConfig(epochs=20), 1_281_167, 2000, r"--size 64 --epochs 4 --images \d+"),
        (TrainConfig(epochs=400, augment=AugmentConfig(size=28)), 8000, 3, r"--epochs \d+"),
        (
            TrainConfig(epochs=400, warmup_epochs=40, augment=AugmentConfig(size=28)),
            8000, 30, r"--epochs 4 --warmup-epochs 0.4 --images \d+",
        ),
        (
            TrainConfig(augment=AugmentConfig(local_views=6), model=ModelConfig(local_predictor=True)),
            9469, 80, r"--local-views 0 --no-local-predictor --size 64 --epochs \d+",
        ),
    ],
)  # fmt: skip
def test_a_long_run_gets_the_options_of_a_short_one(
    config: TrainConfig, images: int, hours: float, options: str
) -> None:
    line = duration_line(config, images, hours * 3600)
    assert duration_line(config, images, hours * 3600, resumed=True) == line.split(";")[0], "settings are fixed"
    found = re.fullmatch(rf"about \d+ (h|days) to go on this CPU; ({options}): about (\d+) min", line)
    assert found is not None, line
    assert 1 <= int(found[3]) <= 20
    if epochs := re.search(r"--epochs (\d+)", line):
        assert 4 <= int(epochs[1]) <= config.epochs


def test_no_more_images_are_proposed_than_there_are() -> None:
    assert "--images" not in duration_line(TrainConfig(epochs=4), 70, 1e7)


def test_the_estimate_follows_the_measured_steps() -> None:
    """A ResNet-18 step of 128 pixels was measured at 2.7 s, one of 64 at 0.65 s: the line must predict that ratio."""
    config = TrainConfig(epochs=4, augment=AugmentConfig(size=128))
    line = duration_line(dataclasses.replace(config, warmup_epochs=0), 8_000, 2.7 * 1000)
    found = re.search(r"--size 64: about (\d+) min", line)
    assert found is not None
    assert abs(int(found[1]) - 0.65 * 1000 / 60) <= 2
