"""The Power Spherical and the uniform distribution on the unit sphere, as torch.distributions.

Source: De Cao and Aziz, "The Power Spherical distribution" (2020, arXiv 2006.04437). For x on the
sphere in R^D, mean direction mu and concentration k (kappa), with b = (D - 1)/2, a = b + k and s =
a + b:

    PS(x; mu, k) proportional to (1 + mu.x)^k                                       eq. 8
    T = mu.x = 2 Z - 1 with Z ~ Beta(a, b)                                          theorem 1
    E[x] = (k/s) mu          Cov[x] = 2a / (s (s + 1)) (I - (k/s) mu mu^T)
    KL(PS || uniform) = log C(k) - log C(0) + k [log 2 + psi(a) - psi(s)]
    entropy = log area - KL

The moments follow from E[Z] = a/s, E[Z (1 - Z)] = ab / (s (s + 1)) and the symmetry around mu.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution, Gamma, constraints
from torch.distributions.kl import register_kl

from vi_simsiam.errors import InputError
from vi_simsiam.ops.power_spherical import (
    cosine_derivative,
    kl_to_uniform,
    log_density_ratio,
    log_uniform,
)


class UnitSphere(constraints.Constraint):
    """Vectors of unit length along the last dimension.

    The length may be off by 1e-6 in float64, 1e-5 in float32 and 4 eps in float16 and bfloat16:
    rounding, not a vector that was never normalised. float64 admits vectors that were normalised in
    float32.
    """

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        """Return (...) bool, True for each vector of (..., D) that is of unit length."""
        tolerance = (
            1e-6 if value.dtype == torch.float64 else max(1e-5, 4 * torch.finfo(value.dtype).eps)
        )
        valid: Tensor = (torch.linalg.vector_norm(widen(value), dim=-1) - 1).abs() <= tolerance
        return valid


unit_sphere = UnitSphere()


class HypersphericalUniform(Distribution):
    """The uniform distribution on the unit sphere in R^dim.

    Args:
        dim: D >= 2, the dimension of the space the sphere lies in.
        batch_shape: shape of a batch of identical distributions.
        dtype: dtype of the samples. `log_prob` and `entropy` are float32 for float16 and bfloat16.
        device: device of the samples.
        validate_args: whether `log_prob` checks that its argument lies on the sphere; torch's
            default.

    Raises:
        InputError: dim below 2.
        TypeError: a dtype that is not floating.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = unit_sphere

    def __init__(
        self,
        dim: int,
        batch_shape: Sequence[int] = (),
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if dim < 2:
            raise InputError(f"dim: {dim} given, must be at least 2")
        if not dtype.is_floating_point:
            raise TypeError(f"dtype: {dtype} given, must be a floating dtype")
        self.dim, self.dtype = dim, dtype
        self.device = torch.empty(0, device=device).device
        super().__init__(torch.Size(batch_shape), torch.Size((dim,)), validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> HypersphericalUniform:
        """The same distribution with its batch expanded to `batch_shape`."""
        new = copy.copy(self)
        # torch's own error where the batch cannot be expanded to this shape.
        whole = torch.empty(self.batch_shape, device="meta")
        new._batch_shape = whole.expand(torch.Size(batch_shape)).shape
        return new

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """(*sample_shape, *batch, D) unit vectors."""
        shape = self._extended_shape(torch.Size(sample_shape))
        return _random_direction(shape, wide(self.dtype), self.device).to(self.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Minus the log area of the sphere, in nats, for value (..., D) that broadcasts with the
        batch."""
        shape = _check_value(self, value)
        dtype = torch.promote_types(wide(self.dtype), value.dtype)
        return torch.full(shape, log_uniform(self.dim), dtype=dtype, device=value.device)

    def entropy(self) -> Tensor:
        """Log area of the sphere in nats, (*batch)."""
        return torch.full(
            self.batch_shape, -log_uniform(self.dim), dtype=wide(self.dtype), device=self.device
        )


class PowerSpherical(Distribution):
    """The Power Spherical distribution on the unit sphere in R^D, D >= 2.

    Args:
        loc: (*batch, D) unit vectors, the mean direction mu. Any floating dtype.
        concentration: (*batch), kappa >= 0 and finite, of loc's dtype and device; or one number or
            () tensor for the whole batch. Other shapes are not broadcast. 0 is the uniform
            distribution.
        validate_args: whether values are checked (which waits for the device); torch's default.
            Shapes, dtypes and devices always are.

    Samples and moments have loc's dtype. `log_prob`, `entropy` and the divergence are float32 for
    float16 and bfloat16 parameters, whose few digits do not hold them. Only the part of a gradient
    that is tangential to the sphere has a meaning: differentiate through the normalisation of `loc`
    and `value`.

    Raises:
        InputError: shapes or devices that do not fit, vectors that are not of unit length, a
            negative, infinite or NaN concentration.
        TypeError: an argument that is no floating tensor, or dtypes that differ.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "loc": unit_sphere,
        "concentration": constraints.nonnegative,
    }
    support = unit_sphere
    has_rsample = True

    def __init__(
        self, loc: Tensor, concentration: Tensor | float, validate_args: bool | None = None
    ) -> None:
        _check_floating("loc", loc)
        if not isinstance(concentration, Tensor):
            concentration = loc.new_tensor(float(concentration))
        _check_parameters(loc, concentration)
        batch_shape = loc.shape[:-1]
        self.loc, self.concentration = loc, concentration.expand(batch_shape)
        # The base class would check the same again, with a message that names no remedy.
        super().__init__(batch_shape, loc.shape[-1:], validate_args=False)
        self._validate_args = type(self)._validate_args if validate_args is None else validate_args
        if self._validate_args:
            _check_unit("loc", loc)
            valid = torch.isfinite(concentration) & (concentration >= 0)
            if not bool(valid.all()):
                bad = concentration.detach()[~valid].flatten()[0].item()
                raise InputError(f"concentration: holds {bad}, must be finite and at least 0")

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> PowerSpherical:
        """The same distribution with its batch expanded to `batch_shape`; the parameters are not
        copied."""
        new = copy.copy(self)
        new.loc = self.loc.expand(*batch_shape, self.dim)
        new._batch_shape = new.loc.shape[:-1]
        new.concentration = self.concentration.expand(new._batch_shape)
        return new

    @property
    def dim(self) -> int:
        """D, the dimension of the space the sphere lies in."""
        return self.event_shape[0]

    @property
    def mean(self) -> Tensor:
        """E[x] = kappa / (kappa + D - 1) loc, (*batch, D); shorter than 1."""
        k = widen(self.concentration).unsqueeze(-1)
        return (k / (k + (self.dim - 1)) * widen(self.loc)).to(self.loc.dtype)

    @property
    def mode(self) -> Tensor:
        """loc, (*batch, D); at concentration 0, where the density is constant, one mode of many."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """Variance of each coordinate, the diagonal of Cov[x], (*batch, D); it sums to 1 -
        |E[x]|^2."""
        k, loc = widen(self.concentration).unsqueeze(-1), widen(self.loc)
        b = (self.dim - 1) / 2
        a, s = b + k, 2 * b + k
        # 1 - (k/s) loc^2, without the cancellation at loc = +-e_i.
        deficit = (1 - loc) * (1 + loc) + 2 * b / s * loc.square()
        return (2 * a / s / (s + 1) * deficit).to(self.loc.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density with respect to the surface measure of the sphere, in nats.

        Args:
            value: (..., D) unit vectors; the leading dimensions broadcast with the batch shape.

        Returns:
            The log-density, of the broadcast shape. 1 + cos is clamped from below at 1e-6.

        The cosine is taken as sign(c) (1 - |value - sign(c) loc|^2 / 2): the rounding of the two
        lengths enters it in second order only, where the rounded dot product would cost kappa/(1 +
        c) times 1e-7 in float32.
        """
        _check_value(self, value)
        dtype = torch.promote_types(wide(self.loc.dtype), value.dtype)
        loc, k, value = self.loc.to(dtype), self.concentration.to(dtype), value.to(dtype)
        with torch.no_grad():
            sign = torch.where((value * loc).sum(-1) < 0, -1.0, 1.0).to(dtype)
        half_square = (value - sign.unsqueeze(-1) * loc).square().sum(-1) / 2
        cosine = sign * (1 - half_square)
        # What rounding to a cosine near 1 dropped, exactly; put back to first order.
        dropped = (sign * ((1 - sign * cosine) - half_square)).detach()
        ratio = log_density_ratio(k, cosine, self.dim) + cosine_derivative(k, cosine) * dropped
        return ratio + log_uniform(self.dim)

    def entropy(self) -> Tensor:
        """Differential entropy in nats, (*batch): log area minus KL(self || uniform)."""
        return -log_uniform(self.dim) - kl_to_uniform(widen(self.concentration), self.dim)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Samples (*sample_shape, *batch, D), differentiable in loc and concentration (once).

        x = T mu + sqrt(1 - T^2) w, algorithm 1 of the paper. T = 2 Z - 1 with Z = G / (G + G'), G ~
        Gamma(a) and G' ~ Gamma(b): both Z and 1 - Z keep their digits, so sqrt(1 - T^2) = 2 sqrt(Z
        (1 - Z)) does at any kappa. w is uniform among the directions orthogonal to mu: a direction
        v of R^(D-1), reflected by the Householder transform that maps e1 to -sign(mu_1) mu. That
        choice of sign never divides by less than 1 + |mu_1|.
        """
        shape = self._extended_shape(torch.Size(sample_shape))
        loc, k = widen(self.loc).expand(shape), widen(self.concentration).expand(shape[:-1])
        b = torch.full_like(k, (self.dim - 1) / 2, requires_grad=False)
        rate = torch.ones_like(b)
        upper = Gamma(b + k, rate, validate_args=False).rsample().unsqueeze(-1)
        lower = Gamma(b, rate, validate_args=False).sample().unsqueeze(-1)
        total = upper + lower
        direction = _random_direction((*shape[:-1], self.dim - 1), loc.dtype, loc.device)
        first, rest = loc[..., :1], loc[..., 1:]
        sign = torch.where(first < 0, -1.0, 1.0).to(loc.dtype)
        along = (rest * direction).sum(-1, keepdim=True)
        tangent = torch.cat(
            (-sign * along, direction - rest * (along / (1 + sign * first))), dim=-1
        )
        sample = (upper - lower) / total * loc + 2 * upper.sqrt() * lower.sqrt() / total * tangent
        return sample.to(self.loc.dtype)


@register_kl(PowerSpherical, HypersphericalUniform)  # type: ignore[no-untyped-call]
def _kl_power_spherical_uniform(p: PowerSpherical, q: HypersphericalUniform) -> Tensor:
    if p.dim != q.dim:
        raise InputError(f"kl_divergence: dimensions {p.dim} and {q.dim} given, must be equal")
    shape = _broadcast_shape(p.batch_shape, q.batch_shape)
    return kl_to_uniform(widen(p.concentration), p.dim).expand(shape)


def _random_direction(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uniform unit vectors along the last dimension."""
    normal = torch.randn(tuple(shape), dtype=dtype, device=device)
    # In one dimension a float32 normal is exactly 0 once in some ten million draws.
    normal[..., 0].masked_fill_((normal == 0).all(-1), 1.0)
    length: Tensor = torch.linalg.vector_norm(normal, dim=-1, keepdim=True)
    return normal / length


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float32 for the half precisions."""
    return torch.promote_types(dtype, torch.float32)


def widen(x: Tensor) -> Tensor:
    """A tensor in the dtype to compute in."""
    return x.to(wide(x.dtype))


def _broadcast_shape(first: torch.Size, second: torch.Size) -> torch.Size:
    return torch.Size(torch.broadcast_shapes(first, second))  # type: ignore[no-untyped-call]


def _check_floating(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        given = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name}: {given} given, must be a tensor of a floating dtype")


def _check_parameters(loc: Tensor, concentration: Tensor) -> None:
    _check_floating("concentration", concentration)
    if concentration.dtype != loc.dtype:
        raise TypeError(f"concentration: {concentration.dtype} given, must be loc's {loc.dtype}")
    if concentration.device != loc.device:
        raise InputError(
            f"concentration: lies on {concentration.device}, must lie on loc's {loc.device}"
        )
    if loc.dim() < 1 or loc.shape[-1] < 2:
        raise InputError(f"loc: shape {tuple(loc.shape)} given, must be (*batch, D) with D >= 2")
    if concentration.shape not in (torch.Size(), loc.shape[:-1]):
        raise InputError(
            f"concentration: shape {tuple(concentration.shape)} given for loc of shape "
            f"{tuple(loc.shape)}, must be loc's batch shape {tuple(loc.shape[:-1])}, or () for the "
            "whole batch; it is not broadcast otherwise"
        )


def _check_unit(name: str, x: Tensor) -> None:
    valid = unit_sphere.check(x)
    if not bool(valid.all()):
        length = torch.linalg.vector_norm(widen(x.detach()), dim=-1)[~valid].flatten()[0].item()
        raise InputError(
            f"{name}: a vector of length {length:.9g} given, must be of length 1 within rounding "
            f"of {x.dtype}; normalise it with torch.nn.functional.normalize({name}, dim=-1)"
        )


def _check_value(distribution: PowerSpherical | HypersphericalUniform, value: Tensor) -> torch.Size:
    """The shape of log_prob(value)."""
    _check_floating("value", value)
    if value.dim() < 1 or value.shape[-1] != distribution.dim:
        raise InputError(
            f"value: shape {tuple(value.shape)} given, "
            f"its last dimension must be D = {distribution.dim}"
        )
    try:
        shape = _broadcast_shape(value.shape[:-1], distribution.batch_shape)
    except RuntimeError:
        raise InputError(
            f"value: shape {tuple(value.shape)} given, its leading dimensions must broadcast with "
            f"the batch shape {tuple(distribution.batch_shape)}"
        ) from None
    if distribution._validate_args:
        _check_unit("value", value)
    return shape
