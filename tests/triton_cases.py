"""Numerical cases of the Triton loss kernel, on CPU tensors in Triton's interpreter or on a GPU.

Triton decides at import whether it interprets, so `test_triton_kernels.py` runs this file in a
process of its own; its name keeps pytest from collecting it anywhere else. There the quick tests of
the public losses run, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from losses import COSINE, POWER_SPHERICAL, QUADRATIC, check_error, draw, loss_and_gradient
from torch import Tensor
from triton_tools import DEVICE, INTERPRETED

from vi_simsiam.kernels import multiview_loss as kernel
from vi_simsiam.kernels import scale_gradient
from vi_simsiam.kernels.multiview_loss_parts import store_mean
from vi_simsiam.ops.multiview_loss import LossForm
from vi_simsiam.ops.multiview_loss_fused import LossCall, launch_loss

# The interpreter evaluates 0/0 in lanes that the kernel discards.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def inputs(
    form: LossForm,
    views: int,
    targets: int,
    dim: int,
    dtype: torch.dtype = F32,
    target_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Four samples, one of them in rows that take several warps."""
    p, z = draw(form, views, targets, 4 if dim < 200 else 1, dim, raw=2.0)
    return p.to(DEVICE, dtype), z.to(DEVICE, target_dtype or dtype)


@pytest.mark.parametrize(
    ("form", "shape"),
    [
        *((form, (2, 2, 2)) for form in (POWER_SPHERICAL, QUADRATIC, COSINE)),
        *((form, (5, 3, 33, F64)) for form in (POWER_SPHERICAL, QUADRATIC, COSINE)),
        *((form, (8, 2, 32)) for form in (POWER_SPHERICAL, COSINE)),
        *((form, (2, 2, 100, BF16)) for form in (POWER_SPHERICAL, COSINE)),
        (POWER_SPHERICAL, (2, 2, 256 if INTERPRETED else 2048)),  # a GPU takes four warps
        (POWER_SPHERICAL, (6, 5, 12)),  # views in blocks, the last one not full
        (QUADRATIC, (2, 1, 3)),
        (QUADRATIC, (16, 3, 9)),
        (COSINE, (3, 2, 48, F16)),
        (POWER_SPHERICAL, (3, 2, 24, BF16, F32)),
        (POWER_SPHERICAL, (3, 2, 24, F32, F16)),
        (POWER_SPHERICAL, (3, 2, 24, F32, F64)),
    ],
    ids=str,
)
def test_loss_and_gradient(form: LossForm, shape: tuple[int, ...]) -> None:
    check_error(*inputs(form, *shape), form, "triton")


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets limits of the launch for one test."""

    def change(**values: int) -> None:
        for name, value in values.items():
            monkeypatch.setattr(kernel, name, value)
        kernel.launch_arguments.cache_clear()

    yield change
    kernel.launch_arguments.cache_clear()


def _arguments(dim: int, views: int, targets: int) -> dict[str, int | bool]:
    return kernel.launch_arguments(dim, views, targets, 4, width=dim, spherical=True, double=False)


@pytest.mark.parametrize(
    ("form", "shape"),
    [(QUADRATIC, (2, 2, 40)), (COSINE, (3, 1, 37)), (POWER_SPHERICAL, (5, 3, 32))],
    ids=str,
)
def test_rows_in_chunks(
    form: LossForm, shape: tuple[int, int, int], limits: Callable[..., None]
) -> None:
    views, targets, dim = shape
    limits(_MOST_PAIRS=0, _WARPS=1, _STREAMED=triton.next_power_of_2(views) // 2)
    arguments = _arguments(dim, views, targets)
    assert (arguments["RESIDENT"], arguments["BLOCK_D"]) == (False, 16)
    check_error(*inputs(form, *shape), form, "triton")


def test_views_one_by_one(limits: Callable[..., None]) -> None:
    limits(_MOST_PAIRS=2)
    assert _arguments(12, 3, 2)["BLOCK_V"] == 1
    check_error(*inputs(POWER_SPHERICAL, 3, 2, 12), POWER_SPHERICAL, "triton")


@pytest.mark.parametrize("programs", [1, 2])
def test_several_samples_to_a_program_change_nothing(
    programs: int, limits: Callable[..., None]
) -> None:
    given = inputs(QUADRATIC, 3, 2, 12)
    want = loss_and_gradient(*given, QUADRATIC, "triton")
    limits(_MOST_WARPS_IN_ALL=programs)
    assert all(map(torch.equal, loss_and_gradient(*given, QUADRATIC, "triton"), want))


@triton.jit(do_not_specialize=["samples"])
def _mean_kernel(loss_ptr, mean_ptr, ticket_ptr, samples, WIDTH: tl.constexpr):
    store_mean(mean_ptr, ticket_ptr, loss_ptr, samples.to(tl.int64), WIDTH)


@pytest.mark.parametrize(
    ("samples", "bad"),
    [
        *((1, None), (300, torch.nan), (512, None), (513, torch.inf)),
        *((1536, torch.nan), (1950, None), (1950, torch.inf)),
    ],
)
def test_mean_of_many_losses(samples: int, bad: float | None) -> None:
    loss = torch.rand(samples + 1, generator=torch.Generator().manual_seed(samples)).to(DEVICE)
    loss[-1] = torch.nan  # behind the end
    if bad is not None:
        loss[samples // 2] = bad
    mean = torch.empty((), device=DEVICE)
    ticket = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    means = []
    for programs in (1, 3, 3):
        mean.fill_(-7)
        _mean_kernel[(programs,)](loss, mean, ticket, samples, 32)
        assert ticket.item() == 0
        means.append(mean.item())
    want = loss[:samples].double().mean().item()
    np.testing.assert_allclose(means, [want] * 3, rtol=2e-7)
    assert len(set(map(str, means))) == 1


def test_rows_and_views_further_apart_than_int32(tmp_path: Path) -> None:
    """The third row, and the third view of the gradient, start 2^31 elements on; the file behind
    them is sparse."""
    stride, dim = 1 << 30, 5
    if INTERPRETED:
        memory = torch.from_file(
            str(tmp_path / "rows"), shared=True, size=2 * stride + 64, dtype=F16
        )
    else:
        memory = torch.empty(2 * stride + 64, dtype=F16, device=DEVICE)
    predictions, targets = (x[:, :3] for x in inputs(COSINE, 3, 3, dim, F16))
    numbers = (1.0, 0.0, 1.0, "softplus", 1.0, 0.0)
    call = LossCall("triton", "cosine", F32, *numbers, mean=False, wants_gradient=True)
    loss, grad = torch.empty(3, device=DEVICE), torch.empty(3, 3, dim, device=DEVICE)

    def run(p: Tensor | list[Tensor], z: Tensor | list[Tensor], loss: Tensor, grad: Tensor) -> None:
        launch_loss(list(p), list(z), None, loss, None, grad, None, call)

    def apart(views: Tensor) -> list[Tensor]:
        rows = [memory.as_strided((3, dim), (stride, 1), 8 * v) for v in range(3)]
        return [row.copy_(view) for row, view in zip(rows, views, strict=True)]

    run(predictions, targets, loss, grad)
    got_loss, got_grad = torch.full_like(loss, torch.nan), torch.full_like(grad, torch.nan)
    run(apart(predictions), targets, got_loss, got_grad)
    assert torch.equal(got_loss, loss)
    assert torch.equal(got_grad, grad)
    wide = memory.as_strided((3, 3, dim), (stride, 8, 1), 32)
    run(predictions, apart(targets), got_loss.fill_(torch.nan), wide)
    assert torch.equal(got_loss, loss)
    torch.testing.assert_close(wide.float(), grad, rtol=2e-3, atol=1e-6)


@pytest.fixture(params=["one tile to a program", "all tiles to one program"])
def programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param.startswith("all"):
        monkeypatch.setattr(scale_gradient, "_MOST_PROGRAMS", 1)
    scale_gradient._launch_arguments.cache_clear()
    yield
    scale_gradient._launch_arguments.cache_clear()


def _gradient(width: int, dtype: torch.dtype = F32) -> Tensor:
    """(2, 19, width) with rows 16 elements wider than its own."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 19, width + 16, generator=generator, dtype=F64)
    return rows.to(dtype).to(DEVICE)[..., :width]


def _factor(kind: str, dtype: torch.dtype) -> Tensor:
    factors = torch.linspace(-3, 3, 38, dtype=dtype, device=DEVICE)
    factors[::8] = 1
    numbers = {"number": factors[1], "expanded": factors[1].expand(19)}
    return (numbers | {"per sample": factors[:19], "strided": factors[::2]})[kind]


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("kind", ["number", "expanded", "per sample", "strided"])
@pytest.mark.parametrize(("dtype", "width"), [(F32, 300), (F32, 5), (F64, 300), (BF16, 300)])
def test_scaling_in_place(kind: str, dtype: torch.dtype, width: int) -> None:
    gradient, factor = _gradient(width, dtype), _factor(kind, torch.promote_types(dtype, F32))
    concentration = torch.rand(2, 19, dtype=factor.dtype, device=DEVICE)
    around = gradient.as_strided((2, 19, 16), gradient.stride(), width)
    before, want_concentration = around.clone(), concentration * factor
    want = (gradient * factor.expand(19)[:, None]).to(dtype)
    scale_gradient.scale_gradient(gradient, factor, gradient, concentration)
    # The interpreter truncates to bfloat16 where a GPU rounds.
    rounding = torch.finfo(dtype).eps if dtype == BF16 else 0
    torch.testing.assert_close(gradient, want, rtol=rounding, atol=0)
    assert torch.equal(concentration, want_concentration)
    assert torch.equal(around, before)


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("kind", ["number", "strided"])
def test_scaling_into_float16(kind: str) -> None:
    gradient, factor = _gradient(300) * 1e-4, _factor(kind, F32)
    before = gradient.clone()
    out = torch.full((2, 19, 307), torch.nan, dtype=F16, device=DEVICE)
    scale_gradient.scale_gradient(gradient, factor, out[..., :300], None)
    want = (gradient * factor.expand(19)[:, None]).half()
    torch.testing.assert_close(out[..., :300], want, rtol=1e-3, atol=6e-8)
    assert out[..., 300:].isnan().all()
    assert torch.equal(gradient, before)


@pytest.mark.parametrize("shape", [(), (19,)])
def test_a_factor_of_one_touches_nothing(shape: tuple[int, ...]) -> None:
    """A NaN that is multiplied loses nothing that a test could see, but a signalling one becomes
    quiet."""
    gradient = _gradient(300)
    gradient.view(torch.int32)[..., 7] = 0x7F800001
    before = gradient.view(torch.int32).clone()
    scale_gradient.scale_gradient(gradient, torch.ones(shape, device=DEVICE), gradient, None)
    assert torch.equal(gradient.view(torch.int32), before)
