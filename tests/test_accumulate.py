"""A batch computed in parts: the step of the whole batch, with the memory of one part."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from graph_cases import with_stand_in
from test_distributed import real_run, run_ranks, values
from test_step import RATES, assert_same, everything, group_of_one, resnet_model, views
from test_trainer import QUIET, config, metrics
from torch import Tensor, nn
from torch.distributed import GradBucket
from torch.nn.parallel import DistributedDataParallel

from vi_simsiam.config import AugmentConfig
from vi_simsiam.data.defaults import suited
from vi_simsiam.engine import replay
from vi_simsiam.engine.distributed import World
from vi_simsiam.engine.network import OWN_BUFFERS, Bfloat16Weights, backward, training_network
from vi_simsiam.engine.step import TrainStep
from vi_simsiam.engine.train import Trainer
from vi_simsiam.errors import InputError
from vi_simsiam.inference.images import open_images
from vi_simsiam.models import Output, SimSiam, VISimSiam

KINDS: dict[str, tuple[type[SimSiam], dict[str, Any], dict[str, Any]]] = {
    "vi-simsiam": (VISimSiam, {}, {}),
    "simsiam": (SimSiam, {}, {}),
    "byol": (VISimSiam, {}, {"ema": 0.9}),
    "clipped": (VISimSiam, {}, {"clip_norm": 0.05}),
    "shuffled": (VISimSiam, {"concentration": "shuffled"}, {}),
    "global": (VISimSiam, {"concentration": "global"}, {}),
    "detached": (VISimSiam, {"concentration": "detached"}, {}),
}


def make_step(name: str, parts: int) -> TrainStep:
    """A step in float64 without BatchNorm, so that parts change nothing but rounding."""
    kind, model_options, step_options = KINDS[name]
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
    )
    widths = {"features": 32, "dim": 16, "projector_hidden": 16, "predictor_hidden": 8}
    model = kind(backbone, **widths, **model_options).double()  # type: ignore[arg-type]
    for head in (model.projector, model.predictor):
        for child, norm in enumerate(head):
            if isinstance(norm, nn.BatchNorm1d):
                head[child] = nn.LayerNorm(norm.num_features, dtype=torch.float64)
    if "ema" in step_options:
        model.add_target()
    options = {"weight_decay": 1e-2, "loss_scale": 0.1, "backend": "eager", **step_options}
    return TrainStep(model.train(), RATES, accumulate=parts, **options)


def batch(step: int) -> list[Tensor]:
    return [view.double() for view in views(step)]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("parts", [2, 4])
def test_parts_train_as_the_whole_batch(name: str, parts: int) -> None:
    """Five steps of eight images: outputs, losses, norms of the gradient, weights and momentum."""
    whole, divided = make_step(name, 1), make_step(name, parts)
    for number in range(5):
        expected, found = whole(batch(number)), divided(batch(number))
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(divided.gradient_norm(), whole.gradient_norm())
    before = everything(make_step(name, 1))
    assert not torch.equal(before[0], everything(whole)[0])
    torch.testing.assert_close(everything(divided), everything(whole), rtol=1e-6, atol=1e-9)


def test_parts_are_captured() -> None:
    eager, captured = make_step("byol", 2), make_step("byol", 2)
    call = with_stand_in(captured, captured.state, warmup=2)
    for number in range(6):
        eager(batch(number))
        call(batch(number))
    assert call.captured
    assert_same(everything(eager), everything(captured))


@pytest.mark.parametrize("broken", [0, 1])
def test_one_part_that_is_not_finite_stops_the_step(broken: int) -> None:
    step = make_step("vi-simsiam", 2)
    step(batch(0))
    kept = [weights.detach().clone() for weights in step.model.parameters()]
    given = batch(1)
    given[0][broken] = torch.nan
    step(given)
    step(batch(2))
    assert_same([weights.detach() for weights in step.model.parameters()], kept)
    assert step.failed.item() == 1
    assert torch.isfinite(step.losses[:3]).tolist() == [True, False, True]


def test_one_part_is_in_memory_at_a_time() -> None:
    """Each part's output, which holds its activations, is gone before the next part is computed."""
    step = make_step("vi-simsiam", 4)
    outputs: list[weakref.ref[Tensor]] = []

    def network(views: Sequence[Tensor]) -> Output:
        assert [len(view) for view in views] == [2, 2, 2]
        assert not any(output() is not None for output in outputs)
        output = step.model(views)
        outputs.extend(weakref.ref(prediction) for prediction in output.predictions)
        return output  # type: ignore[no-any-return]

    step.network = network
    step(batch(0))
    assert len(outputs) == 4 * 3


@pytest.mark.parametrize("bf16", [False, True])
def test_parts_with_the_kernels(bf16: bool) -> None:
    """BatchNorm normalises each part; the gradients are the mean of those of both parts."""
    dtype = torch.float32 if bf16 else torch.float64
    generator = torch.Generator().manual_seed(1)
    sides = (32, 32, 16)
    given = [torch.randn(8, 3, side, side, generator=generator, dtype=dtype) for side in sides]

    def gradients(views: list[Tensor], parts: int) -> tuple[Tensor, list[Tensor]]:
        model = resnet_model().to(dtype)
        network = training_network(model, kernels=True, bf16=bf16)
        assert isinstance(network, Bfloat16Weights) == bf16
        _, loss = backward(
            network, lambda output: model.loss(output, "eager"), views, parts=parts, bf16=bf16
        )
        found = [weights.grad for weights in model.parameters()]
        assert all(gradient is not None for gradient in found)
        return loss, found  # type: ignore[return-value]

    loss, found = gradients(given, 2)
    each = [gradients([view[part::2].contiguous() for view in given], 1) for part in range(2)]
    torch.testing.assert_close(loss, torch.stack([part for part, _ in each]).mean())
    for gradient, *others in zip(found, *(part for _, part in each), strict=True):
        expected = torch.stack(others).mean(0)
        tolerance = 2**-8 if bf16 else 1e-6
        scale = float(expected.abs().max())
        torch.testing.assert_close(gradient, expected, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch built with gloo")
def test_parts_on_two_ranks_train_as_one_process(image_folder: Path, tmp_path: Path) -> None:
    """Loss, norm of the gradient and weights of a network without BatchNorm."""
    augment = AugmentConfig(size=12, local_views=1, local_size=8, blur_prob=0.0)
    settings = config(image_folder, epochs=1, log_every=1, lr=0.1, augment=augment)
    divided = dataclasses.replace(settings, accumulate=2)
    _, expected = real_run(World(), settings, tmp_path / "whole")
    first, _ = values(run_ranks(real_run, 2, divided, tmp_path / "divided"))
    whole, parts = metrics(tmp_path / "whole"), metrics(tmp_path / "divided")
    for name in ("step", "loss", "grad_norm"):
        numbers = [line[name] for line in whole]
        assert [line[name] for line in parts] == pytest.approx(numbers, rel=1e-5), name
    for name, value in expected.items():
        np.testing.assert_allclose(first[1][name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_ranks_exchange_gradients_once_a_step() -> None:
    """One bucket holds all of them; a hook of DistributedDataParallel counts."""
    step, plain, sent = make_step("vi-simsiam", 4), make_step("vi-simsiam", 4), list[int]()

    def hook(state: None, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        sent.append(bucket.index())
        found: torch.futures.Future[Tensor] = torch.futures.Future()
        found.set_result(bucket.buffer())
        return found

    hook.__annotations__.clear()  # torch refuses those that are text
    with group_of_one():
        network = DistributedDataParallel(step.model, **OWN_BUFFERS)
        network.register_comm_hook(None, hook)
        step.network = network
        for number in range(3):
            step(batch(number))
            plain(batch(number))
    assert sent == [0, 0, 0]
    assert_same(everything(step), everything(plain))


@pytest.mark.usefixtures("small_network")
def test_a_failed_batch_is_made_again_in_parts(image_folder: Path, tmp_path: Path) -> None:
    """Loss and norm of the gradient are those of the step."""
    settings = config(image_folder, accumulate=2, kernels="off")
    trainer = Trainer(settings, tmp_path / "run", console=QUIET)
    given = next(iter(trainer.loader.epoch(0))).views
    again = SimpleNamespace(
        config=settings, model=copy.deepcopy(trainer.model), device=torch.device("cpu")
    )
    loss, norm, _ = replay._figures(again, given)  # type: ignore[arg-type]
    trainer.model.train()
    trainer.train_step(given)
    expected = trainer.train_step.losses[0].item() / settings.loss_scale
    assert loss == pytest.approx(expected, rel=1e-5)
    assert norm == pytest.approx(trainer.train_step.gradient_norm().item(), rel=1e-5)


@pytest.mark.usefixtures("small_network")
@pytest.mark.parametrize("parts", [3, 8])
def test_parts_that_do_not_divide_the_batch(parts: int, image_folder: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(config(image_folder), accumulate=parts)
    assert settings.batch_size == 8
    with pytest.raises(InputError, match=f"accumulate: {parts} is not accepted; it must be a div"):
        Trainer(settings, tmp_path / "run", console=QUIET)
    assert not (tmp_path / "run").exists()


def test_the_batch_that_suits_the_images_can_be_divided(image_folder: Path) -> None:
    settings = dataclasses.replace(config(image_folder), accumulate=3)
    assert suited(settings, open_images(image_folder / "train")).batch_size == 39
