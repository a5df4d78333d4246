"""The losses as modules, for training code of your own."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vi_simsiam.config import Link
from vi_simsiam.functional import cosine_loss, power_spherical_form, power_spherical_loss
from vi_simsiam.ops.backends import check_backend_name
from vi_simsiam.ops.multiview_loss import LossForm, Reduction, check_reduction


class PowerSphericalLoss(nn.Module):
    """VI-SimSiam's loss, `vi_simsiam.functional.power_spherical_loss` with its options kept.

    Args:
        reduction: "mean" over the batch, or "none".
        backend: "auto" (the fastest for the device), "eager", "triton", "cuda" or "cpu".
        concentration_scale, concentration_min, concentration_link, concentration_gain: kappa =
            concentration_scale * link(concentration_gain * raw) + concentration_min. With the link "quadratic" the result
            must not be negated.
        cosine_weight: weight of SimSiam's loss, `cosine_loss`, which is added; at least 0.
        loss_scale: factor on the Power Spherical loss, positive.

    Raises:
        InputError: an option that is none of these.
    """

    def __init__(
        self,
        *,
        reduction: Reduction = "mean",
        backend: str = "auto",
        concentration_scale: float = 1.0,
        concentration_min: float = 0.0,
        concentration_link: Link = "softplus",
        concentration_gain: float = 1.0,
        cosine_weight: float = 0.0,
        loss_scale: float = 1.0,
    ) -> None:
        super().__init__()
        power_spherical_form(
            concentration_scale,
            concentration_min,
            concentration_link,
            concentration_gain,
            cosine_weight,
            loss_scale,
        )
        check_reduction(reduction)
        check_backend_name(backend)
        self.reduction: Reduction = reduction
        self.backend = backend
        self.concentration_scale = concentration_scale
        self.concentration_min = concentration_min
        self.concentration_link: Link = concentration_link
        self.concentration_gain = concentration_gain
        self.cosine_weight = cosine_weight
        self.loss_scale = loss_scale

    def forward(
        self,
        predictions: Tensor | Sequence[Tensor],
        targets: Tensor | Sequence[Tensor],
        concentration: Tensor | Sequence[Tensor] | None = None,
    ) -> Tensor:
        """The loss, a scalar or (B,).

        Args:
            predictions: (V, B, D + 1) or V tensors (B, D + 1), last column the raw concentration; (V, B, D) or V
                tensors (B, D) with `concentration`.
            targets: (G, B, D) or G tensors (B, D).
            concentration: kappa itself, (V, B) or V tensors (B,).

        Raises:
            InputError, TypeError, BackendUnavailableError: as `power_spherical_loss`.
        """
        return power_spherical_loss(
            predictions,
            targets,
            concentration=concentration,
            reduction=self.reduction,
            backend=self.backend,
            concentration_scale=self.concentration_scale,
            concentration_min=self.concentration_min,
            concentration_link=self.concentration_link,
            concentration_gain=self.concentration_gain,
            cosine_weight=self.cosine_weight,
            loss_scale=self.loss_scale,
        )

    def extra_repr(self) -> str:
        """The options, for repr()."""
        return (
            f"reduction={self.reduction!r}, backend={self.backend!r}, concentration_scale={self.concentration_scale}, "
            f"concentration_min={self.concentration_min}, concentration_link={self.concentration_link!r}, "
            f"concentration_gain={self.concentration_gain}, cosine_weight={self.cosine_weight}, "
            f"loss_scale={self.loss_scale}"
        )


class CosineLoss(nn.Module):
    """SimSiam's loss, `vi_simsiam.functional.cosine_loss` with its options kept.

    Args:
        reduction: "mean" over the batch, or "none".
        backend: "auto" (the fastest for the device), "eager", "triton", "cuda" or "cpu".
        loss_scale: factor on the loss, positive.

    Raises:
        InputError: an option that is none of these.
    """

    def __init__(
        self, *, reduction: Reduction = "mean", backend: str = "auto", loss_scale: float = 1.0
    ) -> None:
        super().__init__()
        LossForm("cosine", factor=loss_scale)
        check_reduction(reduction)
        check_backend_name(backend)
        self.reduction: Reduction = reduction
        self.backend = backend
        self.loss_scale = loss_scale

    def forward(
        self, predictions: Tensor | Sequence[Tensor], targets: Tensor | Sequence[Tensor]
    ) -> Tensor:
        """The loss, a scalar or (B,), of predictions (V, B, D) and targets (G, B, D) or as many tensors (B, D)."""
        return cosine_loss(
            predictions,
            targets,
            reduction=self.reduction,
            backend=self.backend,
            loss_scale=self.loss_scale,
        )

    def extra_repr(self) -> str:
        """The options, for repr()."""
        return (
            f"reduction={self.reduction!r}, backend={self.backend!r}, loss_scale={self.loss_scale}"
        )
