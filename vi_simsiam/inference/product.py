"""The product of several Power Spherical distributions, which joins the views of an image."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vi_simsiam.errors import InputError

_FIXED_POINT_STEPS = 20
_MOST_STEPS = 100
_HALVINGS = 50
_TOLERANCE = 1e-10
_CANCELLED = 1e-12
_NEAR = 1 / 16


def product_of_experts(loc: Tensor, concentration: Tensor) -> tuple[Tensor, Tensor]:
    """The Power Spherical distribution with (nearly) the mean of a product of several.

    The posterior of several views is a product of experts (Nakamura et al., arXiv 2203.11437,
    eq. 6 and 10): the density proportional to prod_i PS(z; mu_i, kappa_i), that is to
    prod_i (1 + mu_i.z)^kappa_i. It is Power Spherical itself only where all directions agree (the
    concentrations add); otherwise this is its mean-field approximation in many dimensions.

    Write z = t m + sqrt(1 - t^2) u with a unit vector m and u uniform among the directions
    orthogonal to m, of which each has a component of order 1/sqrt(D) only along mu_i. So mu_i.z is
    about t c_i with c_i = m.mu_i, and the log-density of t is
    sum_i kappa_i log(1 + t c_i) + (D - 3)/2 log(1 - t^2). With y = t m in the unit ball, the
    estimate of E[z] is the maximum of

        sum_i kappa_i log(1 + mu_i.y) + (D - 1)/2 log(1 - |y|^2)

    which is concave, so there is one. D - 1 in place of D - 3 makes the mean of t of its mode,
    exactly so for directions that agree and for two that are opposite. Setting the gradient to 0,
    with w_i = kappa_i / (1 + t c_i),

        m proportional to sum_i w_i mu_i,  kappa = (1 + t) sum_i w_i c_i,  t = kappa/(kappa + D - 1)

    and the result is PS(m, kappa), whose mean is y.

    Against importance sampling of the true product (2 to 8 experts, kappa_i/(D - 1) from 0.05 to
    20, directions from close together to independent) kappa is off by at most 11 % for D = 16,
    1.9 % for D = 64 and 0.3 % for D = 512, and the direction by 0.6, 0.3 and 0.1 degrees.

    Two experts, integrated by quadrature (cosine from -0.4 to 0.9, kappa_i/(D - 1) from 0.1 to 15,
    D of 16, 64 and 512): errors of at most 0.1/D in mean length and 2/D degrees.

    A product assumes independent experts. Views of one image are not: M views multiply kappa by
    about M, and the result is comparable among images seen through the same number of views, not
    with that of one view.

    Args:
        loc: (N, V, D) unit vectors mu_i, D >= 2, float32 or float64.
        concentration: (N, V), kappa_i >= 0.

    Returns:
        loc (N, D) of unit length and concentration (N,), in the dtype of `loc`. One expert is
        returned as it is. Where the experts cancel (all kappa_i = 0, or equally certain opposite
        directions), the concentration is 0 and loc is the direction of the most certain expert.

    Raises:
        InputError: shapes that do not fit, or a concentration that is negative or not finite.
    """
    sizes = loc.shape
    if len(sizes) != 3 or sizes[1] < 1 or sizes[2] < 2 or concentration.shape != sizes[:2]:
        raise InputError(
            f"loc, concentration: shapes {tuple(sizes)}, {tuple(concentration.shape)} given; "
            "accepted are (N, V, D) and (N, V) with V >= 1 and D >= 2"
        )
    if not bool((torch.isfinite(concentration) & (concentration >= 0)).all()):
        raise InputError(
            "concentration: a negative or non-finite value given; accepted are numbers of at "
            "least 0"
        )
    if loc.shape[1] == 1:
        return loc[:, 0], concentration[:, 0]
    mu, kappa = loc.double(), concentration.double()
    gram = mu @ mu.mT
    y = _solve(gram, kappa, loc.shape[2] - 1)
    weights = kappa / (1 + _times(gram, y))
    total = (weights.unsqueeze(-1) * mu).sum(1)
    length = torch.linalg.vector_norm(total, dim=-1)
    t = (y * _times(gram, y)).sum(-1).clamp(min=0).sqrt()
    cancelled = length <= _CANCELLED * weights.sum(-1)
    first = mu[torch.arange(len(mu), device=mu.device), kappa.argmax(-1)]
    direction = torch.where(cancelled.unsqueeze(-1), first, F.normalize(total, dim=-1))
    return direction.to(loc.dtype), torch.where(cancelled, 0.0, (1 + t) * length).to(loc.dtype)


def _solve(gram: Tensor, kappa: Tensor, scale: int) -> Tensor:
    """Coefficients a (N, V) of the maximum y = sum_i a_i mu_i, by Newton's method."""
    # With s = G a, q = |y|^2 = a.s and w = kappa/(1 + s), the root of scale a/(1 - q) - w, whose
    # Jacobian scale/(1 - q) I + (2 scale/(1 - q)^2 a a^T + diag(w/(1 + s))) G is invertible also
    # where G is singular. Two to ten steps are enough, except where huge concentrations contradict
    # each other in few dimensions (D <= 16, kappa > 100 (D - 1)).
    total = kappa.sum(-1, keepdim=True)
    a: Tensor = _start(gram, kappa, scale)
    identity = torch.eye(kappa.shape[1], dtype=kappa.dtype, device=kappa.device)
    for _ in range(_MOST_STEPS):
        s = _times(gram, a)
        room = (1 - (a * s).sum(-1, keepdim=True)).unsqueeze(-1)
        w = kappa / (1 + s)
        residual = scale / room.squeeze(-1) * a - w
        outer = a.unsqueeze(-1) * a.unsqueeze(-2)
        curvature = 2 * scale / room.square() * outer + torch.diag_embed(w / (1 + s))
        step = -torch.linalg.solve(scale / room * identity + curvature @ gram, residual)
        # The square of Newton's decrement, in units of the objective.
        decrement = -(step * _times(gram, residual)).sum(-1)
        if bool((decrement <= _TOLERANCE**2 * (scale + total.squeeze(-1))).all()):
            break
        a = _line_search(gram, kappa, scale, a, step, decrement)
    return a


def _start(gram: Tensor, kappa: Tensor, scale: int) -> Tensor:
    """Coefficients near the maximum: those for agreeing or opposite experts, or a fixed point."""
    # The fixed point takes the weights w as given, which leaves r = |sum_i w_i mu_i| =
    # scale t/(1 - t^2). Without it Newton's method is slow where the maximum is near the sphere.
    agreeing = kappa / (kappa.sum(-1, keepdim=True) + scale)
    a = agreeing
    for _ in range(_FIXED_POINT_STEPS):
        w = kappa / (1 + _times(gram, a))
        r = (w * _times(gram, w)).sum(-1, keepdim=True).clamp(min=0).sqrt()
        a = 2 * w / (scale + torch.hypot(torch.full_like(r, scale), 2 * r))
    better = _objective(gram, kappa, scale, a) > _objective(gram, kappa, scale, agreeing)
    return torch.where(better.unsqueeze(-1), a, agreeing)


def _line_search(
    gram: Tensor, kappa: Tensor, scale: int, a: Tensor, step: Tensor, decrement: Tensor
) -> Tensor:
    """The longest of the steps 1, 1/2, 1/4, ... that stays in the ball and raises the objective."""
    # Near the maximum the full step does both (the objective is self-concordant), and rounding
    # would hide it.
    before = _objective(gram, kappa, scale, a)
    length = torch.ones_like(before)
    for _ in range(_HALVINGS):
        after = _objective(gram, kappa, scale, a + length.unsqueeze(-1) * step)
        enough = (decrement < _NEAR) | (after >= before + 0.1 * length * decrement)
        if bool(enough.all()):
            break
        length = torch.where(enough, length, length / 2)
    return a + length.unsqueeze(-1) * step


def _objective(gram: Tensor, kappa: Tensor, scale: int, a: Tensor) -> Tensor:
    """sum_i kappa_i log(1 + mu_i.y) + scale/2 log(1 - |y|^2), (N,); -inf outside the ball."""
    s = _times(gram, a)
    q = (a * s).sum(-1)
    inside = (q < 1) & (s > -1).all(-1)
    value = torch.xlogy(kappa, 1 + s).sum(-1) + scale / 2 * torch.log1p(-q)
    return torch.where(inside, value, -torch.inf)


def _times(gram: Tensor, a: Tensor) -> Tensor:
    product: Tensor = gram @ a.unsqueeze(-1)
    return product.squeeze(-1)
