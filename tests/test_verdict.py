"""The state that a training is in, what it prints of that, and how long it says that it will take."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from vi_simsiam.config import AugmentConfig, LossConfig, ModelConfig, TrainConfig, preset
from vi_simsiam.engine.monitor import duration, duration_line
from vi_simsiam.engine.verdict import Health

GOOD = {"cosine": 0.7, "z_std": 0.95, "projection_spread": 0.8, "kappa": 2.3, "kappa_best": 2.33}
NETWORK = LossConfig(concentration_link="softplus", cosine_weight=0.0)


def health(config: TrainConfig, *lines: dict[str, float]) -> Health:
    """The state after some lines, those of steps 10, 20, .. of epochs of 40 steps."""
    found = Health(config)
    for number, line in enumerate(lines, 1):
        found.update({"step": 10 * number, "epoch": number / 4} | GOOD | line)
    return found


@pytest.mark.parametrize(
    ("metrics", "state", "start"),
    [
        ({}, "learning", "learned: cosine 0.70"),
        ({"cosine": 0.04}, "not learning", "not learning since step 10: cosine 0.04"),
        ({"cosine": -0.001}, "not learning", "not learning since step 10: cosine 0.00"),
        ({"cosine": 0.07}, "learning", "barely learned: cosine 0.07"),
        ({"z_std": 0.1}, "collapsed", "collapsed since step 10: z-std 0.10"),
        (
            {"projection_spread": 0.004, "cosine": 0.99},
            "collapsed",
            "collapsed since step 10: 0.4% of the projections",
        ),
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
    """Three lines are averaged, so that one batch alone says little; the step is that of the first line of the three."""
    found = Health(TrainConfig())
    begins = []
    for number in range(12):
        line = GOOD | (
            {"kappa": 0.01} if 4 <= number < 8 else {"kappa": 0.25} if number == 10 else {}
        )
        begins.append(found.update({"step": 100 * number, "epoch": number} | line))
        if number == 7:
            assert (found.state, found.since) == ("dead", 400)
    assert [number for number, begun in enumerate(begins) if begun] == [6]
    assert (found.state, found.since, found.short) == ("learning", None, "")


def test_one_line_of_a_short_run_is_a_state() -> None:
    found = health(TrainConfig(), {"z_std": 0.1})
    assert (found.state, found.short) == ("collapsed", "collapsed since step 10")


def test_a_cosine_has_time_to_rise() -> None:
    flat = {"cosine": 0.02}
    assert health(TrainConfig(), *[flat] * 9).state == "learning"
    assert health(TrainConfig(), *[flat] * 9).line.startswith("barely learned: cosine 0.02")
    assert health(TrainConfig(), *[flat] * 10).state == "not learning"


def test_a_small_kappa_is_judged_by_its_weight_in_the_loss() -> None:
    """The paper's literal kappa is small beside D, but its loss is not divided by D - 1; SimSiam has none.

    Runs logged before there was a best kappa have nothing else to be judged by.
    """
    small = GOOD | {"kappa": 0.003}
    del small["kappa_best"]

    def state(config: TrainConfig, line: dict[str, float]) -> str:
        found = Health(config)
        found.update({"step": 90} | line)
        return found.line.partition(":")[0].partition(" since")[0]

    assert state(preset("paper"), small) == "learned"  # 0.003 x 2047 x 1 = 6
    assert state(preset("paper"), GOOD | {"kappa": 0.003}) == "learned", (
        "its kappa is not meant to follow"
    )
    assert state(TrainConfig(loss=NETWORK), small) == "dead"
    assert state(TrainConfig(), small) == "learned", "SimSiam's loss stands beside it"
    start = small | {
        "kappa": 0.04,
        "cosine": 0.03,
    }  # where softplus(-3) lets it start: not dead, and nothing learned
    assert state(TrainConfig(loss=NETWORK), start) == "barely learned"
    assert state(TrainConfig(loss=dataclasses.replace(NETWORK, loss_scale=1.0)), small) == "learned"
    detached = TrainConfig(loss=dataclasses.replace(NETWORK, concentration="detached"))
    assert state(detached, small) == "learned", "the network is trained by the cosine"
    simsiam = {name: value for name, value in small.items() if name != "kappa"}
    assert state(TrainConfig(method="simsiam"), simsiam) == "learned"


def test_the_advice_is_not_what_was_done() -> None:
    flat = [{"cosine": 0.0}] * 10
    assert "--crop-scale 0.5 1" in health(preset("demo"), *flat).line
    mild = TrainConfig(augment=AugmentConfig(crop_scale=(0.5, 1.0)))
    assert "--crop-scale" not in health(mild, *flat).line
    dead = [{"kappa": 0.01}] * 10
    assert health(TrainConfig(), *dead).line.startswith("dead since step 10")
    assert "--concentration-link" not in health(TrainConfig(), *dead).line
    assert "--clip-norm 1" in health(TrainConfig(), *dead).line
    assert "--clip-norm" not in health(TrainConfig(clip_norm=1.0), *dead).line
    assert (
        "--concentration-link quadratic --cosine-weight 1"
        in health(TrainConfig(loss=NETWORK), *dead).line
    )
    fitted = TrainConfig(frozen_run=Path("runs/simsiam"), loss=NETWORK)
    assert health(fitted, *dead).line.endswith(
        "try more --epochs than 100 or a larger --lr than 0.0125"
    )
    detached = LossConfig(concentration="detached", cosine_weight=0.0)
    assert health(TrainConfig(loss=detached), *dead).line.endswith(
        "try a smaller --lr than 0.0125, --clip-norm 1 or another --seed"
    )
    constant = dataclasses.replace(NETWORK, concentration="constant", concentration_value=0.01)
    line = health(TrainConfig(loss=constant), *dead).line
    assert (
        "the loss has 1.0% of the gradient of SimSiam's; try a larger --concentration-value than 0.01"
        in line
    )


def test_a_warm_up_and_an_epoch_are_waited_for() -> None:
    early = [{"kappa": 0.01, "cosine": 0.02}] * 44
    assert health(TrainConfig(epochs=20, warmup_epochs=10.0), *early[:43]).state == "learning"
    assert health(TrainConfig(epochs=20, warmup_epochs=10.0), *early).state == "dead"


def test_a_kappa_that_had_no_time_is_named_at_the_end() -> None:
    """Below 100 steps it is no death, and nothing that was learned."""
    short = health(TrainConfig(epochs=10), *[{"kappa": 0.03}] * 9)
    assert short.state == "learning"
    assert short.line == (
        "kappa not fitted yet: kappa/(D-1) 0.03, where 2.3 would fit the cosines; try more --epochs than 10"
    )


def test_one_line_of_nearly_equal_directions_is_no_death() -> None:
    lines = [
        GOOD | {"kappa": 0.5, "kappa_best": 100.0 if number == 15 else 0.5} for number in range(20)
    ]
    found = health(TrainConfig(), *lines[:16])
    assert found.state == "learning"
    assert health(TrainConfig(), *lines).state == "learning"


def test_a_single_long_epoch_is_judged_at_its_end() -> None:
    found = Health(TrainConfig(epochs=1, warmup_epochs=0.05))
    for step in range(100, 1001, 100):
        assert found.state == "learning"
        found.update(GOOD | {"step": step, "epoch": step / 1000, "kappa": 0.02})
    assert (found.state, found.since) == ("dead", 100)


def test_a_kappa_at_its_upper_bound_is_not_dead() -> None:
    """kappa/(D - 1) is at most 0.8, the best one 9."""
    bounded = TrainConfig(loss=LossConfig(concentration_max=0.8 * 2047))
    assert health(bounded, *[{"kappa": 0.79, "kappa_best": 9.0}] * 10).state == "learning"
    assert health(bounded, *[{"kappa": 0.07, "kappa_best": 9.0}] * 10).state == "dead"


def test_a_large_kappa_is_not_dead_however_near_the_cosines_are_to_1() -> None:
    assert (
        health(TrainConfig(), *[{"kappa": 30.0, "kappa_best": 1e6, "cosine": 1.0}] * 10).state
        == "learning"
    )
    assert (
        health(TrainConfig(), *[{"kappa": 0.9, "kappa_best": 1e6, "cosine": 1.0}] * 10).state
        == "dead"
    )


def test_a_scale_of_one_s_own_is_judged_where_it_is_the_default_one() -> None:
    for scale, state in ((2047.0, "dead"), (1.0, "learning")):
        config = TrainConfig(loss=LossConfig(concentration_scale=scale))
        assert health(config, *[{"kappa": 0.01}] * 10).state == state


def test_a_fitted_kappa_has_a_verdict_of_its_own() -> None:
    config = TrainConfig(frozen_run=Path("runs/simsiam"))
    found = health(config, *[{"cosine": 0.02}] * 20)
    assert found.line == "kappa fitted: kappa/(D-1) 2.3 at a mean cosine of 0.02"
    assert health(config, *[{"kappa": 0.01}] * 10).state == "dead"


def test_a_log_that_cannot_be_read_has_no_verdict(tmp_path: Path) -> None:
    assert Health.of_run(tmp_path, TrainConfig()) is None
    log = tmp_path / "metrics.jsonl"
    for text in ("", "{", "[1]\n", '{"cosine": "x"}\n'):
        log.write_text(text)
        assert Health.of_run(tmp_path, TrainConfig()) is None, text
    log.write_text(
        "".join(
            json.dumps({"step": step, "epoch": 2} | GOOD | {"z_std": 0.1}) + "\n"
            for step in (50, 60, 70)
        )
        + '{"step": 8'
    )
    found = Health.of_run(tmp_path, TrainConfig())
    assert found is not None
    assert found.short == "collapsed since step 50"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "about 1 s"),
        (40, "about 40 s"),
        (150, "about 2 min"),
        (3 * 3600, "about 3 h"),
        (4e5, "about 5 days"),
    ],
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
    assert duration_line(config, images, hours * 3600, resumed=True) == line.split(";")[0], (
        "settings are fixed"
    )
    found = re.fullmatch(
        rf"about \d+ (h|days) to go on this CPU; ({options}): about (\d+) min", line
    )
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
