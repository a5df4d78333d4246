"""Whole runs of the control variants: each trains its own part, and can be resumed."""

from __future__ import annotations

import copy
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from graph_cases import with_stand_in
from test_step import RATES, assert_same, everything, group_of_one, views
from test_trainer import QUIET, Watched, checkpoint, config, metrics, same, train, weights
from torch.nn.parallel import DistributedDataParallel

from vi_simsiam import models
from vi_simsiam.config import AugmentConfig, LossConfig, ModelConfig, TrainConfig
from vi_simsiam.engine.network import OWN_BUFFERS
from vi_simsiam.engine.run import load_run
from vi_simsiam.engine.step import TrainStep
from vi_simsiam.engine.train import Trainer
from vi_simsiam.models import SimSiam, VISimSiam, build_model

pytestmark = pytest.mark.usefixtures("small_network")

CONSTANT = LossConfig(concentration="constant", concentration_value=1.0)
MULTICROP = AugmentConfig(size=16, local_views=2, local_size=8, blur_prob=0.0)
VARIANTS = {
    "plain": {},
    "constant": {"loss": CONSTANT},
    "global": {"loss": LossConfig(concentration="global", concentration_max=50.0)},
    "shuffled": {"loss": LossConfig(concentration="shuffled")},
    "detached": {"loss": LossConfig(concentration="detached")},
    "bounded": {"loss": LossConfig(concentration_max=20.0)},
    "byol": {"method": "simsiam", "ema": 0.9},
    "vi-byol": {"ema": 0.9},
    "local-predictor": {
        "augment": MULTICROP,
        "model": ModelConfig(
            dim=32, projector_hidden=32, predictor_hidden=16, local_predictor=True
        ),
    },
}


def make_step(
    kind: type[SimSiam] = VISimSiam,
    *,
    ema: float | None = None,
    shared: bool = False,
    **options: object,
) -> TrainStep:
    torch.manual_seed(0)
    backbone, features = models.build_backbone("resnet18")
    sizes = {"features": features, "dim": 16, "projector_hidden": 16, "predictor_hidden": 8}
    model = kind(backbone, **sizes, **options)  # type: ignore[arg-type]
    model.shared_passes = shared
    if ema is not None:
        model.add_target()
    return TrainStep(model.train(), RATES, weight_decay=1e-2, loss_scale=0.1, ema=ema)


@pytest.mark.parametrize(
    "name", ["plain", "constant", "global", "shuffled", "vi-byol", "local-predictor"]
)
def test_a_run_is_resumed_bit_for_bit(
    name: str, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted at step 3, in the first epoch; then the finished run is opened."""
    settings = config(image_folder, **VARIANTS[name])
    whole = train(settings, tmp_path / "whole")
    trainer = Trainer(settings, tmp_path / "parts", console=QUIET)

    def interrupt_at_3() -> None:
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(trainer, "train_step", Watched(trainer.train_step, interrupt_at_3))
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert trainer.step == checkpoint(tmp_path / "parts").step == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train(settings, tmp_path / "parts", resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    for key in ("step", "loss"):
        whole_run, parts = (metrics(tmp_path / folder) for folder in ("whole", "parts"))
        assert [line[key] for line in parts[2:]] == [line[key] for line in whole_run[2:]]

    run = load_run(tmp_path / "parts", device="cpu")
    assert run.config == settings.located()
    assert same(run.model.state_dict(), whole.model.state_dict())
    if isinstance(run.model, VISimSiam):
        kappa = run.model.distribution(torch.randn(4, 3, 16, 16)).concentration
        assert (kappa > 0).all()
        if name == "constant":
            torch.testing.assert_close(kappa, torch.full((4,), 31.0))
            assert metrics(tmp_path / "whole")[-1]["kappa"] == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "local-predictor"])
def test_variants_are_captured(name: str) -> None:
    """Six captured steps equal six eager ones, number for number."""
    settings = TrainConfig(**VARIANTS[name])  # type: ignore[arg-type]
    kind = SimSiam if settings.method == "simsiam" else VISimSiam
    names = ("concentration", "concentration_value", "concentration_max")
    options = {name: getattr(settings.loss, name) for name in names if kind is VISimSiam}
    eager, captured = (make_step(kind, ema=settings.ema, **options) for _ in range(2))
    call = with_stand_in(captured, captured.state, warmup=2)
    for i in range(6):
        eager(views(i))
        call(views(i))
    assert call.captured
    assert_same(everything(eager), everything(captured))
    assert torch.isfinite(eager.losses).all()


@pytest.mark.parametrize(("kind", "shared"), [(SimSiam, False), (VISimSiam, True)])
def test_the_target_is_a_moving_average(kind: type[SimSiam], shared: bool) -> None:
    """theta' <- m theta' + (1 - m) theta after every step; theta' makes the targets."""
    step = make_step(kind, ema=0.75, shared=shared)
    model = step.model
    assert model.target is not None
    online = [*model.backbone.parameters(), *model.projector.parameters()]
    expected = [p.detach().clone() for p in online]
    assert_same([p.detach() for p in model.target.parameters()], expected)
    reference = copy.deepcopy(model.target)
    for i in range(4):
        by_hand = [reference(view) for view in views(i)[:2]]
        output = step(views(i))
        for found, wanted in zip(output.targets, by_hand, strict=True):
            torch.testing.assert_close(found, wanted)
        expected = [
            0.75 * average + 0.25 * p.detach() for average, p in zip(expected, online, strict=True)
        ]
        torch.testing.assert_close([p.detach() for p in model.target.parameters()], expected)
        with torch.no_grad():
            for p, q in zip(reference.parameters(), expected, strict=True):
                p.copy_(q)
    torch.testing.assert_close(dict(model.target.named_buffers()), dict(reference.named_buffers()))
    own, others = dict(model.target[0].named_buffers()), dict(model.backbone.named_buffers())
    assert not torch.equal(own["1.running_mean"], others["1.running_mean"])
    assert (own["1.num_batches_tracked"], others["1.num_batches_tracked"]) == (8, 12)
    assert all(p.grad is None and not p.requires_grad for p in model.target.parameters())
    trained = {id(p) for group in step.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in [*online, *model.predictor.parameters()]}


def test_the_latch_keeps_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    step = make_step(ema=0.5)
    loss = step.model.loss
    broken = [1.0, float("nan"), 1.0]
    monkeypatch.setattr(step.model, "loss", lambda *given: loss(*given) * broken[int(step.counter)])
    assert step.model.target is not None
    step(views(0))
    kept = [p.clone() for p in step.model.target.parameters()]
    for i in (1, 2):
        step(views(i))
        assert_same([p.detach() for p in step.model.target.parameters()], kept)


def test_ranks_average_no_gradient_of_the_target() -> None:
    """DistributedDataParallel leaves the target alone, and the step moves it."""
    plain, wrapped = make_step(ema=0.5), make_step(ema=0.5)
    with group_of_one():
        wrapped.network = DistributedDataParallel(wrapped.model, **OWN_BUFFERS)
        for i in range(3):
            plain(views(i))
            wrapped(views(i))
    assert_same(everything(plain), everything(wrapped))


def test_a_detached_run_trains_simsiams_network(image_folder: Path, tmp_path: Path) -> None:
    """The controls start from SimSiam's weights, and ten steps of "detached" are SimSiam's."""

    def by_simsiams_names(model: SimSiam) -> dict[str, torch.Tensor]:
        state = {name.replace("3.mean", "3"): value for name, value in model.state_dict().items()}
        return {name: value for name, value in state.items() if "concentration" not in name}

    settings = config(image_folder, method="simsiam")
    torch.manual_seed(5)
    start = build_model(settings).state_dict()
    for kind in ("constant", "global", "detached"):
        value = 1.0 if kind == "constant" else None
        loss = LossConfig(concentration=kind, concentration_value=value)  # type: ignore[arg-type]
        torch.manual_seed(5)
        assert same(start, by_simsiams_names(build_model(config(image_folder, loss=loss))))
    simsiam = train(settings, tmp_path / "simsiam").model.state_dict()
    detached = train(config(image_folder, loss=loss), tmp_path / "detached").model
    # Layers of other widths may round differently; with every operation off by eps, ten steps
    # differed by 2e-6.
    torch.testing.assert_close(by_simsiams_names(detached), simsiam, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(simsiam["backbone.0.weight"], start["backbone.0.weight"])


def test_local_views_have_their_own_predictor(image_folder: Path) -> None:
    settings = config(image_folder, **VARIANTS["local-predictor"])
    model = build_model(settings)
    assert model.local_predictor is not None
    for together in (False, True):
        model.shared_passes = together
        given = [torch.randn(4, 3, size, size) for size in (16, 16, 8, 8)]
        model.zero_grad()
        output = model(given)
        sum(p.square().sum() for p in output.predictions[:2]).backward()  # type: ignore[union-attr]
        assert all(p.grad is None for p in model.local_predictor.parameters())
        assert all(p.grad is not None for p in model.predictor.parameters())
        model.zero_grad()
        sum(p.square().sum() for p in model(given).predictions[2:]).backward()  # type: ignore[union-attr]
        assert all(p.grad is not None for p in model.local_predictor.parameters())
        assert all(p.grad is None for p in model.predictor.parameters())


def test_a_run_trains_on_its_selection(image_folder: Path, tmp_path: Path) -> None:
    """One of 40 images is in both parts; a quarter is held out, and 24 others are trained on."""
    data = tmp_path / "data"
    shutil.copytree(image_folder, data)
    shutil.copy(data / "train" / "dark" / "03.png", data / "val" / "dark" / "zz.png")
    settings = config(data, images=24, held_out=0.25, split_seed=7, distinct=True, epochs=1)
    trainer = train(settings, tmp_path / "run")
    splits = load_run(tmp_path / "run", device="cpu").splits
    assert splits.val is not None
    places = [{part.describe(i) for i in range(len(part))} for part in (splits.train, splits.val)]
    assert list(map(len, places)) == [24, 10]
    source = trainer.loader.source
    assert {source.describe(i) for i in range(len(source))} == places[0]
    assert not places[0] & places[1]
    assert not any(place.endswith("train/dark/03.png") for place in places[0] | places[1])
