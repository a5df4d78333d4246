"""Ranks with the project's kernels: their gradients, and one choice for all."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import small_backbone
from numpy.typing import NDArray
from test_distributed import run_ranks, values
from test_step import resnet_model
from test_trainer import config
from torch import Tensor

from vi_simsiam.config import TrainConfig
from vi_simsiam.engine import kernels
from vi_simsiam.engine.distributed import World
from vi_simsiam.engine.network import Bfloat16Weights, training_network, wrap
from vi_simsiam.engine.step import configured_step
from vi_simsiam.models import SimSiam

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="needs torch built with gloo"
)


def gradients(network: Any, model: SimSiam, views: list[Tensor], bf16: bool) -> list[Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model.loss(network(views), "eager", 0.1)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    return [parameter.grad.clone() for parameter in model.parameters()]  # type: ignore[union-attr]


def fused_gradients(world: World, bf16: bool) -> tuple[bool, list[tuple[NDArray[Any], ...]]]:
    """Gradients with the kernels on this rank's part of a batch, averaged over the ranks, and the
    mean of both parts' gradients that one process computes: in float64 by separate passes, with
    bf16 by autocast."""
    dtype = torch.float32 if bf16 else torch.float64
    generator = torch.Generator().manual_seed(1)
    parts = [
        [torch.randn(4, 3, size, size, generator=generator, dtype=dtype) for size in (32, 32, 16)]
        for _ in range(world.size)
    ]
    model, alone = resnet_model().to(dtype), resnet_model().to(dtype)
    alone.fused = bf16
    expected = [gradients(alone, alone, views, bf16) for views in parts]
    network = training_network(model, kernels=True, bf16=bf16)
    found = gradients(wrap(network, world), model, parts[world.rank], bf16)
    pairs = zip(found, *expected, strict=True)
    means = [(own.numpy(), torch.stack(others).mean(0).numpy()) for own, *others in pairs]
    return isinstance(network, Bfloat16Weights), means


@pytest.mark.parametrize("bf16", [False, True])
def test_ranks_with_kernels_have_the_gradients_of_one_process(bf16: bool) -> None:
    for converted, pairs in values(run_ranks(fused_gradients, 2, bf16)):
        assert converted == bf16
        for found, expected in pairs:
            scale = float(np.abs(expected).max())
            # In bfloat16 a weight's gradient is rounded once, under autocast alone in each use.
            tolerance = 2**-8 if bf16 else 1e-6
            np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * scale)


Case = list[tuple[str | None, tuple[float | Exception, float]]]


def choosing(
    world: World, settings: TrainConfig, cases: list[Case], resumed: Path | None = None
) -> list[str]:
    """The choices where each rank cannot use the kernels for a reason, or its steps take so many
    seconds with and without them."""
    chosen = []
    for case in cases:
        problem, (fused, plain) = case[world.rank]

        def seconds(call: Any, device: torch.device, durations: Any = (plain, fused)) -> float:
            duration = durations[call.func._step.model.fused]
            if isinstance(duration, Exception):
                raise duration
            return float(duration)

        unavailable = mock.patch.object(kernels, "why_unavailable", return_value=problem)
        model = SimSiam(small_backbone()[0], features=32, dim=32)
        make_step = partial(configured_step, settings, loss_scale=1.0, backend="eager", bf16=False)
        device = mock.patch.object(kernels, "device_name", return_value="a device")
        with unavailable, device, mock.patch.object(kernels, "_seconds", seconds):
            found = kernels.choose_kernels(
                settings, world, model, make_step, dtype=torch.float32, steps=100, resumed=resumed
            )
        chosen.append(str(found))
    return chosen


def test_ranks_choose_the_same_layers(image_folder: Path) -> None:
    """The slowest rank counts; kernels that one rank cannot use, none uses."""
    memory = MemoryError("no memory")
    cases: dict[str, Case] = {
        "off (fused 400 ms, torch's layers 300 ms a step)": [
            (None, (0.1, 0.2)),
            (None, (0.4, 0.3)),
        ],
        "on (fused 200 ms, torch's layers 300 ms a step)": [(None, (0.2, 0.1)), (None, (0.1, 0.3))],
        "off: no compiler": [(None, (0.1, 0.2)), ("no compiler", (0.1, 0.2))],
        "off (torch's layers 300 ms a step; fused failed: no memory)": [
            (None, (0.1, 0.2)),
            (None, (memory, 0.3)),
        ],
    }
    for found in values(run_ranks(choosing, 2, config(image_folder), list(cases.values()))):
        assert found == list(cases)


def test_ranks_keep_the_choice_that_rank_0_reads(image_folder: Path, tmp_path: Path) -> None:
    saved = kernels.KernelChoice("a device", False, 300.0, 200.0)
    saved.save(tmp_path)
    case: Case = [(None, (0.1, 0.2)), (None, (0.1, 0.2))]
    for found in values(run_ranks(choosing, 2, config(image_folder), [case], tmp_path)):
        assert found == [str(saved)]
