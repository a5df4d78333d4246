"""The losses as modules, for training code of your own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from vi_simsiam.config import Link
from vi_simsiam.functional import cosine_loss, power_spherical_loss
from vi_simsiam.ops.backends import check_backend_name
from vi_simsiam.ops.multiview_loss import LossForm, Reduction, check_reduction


class _Loss(nn.Module):
    """Keeps the options of a loss function as attributes of these names."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        check_reduction(options["reduction"])
        check_backend_name(options["backend"])
        self._names = tuple(options)
        self.__dict__.update(options)

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._names}

    def extra_repr(self) -> str:
        """The options, for repr()."""
        options = self._options().items()
        return ", ".join(f"{k}={v!r}" if isinstance(v, str) else f"{k}={v}" for k, v in options)


class PowerSphericalLoss(_Loss):
    """VI-SimSiam's loss, `vi_simsiam.functional.power_spherical_loss` with fixed options.

    Args:
        reduction, backend, concentration_scale, concentration_min, concentration_link,
            concentration_gain, cosine_weight, loss_scale: as `power_spherical_loss`. With the link
            "quadratic" the result must not be negated.

    Raises:
        InputError: an option that is not accepted.
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
        LossForm(
            "power_spherical",
            concentration_scale,
            concentration_min,
            loss_scale,
            concentration_link,
            concentration_gain,
            cosine_weight,
        )
        super().__init__(
            reduction=reduction,
            backend=backend,
            concentration_scale=concentration_scale,
            concentration_min=concentration_min,
            concentration_link=concentration_link,
            concentration_gain=concentration_gain,
            cosine_weight=cosine_weight,
            loss_scale=loss_scale,
        )

    def forward(
        self,
        predictions: Tensor | Sequence[Tensor],
        targets: Tensor | Sequence[Tensor],
        concentration: Tensor | Sequence[Tensor] | None = None,
    ) -> Tensor:
        """The loss, a scalar or (B,).

        Args:
            predictions: (V, B, D + 1) or V tensors (B, D + 1), last column the raw concentration;
                (V, B, D) or V tensors (B, D) with `concentration`.
            targets: (G, B, D) or G tensors (B, D).
            concentration: kappa itself, (V, B) or V tensors (B,).

        Raises:
            InputError, TypeError, BackendUnavailableError: as `power_spherical_loss`.
        """
        return power_spherical_loss(
            predictions, targets, concentration=concentration, **self._options()
        )


class CosineLoss(_Loss):
    """SimSiam's loss, `vi_simsiam.functional.cosine_loss` with fixed options.

    Args:
        reduction, backend, loss_scale: as `cosine_loss`.

    Raises:
        InputError: an option that is not accepted.
    """

    def __init__(
        self, *, reduction: Reduction = "mean", backend: str = "auto", loss_scale: float = 1.0
    ) -> None:
        LossForm("cosine", factor=loss_scale)
        super().__init__(reduction=reduction, backend=backend, loss_scale=loss_scale)

    def forward(
        self, predictions: Tensor | Sequence[Tensor], targets: Tensor | Sequence[Tensor]
    ) -> Tensor:
        """The loss, a scalar or (B,), of (V, B, D) and (G, B, D), or as many tensors (B, D)."""
        return cosine_loss(predictions, targets, **self._options())
