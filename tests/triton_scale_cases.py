"""Cases of the Triton kernel that scales a gradient, in Triton's interpreter or on a GPU (see
`triton_cases.py`)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from triton_tools import DEVICE

from vi_simsiam.kernels import scale_gradient as kernel

VIEWS, SAMPLES, WIDTH = 2, 19, 300
KINDS = ("number", "expanded", "per sample", "strided")
BRIEF = ("number", "strided")
"""One of those that the kernel reads as a number, one of those that it reads for each row."""


@pytest.fixture(autouse=True, params=["one tile to a program", "all tiles to one program"])
def programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param.startswith("all"):
        monkeypatch.setattr(kernel, "_MOST_PROGRAMS", 1)
    kernel._launch_arguments.cache_clear()
    yield
    kernel._launch_arguments.cache_clear()


def _gradient(dtype: torch.dtype = torch.float32, width: int = WIDTH) -> Tensor:
    """With rows 16 elements wider than its own."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(VIEWS, SAMPLES, width + 16, generator=generator, dtype=torch.float64)
    return rows.to(dtype).to(DEVICE)[..., :width]


def _factor(kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    if kind == "number":
        return torch.tensor(-2.5, dtype=dtype, device=DEVICE)
    if kind == "expanded":
        return torch.tensor(0.3, dtype=dtype, device=DEVICE).expand(SAMPLES)
    factors = torch.linspace(-3, 3, 2 * SAMPLES, dtype=dtype, device=DEVICE)
    factors[::8] = 1
    return factors[:SAMPLES] if kind == "per sample" else factors[::2]


def _around(x: Tensor) -> Tensor:
    return x.as_strided((VIEWS, SAMPLES, 16), x.stride(), x.shape[2])


@pytest.mark.parametrize(
    ("kind", "dtype", "width"),
    [
        *((kind, torch.float32, WIDTH) for kind in KINDS),
        *((kind, dtype, WIDTH) for kind in BRIEF for dtype in (torch.float64, torch.bfloat16)),
        *((kind, torch.float32, 5) for kind in BRIEF),
    ],
    ids=str,
)
def test_in_place(kind: str, dtype: torch.dtype, width: int) -> None:
    gradient = _gradient(dtype, width)
    around = _around(gradient).clone()
    factor = _factor(kind, torch.promote_types(dtype, torch.float32))
    want = (gradient * factor.expand(SAMPLES)[:, None]).to(dtype)
    kernel.scale_gradient(gradient, factor, gradient, None)
    # The interpreter truncates to bfloat16 where a GPU rounds.
    torch.testing.assert_close(
        gradient, want, rtol=torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0, atol=0
    )
    assert torch.equal(_around(gradient), around)


@pytest.mark.parametrize("kind", BRIEF)
def test_into_float16(kind: str) -> None:
    gradient, factor = _gradient() * 1e-4, _factor(kind)
    before = gradient.clone()
    out = torch.full((VIEWS, SAMPLES, WIDTH + 7), torch.nan, dtype=torch.float16, device=DEVICE)
    kernel.scale_gradient(gradient, factor, out[..., :WIDTH], None)
    want = (gradient * factor.expand(SAMPLES)[:, None]).half()
    torch.testing.assert_close(out[..., :WIDTH], want, rtol=1e-3, atol=6e-8)
    assert out[..., WIDTH:].isnan().all()
    assert torch.equal(gradient, before)


@pytest.mark.parametrize("kind", BRIEF)
def test_gradient_of_the_concentration(kind: str) -> None:
    gradient, factor = _gradient(), _factor(kind)
    concentration = torch.rand(VIEWS, SAMPLES, device=DEVICE)
    want = concentration * factor
    kernel.scale_gradient(gradient, factor, gradient, concentration)
    assert torch.equal(concentration, want)


@pytest.mark.parametrize("shape", [(), (SAMPLES,)])
def test_a_factor_of_one_touches_nothing(shape: tuple[int, ...]) -> None:
    """A NaN that is multiplied loses nothing that a test could see, but a signalling one becomes
    quiet."""
    gradient = _gradient()
    gradient.view(torch.int32)[..., 7] = 0x7F800001
    before = gradient.view(torch.int32).clone()
    kernel.scale_gradient(gradient, torch.ones(shape, device=DEVICE), gradient, None)
    assert torch.equal(gradient.view(torch.int32), before)


def test_nan_and_zero_factors() -> None:
    gradient = _gradient()
    kernel.scale_gradient(gradient, torch.zeros((), device=DEVICE), gradient, None)
    assert (gradient == 0).all()
    kernel.scale_gradient(gradient, torch.full((), torch.nan, device=DEVICE), gradient, None)
    assert gradient.isnan().all()


def test_empty_batch() -> None:
    empty = torch.empty(2, 0, 5, device=DEVICE)
    kernel.scale_gradient(empty, torch.ones((), device=DEVICE), empty, None)
