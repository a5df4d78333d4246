"""The compared ways to compute the loss, and the error of each.

A provider takes V predictions (B, W) and G targets (B, D) and returns the mean loss.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vi_simsiam.ops.backends import why_unavailable
from vi_simsiam.ops.multiview_loss import LossForm, eager_loss, multiview_loss

from . import names
from .baselines import textbook_loss
from .timers import failed, failure_reason

Provider = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]

MISSING = ("loss_error", "gradient_error", "first_call_seconds")
"""Figures that a provider without a result lacks."""
_CHUNK_ELEMENTS = 2**24


def make_providers(form: LossForm, device: torch.device) -> dict[str, Provider | str]:
    """All providers on `device`, or the reason for those that cannot run; resets torch.compile."""
    torch.compiler.reset()

    def eager(predictions: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        return eager_loss(predictions, targets, form).mean()

    providers: dict[str, Provider | str] = {
        "textbook": lambda predictions, targets: textbook_loss(predictions, targets, form).mean(),
        "eager": eager,
        names.COMPILED[0]: torch.compile(eager, fullgraph=True, dynamic=False),
    }
    if device.type == "cuda":
        # Another function, as two compiled forms of one would share its cache; and without CUDA
        # graphs by Inductor, as the benchmark captures every provider in the same way.
        providers[names.COMPILED[1]] = torch.compile(
            lambda predictions, targets: eager_loss(predictions, targets, form).mean(),
            fullgraph=True,
            dynamic=False,
            mode="max-autotune-no-cudagraphs",
        )
    for name in ("triton", "cuda") if device.type == "cuda" else ("cpu",):
        reason = why_unavailable(name, device.type)
        fused = functools.partial(multiview_loss, form=form, backend=name)
        providers[name] = fused if reason is None else f"not available: {reason}"
    return providers


@dataclass(frozen=True)
class Outcome:
    """A mean loss, and its gradient for every view (B, W)."""

    loss: float
    gradients: Sequence[Tensor]


def reference(
    predictions: Sequence[Tensor], targets: Sequence[Tensor], form: LossForm, dtype: torch.dtype
) -> Outcome:
    """Eager loss and gradient in `dtype`, in pieces of the batch to save memory in float64."""
    batch = len(targets[0])
    rows = max(1, _CHUNK_ELEMENTS // (len(predictions) * targets[0].shape[1]))
    gradients = [torch.empty(p.shape, dtype=dtype, device=p.device) for p in predictions]
    total = 0.0
    for piece in (slice(start, start + rows) for start in range(0, batch, rows)):
        leaves = [p[piece].detach().to(dtype).requires_grad_() for p in predictions]
        loss = eager_loss(leaves, [z[piece].to(dtype) for z in targets], form).sum()
        found = torch.autograd.grad(loss / batch, leaves)
        for gradient, part in zip(gradients, found, strict=True):
            gradient[piece] = part
        total += loss.item()
    return Outcome(total / batch, gradients)


def errors(found: Outcome, exact: Outcome) -> tuple[float, float]:
    """Errors of loss and gradient, relative to the largest exact value; they keep a NaN."""
    difference = largest = torch.zeros((), dtype=torch.float64)
    for ours, theirs in zip(found.gradients, exact.gradients, strict=True):
        rows = max(1, _CHUNK_ELEMENTS // ours.shape[1])
        for a, b in zip(ours.split(rows), theirs.split(rows), strict=True):
            worst = (a.double() - b).abs().max().cpu()
            difference = torch.maximum(difference, worst)  # keeps a NaN
            largest = torch.maximum(largest, b.abs().max().cpu())
    loss = abs(found.loss - exact.loss) / max(abs(exact.loss), 1e-30)
    return loss, (difference / largest).item()


def allowed_errors(eager: tuple[float, float], dtype: torch.dtype) -> tuple[float, float]:
    """The repository's rule: twice the error of eager in the same dtype, plus a few roundings.

    The loss is float32 for every input dtype; the gradient is rounded once to `dtype`.
    """
    few = 4 * torch.finfo(torch.float32).eps
    return 2 * eager[0] + few, 2 * eager[1] + max(few, torch.finfo(dtype).eps)


def check(
    provider: Provider,
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    exact: Outcome,
    allowed: tuple[float, float],
) -> dict[str, Any]:
    """Run a provider and compare its result with `exact`.

    Returns:
        `correct`, `failure` (None or a line), `loss_error`, `gradient_error` (None where they are
        not finite) and `first_call_seconds`, for torch.compile with the compilation.
    """
    try:
        start = time.perf_counter()
        loss, gradients = _loss_and_gradients(provider, predictions, targets)
        seconds = time.perf_counter() - start
        # The second result will most likely reuse this memory: what it leaves unwritten is NaN.
        while gradients:
            gradients.pop().fill_(math.nan)
        loss, gradients = _loss_and_gradients(provider, predictions, targets)
        loss_error, gradient_error = errors(Outcome(loss, gradients), exact)
    except Exception as error:  # no compiler, no memory, a broken kernel: a result like any other
        return failed(failure_reason(error), MISSING)
    found = {"loss_error": loss_error, "gradient_error": gradient_error}
    wrong = [
        f"{name.replace('_', ' ')} {value:.1e}, allowed {limit:.1e}"
        for (name, value), limit in zip(found.items(), allowed, strict=True)
        if not value <= limit  # NaN is wrong, too
    ]
    return {
        "correct": not wrong,
        "failure": f"inaccurate: {'; '.join(wrong)}" if wrong else None,
        **{name: value if math.isfinite(value) else None for name, value in found.items()},
        "first_call_seconds": seconds,
    }


def _loss_and_gradients(
    provider: Provider, predictions: Sequence[Tensor], targets: Sequence[Tensor]
) -> tuple[float, list[Tensor]]:
    loss = provider(predictions, targets)
    return loss.item(), list(torch.autograd.grad(loss, list(predictions)))
