"""The state of a training, its verdict, and the estimate of its time."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from vi_simsiam.config import SOFTPLUS, AugmentConfig, LossConfig, ModelConfig, TrainConfig, preset
from vi_simsiam.engine.monitor import duration, duration_line
from vi_simsiam.engine.verdict import Health

GOOD = {"cosine": 0.7, "z_std": 0.95, "projection_spread": 0.8, "kappa": 2.3, "kappa_best": 2.33}


def health(config: TrainConfig, *lines: dict[str, float]) -> Health:
    """The state after lines at steps 10, 20, .. of epochs of 40 steps."""
    found = Health(config)
    for number, line in enumerate(lines, 1):
        found.update({"step": 10 * number, "epoch": number / 4} | GOOD | line)
    return found


def test_a_problem_begins_once_and_ends() -> None:
    """Three lines are averaged; the step is that of the first one."""
    found = Health(TrainConfig())
    begins = []
    for number in range(12):
        kappa = 0.01 if 4 <= number < 8 else 0.25 if number == 10 else GOOD["kappa"]
        line = GOOD | {"step": 100 * number, "epoch": number, "kappa": kappa}
        begins.append(found.update(line))
        if number == 7:
            assert (found.state, found.since) == ("dead", 400)
    assert [number for number, begun in enumerate(begins) if begun] == [6]
    assert (found.state, found.since, found.short) == ("learning", None, "")


DEAD, LOW, CLOSE = {"kappa": 0.01}, {"cosine": 0.02}, {"kappa_best": 1e6, "cosine": 1.0}
FITTED = TrainConfig(model=ModelConfig(projector="standardised"))
SLOW = TrainConfig(epochs=20, warmup_epochs=10.0)
BOUNDED = TrainConfig(loss=LossConfig(concentration_max=0.8 * 2047))
SCALE_D = TrainConfig(loss=LossConfig(concentration_scale=2047.0))
SCALE_1 = TrainConfig(loss=LossConfig(concentration_scale=1.0))
LARGER_CROPS = TrainConfig(augment=AugmentConfig(crop_scale=(0.5, 1.0)))
DETACHED = TrainConfig(loss=LossConfig(concentration="detached", cosine_weight=0.0))
CONSTANT = TrainConfig(
    loss=dataclasses.replace(SOFTPLUS, concentration="constant", concentration_value=0.01)
)


@pytest.mark.parametrize(
    ("config", "lines", "start"),
    [
        (preset("demo"), [{}] * 10, "learned: cosine 0.70"),
        (preset("demo"), [{"cosine": -0.001}] * 10, "not learning since step 10: cosine 0.00"),
        (preset("demo"), [{"cosine": 0.07}] * 10, "barely learned: cosine 0.07"),
        (preset("demo"), [{"projection_spread": 0.004}] * 10, "collapsed since step 10: 0.4% of "),
        (preset("demo"), [DEAD] * 10, "dead since step 10: kappa/(D-1) 0.01, where 2.3 would fit"),
        (TrainConfig(), [{"z_std": 0.1}], "collapsed since step 10: z-std 0.10"),  # one is enough
        # A cosine has time to rise.
        (TrainConfig(), [LOW] * 9, "barely learned: cosine 0.02"),
        (TrainConfig(), [LOW] * 10, "not learning since step 10"),
        # The warm-up and one more epoch pass first.
        (SLOW, [DEAD | LOW] * 43, "barely learned: cosine 0.02"),
        (SLOW, [DEAD | LOW] * 44, "dead since step 10"),
        (TrainConfig(epochs=10), [DEAD] * 9, "kappa not fitted yet: kappa/(D-1) 0.01"),
        # One line of nearly equal directions is no death.
        (TrainConfig(), [{"kappa": 0.5, "kappa_best": 0.5}] * 19 + [CLOSE], "learned: "),
        # The best kappa that can be reached is at most 0.8.
        (BOUNDED, [{"kappa": 0.79, "kappa_best": 9.0}] * 10, "learned: "),
        (BOUNDED, [{"kappa": 0.07, "kappa_best": 9.0}] * 10, "dead since step 10"),
        # A large kappa is not dead, however near the cosines are to 1.
        (TrainConfig(), [CLOSE | {"kappa": 30.0}] * 10, "learned: cosine 1.00"),
        (TrainConfig(), [CLOSE | {"kappa": 0.9}] * 10, "dead since step 10"),
        # Only kappa with the default scale should follow the best one.
        (SCALE_D, [DEAD] * 10, "dead since step 10"),
        (SCALE_1, [DEAD] * 10, "learned: "),
        # An encoder that is given does not collapse.
        (FITTED, [{"z_std": 0.1, "projection_spread": 0.004}] * 10, "learned: cosine 0.70"),
        (FITTED, [LOW] * 10, "not learning since step 10"),
        (FITTED, [DEAD] * 10, "dead since step 10"),
    ],
)
def test_a_state_is_named_with_its_step_and_figure(
    config: TrainConfig, lines: list[dict[str, float]], start: str
) -> None:
    found = health(config, *lines)
    assert found.line.startswith(start)
    assert "\n" not in found.line
    assert ("try " in found.line) == (not start.startswith("learned"))
    state, since, step = start.partition(":")[0].partition(" since step ")
    assert found.state == (state if since else "learning")
    assert found.short == (f"{state} since step {step}" if since else "")


@pytest.mark.parametrize(
    ("config", "line", "there", "absent"),
    [
        (TrainConfig(), {"cosine": 0.0}, "--crop-scale 0.5 1", "--lr"),
        (LARGER_CROPS, {"cosine": 0.0}, "try more --epochs than 100", "--crop-scale"),
        (TrainConfig(), DEAD, "try a smaller --lr than 0.0125, --clip-norm 1", "--conc"),
        (TrainConfig(clip_norm=1.0), DEAD, "or another --seed", "--clip-norm"),
        (TrainConfig(loss=SOFTPLUS), DEAD, "--concentration-link quadratic", "--lr"),
        (FITTED, DEAD, "try more --epochs than 100", "--lr"),
        (FITTED, {"cosine": 0.0}, "try more --epochs than 100", "--crop-scale"),
        (DETACHED, DEAD, "--clip-norm 1 or another --seed", "--cosine-weight"),
        (CONSTANT, DEAD, "try a larger --concentration-value than 0.01", "--lr"),
    ],
)
def test_the_verdict_has_a_remedy_that_was_not_tried(
    config: TrainConfig, line: dict[str, float], there: str, absent: str
) -> None:
    found = health(config, *[line] * 10).line
    assert there in found
    assert absent not in found


def test_a_small_kappa_is_judged_by_its_weight_in_the_loss() -> None:
    """The paper's kappa is small beside D, but its loss is not divided by D - 1.

    Logs of older runs have no best kappa.
    """
    small = GOOD | {"kappa": 0.003}
    del small["kappa_best"]

    def state(config: TrainConfig, line: dict[str, float]) -> str:
        found = Health(config)
        found.update({"step": 90} | line)
        return found.line.partition(":")[0].partition(" since")[0]

    assert state(preset("paper"), small) == "learned"  # 0.003 x 2047 x 1 = 6
    assert state(TrainConfig(loss=SOFTPLUS), small) == "dead"
    assert state(TrainConfig(), small) == "learned", "SimSiam's loss stands beside it"
    start = small | {"kappa": 0.04, "cosine": 0.03}  # the initial value, softplus(-3)
    assert state(TrainConfig(loss=SOFTPLUS), start) == "barely learned"
    assert (
        state(TrainConfig(loss=dataclasses.replace(SOFTPLUS, loss_scale=1.0)), small) == "learned"
    )
    detached = TrainConfig(loss=dataclasses.replace(SOFTPLUS, concentration="detached"))
    assert state(detached, small) == "learned", "the network is trained by the cosine"
    del small["kappa"]
    assert state(TrainConfig(method="simsiam"), small) == "learned"


def test_a_single_long_epoch_is_judged_at_its_end() -> None:
    found = Health(TrainConfig(epochs=1, warmup_epochs=0.05))
    for step in range(100, 1001, 100):
        assert found.state == "learning"
        found.update(GOOD | DEAD | {"step": step, "epoch": step / 1000})
    assert (found.state, found.since) == ("dead", 100)


def test_a_log_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    assert Health.of_run(tmp_path, TrainConfig()) is None
    log = tmp_path / "metrics.jsonl"
    lines = [GOOD | {"step": step, "epoch": 2, "z_std": 0.1} for step in (50, 60, 70)]
    log.write_text("\n".join([*map(json.dumps, lines), '{"step": 8']))
    found = Health.of_run(tmp_path, TrainConfig())
    assert found is not None
    assert found.short == "collapsed since step 50"
    log.write_text('{"st')
    assert Health.of_run(tmp_path, TrainConfig()) is None


LOCAL = {"augment": AugmentConfig(local_views=6)}
TWO_PREDICTORS = LOCAL | {"model": ModelConfig(local_predictor=True)}
SMALL = {"augment": AugmentConfig(size=28), "epochs": 400}
STEM = {"augment": AugmentConfig(size=32), "model": ModelConfig(stem="small"), "epochs": 40}
MEDIUM = STEM | {"model": ModelConfig(stem="medium")}


@pytest.mark.parametrize(
    ("changes", "images", "hours", "options"),
    [
        ({"augment": AugmentConfig(size=128)}, 9469, 6, r"--size 64 --epochs \d+"),
        (LOCAL, 9469, 100, r"--local-views 0 --size 64 --epochs \d+"),
        (TWO_PREDICTORS, 9469, 80, r"--local-views 0 --no-local-predictor --size 64 --epochs \d+"),
        (STEM, 50_000, 18, r"--stem imagenet --epochs 4"),
        (MEDIUM, 50_000, 9, r"--stem imagenet --epochs 4"),
        ({"epochs": 20}, 1_281_167, 2000, r"--size 64 --epochs 4 --images \d+"),
        (SMALL, 8000, 3, r"--epochs \d+"),
        (SMALL | {"warmup_epochs": 40}, 8000, 30, r"--epochs 4 --warmup-epochs 0.4 --images \d+"),
    ],
)
def test_a_long_run_gets_the_options_of_a_short_one(
    changes: dict[str, Any], images: int, hours: float, options: str
) -> None:
    config = TrainConfig(**changes)
    line = duration_line(config, images, hours * 3600)
    resumed = duration_line(config, images, hours * 3600, resumed=True)
    assert resumed == line.partition(";")[0], "settings are fixed"
    text = rf"about \d+ (h|days) to go on this CPU; ({options}): about (\d+) min"
    found = re.fullmatch(text, line)
    assert found is not None, line
    assert 1 <= int(found[3]) <= 20
    if epochs := re.search(r"--epochs (\d+)", line):
        assert 4 <= int(epochs[1]) <= config.epochs


def test_estimates_are_rounded_and_follow_the_measured_steps() -> None:
    """ResNet-18's steps were measured at 2.7 s with 128 pixels, and 0.65 s with 64."""
    texts = [duration(seconds) for seconds in (0.2, 40, 150, 3 * 3600, 4e5)]
    assert texts == ["about 1 s", "about 40 s", "about 2 min", "about 3 h", "about 5 days"]
    assert duration_line(preset("demo"), 8000, 150) == "about 2 min to go on this CPU"
    line = duration_line(TrainConfig(epochs=4, augment=AugmentConfig(size=128)), 8_000, 2700)
    found = re.search(r"--size 64: about (\d+) min", line)
    assert found is not None
    assert abs(int(found[1]) - 0.65 * 1000 / 60) <= 2
    # There are no more than 70 images to propose.
    assert "--images" not in duration_line(TrainConfig(epochs=4), 70, 1e7)
