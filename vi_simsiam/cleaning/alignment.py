"""Correlation of two thumbnails, once they are aligned: either may be a crop of the other."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

_SHARE = 0.85  # of each side, the crops from which the search starts
_ALIKE = 0.7  # correlation of brightness from which pairs are aligned
_CLOSE = 0.6  # correlation of details from which they are aligned at full size, too
_LEAST, _FARTHEST = 0.7, 0.45  # bounds of scale and shift
_DAMPING = 1e-3
_LONGEST = 0.15  # step of a scale or shift


def aligned_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Correlate the details of thumbnails whose rows and columns are scaled and shifted to fit.

    The scales and shifts of least squares are found from coarse to fine by Gauss-Newton steps, with
    a gain and an offset of brightness (Lucas and Kanade, "An iterative image registration
    technique", 1981; Baker and Matthews, "Lucas-Kanade 20 years on", 2004). They start from the
    best of the whole image and of crops of 85 % of the sides, either way. Scales lie between 0.7
    and its inverse. Details are differences of neighbouring pixels where both images overlap, at
    half the thumbnails' size, which levels out how sharp they are.

    Args:
        first: (P, S, S) float32 thumbnails, each stretched to a square; S is a multiple of 4.
        second: (P, S, S) those to align with them.

    Returns:
        (P,) correlations.
    """
    starts = _starts().to(first.device)
    warped, inside = _warp(_shrunk(second, 4)[:, None], starts)
    brightness = _correlation(
        _shrunk(first, 4)[:, None].flatten(-2), warped.flatten(-2), inside.flatten(-2)
    )
    alike, best = brightness.max(1)
    fit = starts[best]
    found = _details_correlation(first, second, fit)
    rows = (alike >= _ALIKE).nonzero()[:, 0]
    for stages in (((4, 4), (2, 6)), ((1, 3),)):
        one, other, near = first[rows], second[rows], fit[rows]
        for shrink, steps in stages:
            near = _refined(one, other, near, shrink, steps)
        fit[rows], found[rows] = near, _details_correlation(one, other, near)
        rows = rows[found[rows] >= _CLOSE]
    return found


def _starts() -> Tensor:
    """Scale and shift of columns, and of rows, (19, 4).

    Place x of the first image, from -1 to 1, shows place scale x + shift of the second.
    """
    found = [(1.0, 0.0, 1.0, 0.0)]
    for right, down in itertools.product((-1, 0, 1), repeat=2):
        for scale in (_SHARE, 1 / _SHARE):
            found.append((scale, right * (1 - scale), scale, down * (1 - scale)))
    return torch.tensor(found)


def _refined(first: Tensor, second: Tensor, fit: Tensor, shrink: int, steps: int) -> Tensor:
    """Improve scales and shifts (P, 4) at a smaller size."""
    first, second = _shrunk(first, shrink), _shrunk(second, shrink)
    side = first.shape[-1]
    places = _places(first)
    most = fit.new_tensor([1 / _LEAST, _FARTHEST] * 2)
    least = fit.new_tensor([_LEAST, -_FARTHEST] * 2)
    for _ in range(steps):
        warped, inside = _warp(second, fit)
        slope_x = F.pad(warped[:, :, 2:] - warped[:, :, :-2], (1, 1)) * (side / 4)
        slope_y = F.pad(warped[:, 2:] - warped[:, :-2], (0, 0, 1, 1)) * (side / 4)
        columns = [
            slope_x * places,
            slope_x,
            slope_y * places[:, None],
            slope_y,
            warped,
            torch.ones_like(warped),
        ]
        jacobian = torch.stack(columns, -1).flatten(1, 2)
        inner = F.pad(inside[:, 1:-1, 1:-1], (1, 1, 1, 1))  # slopes at the edge are one-sided
        weighted = (jacobian * inner.flatten(1)[..., None]).mT
        square = weighted @ jacobian
        unit = square.diagonal(dim1=1, dim2=2).clamp_min(1e-6).rsqrt()  # 0 for stripes
        square = square * unit[:, :, None] * unit[:, None]
        square.diagonal(dim1=1, dim2=2).add_(_DAMPING)
        right = weighted @ first.flatten(1)[..., None] * unit[..., None]
        solved = torch.linalg.solve(square, right)[..., 0] * unit
        gain = solved[:, 4:5].clamp_min(0.2)
        step = solved[:, :4] / gain * fit[:, [0, 0, 2, 2]]
        fit = (fit + step.clamp(-_LONGEST, _LONGEST)).clamp(least, most)
    return fit


def _details_correlation(first: Tensor, second: Tensor, fit: Tensor) -> Tensor:
    warped, inside = _warp(second, fit)
    images = torch.stack([_shrunk(first, 2), _shrunk(warped, 2)])
    kept = _shrunk(inside, 2).floor()  # pixels that lie inside as a whole
    steps = [images.diff(dim=axis).flatten(-2) for axis in (-2, -1)]
    both = [
        (kept[:, 1:] * kept[:, :-1]).flatten(-2),
        (kept[:, :, 1:] * kept[:, :, :-1]).flatten(-2),
    ]
    details = torch.cat(steps, -1)
    return _correlation(details[0], details[1], torch.cat(both, -1))


def _correlation(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """Correlation of (..., n) values with weights of 0 or 1; 0 where either is constant."""
    count = weights.sum(-1, keepdim=True).clamp_min(1)
    a = (a - (a * weights).sum(-1, keepdim=True) / count) * weights
    b = (b - (b * weights).sum(-1, keepdim=True) / count) * weights
    return (F.normalize(a, dim=-1) * F.normalize(b, dim=-1)).sum(-1)


def _warp(images: Tensor, fit: Tensor) -> tuple[Tensor, Tensor]:
    """Images (..., S, S) at the places of `fit` (..., 4); and 1 inside of them, 0 outside."""
    side = images.shape[-1]
    pixels = torch.arange(side, device=images.device)
    weights, inside = [], []
    for scale, shift in ((fit[..., 0], fit[..., 1]), (fit[..., 2], fit[..., 3])):
        at = ((scale[..., None] * _places(images) + shift[..., None] + 1) * side - 1) / 2
        inside.append((at >= -0.5) & (at <= side - 0.5))
        distance = (at.clamp(0, side - 1)[..., None] - pixels).abs()
        weights.append((1 - distance).clamp_min(0))  # linear interpolation
    columns, rows = weights
    known = inside[1][..., :, None] & inside[0][..., None, :]
    return rows @ images @ columns.mT, known.to(images.dtype)


def _places(images: Tensor) -> Tensor:
    """The centres of the pixels of a side, from -1 at one edge to 1 at the other, (S,)."""
    side = images.shape[-1]
    return (torch.arange(side, device=images.device) + 0.5) * (2 / side) - 1


def _shrunk(images: Tensor, factor: int) -> Tensor:
    """Means of squares of `factor` pixels a side."""
    side = images.shape[-1] // factor
    squares = images.unflatten(-1, (side, factor)).unflatten(-3, (side, factor))
    means: Tensor = squares.mean((-3, -1))
    return means
