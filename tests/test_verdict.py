"""The state of a training, its verdict, and the estimate of its time."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from vi_simsiam.config import AugmentConfig, LossConfig, ModelConfig, TrainConfig, preset
from vi_simsiam.engine.monitor import duration, duration_line
from vi_simsiam.engine.verdict import Health

GOOD = {"cosine": 0.7, "z_std": 0.95, "projection_spread": 0.8, "kappa": 2.3, "kappa_best": 2.33}
NETWORK = LossConfig(concentration_link="softplus", cosine_weight=0.0)


def health(config: TrainConfig, *lines: dict[str, float]) -> Health:
    """The state after lines at steps 10, 20, .. of epochs of 40 steps."""
    found = Health(config)
    for number, line in enumerate(lines, 1):
        found.update({"step": 10 * number, "epoch": number / 4} | GOOD | line)
    return found


@pytest.mark.parametrize(
    ("metrics", "state", "start"),
    [
        ({}, "learning", "learned: cosine 0.70"),
        ({"cosine": -0.001}, "not learning", "not learning since step 10: cosine 0.00"),
        ({"cosine": 0.07}, "learning", "barely learned: cosine 0.07"),
        ({"z_std": 0.1}, "collapsed", "collapsed since step 10: z-std 0.10"),
        ({"projection_spread": 0.004}, "collapsed", "collapsed since step 10: 0.4% of the proj"),
        ({"kappa": 0.02}, "dead", "dead since step 10: kappa/(D-1) 0.02, where 2.3 would fit"),
    ],
)
def test_a_state_is_named_with_its_step_its_figure_and_a_way_on(
    metrics: dict[str, float], state: str, start: str
) -> None:
    found = health(preset("demo"), *[metrics] * 10)
    assert found.state == state
    assert found.line.startswith(start)
    assert "\n" not in found.line
    assert ("try " in found.line) == bool(metrics)
    assert found.short == ("" if state == "learning" else start.partition(":")[0])


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


DEAD = {"kappa": 0.01}
FROZEN = TrainConfig(frozen_run=Path("runs/simsiam"))
SLOW = TrainConfig(epochs=20, warmup_epochs=10.0)
BOUNDED = TrainConfig(loss=LossConfig(concentration_max=0.8 * 2047))
ODD = [{"kappa": 0.5, "kappa_best": 100.0 if number == 15 else 0.5} for number in range(20)]


@pytest.mark.parametrize(
    ("config", "lines", "state"),
    [
        (TrainConfig(), [{"z_std": 0.1}], "collapsed"),  # one line of a short run is enough
        # A cosine has time to rise.
        (TrainConfig(), [{"cosine": 0.02}] * 9, "learning"),
        (TrainConfig(), [{"cosine": 0.02}] * 10, "not learning"),
        # The warm-up and one more epoch pass first.
        (SLOW, [DEAD | {"cosine": 0.02}] * 43, "learning"),
        (SLOW, [DEAD | {"cosine": 0.02}] * 44, "dead"),
        (TrainConfig(epochs=10), [DEAD] * 9, "learning"),
        (TrainConfig(), ODD, "learning"),  # one line of nearly equal directions is no death
        # The best kappa that can be reached is at most 0.8.
        (BOUNDED, [{"kappa": 0.79, "kappa_best": 9.0}] * 10, "learning"),
        (BOUNDED, [{"kappa": 0.07, "kappa_best": 9.0}] * 10, "dead"),
        # A large kappa is not dead, however near the cosines are to 1.
        (TrainConfig(), [{"kappa": 30.0, "kappa_best": 1e6, "cosine": 1.0}] * 10, "learning"),
        (TrainConfig(), [{"kappa": 0.9, "kappa_best": 1e6, "cosine": 1.0}] * 10, "dead"),
        # Only kappa with the default scale should follow the best one.
        (TrainConfig(loss=LossConfig(concentration_scale=2047.0)), [DEAD] * 10, "dead"),
        (TrainConfig(loss=LossConfig(concentration_scale=1.0)), [DEAD] * 10, "learning"),
        (FROZEN, [{"cosine": 0.02}] * 20, "learning"),
        (FROZEN, [DEAD] * 10, "dead"),
    ],
)
def test_states(config: TrainConfig, lines: list[dict[str, float]], state: str) -> None:
    assert health(config, *lines).state == state


LARGER_CROPS = TrainConfig(augment=AugmentConfig(crop_scale=(0.5, 1.0)))
FROZEN_NETWORK = TrainConfig(frozen_run=Path("runs/simsiam"), loss=NETWORK)
DETACHED = TrainConfig(loss=LossConfig(concentration="detached", cosine_weight=0.0))
CONSTANT = TrainConfig(
    loss=dataclasses.replace(NETWORK, concentration="constant", concentration_value=0.01)
)
UNFITTED = {"kappa": 0.03}
UNALIGNED = {"cosine": 0.0}


@pytest.mark.parametrize(
    ("config", "lines", "there", "absent"),
    [
        (preset("demo"), [UNALIGNED] * 10, "--crop-scale 0.5 1", "--lr"),
        (LARGER_CROPS, [UNALIGNED] * 10, "not learning", "--crop-scale"),
        (TrainConfig(), [DEAD] * 10, "try a smaller --lr than 0.0125, --clip-norm 1", "--conc"),
        (TrainConfig(clip_norm=1.0), [DEAD] * 10, "dead since step 10", "--clip-norm"),
        (TrainConfig(loss=NETWORK), [DEAD] * 10, "--concentration-link quadratic", "--lr"),
        (FROZEN_NETWORK, [DEAD] * 10, "more --epochs than 100 or a larger --lr", "--seed"),
        (DETACHED, [DEAD] * 10, "--clip-norm 1 or another --seed", "--cosine-weight"),
        (CONSTANT, [DEAD] * 10, "try a larger --concentration-value than 0.01", "--lr"),
        (TrainConfig(), [{"cosine": 0.02}] * 9, "barely learned: cosine 0.02", "--lr"),
        (TrainConfig(epochs=10), [UNFITTED] * 9, "try more --epochs than 10", "dead"),
        (FROZEN, [{"cosine": 0.02}] * 20, "kappa fitted: kappa/(D-1) 2.3", "try"),
    ],
)
def test_the_verdict_has_a_remedy_that_was_not_tried(
    config: TrainConfig, lines: list[dict[str, float]], there: str, absent: str
) -> None:
    line = health(config, *lines).line
    assert there in line
    assert absent not in line


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
    assert state(TrainConfig(loss=NETWORK), small) == "dead"
    assert state(TrainConfig(), small) == "learned", "SimSiam's loss stands beside it"
    start = small | {"kappa": 0.04, "cosine": 0.03}  # the initial value, softplus(-3)
    assert state(TrainConfig(loss=NETWORK), start) == "barely learned"
    assert state(TrainConfig(loss=dataclasses.replace(NETWORK, loss_scale=1.0)), small) == "learned"
    detached = TrainConfig(loss=dataclasses.replace(NETWORK, concentration="detached"))
    assert state(detached, small) == "learned", "the network is trained by the cosine"
    del small["kappa"]
    assert state(TrainConfig(method="simsiam"), small) == "learned"


def test_a_single_long_epoch_is_judged_at_its_end() -> None:
    found = Health(TrainConfig(epochs=1, warmup_epochs=0.05))
    for step in range(100, 1001, 100):
        assert found.state == "learning"
        found.update(GOOD | DEAD | {"step": step, "epoch": step / 1000})
    assert (found.state, found.since) == ("dead", 100)


def test_a_log_that_cannot_be_read_has_no_verdict(tmp_path: Path) -> None:
    assert Health.of_run(tmp_path, TrainConfig()) is None
    log = tmp_path / "metrics.jsonl"
    for text in ("", "{", "[1]\n", '{"cosine": "x"}\n'):
        log.write_text(text)
        assert Health.of_run(tmp_path, TrainConfig()) is None, text
    lines = [GOOD | {"step": step, "epoch": 2, "z_std": 0.1} for step in (50, 60, 70)]
    log.write_text("\n".join([*map(json.dumps, lines), '{"step": 8']))
    found = Health.of_run(tmp_path, TrainConfig())
    assert found is not None
    assert found.short == "collapsed since step 50"


LOCAL = {"augment": AugmentConfig(local_views=6)}
TWO_PREDICTORS = LOCAL | {"model": ModelConfig(local_predictor=True)}
SMALL = {"augment": AugmentConfig(size=28), "epochs": 400}
STEM = {"augment": AugmentConfig(size=32), "model": ModelConfig(stem="small"), "epochs": 40}


@pytest.mark.parametrize(
    ("changes", "images", "hours", "options"),
    [
        ({"augment": AugmentConfig(size=128)}, 9469, 6, r"--size 64 --epochs \d+"),
        (LOCAL, 9469, 100, r"--local-views 0 --size 64 --epochs \d+"),
        (TWO_PREDICTORS, 9469, 80, r"--local-views 0 --no-local-predictor --size 64 --epochs \d+"),
        (STEM, 50_000, 18, r"--stem imagenet --epochs 4"),
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
