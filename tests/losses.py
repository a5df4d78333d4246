"""Shared by the tests of the losses: random views, and the backends of the tested device.

The tests run on the CPU; with VI_SIMSIAM_TEST_DEVICE=cuda they test the backends of a GPU, as
test_gpu.py does.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from emulated_cuda import emulate
from torch import Tensor
from triton_interpreter import prepare

from vi_simsiam.benchmarks.peers import textbook_loss
from vi_simsiam.ops.backends import extension, interpreting, why_unavailable
from vi_simsiam.ops.multiview_loss import LossForm, multiview_loss

textbook = textbook_loss
DEVICE = os.environ.get("VI_SIMSIAM_TEST_DEVICE", "cpu")
EMULATION = os.environ.get("VI_SIMSIAM_EMULATION")
POWER_SPHERICAL, COSINE = LossForm("power_spherical"), LossForm("cosine")
QUADRATIC = LossForm("power_spherical", 31.0, 0.5, link="quadratic", gain=0.25, cosine=20.0)
"""The trainer's default: a quadratic link, a gain, and SimSiam's loss beside the density's."""
if interpreting():
    from triton.runtime import interpreter

    prepare(interpreter)
if EMULATION:
    emulate(EMULATION, pytest.MonkeyPatch())
    FUSED: list[Any] = ["cuda"]
elif DEVICE == "cpu":
    # Under TRITON_INTERPRET=1, as in test_triton_kernels.py, Triton accepts CPU tensors.
    FUSED = [
        pytest.param(
            "cpu", marks=pytest.mark.skipif(extension() is None, reason="needs the C++ extension")
        ),
        *(["triton"] if interpreting() else []),
    ]
else:
    reason = why_unavailable("cuda", DEVICE)
    FUSED = [
        "triton",
        pytest.param("cuda", marks=pytest.mark.skipif(reason is not None, reason=str(reason))),
    ]

fused = pytest.mark.parametrize("backend", FUSED)
every = pytest.mark.parametrize("backend", ["eager", *FUSED])
on_cpu_only = pytest.mark.skipif(DEVICE != "cpu", reason="about CPU tensors")


def draw(
    form: LossForm,
    views: int,
    targets: int,
    batch: int,
    dim: int,
    *,
    raw: float = 5.0,
    near: float = 1.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Float64 predictions near their targets (cosine about 1/sqrt(1 + near^2)), and the targets.

    The raw concentrations are around `raw`.
    """
    generator = torch.Generator("cpu").manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator, device="cpu")

    common = randn(batch, dim)
    z = common + 0.3 * near * randn(targets, batch, dim)
    p = common + near * randn(views, batch, dim)
    if form.distribution == "power_spherical":
        p = torch.cat([p, raw + randn(views, batch, 1)], -1)
    return p.to(DEVICE), z.to(DEVICE)


def loss_and_gradient(
    p: Tensor, z: Tensor, form: LossForm, backend: str, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The loss of every sample, and the gradient of their sum, weighted if `weights` are given."""
    p = p.detach().clone().requires_grad_()
    loss = multiview_loss(p, z, form, reduction="none", backend=backend)
    loss.backward(torch.ones_like(loss) if weights is None else weights.to(loss))
    assert p.grad is not None
    return loss.detach(), p.grad


def check_error(p: Tensor, z: Tensor, form: LossForm, backend: str) -> None:
    """Loss and gradient are off by at most twice what eager is off by in the same dtype, or a few
    ulp (float64: rounding); both against float64 eager on the same rounded inputs."""
    exact = loss_and_gradient(p.double(), z.double(), form, "eager")
    eager = loss_and_gradient(p, z, form, "eager")
    found = loss_and_gradient(p, z, form, backend)
    for want, ours, theirs in zip(exact, found, eager, strict=True):
        assert ours.dtype == theirs.dtype
        scale = want.abs().max() + 1
        floor = (64 if p.dtype == torch.float64 else 4) * torch.finfo(ours.dtype).eps * scale
        assert (ours.double() - want).abs().max() <= 2 * (
            theirs.double() - want
        ).abs().max() + floor
