"""Tests that need a GPU: the losses on CUDA tensors, launches, streams, graphs, memory."""

from __future__ import annotations

import dataclasses
import gc
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from losses import COSINE, POWER_SPHERICAL, draw
from processes import run_tests
from rich.console import Console
from test_trainer import config, learned, metrics
from torch import Tensor

from vi_simsiam.config import ModelConfig
from vi_simsiam.engine.checkpoint import load_last
from vi_simsiam.engine.train import Trainer
from vi_simsiam.errors import TrainingError
from vi_simsiam.functional import power_spherical_loss
from vi_simsiam.models import VISimSiam
from vi_simsiam.ops.backends import why_unavailable
from vi_simsiam.ops.multiview_loss import LossForm, multiview_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
_NO_CUDA = why_unavailable("cuda", "cuda")
fused = pytest.mark.parametrize(
    "backend",
    [
        "triton",
        pytest.param("cuda", marks=pytest.mark.skipif(_NO_CUDA is not None, reason=str(_NO_CUDA))),
    ],
)


def on_gpu(
    dtype: torch.dtype, batch: int, dim: int, width: int | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Two views as the predictor makes them, with rows of `width` columns, and two targets."""
    p, z = (x.to("cuda", dtype) for x in draw(POWER_SPHERICAL, 2, 2, batch, dim))
    rows = torch.zeros(2, batch, dim + 1 if width is None else width, device="cuda", dtype=dtype)
    rows[..., : dim + 1] = p
    return [x.clone().requires_grad_() for x in rows], list(z)


@fused
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_compute_sanitizer_finds_nothing(backend: str, tool: str) -> None:
    """Out-of-bounds, misaligned and uninitialised accesses, and races, over shapes, strides and
    dtypes."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip(
            "compute-sanitizer is not installed: memory accesses of the kernels are not checked"
        )
    # torch and Triton probe the driver with CUDA calls that may fail without harm.
    wrapper = (sanitizer, "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9")
    run_tests(
        "tests/test_multiview_loss_autograd.py",
        "-k",
        f"{backend} and (padded or incoming or mean_is)",
        wrapper=(*wrapper, "--target-processes", "all"),
        VI_SIMSIAM_TEST_DEVICE="cuda",
        PYTORCH_NO_CUDA_MEMORY_CACHING="1",  # else a tensor ends within a larger allocation
    )


def kernels_of(call: Callable[[], object]) -> list[str]:
    """Names of the kernels that a call launches."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return [
        event.name
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]


@fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_launches(backend: str, dtype: torch.dtype) -> None:
    """One for loss, mean and gradient; backward adds one, and autograd its own that makes the
    incoming 1."""
    views, z = on_gpu(dtype, 64, 2048, 2064)

    def forward() -> Tensor:
        return power_spherical_loss(views, z, backend=backend)

    def both() -> None:
        torch.autograd.grad(forward(), views)

    with torch.no_grad():
        assert len(kernels_of(forward)) == 1
    assert len(kernels_of(forward)) == 1
    assert len(kernels_of(both)) == 3


@fused
def test_nothing_is_allocated_but_the_results(backend: str) -> None:
    """Peak memory of forward and backward: the gradient with its padded rows, the losses, and no
    copy of an input."""
    views, z = on_gpu(torch.float32, 4096, 2048, 2064)
    torch.autograd.grad(power_spherical_loss(views, z, backend=backend), views)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(power_spherical_loss(views, z, backend=backend), views)
    used = torch.cuda.max_memory_allocated() - before
    assert used <= 2 * 4096 * 2064 * 4 + 4096 * 4 + 4096


@fused
def test_streams_of_ones_own(backend: str) -> None:
    views, z = on_gpu(torch.float32, 64, 2048, 2064)
    expected = torch.autograd.grad(power_spherical_loss(views, z, backend=backend), views)
    streams = [torch.cuda.Stream() for _ in range(3)]
    results = []
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results.append(
                [
                    torch.autograd.grad(power_spherical_loss(views, z, backend=backend), views)
                    for _ in range(5)
                ]
            )
    torch.cuda.synchronize()
    for found in (gradients for each in results for gradients in each):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@fused
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_cuda_graph_replays_the_loss_and_its_gradient(backend: str, reduction: str) -> None:
    """Other inputs in the same memory, replayed while another stream runs the same loss."""
    views, z = on_gpu(torch.float32, 64, 512, 528)

    def step() -> tuple[Tensor, ...]:
        loss = power_spherical_loss(views, z, backend=backend, reduction=reduction).sum()
        return loss, *torch.autograd.grad(loss, views)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (7, 8):
        fresh = draw(POWER_SPHERICAL, 2, 2, 64, 512, seed=seed)[0].to("cuda", torch.float32)
        with torch.no_grad():
            for view, new in zip(views, fresh, strict=True):
                view[:, :513] = new
        torch.cuda.synchronize()
        graph.replay()
        with torch.cuda.stream(side):
            beside = [step() for _ in range(3)]
        torch.cuda.synchronize()
        for found in (captured, *beside[1:]):
            assert all(torch.equal(a, b) for a, b in zip(found, beside[0], strict=True))


@fused
@pytest.mark.parametrize("form", [POWER_SPHERICAL, COSINE], ids=str)
def test_rows_too_long_for_registers_and_many_views(backend: str, form: LossForm) -> None:
    for views, targets, batch, dim in (
        (2, 2, 3, 20000),
        (16, 16, 2, 129),
        (16, 2, 3, 8192),
        (8, 8, 2, 2049),
    ):
        p, z = (x.to("cuda", torch.float32) for x in draw(form, views, targets, batch, dim))
        exact = p.double().requires_grad_()
        want = multiview_loss(exact, z.double(), form, backend="eager")
        p.requires_grad_()
        loss = multiview_loss(p, z, form, backend=backend)
        torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=1e-5)
        (gradient,), (expected,) = torch.autograd.grad(loss, p), torch.autograd.grad(want, exact)
        assert (gradient - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.fixture
def _memory_back() -> Iterator[None]:
    """Other test processes can have what a test took."""
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.xdist_group("much GPU memory")
@pytest.mark.usefixtures("_memory_back")
@fused
def test_offsets_beyond_31_bits(backend: str) -> None:
    """2 views of 1.1 million rows of 2064 columns: the last rows lie behind element 2^31 of each
    view."""
    batch, dim = 1_100_000, 2048
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of free GPU memory")
    p = [torch.empty(batch, 2064, device="cuda", dtype=torch.bfloat16).normal_() for _ in range(2)]
    z = [torch.empty(batch, dim, device="cuda", dtype=torch.bfloat16).normal_() for _ in range(2)]
    leaves = [x.requires_grad_() for x in p]
    loss = power_spherical_loss(leaves, z, reduction="none", backend=backend)
    gradients = torch.autograd.grad(loss.sum(), leaves)
    rows = [0, batch // 2, batch - 1]
    few = [x.detach()[rows].clone().requires_grad_() for x in p]
    expected = power_spherical_loss(few, [x[rows] for x in z], reduction="none", backend=backend)
    assert torch.equal(loss[rows], expected)
    for gradient, want in zip(gradients, torch.autograd.grad(expected.sum(), few), strict=True):
        assert torch.equal(gradient[rows], want)


@fused
def test_a_compiled_model_trains_with_the_fused_loss(backend: str) -> None:
    """torch.compile of model and loss as one graph gives the gradients of the uncompiled one."""
    torch.manual_seed(0)
    model = VISimSiam(
        torch.nn.Flatten(), features=48, dim=64, projector_hidden=32, predictor_hidden=16
    ).cuda()
    images = [torch.randn(32, 3, 4, 4, device="cuda") for _ in range(2)]

    def gradients(loss: Callable[[list[Tensor]], Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(images), list(model.parameters()))

    expected = gradients(lambda x: model.loss(model(x), backend))
    found = gradients(torch.compile(lambda x: model.loss(model(x), backend), fullgraph=True))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@fused
def test_the_second_gpu(backend: str) -> None:
    """The launch goes to the tensors' device, whichever is current."""
    views, z = on_gpu(torch.float32, 64, 512)
    expected = power_spherical_loss(views, z, backend=backend)
    loss = power_spherical_loss(
        [x.to("cuda:1") for x in views], [x.to("cuda:1") for x in z], backend=backend
    )
    assert loss.device.index == 1
    assert torch.equal(loss.cpu(), expected.cpu())


def test_fused_backends_explain_themselves() -> None:
    assert why_unavailable("triton", "cuda") is None
    assert why_unavailable("cpu", "cuda") == "it takes CPU tensors, not cuda"


@pytest.mark.parametrize("method", ["vi-simsiam", "simsiam"])
def test_training_on_the_gpu(image_folder: Path, tmp_path: Path, method: str) -> None:
    settings = dataclasses.replace(
        config(image_folder, method=method, epochs=12, lr=0.05), device="cuda"
    )
    trainer = Trainer(settings, tmp_path / "run", console=Console(quiet=True))
    assert trainer.train_step.bf16
    assert trainer.backend == "triton"
    trainer.fit()
    assert learned(metrics(tmp_path / "run"))


@pytest.mark.parametrize("memory", ["gpu", "host"])
@pytest.mark.parametrize("capture", ["on", "off"])
def test_captured_and_single_launches_train_alike(
    image_folder: Path, tmp_path: Path, capture: str, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each against a run in float32 on the CPU: the same views, order, learning rate and latch,
    step by step."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    base = config(
        image_folder, epochs=4, lr=1e-5, log_every=1
    )  # low: views differ by 1e-5, which updates amplify
    on_device = dataclasses.replace(
        base, device="cuda", precision="fp32", capture=capture, data_memory=memory
    )
    for settings, name in ((base, "cpu"), (on_device, "gpu")):
        Trainer(settings, tmp_path / name, console=Console(quiet=True)).fit()
    expected, found = metrics(tmp_path / "cpu"), metrics(tmp_path / "gpu")
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    assert [line["lr"] for line in found] == [line["lr"] for line in expected]
    for line, reference in list(zip(found, expected, strict=True))[
        :6
    ]:  # later steps amplify it, too
        assert line["loss"] == pytest.approx(reference["loss"], rel=0.02, abs=0.01)


def test_a_captured_run_equals_the_one_of_single_launches(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, as every kernel adds in a fixed order (no max-pool, deterministic cuDNN)."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    model = ModelConfig(stem="small", dim=32, projector_hidden=32, predictor_hidden=16)
    settings = dataclasses.replace(
        config(image_folder, epochs=4, model=model), device="cuda", log_every=1
    )
    for capture in ("on", "off"):
        each = dataclasses.replace(settings, capture=capture)
        Trainer(each, tmp_path / capture, console=Console(quiet=True)).fit()
    first, second = (load_last(tmp_path / name) for name in ("on", "off"))
    torch.testing.assert_close(first.model, second.model, rtol=0, atol=0)
    kept = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("on", "off")]
    assert kept[0] == kept[1]


def test_the_latch_stops_a_captured_run(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A factor that becomes infinite after the capture: the error names the step, and the last
    checkpoint is good."""
    settings = dataclasses.replace(
        config(image_folder, epochs=6), device="cuda", capture="on", log_every=30
    )
    trainer = Trainer(settings, tmp_path / "run", console=Console(quiet=True))
    loss, counter = trainer.model.loss, trainer.train_step.counter

    def broken(*given: Any) -> Tensor:
        return loss(*given) * torch.where(counter >= 12, torch.inf, 1.0)

    monkeypatch.setattr(trainer.model, "loss", broken)
    with pytest.raises(TrainingError, match=r"the loss is not finite at step 13 \(epoch 3\)"):
        trainer.fit()
    kept = load_last(tmp_path / "run")
    assert all(torch.isfinite(value).all() for value in kept.model.values())
