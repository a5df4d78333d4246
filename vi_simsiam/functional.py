"""The losses and the density as functions. Shapes: V views, of which the first G are targets too; B
samples; D dimensions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vi_simsiam.config import Link
from vi_simsiam.distributions import PowerSpherical
from vi_simsiam.ops.multiview_loss import LossForm, Reduction, multiview_loss


def power_spherical_loss(
    predictions: Tensor | Sequence[Tensor],
    targets: Tensor | Sequence[Tensor],
    *,
    concentration: Tensor | Sequence[Tensor] | None = None,
    reduction: Reduction = "mean",
    backend: str = "auto",
    concentration_scale: float = 1.0,
    concentration_min: float = 0.0,
    concentration_link: Link = "softplus",
    concentration_gain: float = 1.0,
    cosine_weight: float = 0.0,
    loss_scale: float = 1.0,
) -> Tensor:
    """VI-SimSiam's loss: minus the Power Spherical log-density of the targets, relative to the
    uniform density, in nats.

    For every sample twice the mean over the ordered pairs v != g of -[log PS(z_g; mu_v, kappa_v) -
    log uniform], with kappa = concentration_scale * link(concentration_gain * raw) +
    concentration_min; mu and z are normalised inside. A loss of 0 is no better than the uniform
    distribution. It differs from Nakamura et al. (arXiv 2203.11437, Algorithm 1) by a constant of D
    and has the same gradient, without the cosine. 1 + cos is clamped from below at 1e-6; a zero
    vector has cosine 0 and no gradient; NaN or infinity in a sample makes that sample's loss NaN,
    but for a raw concentration of minus infinity, which is the least kappa.

    The fused backends read each input once and write the gradient in the same launch. They are
    fastest with V separate tensors, or one, whose rows start at multiples of 16 elements.

    Args:
        predictions: (V, B, D + 1), or a sequence of V tensors (B, D + 1), with any strides; last
            column the raw concentration. 2 <= V <= 16. float16, bfloat16, float32 or float64.
            Columns may follow that pad the rows to the next multiple of 16; they are not read, and
            their gradient is 0.
        targets: (G, B, D), or a sequence of G tensors (B, D), 1 <= G <= V. Detached: they never
            receive a gradient.
        concentration: kappa itself, (V, B) or V tensors (B,), for heads of your own: predictions
            are (V, B, D) then, the mean directions alone, of any length. A negative one makes its
            sample's loss NaN.
        reduction: "mean" over the batch, or "none".
        backend: "auto" (the fastest here), "eager", "triton", "cuda" or "cpu".
        concentration_scale: factor on the link, positive; D - 1 keeps gain * raw of order 1 in
            training.
        concentration_min: added to the link, at least 0.
        concentration_link: "softplus", or "quadratic": r + r^2/2 with r = max(x, 0.02), whose
            gradient is kept at the bound where it raises kappa. The bound's side is that of a loss
            to be minimised: do not negate the result.
        concentration_gain: factor on raw, positive. A linear layer of H hidden features learns raw
            at a speed in proportion to H and overshoots; 4/sqrt(H) makes up for that.
        cosine_weight: weight of SimSiam's loss, `cosine_loss`, which is added; at least 0.
        loss_scale: factor on the Power Spherical loss, positive. Multiplying the result costs a
            pass over the gradient; this does not. A constant under torch.compile, which compiles
            anew for another one.

    Returns:
        A scalar, or (B,) for reduction "none"; float32, or float64 where an input is float64. The
        fused backends can be differentiated once, "eager" any number of times.

    Raises:
        InputError: shapes, devices or options that do not fit, or the mean of an empty batch.
        TypeError: an input that is no tensor of an accepted dtype.
        BackendUnavailableError: a backend named explicitly that cannot run here.
    """
    form = LossForm(
        "power_spherical",
        concentration_scale,
        concentration_min,
        loss_scale,
        concentration_link,
        concentration_gain,
        cosine_weight,
    )
    return multiview_loss(
        predictions,
        targets,
        form,
        concentration=concentration,
        reduction=reduction,
        backend=backend,
    )


def cosine_loss(
    predictions: Tensor | Sequence[Tensor],
    targets: Tensor | Sequence[Tensor],
    *,
    reduction: Reduction = "mean",
    backend: str = "auto",
    loss_scale: float = 1.0,
) -> Tensor:
    """SimSiam's loss: twice the mean over the ordered pairs v != g of -cos(p_v, z_g) (Chen and He,
    arXiv 2011.10566, eq. 1).

    Two views give -cos(p_1, z_2) - cos(p_2, z_1), twice the loss of the official SimSiam code.

    Args:
        predictions: (V, B, D), or a sequence of V tensors (B, D); otherwise as in
            `power_spherical_loss`.
        targets: (G, B, D), or a sequence of G tensors (B, D). Detached.
        reduction: "mean" over the batch, or "none".
        backend: "auto", "eager", "triton", "cuda" or "cpu".
        loss_scale: factor on the loss, positive.

    Returns:
        A scalar, or (B,) for reduction "none"; float32, or float64 where an input is float64.

    Raises:
        InputError, TypeError, BackendUnavailableError: as `power_spherical_loss`.
    """
    form = LossForm("cosine", factor=loss_scale)
    return multiview_loss(predictions, targets, form, reduction=reduction, backend=backend)


def power_spherical_log_prob(value: Tensor, loc: Tensor, concentration: Tensor) -> Tensor:
    """Log-density of the Power Spherical distribution at `value`, in nats (De Cao and Aziz, arXiv
    2006.04437, eq. 8).

    Args:
        value: (..., D) unit vectors.
        loc: (*batch, D) unit vectors, the mean direction mu.
        concentration: (*batch), kappa >= 0.

    Returns:
        The log-density, of the shape that value's leading dimensions broadcast to with `batch`.

    Raises:
        ValueError: vectors that are not of unit length, a negative concentration, shapes that do
            not fit.
    """
    log_prob: Tensor = PowerSpherical(loc, concentration).log_prob(value)
    return log_prob
