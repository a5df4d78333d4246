"""The update of the training step on a CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.profiler import profile

from vi_simsiam.engine.sgd import CPUFusedSGD
from vi_simsiam.engine.step import TrainStep
from vi_simsiam.models import SimSiam


def network(channels: int = 3) -> nn.Sequential:
    """Weights in channels_last and in other layouts, one of them frozen."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(channels, 8, 3), nn.Conv2d(8, 5, 1), nn.Flatten(), nn.Linear(5, 4)]
    model = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    model.append(nn.Conv2d(4, 4, 3))
    model[1].bias.requires_grad_(False)
    return model


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_updates_are_torchs(momentum: float) -> None:
    """Those of a loop over the parameters; none where found_inf is set."""
    ours, torchs = network(), network()
    rate = torch.tensor(0.0)
    options = dict(momentum=momentum, weight_decay=0.1)
    fused = CPUFusedSGD(ours.parameters(), lr=rate, fused=True, **options)
    plain = torch.optim.SGD(torchs.parameters(), lr=0.0, foreach=False, **options)
    for parameter in ours.parameters() if momentum else ():
        fused.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    for step in range(3):
        rate.fill_(0.5**step)
        plain.param_groups[0]["lr"] = 0.5**step
        for p, q in zip(ours.parameters(), torchs.parameters(), strict=True):
            if p.requires_grad:
                p.grad = torch.randn_like(p)
                q.grad = p.grad.clone()
        fused.step()
        plain.step()
    torch.testing.assert_close(ours.state_dict(), torchs.state_dict())
    fused.found_inf = torch.ones(())  # type: ignore[attr-defined]
    before = copy.deepcopy((ours.state_dict(), fused.state_dict()))
    fused.step()
    torch.testing.assert_close((ours.state_dict(), fused.state_dict()), before, rtol=0, atol=0)
    fused.zero_grad()
    fused.step()  # without a gradient there is nothing to do


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_a_step_copies_no_gradient(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = SimSiam(nn.Sequential(*layers), features=8, dim=16).to(memory_format=layout)
    step = TrainStep(model, torch.full((2,), 0.1))
    step([torch.randn(4, 3, 8, 8) for _ in range(2)])
    gradient = model.backbone[0].weight.grad
    assert gradient is not None
    assert gradient.is_contiguous(memory_format=layout)
    with profile() as profiler:
        step.optimizer.step()
    names = [event.name for event in profiler.events()]
    assert "aten::_fused_sgd_" in names
    assert "aten::clone" not in names
