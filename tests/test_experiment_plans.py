"""Plans of experiments: arms, settings, and the primary comparison."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from vi_simsiam.config import PRESETS, SOFTPLUS, LossConfig, differing_fields
from vi_simsiam.errors import InputError
from vi_simsiam.experiments.catalogue import plan
from vi_simsiam.experiments.plan import PlanOptions

NUMBERS = (
    "seeds", "epochs", "images", "val_images", "trials", "batch_size", "ema", "dim", "size",
)  # fmt: skip


@pytest.mark.parametrize("name", ["table1", "tuned", "controls", "stability", "lightly-imagenette"])
def test_every_plan_names_its_comparison_and_its_arms(name: str) -> None:
    planned = plan(name, PlanOptions(seeds=2))
    content = json.loads(json.dumps(planned.described()))
    names = {arm["name"] for arm in content["arms"]}
    assert {content["primary"][part] for part in ("arm", "against")} <= names
    assert set(content["published"]) <= names
    for arm in content["arms"]:
        assert all(arm[field] for field in ("note", "data", "method"))
    assert all(arm.config.distinct for arm in planned.arms), "no image is in both parts"


def test_table1_is_the_preset_and_marks_what_the_paper_does_not_state() -> None:
    planned = plan("table1", PlanOptions())
    unstated = {
        "augment.size", "augment.local_size", "augment.crop_scale", "augment.local_scale",
        "augment.local_views", "model.dim",
    }  # fmt: skip
    for arm in planned.arms:
        config = dataclasses.replace(arm.config, distinct=False)
        differing = {line.split(":")[0] for line in differing_fields(PRESETS["paper"], config)}
        assert differing <= {"method", "data"}
        concentration = {"initial concentration"} if config.method == "vi-simsiam" else set()
        assert set(arm.inferred) == unstated | concentration
    assert planned.published["vi-simsiam-imagewoof"] == {"linear": 0.78468, "linear_top5": 0.98066}
    assert planned.primary is not None
    assert planned.primary["measure"] == "linear"


def test_lightlys_loss_is_half_of_ours() -> None:
    """Half a loss with rate 0.06 and weight decay 5e-4 makes the same steps."""
    config = plan("lightly-imagenette", PlanOptions()).arms[0].config
    assert (config.batch_size, config.epochs, config.augment.size) == (256, 200, 128)
    assert (config.lr, config.weight_decay) == (0.03, 1e-3)
    for epochs, published in ((200, 0.752), (800, 0.872), (100, None)):
        wanted = {} if published is None else {"simsiam": {"knn200": published}}
        assert plan("lightly-imagenette", PlanOptions(epochs=epochs)).published == wanted


def test_both_methods_try_the_same_points_of_one_grid() -> None:
    """Learning rates are in proportion to the batch, and those for 64 come 2.5 apart."""

    def tried(**options: Any) -> dict[str, list[tuple[float, float]]]:
        planned = plan("tuned", PlanOptions(**options))
        assert {arm.config.held_out for arm in planned.trials} == {0.2}
        assert {arm.config.loss for arm in planned.trials} == {LossConfig()}
        found: dict[str, list[tuple[float, float]]] = {"simsiam": [], "vi-simsiam": []}
        for arm in planned.trials:
            found[arm.config.method].append((arm.config.lr, arm.config.weight_decay))
        return found

    rates = [0.05 * 2.5**power for power in range(5)]
    decays = (1e-4, 5e-4, 2.5e-3, 1.25e-2)
    grid = [(pytest.approx(rate), decay) for rate in rates for decay in decays]
    whole = tried(batch_size=128, preset="paper")
    assert whole == {"simsiam": grid, "vi-simsiam": grid}
    some = tried(batch_size=128, trials=8)
    assert some["simsiam"] == some["vi-simsiam"]
    assert len(set(some["simsiam"])) == 8
    assert [point for point in whole["simsiam"] if point in some["simsiam"]] == some["simsiam"]
    assert some["simsiam"] != whole["simsiam"][:8], "a draw"


def test_deaths_runs_every_loss_at_every_dimension_and_learning_rate() -> None:
    made = plan("deaths", PlanOptions(seeds=9, preset="paper"))
    assert len(made.arms) == 3 * 4 * 4
    assert (made.measures, made.primary) == ((), None)
    for name, seeds, method, loss in (
        ("vi-simsiam", None, "vi-simsiam", LossConfig()),
        ("softplus", 3, "vi-simsiam", SOFTPLUS),
        ("simsiam", 4, "simsiam", LossConfig()),
    ):
        arms = [arm for arm in made.arms if arm.name.partition("-d")[0] == name]
        assert all((arm.seeds, arm.config.method) == (seeds, method) for arm in arms)
        assert all(arm.config.loss == loss for arm in arms)
        assert {arm.config.model.dim for arm in arms} == {128, 256, 512, 2048}
        assert {arm.config.lr for arm in arms} == {0.0125, 0.03, 0.06, 0.1}


def test_options_scale_an_experiment() -> None:
    data = ("cifar10", "folder:/some/where/cats")
    options = PlanOptions(data=data, epochs=10, size=112, images=500, batch_size=32, dim=64)
    planned = plan("table1", options)
    assert [arm.name for arm in planned.arms[::2]] == ["simsiam-cifar10", "simsiam-folder-cats"]
    config = planned.arms[3].config
    assert config.data == "folder:/some/where/cats"
    assert (config.epochs, config.images, config.batch_size, config.model.dim) == (10, 500, 32, 64)
    views = config.augment
    assert (views.size, views.local_size, views.local_views) == (112, 48, 6)
    assert "/some" not in json.dumps(planned.described())
    options = PlanOptions(ood=("near=folder:/some/where/dogs", "far=cifar10"))
    assert plan("kappa", options).described()["options"]["ood"] == [
        "near=folder:dogs",
        "far=cifar10",
    ]
    for epochs, ema in ((99, 0.99), (100, 0.996)):
        assert plan("controls", PlanOptions(epochs=epochs)).arms[-1].config.ema == ema
    assert {arm.config.model.dim for arm in plan("stability", PlanOptions(dim=96)).arms} == {96}
    for name in ("tuned", "controls", "stability"):
        views = plan(name, PlanOptions(preset="demo")).arms[0].config.augment
        assert (views.size, views.blur_prob) == (28, 0.0)


def test_a_plain_folder_is_named_without_its_place(tmp_path: Path) -> None:
    for name in ("cats", "dogs"):
        (tmp_path / name).mkdir()
    data = (str(tmp_path / "cats"), str(tmp_path / "dogs"))
    planned = plan("kappa", PlanOptions(data=data, ood=(f"near={tmp_path / 'dogs'}",)))
    assert planned.arms[-1].name == "fitted-folder-dogs"
    assert planned.arms[-1].config.data == f"folder:{tmp_path / 'dogs'}"
    assert str(tmp_path) not in json.dumps(planned.described())


def test_further_training_begins_with_the_given_weights() -> None:
    options = PlanOptions(backbone="timm:resnet10t", init=Path("/some/where/w.pth"), preset="demo")
    planned = plan("further", options)
    assert "/some" not in json.dumps(planned.described())
    assert [(arm.name, arm.fitted, arm.after) for arm in planned.arms if arm.fitted] == [
        ("starting", True, None),
        ("fitted", True, "simsiam"),
    ]
    for arm in planned.arms:
        config = arm.config
        assert (config.model.backbone, config.init) == (options.backbone, options.init)
        slower = PRESETS["demo"].lr / (10 if arm.name.endswith("-gentle") else 1)
        assert config.lr == pytest.approx(slower)
    arms = plan("further", PlanOptions(pretrained=True)).arms
    assert all(arm.config.model.pretrained for arm in arms)


def test_weights_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """A file by its content, a run by that of its last checkpoint."""

    def named(init: Path) -> str:
        found = plan("further", PlanOptions(init=init)).described()["options"]["init"]
        assert isinstance(found, str)
        return found

    places = [tmp_path / name / "w.pth" for name in ("one", "other")]
    for place in places:
        place.parent.mkdir()
        place.write_bytes(b"1")
    assert named(places[0]) == named(places[1])
    assert re.fullmatch(r"w\.pth \([0-9a-f]{16}\)", named(places[0]))
    places[1].write_bytes(b"2")
    assert named(places[0]) != named(places[1])

    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoint-00000010.safetensors").write_bytes(b"1")
    before = named(run)
    (run / "checkpoint-00000020.safetensors").write_bytes(b"2")
    assert named(run) not in ("run", before)


def test_arms_are_chosen_by_name() -> None:
    assert "vi-byol" not in [arm.name for arm in plan("controls", PlanOptions()).arms]
    some = plan("controls", PlanOptions(arms=("simsiam", "vi-byol", "fitted")))
    assert [arm.name for arm in some.arms] == ["simsiam", "fitted", "vi-byol"]
    assert some.primary is None, "an arm of its comparison is missing"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("table2", {}, "experiment: 'table2' is none of table1, "),
        ("controls", {"arms": ("fitted",)}, "'fitted' starts from the runs of 'simsiam'"),
        ("deaths", {"arms": ("vi-simsim",)}, r"\.\.\. \(48 in all\); did you mean 'vi-simsiam-d"),
        ("controls", {"arms": ()}, "arms: nothing is not accepted"),
        ("controls", {"data": ("folder:a/x", "folder:b/x")}, "two of them have the same name"),
        (
            "kappa",
            {"ood": ("near=a", "b")},
            "ood: b is not accepted; it must be near=DATA or far=DATA",
        ),
        ("further", {}, "init: None is not accepted; it must be a run or file of weights"),
        ("deaths", {"epochs": 1}, "epochs: 1 is not accepted; it must be at least 2"),
        ("tuned", {"trials": 21}, "trials: 21 is not accepted; it must be at most 20"),
        *(("controls", {option: 0}, f"^{option}: 0 is not accepted") for option in NUMBERS),
    ],
)
def test_options_that_cannot_be_used_are_named(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        plan(name, PlanOptions(**options))
