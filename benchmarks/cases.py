"""The cases that the loss is measured on, and their random inputs.

Inputs are like those of training: one tensor for each view, D + 1 columns (Power Spherical) in rows
padded to a multiple of 16. The padding is not part of the tensor: a gradient for it would cost the
providers that are not fused a copy.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vi_simsiam.ops.multiview_loss import LossForm

MODES = ("forward", "forward_backward")
"""The loss under no_grad, and the loss with its gradient."""

_ALIGNMENT = 16


@dataclass(frozen=True)
class Case:
    """`views` predictions (batch, dim + 1), cosine: dim, and `targets` targets (batch, dim)."""

    batch: int
    dim: int
    views: int = 2
    targets: int = 2
    dtype: str = "float32"
    distribution: str = "power_spherical"

    @property
    def name(self) -> str:
        """Name of the case in results; unique."""
        size, views = f"{self.batch}x{self.dim}", f"{self.views}x{self.targets}"
        return f"{self.distribution} {size} {views} {self.dtype}"

    @property
    def width(self) -> int:
        """Columns of a prediction without its padding."""
        return self.dim + (self.distribution == "power_spherical")

    @property
    def form(self) -> LossForm:
        """The loss, with concentrations as in training: around dim - 1."""
        if self.distribution == "cosine":
            return LossForm("cosine")
        return LossForm("power_spherical", float(self.dim - 1))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of all inputs."""
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]

    def least_bytes(self, mode: str) -> int:
        """Bytes that must move: predictions and targets read, and with gradient, that written."""
        predictions = self.views * self.width * (2 if mode == "forward_backward" else 1)
        return (predictions + self.targets * self.dim) * self.batch * self.torch_dtype.itemsize


_LARGE_BATCH, _BF16 = 32768, "bfloat16"
_TELLING = {
    "cuda": (
        Case(64, 2048, dtype=_BF16),
        Case(_LARGE_BATCH, 2048, dtype=_BF16),
        Case(_LARGE_BATCH, 2048),
        Case(256, 2048),
        Case(1024, 2048, dtype=_BF16),
        Case(256, 2048, 8, dtype=_BF16),
        Case(4096, 2048, 8, dtype=_BF16),
        Case(4096, 8192),
    ),
    "cpu": (
        *(Case(batch, dim) for batch, dim in ((256, 2048), (64, 2048), (1024, 2048), (64, 512))),
        Case(256, 2048, dtype=_BF16),
    ),
}
_GRID = itertools.product(
    (_BF16, "float32"), (2, 8), (2048, 512, 128, 8192), (64, 256, 1024, 4096, _LARGE_BATCH)
)
_SMALL = ((64, 128), (256, 512), (1024, 512), (4096, 512), (64, 8192), (256, 8192))
_FULL = {
    "cuda": (
        *(Case(batch, dim, views, dtype=dtype) for dtype, views, dim, batch in _GRID),
        Case(256, 2048, dtype=_BF16, distribution="cosine"),
        Case(_LARGE_BATCH, 2048, dtype=_BF16, distribution="cosine"),
        Case(_LARGE_BATCH, 2048, distribution="cosine"),
    ),
    "cpu": (
        *(Case(batch, dim) for batch, dim in _SMALL),
        Case(64, 2048, 8),
        Case(256, 2048, 8),
        Case(64, 2048, dtype=_BF16),
        Case(256, 2048, distribution="cosine"),
    ),
}


def cases_for(device_type: str, *, short: bool) -> tuple[Case, ...]:
    """The cases in the order in which they are measured, the telling ones first.

    On a CPU they are those that fit its memory.
    """
    telling = _TELLING[device_type]
    return telling if short else tuple(dict.fromkeys(telling + _FULL[device_type]))


@dataclass(frozen=True)
class Inputs:
    """Arguments of a provider, and the gradient of its result."""

    predictions: list[Tensor]
    targets: list[Tensor]
    seed: Tensor


def draw_inputs(case: Case, device: torch.device, generator: torch.Generator) -> Inputs:
    """Random views of common directions, cosines around 0.8; the padding is NaN."""
    dtype = case.torch_dtype
    common = torch.randn(case.batch, case.dim, device=device, generator=generator)

    def view() -> Tensor:
        return common + 0.5 * torch.randn(case.batch, case.dim, device=device, generator=generator)

    predictions = []
    for _ in range(case.views):
        row = math.ceil(case.width / _ALIGNMENT) * _ALIGNMENT
        padded = torch.full((case.batch, row), math.nan, device=device, dtype=dtype)
        padded[:, : case.dim] = view()
        if case.width > case.dim:
            padded[:, case.dim] = torch.randn(case.batch, device=device, generator=generator)
        predictions.append(padded[:, : case.width].detach().requires_grad_())
    targets = [view().to(dtype) for _ in range(case.targets)]
    return Inputs(predictions, targets, torch.ones((), device=device))
