"""The product of Power Spherical experts against closed forms and integration of the product."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from vi_simsiam.errors import InputError
from vi_simsiam.inference.product import product_of_experts


def unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")
    return torch.nn.functional.normalize(drawn, dim=-1)


def numbers(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def spread(kappa: float, *, count: int = 4, views: int = 3, dim: int = 64) -> tuple[Tensor, Tensor]:
    """Directions of cosine about 0.7 with each other, and concentrations around kappa."""
    loc = unit(count, 1, dim, seed=1) * 1.5 + unit(count, views, dim, seed=2)
    kappas = kappa * torch.linspace(0.5, 2, count * views, dtype=torch.float64, device="cpu")
    return torch.nn.functional.normalize(loc, dim=-1), kappas.view(count, views)


def mean_of_two(c: float, kappa: tuple[float, float], dim: int) -> NDArray[np.float64]:
    """E[z] of the product of two experts with cosine c, by quadrature in the plane they span.

    The projection of the sphere's surface measure onto the plane has density
    (1 - r^2)^((D - 4)/2).
    """
    nodes, radial = np.polynomial.legendre.leggauss(400)
    r, radial = (nodes + 1) / 2, radial / 2
    angle = np.arange(1440) * (2 * math.pi / 1440)
    x, y = r[:, None] * np.cos(angle), r[:, None] * np.sin(angle)
    log_density = kappa[0] * np.log1p(x) + kappa[1] * np.log1p(c * x + math.sqrt(1 - c * c) * y)
    log_density += (dim - 4) / 2 * np.log1p(-r * r)[:, None]
    weight = np.exp(log_density - log_density.max()) * (radial * r)[:, None]
    return np.array([(weight * x).sum(), (weight * y).sum()]) / weight.sum()


@pytest.mark.parametrize("dim", [16, 512])
@pytest.mark.parametrize("c", [0.9, 0.0, -0.4])
@pytest.mark.parametrize("relative", [(0.1, 0.2), (3.0, 8.0), (0.2, 15.0)])
def test_two_experts_against_quadrature(dim: int, c: float, relative: tuple[float, float]) -> None:
    """Errors as in the docstring, a fifth more allowed: they fall as 1/D."""
    kappa = ((dim - 1) * relative[0], (dim - 1) * relative[1])
    true = mean_of_two(c, kappa, dim)
    mu = torch.zeros(1, 2, dim, dtype=torch.float64, device="cpu")
    mu[0, 0, 0], mu[0, 1, 0], mu[0, 1, 1] = 1, c, math.sqrt(1 - c * c)
    loc, concentration = product_of_experts(mu, numbers([kappa]))
    length = (concentration / (concentration + dim - 1)).item()
    assert abs(length - np.linalg.norm(true)) < 0.12 / dim
    angle = math.atan2(loc[0, 1].item(), loc[0, 0].item()) - math.atan2(true[1], true[0])
    assert abs(math.degrees(angle)) < 2.4 / dim
    assert loc[0, 2:].abs().max() < 1e-12


def test_agreeing_experts_add_up() -> None:
    loc = unit(5, 1, 40).expand(5, 4, 40)
    kappa = 10.0 ** torch.linspace(-3, 6, 20, dtype=torch.float64, device="cpu").view(5, 4)
    joined, concentration = product_of_experts(loc, kappa)
    torch.testing.assert_close(joined, loc[:, 0], atol=1e-12, rtol=0)
    torch.testing.assert_close(concentration, kappa.sum(1), rtol=1e-12, atol=0)


def test_opposite_experts_have_the_beta_mean() -> None:
    """(1 + x)^k1 (1 - x)^k2 has E[x] = (k1 - k2)/(D - 1 + k1 + k2); equal ones cancel."""
    direction = unit(1, 1, 30)
    loc = torch.cat([direction, -direction], dim=1)
    joined, concentration = product_of_experts(loc, numbers([[70.0, 25.0]]))
    torch.testing.assert_close(joined[0], direction[0, 0], atol=1e-12, rtol=0)
    mean = concentration / (concentration + 29)
    torch.testing.assert_close(mean.item(), 45 / (29 + 95), rtol=1e-9, atol=0)
    joined, concentration = product_of_experts(loc, numbers([[50.0, 50.0]]))
    assert concentration.item() == 0
    torch.testing.assert_close(joined[0], direction[0, 0])


@pytest.mark.parametrize("kappa", [1e-2, 60.0, 1e4])
def test_the_result_is_stationary(kappa: float) -> None:
    """m proportional to sum w_i mu_i, kappa = (1 + t) sum w_i c_i, t = kappa/(kappa + D - 1)."""
    loc, concentration = spread(kappa)
    m, joined = product_of_experts(loc, concentration)
    t = joined / (joined + 63)
    cosine = (loc @ m.unsqueeze(-1)).squeeze(-1)
    weights = concentration / (1 + t[:, None] * cosine)
    torch.testing.assert_close((1 + t) * (weights * cosine).sum(1), joined, rtol=1e-8, atol=0)
    pull = (weights[..., None] * loc).sum(1)
    torch.testing.assert_close(pull / pull.norm(dim=-1, keepdim=True), m, atol=1e-10, rtol=0)
    torch.testing.assert_close(m.norm(dim=-1), torch.ones(4, dtype=torch.float64, device="cpu"))


def test_no_concentration_no_order_one_and_no_view() -> None:
    loc, concentration = spread(80.0)
    expected = product_of_experts(loc, concentration)
    more_loc = torch.cat([loc, unit(4, 1, 64, seed=9)], 1)
    more = product_of_experts(more_loc, torch.nn.functional.pad(concentration, (0, 1)))
    turned = product_of_experts(loc.flip(1), concentration.flip(1))
    torch.testing.assert_close((*more, *turned), expected * 2, rtol=1e-9, atol=1e-12)
    joined, nothing = product_of_experts(loc, torch.zeros_like(concentration))
    assert (nothing == 0).all()
    torch.testing.assert_close(joined, loc[:, 0])
    one = product_of_experts(loc[:, :1].float(), concentration[:, :1].float())
    assert torch.equal(one[0], loc[:, 0].float())
    assert torch.equal(one[1], concentration[:, 0].float())
    shapes = [tuple(each.shape) for each in product_of_experts(loc[:0], concentration[:0])]
    assert shapes == [(0, 64), (0,)]


def test_extremes_stay_finite() -> None:
    """Concentrations over twelve orders of magnitude in contradicting directions."""
    generator = np.random.default_rng(0)
    for dim in (2, 16, 512):
        kappa = torch.from_numpy((dim - 1) * 10 ** generator.uniform(-6, 6, (50, 5)))
        loc, concentration = product_of_experts(unit(50, 5, dim).float(), kappa.float())
        assert loc.dtype == concentration.dtype == torch.float32
        assert torch.isfinite(loc).all()
        assert torch.isfinite(concentration).all()
        assert (concentration >= 0).all()
        ones = torch.ones(50, device="cpu")
        torch.testing.assert_close(loc.norm(dim=-1), ones, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("shape", "kappa", "message"),
    [
        ((2, 3), [1.0, 1.0], r"shapes \(2, 3\), \(2,\) given"),
        ((1, 3, 4), [[1.0] * 4], "accepted are"),
        ((1, 3, 4), [[-1.0] * 3], "concentration: a negative"),
        ((1, 3, 4), [[math.nan] * 3], "non-finite"),
    ],
)
def test_bad_experts_are_refused(shape: tuple[int, ...], kappa: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        product_of_experts(torch.ones(shape, device="cpu"), numbers(kappa))
