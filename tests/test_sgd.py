"""The update of the training step on a CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.profiler import profile

from vi_simsiam.engine.sgd import CPUFusedSGD
from vi_simsiam.engine.step import TrainStep
from vi_simsiam.errors import InputError
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


@pytest.mark.parametrize("buffer", [torch.zeros(3), torch.zeros(6, 2), torch.zeros(2, 6).double()])
def test_momentum_that_does_not_fit_is_refused(buffer: torch.Tensor) -> None:
    """As from another network's checkpoint; torch would read and write behind its end."""
    parameter = nn.Parameter(torch.ones(2, 6))
    parameter.grad = torch.ones(2, 6)
    fused = CPUFusedSGD([parameter], lr=torch.tensor(0.1), momentum=0.9, fused=True)
    fused.state[parameter]["momentum_buffer"] = buffer
    with pytest.raises(InputError, match=r"momentum_buffer: .* must be torch.float32 \(2, 6\)"):
        fused.step()
    assert parameter.eq(1).all()


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
