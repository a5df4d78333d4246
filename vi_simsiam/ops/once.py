"""Gradients that have no derivative of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def refuse_derivative(
    operation: str, gradients: Sequence[Tensor | None], *sources: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients; differentiating them by any of their sources raises RuntimeError.

    By torch's `once_differentiable` they are constants where only saved tensors, and not the
    incoming gradient, depend on what is differentiated.
    """
    refused: tuple[Tensor | None, ...] = _Refusal.apply(
        operation, len(gradients), *gradients, *sources
    )
    return refused


class _Refusal(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, operation: str, count: int, *given: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        ctx.operation = operation
        return tuple(None if x is None else x.detach() for x in given[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        refuse(ctx.operation)


def refuse(operation: str) -> None:
    """Raise RuntimeError: the operation has no second derivative."""
    raise RuntimeError(
        f"the fused {operation} cannot be differentiated twice; use backend='eager' for that"
    )
