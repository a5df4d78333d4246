"""The last layers of a predictor, which give column D of a prediction, the raw concentration.

VI-SimSiam predicts it for every sample. The other kinds are controls, which differ in this column
only: kappa = concentration_scale link(gain raw) + concentration_min, the loss and the figures are
the same for all. Where no gradient of the mean direction depends on the column, the mean direction
has a linear layer of its own, initialised as SimSiam's last layer: with one seed such a model
starts from SimSiam's weights.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vi_simsiam.config import Concentration, Link
from vi_simsiam.distributions import wide, widen
from vi_simsiam.errors import InputError
from vi_simsiam.ops.multiview_loss import LEAST_ROOT, softplus
from vi_simsiam.ops.multiview_loss_fused import padded_width

# kappa/(D - 1) at the start, near its optimum for the cosines of an untrained network. From
# softplus(0) = 0.69 the first steps would move the raw concentration so far down that its gradient
# vanishes for an epoch.
_INITIAL_CONCENTRATION = 0.05


class ConcentrationHead:
    """Builds the last layers of a predictor, from hidden features (..., H) to predictions (..., W).

    Args:
        kind: as `LossConfig.concentration`.
        dim: D.
        scale: concentration_scale; None for D - 1.
        minimum: concentration_min.
        maximum: concentration_max; None for no bound.
        link: maps the raw concentration to kappa.
        gain: with the link "quadratic" the column is multiplied by gain / sqrt(H). Of H features
            after BatchNorm and ReLU two samples share H/6 of a squared length of H/2, so that a
            step of SGD moves the column H/6 times as far as a parameter, and with momentum kappa
            oscillates about its best value. With a gain of 4 the raw concentration moves 16/6 times
            as far; with 2 it is as steady, but separates samples so slowly that kappa is less well
            calibrated after a short training.
        hidden: H.
        value: kappa/(D - 1) of kind "constant".
        frozen: fit the column to a network that stays as it is, by a layer of its own.

    Raises:
        InputError: the constant or the bound is not above the minimum, or the bound not above the
            link's least value.
    """

    def __init__(
        self,
        kind: Concentration,
        dim: int,
        *,
        scale: float | None = None,
        minimum: float = 0.0,
        maximum: float | None = None,
        link: Link = "quadratic",
        gain: float = 4.0,
        hidden: int = 512,
        value: float | None = None,
        frozen: bool = False,
    ) -> None:
        self.kind, self.dim = kind, dim
        self.scale = float(dim - 1) if scale is None else scale
        # A constant needs no gradient, but may be small.
        self.link: Link = "softplus" if kind == "constant" else link
        self.gain = gain / math.sqrt(hidden) if self.link == "quadratic" else 1.0
        self.initial = self._inverse(_INITIAL_CONCENTRATION) / self.gain if scale is None else None
        self._apart = frozen or kind == "detached"
        self._shared: nn.Module | None = None
        if kind == "constant":
            if value is None:
                raise InputError("concentration_value: None is not accepted; constant needs it")
            kappa = (dim - 1) * value
            if kappa <= minimum:
                raise InputError(
                    f"concentration_value: {value} is not accepted; {dim - 1} times it must be "
                    f"above concentration_min, {minimum}"
                )
            self._shared = _Constant(self._raw(kappa - minimum))
        elif kind == "global":
            self._shared = _Global((self.initial or 0.0) * self.gain, self.gain)
        self._bound: UpperBound | None = None
        if maximum is not None:
            if maximum <= minimum:
                raise InputError(
                    f"concentration_max: {maximum} is not accepted; it must be above "
                    f"concentration_min, {minimum}"
                )
            least = minimum + self.scale * LEAST_ROOT * (1 + LEAST_ROOT / 2)
            if self.link == "quadratic" and maximum <= least:
                raise InputError(
                    f"concentration_max: {maximum} is not accepted; the link quadratic has kappa "
                    f"from {least:.4g} on"
                )
            self._bound = UpperBound(dim, self._raw(maximum - minimum))

    def __call__(self, hidden: int) -> list[nn.Module]:
        """The layers of one predictor; predictors share a constant or global concentration."""
        last: nn.Module
        if self._shared is not None:
            last = SplitHead(hidden, self.dim, self._shared)
        elif self._apart:
            mean = padded_linear(hidden, self.dim)
            # Without a random number, so that the layers made after it are SimSiam's; it learns
            # from zero as well.
            concentration = nn.utils.skip_init(nn.Linear, hidden, 1)
            nn.init.zeros_(concentration.weight)
            nn.init.constant_(concentration.bias, self.initial or 0.0)
            last = SplitHead(hidden, self.dim, concentration, mean)
        else:
            last = padded_linear(hidden, self.dim + 1)
            if self.initial is not None:
                with torch.no_grad():
                    last.bias[self.dim] = self.initial
        return [last] if self._bound is None else [last, self._bound]

    def _raw(self, kappa: float) -> float:
        """The raw concentration whose link is kappa / scale."""
        return self._inverse(kappa / self.scale) / self.gain

    def _inverse(self, y: float) -> float:
        return inverse_softplus(y) if self.link == "softplus" else inverse_quadratic(y)


class SplitHead(nn.Module):
    """A linear layer like SimSiam's for the mean direction, and a module for the raw concentration.

    Args:
        hidden: H.
        dim: D.
        concentration: maps (..., H), detached, to (..., 1).
        mean: the linear layer (H, at least D columns); None for a new one.
    """

    def __init__(
        self, hidden: int, dim: int, concentration: nn.Module, mean: nn.Linear | None = None
    ) -> None:
        super().__init__()
        self.dim = dim
        self.mean = padded_linear(hidden, dim) if mean is None else mean
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


def shuffled(prediction: Tensor, dim: int) -> Tensor:
    """Predictions (B, W) in which each sample has the raw concentration of the one B // 2 before.

    The fixed shift can be replayed by a CUDA graph and repeated by a resumed run. The order of the
    samples in a batch is random.
    """
    raw = prediction[:, dim:].roll(len(prediction) // 2, 0)
    return torch.cat((prediction[:, :dim], raw), dim=1)


def direction_detached(prediction: Tensor, dim: int) -> Tensor:
    """Predictions (B, W) whose mean direction takes no gradient."""
    return torch.cat((prediction[:, :dim].detach(), prediction[:, dim:]), dim=1)


def inverse_softplus(y: float) -> float:
    """The x with log(1 + exp(x)) = y > 0, without overflow for large y and exact for small y."""
    return y + math.log(-math.expm1(-y))


def inverse_quadratic(y: float) -> float:
    """The x that the link "quadratic" maps to y, at least that of its bound."""
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
