"""What only a GPU can show: the fused backends on CUDA tensors, streams, graphs, and a short training run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_multiview_loss import COSINE, POWER_SPHERICAL, draw, loss_and_gradient
from test_trainer import config, learned, metrics

from vi_simsiam.engine.trainer import Trainer
from vi_simsiam.ops.backends import extension, why_unavailable
from vi_simsiam.ops.multiview_loss import LossForm, multiview_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FUSED = [
    "triton",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(
            extension() is None or not hasattr(extension(), "multiview_loss_cuda"), reason="built without nvcc"
        ),
    ),
]


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("form", [POWER_SPHERICAL, COSINE, LossForm("power_spherical", 31.0, 2.5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("views", "targets", "dim"), [(2, 2, 2), (2, 1, 17), (8, 2, 2048), (3, 3, 129), (2, 2, 20000)])
def test_error_is_at_most_twice_eagers(
    backend: str, form: LossForm, dtype: torch.dtype, views: int, targets: int, dim: int
) -> None:
    p, z = (x.to("cuda", dtype) for x in draw(form, views, targets, 33, dim, raw=3.0))
    exact = loss_and_gradient(p.double(), z.double(), form, "eager")
    eager = loss_and_gradient(p, z, form, "eager")
    fused = loss_and_gradient(p, z, form, backend)
    for want, ours, theirs in zip(exact, fused, eager, strict=True):
        floor = (64 if dtype == torch.float64 else 4) * torch.finfo(ours.dtype).eps * (want.abs().max() + 1)
        assert (ours.double() - want).abs().max() <= 2 * (theirs.double() - want).abs().max() + floor


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("kappa", [1e4, 1e5, 1e6])
def test_digits_at_high_concentration(backend: str, kappa: float) -> None:
    """An approximate logarithm (2e-7 absolute) would show here times kappa; only the cosine's rounding may."""
    form = LossForm("power_spherical", kappa)
    p, z = (x.to("cuda", torch.float32) for x in draw(form, 2, 2, 16, 2048, raw=0.5, near=0.1))
    exact, exact_gradient = loss_and_gradient(p.double(), z.double(), form, "eager")
    ours, gradient = loss_and_gradient(p, z, form, backend)
    assert (ours - exact).abs().max() < 2 * kappa * 2e-7
    assert (gradient[..., -1] - exact_gradient[..., -1]).abs().max() < kappa * 2e-6


@pytest.mark.parametrize("backend", FUSED)
def test_padded_rows_streams_and_repeats(backend: str) -> None:
    """Rows of stride 2064, a stream of one's own, and bitwise equality over repeated calls."""
    p, z = (x.to("cuda", torch.float32) for x in draw(POWER_SPHERICAL, 2, 2, 64, 2048))
    padded = torch.full((2, 64, 2064), float("nan"), device="cuda")
    padded[..., :2049] = p
    expected = loss_and_gradient(p, z, POWER_SPHERICAL, backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        leaf = padded[..., :2049].detach().requires_grad_()
        loss = multiview_loss(leaf, z, POWER_SPHERICAL, reduction="none", backend=backend)
        loss.sum().backward()
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(loss.detach(), expected[0])
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, expected[1])


@pytest.mark.parametrize("backend", FUSED)
def test_cuda_graph_replays_the_loss_and_its_gradient(backend: str) -> None:
    p, z = (x.to("cuda", torch.float32) for x in draw(POWER_SPHERICAL, 2, 2, 64, 512))
    leaf = p.clone().requires_grad_()

    def step() -> torch.Tensor:
        leaf.grad = None
        loss = multiview_loss(leaf, z, POWER_SPHERICAL, backend=backend)
        loss.backward()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    fresh = draw(POWER_SPHERICAL, 2, 2, 64, 512, seed=7)[0].to("cuda", torch.float32)
    leaf.data.copy_(fresh)
    graph.replay()
    torch.cuda.synchronize()
    expected = fresh.requires_grad_()
    loss = multiview_loss(expected, z, POWER_SPHERICAL, backend=backend)
    loss.backward()
    assert torch.equal(captured, loss)
    assert leaf.grad is not None
    assert expected.grad is not None
    assert torch.equal(leaf.grad, expected.grad)


def test_fused_backends_explain_themselves() -> None:
    assert why_unavailable("triton", "cuda") is None
    assert why_unavailable("cpu", "cuda") == "it takes CPU tensors, not cuda"


@pytest.mark.parametrize("method", ["vi-simsiam", "simsiam"])
def test_training_on_the_gpu(image_folder: Path, tmp_path: Path, method: str) -> None:
    settings = dataclasses.replace(config(image_folder, method=method, epochs=12, lr=0.05), device="cuda")
    trainer = Trainer(settings, tmp_path / "run", console=Console(quiet=True))
    assert trainer.bf16
    assert trainer.backend == "triton"
    trainer.fit()
    assert learned(metrics(tmp_path / "run"))
