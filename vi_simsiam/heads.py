"""The projector, and the last layers of a predictor, which give column D of a prediction, the raw
concentration.

VI-SimSiam predicts it for every sample. The other kinds are controls, which differ in this column
only: kappa = concentration_scale link(gain raw) + concentration_min, the loss and the figures are
the same for all. Where no gradient of the mean direction depends on the column, the mean direction
has a linear layer of its own, initialised as SimSiam's last layer: with one seed such a model
starts from SimSiam's weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vi_simsiam.checks import require
from vi_simsiam.config import Concentration, Link, Projector
from vi_simsiam.distributions import wide, widen
from vi_simsiam.errors import InputError
from vi_simsiam.normalisation import Head, PerViewBatchNorm1d
from vi_simsiam.ops.multiview_loss import LEAST_ROOT, LossForm, softplus
from vi_simsiam.ops.multiview_loss_fused import padded_width

# kappa/(D - 1) at the start, near its optimum for the cosines of an untrained network. From
# softplus(0) = 0.69 the first steps would move the raw concentration so far down that its gradient
# vanishes for an epoch.
_INITIAL_CONCENTRATION = 0.05
# Features of any scale get variance 1.
_LEAST_VARIANCE = 1e-16


def new_projector(kind: Projector, features: int, hidden: int, dim: int) -> Head:
    """A projector from features (B, F) to projections (B, D).

    Args:
        kind: as `ModelConfig.projector`.
        features: F.
        hidden: width of the hidden layers of SimSiam's projector.
        dim: D.

    Raises:
        InputError: standardised features of another width than D.
    """
    if kind == "standardised":
        require("dim", dim, dim == features, f"{features}, the width of the features")
        return Head(PerViewBatchNorm1d(dim, affine=False, eps=_LEAST_VARIANCE))
    return Head(
        nn.Linear(features, hidden, bias=False),
        PerViewBatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, hidden, bias=False),
        PerViewBatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, dim, bias=False),
        PerViewBatchNorm1d(dim, affine=False),
    )


def concentration_head(
    kind: Concentration,
    dim: int,
    form: LossForm,
    *,
    start: bool = True,
    maximum: float | None = None,
    value: float | None = None,
) -> Callable[[int], list[nn.Module]]:
    """Returns what builds the last layers of a predictor from H, the width of its hidden layer.

    They map hidden features (..., H) to predictions (..., W). Predictors share a constant or global
    concentration.

    Args:
        kind: as `LossConfig.concentration`.
        dim: D.
        form: maps the raw concentration to kappa.
        start: begin with kappa/(D - 1) of about 0.05, for a form of scale D - 1.
        maximum: concentration_max; None for no bound.
        value: kappa/(D - 1) of kind "constant".

    Raises:
        InputError: the constant or the bound is not above the least kappa.
    """
    initial = inverse_link(_INITIAL_CONCENTRATION, form.link) / form.gain if start else 0.0

    def raw(kappa: float) -> float:
        return inverse_link((kappa - form.minimum) / form.scale, form.link) / form.gain

    shared: nn.Module | None = None
    if kind == "constant":
        if value is None or (dim - 1) * value <= form.minimum:
            raise InputError(
                f"concentration_value: {value} is not accepted; {dim - 1} times it must be above "
                f"concentration_min, {form.minimum}"
            )
        shared = _Constant(raw((dim - 1) * value))
    elif kind == "global":
        shared = _Global(initial * form.gain, form.gain)
    bound: list[nn.Module] = []
    if maximum is not None:
        quadratic = form.link == "quadratic"
        least = form.minimum + quadratic * form.scale * LEAST_ROOT * (1 + LEAST_ROOT / 2)
        if maximum <= least:
            raise InputError(
                f"concentration_max: {maximum} is not accepted; it must be above {least:.4g}, the "
                f"least kappa with concentration_min {form.minimum} and the link {form.link}"
            )
        bound = [UpperBound(dim, raw(maximum))]

    def build(hidden: int) -> list[nn.Module]:
        last: nn.Module
        if shared is not None:
            last = SplitHead(hidden, dim, shared)
        elif kind == "detached":
            # Without a random number, so that the layers made after it are SimSiam's; it learns
            # from zero as well.
            concentration = nn.utils.skip_init(nn.Linear, hidden, 1)
            nn.init.zeros_(concentration.weight)
            nn.init.constant_(concentration.bias, initial)
            last = SplitHead(hidden, dim, concentration)
        else:
            last = padded_linear(hidden, dim + 1)
            if start:
                with torch.no_grad():
                    last.bias[dim] = initial
        return [last, *bound]

    return build


class SplitHead(nn.Module):
    """A linear layer like SimSiam's for the mean direction, and a module for the raw concentration.

    Args:
        hidden: H.
        dim: D.
        concentration: maps (..., H), detached, to (..., 1).
    """

    def __init__(self, hidden: int, dim: int, concentration: nn.Module) -> None:
        super().__init__()
        self.dim = dim
        self.mean = padded_linear(hidden, dim)
        self.concentration = concentration

    def forward(self, hidden: Tensor) -> Tensor:
        """Predictions (..., W) of hidden features (..., H), in the wider dtype of the two parts."""
        mean, raw = self.mean(hidden)[..., : self.dim], self.concentration(hidden.detach())
        columns = self.dim + 1
        return F.pad(torch.cat((mean, raw), dim=-1), (0, padded_width(columns) - columns))


class _Constant(nn.Module):
    """A fixed number for every sample, in at least float32: bfloat16 would be off by 0.4 %."""

    def __init__(self, raw: float) -> None:
        super().__init__()
        self.raw = raw

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.new_full((*hidden.shape[:-1], 1), self.raw, dtype=wide(hidden.dtype))


class _Global(nn.Module):
    """One parameter for all samples, gain times their raw concentration."""

    def __init__(self, raw: float, gain: float) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.tensor(raw))
        self.gain = gain

    def forward(self, hidden: Tensor) -> Tensor:
        return (self.raw / self.gain).expand(*hidden.shape[:-1], 1)


class UpperBound(nn.Module):
    """A smooth upper bound of column D: raw becomes raw_max - softplus(raw_max - raw).

    Far below the bound that is raw itself, and at any raw the gradient is positive.

    Args:
        dim: D.
        maximum: raw_max, the column's upper bound.
    """

    def __init__(self, dim: int, maximum: float) -> None:
        super().__init__()
        self.dim, self.maximum = dim, maximum

    def forward(self, prediction: Tensor) -> Tensor:
        """The same predictions (..., W) with column D bounded."""
        mean, raw, rest = prediction.tensor_split((self.dim, self.dim + 1), dim=-1)
        bounded = self.maximum - softplus(self.maximum - widen(raw))
        return torch.cat((mean, bounded, rest), dim=-1)


def inverse_link(y: float, link: Link) -> float:
    """The x that the link maps to y > 0; for "quadratic" at least that of its bound."""
    if link == "softplus":  # without overflow for large y and exact for small y
        return y + math.log(-math.expm1(-y))
    return 2 * y / (math.sqrt(1 + 2 * y) + 1)


def padded_linear(in_features: int, out_features: int) -> nn.Linear:
    """A linear layer with columns of zeros after its `out_features`, up to an aligned row width.

    Kernels load such rows 16 bytes at a time, and the product stays on the tensor cores. The
    columns are part of the result, since autograd would copy the gradient of a slice; the losses
    skip them, and they stay zero.
    """
    linear = nn.Linear(in_features, padded_width(out_features))
    with torch.no_grad():
        linear.weight[out_features:].zero_()
        linear.bias[out_features:].zero_()
    return linear
