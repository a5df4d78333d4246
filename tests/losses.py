"""Shared by the tests of the losses: random views, the textbook formula, backends of a device.

The tests run on the CPU; with VI_SIMSIAM_TEST_DEVICE=cuda the same ones hold the backends of a GPU
(test_gpu.py does so).
"""

from __future__ import annotations

import math
import os

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vi_simsiam.ops.backends import extension, interpreting, why_unavailable
from vi_simsiam.ops.multiview_loss import LossForm, multiview_loss

DEVICE = os.environ.get("VI_SIMSIAM_TEST_DEVICE", "cpu")
POWER_SPHERICAL, COSINE = LossForm("power_spherical"), LossForm("cosine")
QUADRATIC = LossForm("power_spherical", 31.0, 0.5, link="quadratic", gain=0.25, cosine=20.0)
"""The trainer's own: another link, a factor on the raw concentration, and SimSiam's loss beside the
density's."""
if DEVICE == "cpu":
    # Under TRITON_INTERPRET=1 Triton takes CPU tensors, too (test_triton_kernels.py runs the
    # losses' tests so).
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
    """Predictions near their targets (cosine about 1/sqrt(1 + near^2)), raw concentrations around
    `raw`, float64."""
    generator = torch.Generator("cpu").manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator, device="cpu")

    common = randn(batch, dim)
    z = common + 0.3 * near * randn(targets, batch, dim)
    p = common + near * randn(views, batch, dim)
    if form.distribution == "power_spherical":
        p = torch.cat([p, raw + randn(views, batch, 1)], -1)
    return p.to(DEVICE), z.to(DEVICE)


def textbook(p: Tensor, z: Tensor, form: LossForm) -> Tensor:
    """Algorithm 1 as printed, by torch's lgamma, in the dtype of its inputs."""
    dim, b = z.shape[-1], (z.shape[-1] - 1) / 2
    direction, target = F.normalize(p[..., :dim], dim=-1), F.normalize(z.detach(), dim=-1)
    total = torch.zeros((), dtype=p.dtype)
    pairs = [(v, g) for v in range(len(p)) for g in range(len(z)) if v != g]
    for v, g in pairs:
        cos = (direction[v] * target[g]).sum(-1)
        if form.distribution == "cosine":
            total = total - cos
            continue
        x = form.gain * p[v, :, dim]
        r = x.clamp(min=0.02)
        kappa = (
            form.scale * (F.softplus(x) if form.link == "softplus" else r + r * r / 2)
            + form.minimum
        )
        zero, b_ = torch.zeros_like(kappa), torch.full_like(kappa, b)
        log_c = -(kappa * math.log(2) + torch.lgamma(b_ + kappa) - torch.lgamma(2 * b_ + kappa))
        log_c0 = -(torch.lgamma(b_ + zero) - torch.lgamma(2 * b_ + zero))
        total = total - (log_c - log_c0 + kappa * torch.log1p(cos) + form.cosine * cos)
    return 2 / len(pairs) * total


def loss_and_gradient(
    p: Tensor, z: Tensor, form: LossForm, backend: str, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The loss of every sample, and the gradient of their sum, weighted if `weights` are given."""
    p = p.detach().clone().requires_grad_()
    loss = multiview_loss(p, z, form, reduction="none", backend=backend)
    loss.backward(torch.ones_like(loss) if weights is None else weights.to(loss))
    assert p.grad is not None
    return loss.detach(), p.grad
