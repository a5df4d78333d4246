"""PowerSpherical and HypersphericalUniform against 60-digit values, another implementation and
their own samples."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import pytest
import torch
from scipy import stats
from test_power_spherical import COLUMN, DIMS
from torch import Tensor
from torch.distributions import kl_divergence
from torch.nn.functional import normalize

from vi_simsiam.distributions import HypersphericalUniform, PowerSpherical

EPS = {torch.float32: 2.0**-23, torch.float64: 2.0**-52}


def golden(dim: int) -> dict[str, Tensor]:
    return {name: torch.from_numpy(x[COLUMN["d"] == dim]) for name, x in COLUMN.items()}


def exact_log_prob(loc: Tensor, kappa: float, value: Tensor) -> Tensor:
    """log C(kappa) + kappa log(1 + cos) of the vectors as given, normalised, in 40 digits."""
    loc, value = loc.double(), value.double()
    plus = normalize(loc, dim=-1) + normalize(value, dim=-1)
    minus = normalize(loc, dim=-1) - normalize(value, dim=-1)
    near = plus.square().sum(-1) / 2
    one_plus_cos = torch.where(near < 1, near, 2 - minus.square().sum(-1) / 2)
    with mpmath.workdps(40):
        b = mpmath.mpf(loc.shape[-1] - 1) / 2
        a = b + mpmath.mpf(kappa)
        log_c = (
            mpmath.loggamma(a + b)
            - mpmath.loggamma(a)
            - (a + b) * mpmath.log(2)
            - b * mpmath.log(mpmath.pi)
        )
        values = [
            float(log_c + kappa * mpmath.log(mpmath.mpf(x)))
            for x in one_plus_cos.flatten().tolist()
        ]
    return torch.tensor(values, dtype=torch.float64).reshape(one_plus_cos.shape)


def exact_divergence(kappa: float, dim: int) -> tuple[float, float]:
    """KL(PS || uniform) and its derivative kappa [psi'(a) - psi'(s)], in 60 digits."""
    with mpmath.workdps(60):
        k, b = mpmath.mpf(kappa), mpmath.mpf(dim - 1) / 2
        a, s = b + k, 2 * b + k
        log_c = (
            mpmath.loggamma(s) - mpmath.loggamma(a) - mpmath.loggamma(2 * b) + mpmath.loggamma(b)
        )
        value = log_c + k * (mpmath.psi(0, a) - mpmath.psi(0, s))
        return float(value), float(k * (mpmath.psi(1, a) - mpmath.psi(1, s)))


def uniform(p: PowerSpherical) -> HypersphericalUniform:
    return HypersphericalUniform(p.dim, p.batch_shape, dtype=p.loc.dtype)


def random_loc(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return normalize(
        torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)), dim=-1
    )


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(20)


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("dim", DIMS)
def test_log_prob_matches_golden_values(dim: int, dtype: torch.dtype) -> None:
    """mu = e1 and z = (cos, sin, 0, ...): what remains is rounding of the result, of log C's two
    parts and of z."""
    table = golden(dim)
    kappa, cos = table["kappa"], table["cos"]
    value = torch.zeros(len(cos), dim, dtype=torch.float64)
    value[:, 0], value[:, 1] = cos, ((1 - cos) * (1 + cos)).sqrt()
    value, loc = value.to(dtype), torch.zeros(len(cos), dim, dtype=dtype)
    loc[:, 0] = 1
    log_prob = PowerSpherical(loc, kappa.to(dtype)).log_prob(value)
    log_uniform = -uniform(PowerSpherical(loc, kappa.to(dtype))).entropy().double()
    expected = table["log_prob"]
    if dtype == torch.float32:
        kappa = kappa.float().double()
        expected = torch.stack(
            [exact_log_prob(loc[i], kappa[i].item(), value[i]) for i in range(len(cos))]
        )
    # Rounding z by eps moves the cosine by eps (1 - c^2), and the log-density by eps kappa (1 - c).
    tolerance = 4 * EPS[dtype] * (1 + expected.abs() + log_uniform.abs() + kappa * (1 - cos))
    assert log_prob.dtype == dtype
    assert ((log_prob.double() - expected).abs() <= tolerance).all()


@pytest.mark.parametrize("kappa", [1.0, 1e4, 1e6])
@pytest.mark.parametrize("dim", [2, 17, 2048])
def test_log_prob_of_float32_samples_keeps_its_digits(dim: int, kappa: float) -> None:
    p = PowerSpherical(random_loc(32, dim, dtype=torch.float32), torch.tensor(kappa))
    value = p.sample()
    exact = exact_log_prob(p.loc, kappa, value)
    ours = (p.log_prob(value) - exact).abs().max().item()
    size = 1 + exact.abs().max().item() + uniform(p).entropy().abs().max().item()
    size += kappa * (dim - 1) / (kappa + dim - 1)  # kappa (1 - E[cos])
    assert ours <= 4 * EPS[torch.float32] * size
    if kappa == 1e6:
        b = torch.tensor((dim - 1) / 2)
        a = b + kappa
        log_c = (
            torch.lgamma(a + b) - torch.lgamma(a) - (a + b) * math.log(2) - b * math.log(math.pi)
        )
        textbook = log_c + kappa * torch.log1p((p.loc * value).sum(-1))
        assert (textbook - exact).abs().max().item() > 10 * ours


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("dim", DIMS)
def test_entropy_and_divergence_match_golden_values(dim: int, dtype: torch.dtype) -> None:
    table = golden(dim)
    kappa = table["kappa"].to(dtype)
    expected_kl, expected_entropy = table["kl_uniform"], table["entropy"]
    if dtype == torch.float32:  # the table's concentrations are not all representable
        expected_kl = torch.tensor(
            [exact_divergence(k, dim)[0] for k in kappa.tolist()], dtype=torch.float64
        )
        expected_entropy = table["entropy"] + (table["kl_uniform"] - expected_kl)
    p = PowerSpherical(random_loc(len(kappa), dim, dtype=dtype), kappa)
    divergence, entropy = kl_divergence(p, uniform(p)), p.entropy()
    assert divergence.dtype == entropy.dtype == dtype
    error = (divergence.double() - expected_kl).abs()
    assert (error <= 5 * EPS[dtype] * expected_kl + 1e-50).all()  # 0 in 60 digits
    # In float64 the area's own terms, lgamma(D/2) and (D/2) log pi, are rounded before they are
    # subtracted.
    area_terms = 0.0
    if dtype == torch.float64:
        area_terms = abs(math.lgamma(dim / 2)) + dim / 2 * math.log(math.pi)
    tolerance = 2 * EPS[dtype] * (expected_entropy.abs() + expected_kl + area_terms)
    assert ((entropy.double() - expected_entropy).abs() <= tolerance).all()


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("dim", [2, 3, 9, 17, 18, 33, 34, 2048, 8192])
def test_divergence_and_its_gradient_keep_relative_accuracy(dim: int, dtype: torch.dtype) -> None:
    kappa = torch.tensor(
        [1e-6, 1e-3, 0.1, 1.0, 3.0, 30.0, 1e3, 1e5, 1e9], dtype=dtype, requires_grad=True
    )
    divergence = kl_divergence(
        PowerSpherical(random_loc(9, dim, dtype=dtype), kappa), HypersphericalUniform(dim)
    )
    (gradient,) = torch.autograd.grad(divergence.sum(), kappa)
    for k, value, slope in zip(kappa.tolist(), divergence.tolist(), gradient.tolist(), strict=True):
        exact_value, exact_slope = exact_divergence(k, dim)
        assert value == pytest.approx(exact_value, rel=5 * EPS[dtype], abs=0)
        assert slope == pytest.approx(exact_slope, rel=5 * EPS[dtype], abs=0)


@pytest.mark.parametrize("kappa", [0.5, 300.0])
@pytest.mark.parametrize("dim", [2, 64])
def test_agrees_with_the_power_spherical_package(dim: int, kappa: float) -> None:
    other = pytest.importorskip("power_spherical")
    p = PowerSpherical(random_loc(5, dim), kappa)
    q = other.PowerSpherical(p.loc, p.concentration, validate_args=False)
    value = random_loc(7, 5, dim, seed=1)
    torch.testing.assert_close(p.log_prob(value), q.log_prob(value), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(p.entropy(), q.entropy(), rtol=1e-11, atol=1e-11)
    # The package has the area of the sphere in float32.
    area = math.log(2) + dim / 2 * math.log(math.pi) - math.lgamma(dim / 2)
    divergence = kl_divergence(p, HypersphericalUniform(dim, dtype=torch.float64))
    torch.testing.assert_close(divergence, area - q.entropy(), rtol=1e-11, atol=1e-11)
    # The package's mean has no batches.
    single = other.PowerSpherical(p.loc[0], p.concentration[0], validate_args=False)
    torch.testing.assert_close(p.mean[0], single.mean)


@pytest.mark.parametrize(("dim", "kappas"), [(2, [0.7, 5.0, 80.0]), (33, [5.0])])
def test_gradients_match_finite_differences(dim: int, kappas: list[float]) -> None:
    raw = (3 * random_loc(len(kappas), dim)).requires_grad_()
    raw_value = (2 * random_loc(len(kappas), dim, seed=1)).requires_grad_()
    kappa = torch.tensor(kappas, dtype=torch.float64, requires_grad=True)

    def log_prob(raw: Tensor, kappa: Tensor, raw_value: Tensor) -> Tensor:
        return PowerSpherical(normalize(raw, dim=-1), kappa).log_prob(normalize(raw_value, dim=-1))

    def scalars(kappa: Tensor) -> tuple[Tensor, Tensor]:
        p = PowerSpherical(normalize(raw.detach(), dim=-1), kappa)
        return p.entropy(), kl_divergence(p, uniform(p))

    assert torch.autograd.gradcheck(log_prob, (raw, kappa, raw_value))
    assert torch.autograd.gradgradcheck(log_prob, (raw, kappa, raw_value))
    assert torch.autograd.gradcheck(scalars, (kappa,))
    assert torch.autograd.gradgradcheck(scalars, (kappa,))


LOCS: dict[str, Callable[[int], Tensor]] = {
    "e1": lambda dim: torch.eye(dim)[0],
    "-e1": lambda dim: -torch.eye(dim)[0],
    "e2": lambda dim: torch.eye(dim)[1],
    "random": lambda dim: random_loc(dim, dtype=torch.float32),
}


@pytest.mark.parametrize("name", LOCS)
@pytest.mark.parametrize(("dim", "kappa"), [(2, 3.0), (6, 0.0), (6, 1e4)])
def test_samples_have_the_first_two_moments(dim: int, kappa: float, name: str) -> None:
    count = 40_000
    p = PowerSpherical(LOCS[name](dim), torch.tensor(kappa))
    x = p.sample((count,)).double()
    loc, b = p.loc.double(), (dim - 1) / 2
    a, s = b + kappa, 2 * b + kappa
    covariance = 2 * a / (s * (s + 1)) * (torch.eye(dim) - kappa / s * torch.outer(loc, loc))
    torch.testing.assert_close(p.mean.double(), kappa / s * loc, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(p.variance.double(), covariance.diagonal(), rtol=1e-5, atol=1e-9)
    # Five standard errors, the empirical fourth moments giving those of the covariance; 1e-7 is
    # float32 rounding.
    assert ((x.mean(0) - p.mean).abs() <= 5 * (covariance.diagonal() / count).sqrt() + 1e-7).all()
    centred = x - p.mean
    products = centred.unsqueeze(-1) * centred.unsqueeze(-2)
    assert ((products.mean(0) - covariance).abs() <= 5 * products.std(0) / count**0.5 + 1e-9).all()


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize(
    ("dim", "kappa"), [(2, 0.0), (2, 1e6), (3, 7.0), (128, 50.0), (2048, 1e6), (2048, 0.0)]
)
def test_the_cosine_of_samples_follows_its_beta_distribution(
    dim: int, kappa: float, dtype: torch.dtype
) -> None:
    p = PowerSpherical(random_loc(dim, dtype=dtype), torch.tensor(kappa, dtype=dtype))
    x = p.sample((1000,))
    assert x.dtype == dtype
    # The root of D squares' sum is off by sqrt(D) eps / 12 at random; the most of 1000 is three
    # times that.
    assert ((x.double().norm(dim=-1) - 1).abs() <= (4 + dim**0.5 / 4) * EPS[dtype]).all()
    half_gap = (x.double() - normalize(p.loc.double(), dim=-1)).square().sum(
        -1
    ) / 4  # (1 - cos) / 2 ~ Beta(b, a)
    b = (dim - 1) / 2
    assert stats.kstest(half_gap.numpy(), stats.beta(b, b + kappa).cdf).pvalue > 1e-4


def test_gradient_through_samples_is_that_of_the_mean() -> None:
    """E[w.x] = kappa/(kappa + D - 1) w.mu: the pathwise gradients average to its derivatives."""
    count, dim, kappa = 40_000, 5, 8.0
    for name, make in LOCS.items():
        raw = make(dim).double().expand(count, dim).requires_grad_()
        k = torch.full((count,), kappa, dtype=torch.float64, requires_grad=True)
        weight, loc = random_loc(dim, seed=3), make(dim).double()
        x = PowerSpherical(normalize(raw, dim=-1), k).rsample()
        by_loc, by_kappa = torch.autograd.grad((x @ weight).sum(), (raw, k), retain_graph=True)
        s = kappa + dim - 1
        expected_kappa = (dim - 1) / s**2 * (weight @ loc)
        expected_loc = kappa / s * (weight - loc * (weight @ loc))
        assert (by_kappa.mean() - expected_kappa).abs() <= 5 * by_kappa.std() / count**0.5, name
        error = (by_loc.mean(0) - expected_loc).abs()
        assert (error <= 5 * by_loc.std(0) / count**0.5 + 1e-12).all(), name
        for gradient in torch.autograd.grad(x.square().sum(), (raw, k)):
            assert gradient.abs().max() < 1e-12, name  # every path stays on the sphere
        # |w| = 1 bounds each path's gradient: the reflection never divides by a small number.
        assert by_loc.norm(dim=-1).max() < 4, name


def test_concentration_zero_is_the_uniform_distribution() -> None:
    for dim in (2, 3, 64, 2048):
        p = PowerSpherical(random_loc(4, dim, dtype=torch.float32), 0.0)
        u = uniform(p)
        value = u.sample()
        assert torch.equal(p.log_prob(value), u.log_prob(value))
        assert torch.equal(p.entropy(), u.entropy())
        assert torch.equal(kl_divergence(p, u), torch.zeros(4))
        torch.testing.assert_close(p.variance, torch.full((4, dim), 1 / dim))


@pytest.mark.parametrize("dim", [2, 3, 2048])
def test_extreme_concentrations_stay_finite(dim: int) -> None:
    raw = random_loc(3, dim, dtype=torch.float32).requires_grad_()
    kappa = torch.tensor([0.0, 1e6, 1e12], requires_grad=True)
    p = PowerSpherical(normalize(raw, dim=-1), kappa)
    x = p.rsample()
    total = x.sum() + p.log_prob(x).sum() + p.entropy().sum() + p.mean.sum() + p.variance.sum()
    gradients = torch.autograd.grad(total, (raw, kappa))
    assert total.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)
    # At the antipode the density is 0; the clamp on 1 + cos makes its logarithm finite.
    antipode = p.log_prob(-p.loc)
    assert antipode.isfinite().all()
    assert antipode[1] < -1e7


def test_variance_keeps_its_digits_along_a_coordinate_axis() -> None:
    kappa, dim = 1e6, 5
    variance = PowerSpherical(torch.eye(dim)[0], kappa).variance
    b = (dim - 1) / 2
    exact = stats.beta(b + kappa, b).var() * 4
    assert variance[0].item() == pytest.approx(exact, rel=1e-6, abs=0)
    torch.testing.assert_close(
        variance.sum().item(), 1 - (kappa / (kappa + dim - 1)) ** 2, rtol=1e-6, atol=0
    )
