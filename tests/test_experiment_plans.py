"""Plans of experiments: what is compared with what, with which settings, and that it is said before any run starts."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from vi_simsiam.config import PRESETS, differing_fields
from vi_simsiam.errors import InputError
from vi_simsiam.experiments.catalogue import grid, plan
from vi_simsiam.experiments.plan import PlanOptions

NAMES = ("table1", "tuned", "controls", "stability", "lightly-imagenette")


@pytest.mark.parametrize("name", NAMES)
def test_every_plan_names_its_comparison_and_its_arms(name: str) -> None:
    planned = plan(name, PlanOptions(seeds=2))
    content = json.loads(json.dumps(planned.described()))
    assert content["experiment"] == name
    names = [arm["name"] for arm in content["arms"]]
    assert len(set(names)) == len(names)
    assert {content["primary"]["arm"], content["primary"]["against"]} <= set(names)
    assert content["primary"]["arm"] != content["primary"]["against"]
    assert all(
        arm["note"] and arm["data"] and arm["method"] in ("simsiam", "vi-simsiam")
        for arm in content["arms"]
    )
    assert set(content["published"]) <= set(names)
    assert all(arm.config.distinct for arm in planned.arms), (
        "no image is both trained and measured on"
    )
    assert list(planned.seeds) == [0, 1]


def test_table1_is_the_preset_and_says_what_the_paper_does_not_state() -> None:
    planned = plan("table1", PlanOptions())
    for arm in planned.arms:
        config = dataclasses.replace(arm.config, distinct=False)
        differing = {line.split(":")[0] for line in differing_fields(PRESETS["paper"], config)}
        assert differing <= {"method", "data"}
        concentration = {"initial concentration"} if config.method == "vi-simsiam" else set()
        assert set(arm.inferred) - concentration == {
            "augment.size", "augment.local_size", "augment.crop_scale", "augment.local_scale", "augment.local_views",
            "model.dim",
        }  # fmt: skip
        assert concentration <= set(arm.inferred)
    assert planned.published["vi-simsiam-imagewoof"] == {"linear": 0.78468, "linear_top5": 0.98066}
    assert planned.primary is not None
    assert planned.primary.measure == "linear"


def test_lightlys_settings_make_the_same_steps_as_its_halved_loss() -> None:
    """SGD on half a loss with learning rate 0.06 and weight decay 5e-4 against what the plan makes of them."""
    config = plan("lightly-imagenette", PlanOptions()).arms[0].config
    assert (config.batch_size, config.epochs, config.augment.size) == (256, 200, 128)
    weights = []
    for half, lr, decay in ((0.5, 0.06, 5e-4), (1.0, config.lr, config.weight_decay)):
        x = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([x], lr=lr, momentum=config.momentum, weight_decay=decay)
        for _ in range(5):
            optimizer.zero_grad()
            (half * (x.sin() ** 2).sum()).backward()
            optimizer.step()
        weights.append(x.detach())
    assert torch.allclose(*weights, rtol=1e-12, atol=0)
    at = {
        epochs: plan("lightly-imagenette", PlanOptions(epochs=epochs)).published
        for epochs in (200, 800, 100)
    }
    assert at == {200: {"simsiam": {"knn200": 0.752}}, 800: {"simsiam": {"knn200": 0.872}}, 100: {}}


@pytest.mark.parametrize("trials", [1, 8, 36])
def test_both_methods_get_the_same_number_of_different_trials(trials: int) -> None:
    planned = plan("tuned", PlanOptions(trials=trials, batch_size=128))
    assert planned.trials is not None
    assert planned.trials.seed not in planned.seeds
    own = {
        m: [a for a in planned.trials.arms if a.config.method == m]
        for m in ("simsiam", "vi-simsiam")
    }
    for arms in own.values():
        points = {(a.config.lr, a.config.weight_decay, a.config.loss) for a in arms}
        assert len(points) == len(arms) == trials
        assert all(a.config.held_out == 0.2 for a in arms)
    literal = [arm for arm in own["vi-simsiam"] if arm.config.loss.concentration_scale == 1.0]
    assert len(literal) == trials // 2, "both parametrisations are tried alike"
    assert all(2e-4 <= arm.config.lr <= 6e-3 for arm in literal), (
        "learning rates are in proportion to the batch"
    )
    assert (
        plan("tuned", PlanOptions(trials=trials, batch_size=128)).described() == planned.described()
    )


def test_the_methods_grids_are_of_one_size() -> None:
    sizes = [sum(map(len, grid(method, 64))) for method in ("simsiam", "vi-simsiam")]
    assert sizes[0] == sizes[1]
    with pytest.raises(InputError, match=f"trials: {sizes[0] + 1} is not accepted"):
        plan("tuned", PlanOptions(trials=sizes[0] + 1))


def test_options_scale_an_experiment() -> None:
    options = PlanOptions(
        data=("cifar10", "folder:/some/where/cats"),
        epochs=10,
        size=112,
        images=500,
        batch_size=32,
        dim=64,
    )
    arms = plan("table1", options).arms
    assert [arm.name for arm in arms[::2]] == ["simsiam-cifar10", "simsiam-folder-cats"]
    config = arms[3].config
    assert config.data == "folder:/some/where/cats"
    assert (config.epochs, config.images, config.batch_size, config.model.dim) == (10, 500, 32, 64)
    assert (config.augment.size, config.augment.local_size, config.augment.local_views) == (
        112,
        48,
        6,
    )
    assert "/some" not in json.dumps(plan("table1", options).described())
    emas = [
        plan("controls", PlanOptions(epochs=epochs)).arms[-1].config.ema for epochs in (99, 100)
    ]
    assert emas == [0.99, 0.996]
    dims = {arm.config.model.dim for arm in plan("stability", PlanOptions(dim=96)).arms}
    assert dims == {96}
    for name in ("tuned", "controls", "stability"):
        views = [arm.config.augment for arm in plan(name, PlanOptions(preset="demo")).arms]
        assert {(augment.size, augment.blur_prob) for augment in views} == {(28, 0.0)}


def test_arms_are_chosen_by_name() -> None:
    assert "vi-byol" not in [arm.name for arm in plan("controls", PlanOptions()).arms]
    some = plan("controls", PlanOptions(arms=("simsiam", "vi-byol", "ps-posthoc")))
    assert [arm.name for arm in some.arms] == ["simsiam", "ps-posthoc", "vi-byol"]
    assert some.primary is None, "its comparison was not asked for"
    with pytest.raises(InputError, match="'ps-posthoc' starts from the runs of 'simsiam'"):
        plan("controls", PlanOptions(arms=("ps-posthoc",)))
    with pytest.raises(InputError, match="arms: 'resnet' is none of simsiam, "):
        plan("controls", PlanOptions(arms=("resnet",)))
    with pytest.raises(InputError, match="experiment: 'table2' is none of table1, "):
        plan("table2", PlanOptions())
    for name in ("seeds", "epochs", "images", "val_images", "trials"):
        with pytest.raises(InputError, match=f"{name}: 0 is not accepted"):
            PlanOptions(**{name: 0})
    with pytest.raises(InputError, match="arms: nothing is not accepted"):
        PlanOptions(arms=())
    for name in ("batch_size", "ema", "dim", "size"):
        with pytest.raises(InputError, match=f"^{name}: 0 is not accepted"):
            plan("controls", PlanOptions(**{name: 0}))  # type: ignore[arg-type]
