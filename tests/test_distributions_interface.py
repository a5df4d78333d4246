"""PowerSpherical and HypersphericalUniform as torch.distributions: shapes, dtypes, checks."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from scipy import stats
from test_distributions import EPS, random_loc, uniform
from torch import Tensor
from torch.distributions import kl_divergence

import vi_simsiam.distributions as distributions
from vi_simsiam.distributions import HypersphericalUniform, PowerSpherical
from vi_simsiam.errors import InputError

LOC = random_loc(4, 3, dtype=torch.float32)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(20)


def test_shapes_of_batches_samples_and_values() -> None:
    p = PowerSpherical(random_loc(4, 3, 7, dtype=torch.float32), torch.rand(4, 3))
    assert (p.batch_shape, p.event_shape, p.dim) == ((4, 3), (7,), 7)
    assert (
        p.sample().shape
        == p.mean.shape
        == p.mode.shape
        == p.variance.shape
        == p.stddev.shape
        == (4, 3, 7)
    )
    assert p.rsample((2, 5)).shape == p.sample((2, 5)).shape == (2, 5, 4, 3, 7)
    assert p.entropy().shape == kl_divergence(p, HypersphericalUniform(7)).shape == (4, 3)
    assert kl_divergence(p, HypersphericalUniform(7, (2, 1, 3))).shape == (2, 4, 3)
    assert p.log_prob(p.sample((2, 5))).shape == (2, 5, 4, 3)
    one = random_loc(7, dtype=torch.float32)
    assert torch.equal(p.log_prob(one), p.log_prob(one.expand(4, 3, 7)))
    assert p.log_prob(one.expand(4, 1, 7)).shape == (4, 3)
    assert PowerSpherical(one, torch.tensor(2.0)).log_prob(one).shape == ()


def test_expand_keeps_the_densities() -> None:
    p = PowerSpherical(
        random_loc(3, 5), torch.tensor([0.5, 2.0, 9.0], dtype=torch.float64), validate_args=False
    )
    wide = p.expand((4, 3))
    assert type(wide) is PowerSpherical
    assert (wide.batch_shape, wide.concentration.shape, wide.event_shape) == ((4, 3), (4, 3), (5,))
    assert wide._validate_args is False
    with pytest.raises(InputError, match="value: a vector of length 2"):
        PowerSpherical(p.loc, p.concentration, validate_args=True).expand((4, 3)).log_prob(
            2 * p.loc
        )
    with pytest.raises(InputError, match="value: a vector of length 2"):
        HypersphericalUniform(5, validate_args=True).expand((4, 3)).log_prob(2 * p.loc)
    assert wide.loc.data_ptr() == p.loc.data_ptr()
    value = random_loc(5)
    expected = p.log_prob(value).expand(4, 3)
    torch.testing.assert_close(
        wide.log_prob(value), expected, rtol=0, atol=8 * EPS[torch.float64] * 29
    )  # as above
    assert wide.sample((2,)).shape == (2, 4, 3, 5)
    u = HypersphericalUniform(5, (3,), dtype=torch.float64).expand((4, 3))
    assert (u.sample().shape, u.sample().dtype) == ((4, 3, 5), torch.float64)
    with pytest.raises(RuntimeError):
        u.expand((2,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_parameters_are_computed_in_float32(dtype: torch.dtype) -> None:
    loc = random_loc(4, 64, dtype=torch.float32).to(dtype)
    p = PowerSpherical(loc, torch.full((4,), 200.0, dtype=dtype))
    wide = PowerSpherical(loc.float(), p.concentration.float(), validate_args=False)
    x = p.rsample((3,))
    assert x.dtype == p.mean.dtype == p.variance.dtype == dtype
    assert (
        p.log_prob(x).dtype
        == p.entropy().dtype
        == kl_divergence(p, uniform(p)).dtype
        == torch.float32
    )
    assert torch.equal(p.log_prob(x), wide.log_prob(x.float()))
    assert torch.equal(p.entropy(), wide.entropy())
    assert HypersphericalUniform(64, dtype=dtype).sample((2,)).dtype == dtype


def test_mixed_precision_values_are_computed_in_the_wider_dtype() -> None:
    loc, value = random_loc(8), random_loc(8, seed=1)
    single = PowerSpherical(loc.float(), 3.0)
    double = PowerSpherical(loc.float().double(), 3.0)
    assert single.log_prob(value).dtype == torch.float64
    assert torch.equal(single.log_prob(value), double.log_prob(value))


@pytest.mark.parametrize(
    ("loc", "concentration", "error", "message"),
    [
        (LOC, torch.ones(4, 1), InputError, r"\(4, 1\).*loc of shape \(4, 3\).*\(4,\), or \(\)"),
        (LOC * 1.001, torch.ones(4), InputError, r"loc: a vector of length 1\.001.*normalize\(loc"),
        (LOC.double() * (1 + 1e-5), 1.0, InputError, "loc: a vector of length 1.00001"),
        (torch.ones(4, 1), torch.ones(4), InputError, "D >= 2"),
        (torch.ones(()), torch.ones(()), InputError, "D >= 2"),
        (LOC, torch.tensor([1, 2, -0.5, 3]), InputError, "holds -0.5"),
        (LOC, torch.full((4,), torch.inf), InputError, "holds inf"),
        (LOC, torch.tensor([1, torch.nan, 2, 3]), InputError, "holds nan"),
        (LOC, -1.0, InputError, "holds -1.0"),
        (LOC, torch.ones(4, device="meta"), InputError, "lies on meta"),
        (LOC.int(), torch.ones(4), TypeError, "loc: torch.int32"),
        ([[1.0, 0.0]], torch.ones(1), TypeError, "loc: list"),
        (LOC, torch.ones(4, dtype=torch.int64), TypeError, "concentration: torch.int64"),
        (LOC, torch.ones(4).double(), TypeError, "concentration: torch.float64 .* torch.float32"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(
    loc: Tensor, concentration: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        PowerSpherical(loc, concentration, validate_args=True)


@pytest.mark.parametrize(
    "p", [PowerSpherical(LOC, 2.0), HypersphericalUniform(3, (4,))], ids=["power", "uniform"]
)
def test_values_of_the_wrong_shape_or_length_are_refused(
    p: PowerSpherical | HypersphericalUniform,
) -> None:
    with pytest.raises(
        InputError, match=r"value: shape \(4, 1\) given, its last dimension must be D = 3"
    ):
        p.log_prob(torch.ones(4, 1))
    with pytest.raises(InputError, match=r"value: shape \(5, 3\).*batch shape \(4,\)"):
        p.log_prob(random_loc(5, 3, dtype=torch.float32))
    with pytest.raises(InputError, match="value: a vector of length 2"):
        p.log_prob(2 * LOC)
    with pytest.raises(TypeError, match=r"value: torch\.int64"):
        p.log_prob(torch.tensor([1, 0, 0]))
    assert p.support.check(torch.stack((LOC[0], 2 * LOC[0]))).tolist() == [True, False]


def test_value_checks_can_be_switched_off_but_shape_checks_cannot() -> None:
    p = PowerSpherical(2 * LOC, -torch.ones(4), validate_args=False)
    assert p.log_prob(3 * LOC).shape == (4,)
    with pytest.raises(InputError, match="it is not broadcast otherwise"):
        PowerSpherical(LOC, torch.ones(4, 1), validate_args=False)
    with pytest.raises(InputError, match="last dimension"):
        p.log_prob(torch.ones(4, 1))


def test_uniform_distribution() -> None:
    sphere = HypersphericalUniform(3, (2,), dtype=torch.float64)
    assert sphere.entropy().tolist() == pytest.approx([math.log(4 * math.pi)] * 2, rel=1e-15, abs=0)
    assert sphere.log_prob(random_loc(5, 1, 3)).shape == (5, 2)
    assert sphere.log_prob(random_loc(3)).tolist() == pytest.approx(
        [-math.log(4 * math.pi)] * 2, rel=1e-15, abs=0
    )
    x = sphere.sample((5000,))
    assert x.shape == (5000, 2, 3)
    assert ((x.norm(dim=-1) - 1).abs() < 1e-15).all()
    # Archimedes: each coordinate of a uniform point of the sphere in R^3 is uniform on [-1, 1].
    for axis in range(3):
        assert stats.kstest(x[:, 0, axis].numpy(), stats.uniform(-1, 2).cdf).pvalue > 1e-4
    with pytest.raises(InputError, match="dim: 1"):
        HypersphericalUniform(1)
    with pytest.raises(TypeError, match=r"torch\.int64"):
        HypersphericalUniform(3, dtype=torch.int64)
    with pytest.raises(InputError, match="dimensions 3 and 4"):
        kl_divergence(PowerSpherical(LOC, 1.0), HypersphericalUniform(4))


def test_a_normal_draw_of_zero_still_gives_a_unit_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributions.torch, "randn", torch.zeros)
    assert torch.equal(HypersphericalUniform(2).sample((3,)).norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(PowerSpherical(LOC, 1.0).sample().norm(dim=-1), torch.ones(4))


def test_distributions_can_be_copied_and_pickled() -> None:
    p = PowerSpherical(LOC, torch.tensor([0.0, 1.0, 10.0, 1e5]))
    u = HypersphericalUniform(3, (4,))
    for copied in (copy.deepcopy(p), pickle.loads(pickle.dumps(p))):
        assert torch.equal(copied.log_prob(LOC), p.log_prob(LOC))
        assert copied.loc.data_ptr() != p.loc.data_ptr()
    for copied in (copy.deepcopy(u), pickle.loads(pickle.dumps(u))):
        assert torch.equal(kl_divergence(p, copied), kl_divergence(p, u))
