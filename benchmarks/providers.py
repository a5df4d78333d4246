"""The ways to compute the loss that are compared, and how wrong each is.

A provider takes V predictions (B, W) and G targets (B, D) and returns the mean loss. `textbook` is the formula as printed
in papers, with torch's lgamma: the accuracy that the merged form is meant to improve on.
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
from torch.nn import functional as F

from vi_simsiam.ops.backends import why_unavailable
from vi_simsiam.ops.multiview_loss import LossForm, eager_loss, multiview_loss

from .harness import failure_reason

Provider = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]

COMPILED = ("torch.compile", "torch.compile max-autotune")
FUSED = ("triton", "cuda", "cpu")
MAX_AUTOTUNE = "max-autotune-no-cudagraphs"
"""Without Inductor's own CUDA graphs: the benchmark captures every provider in the same way."""

_CHUNK_ELEMENTS = 2**24


def make_providers(form: LossForm, device: torch.device) -> dict[str, Provider | str]:
    """All providers for tensors on `device`, or for those that cannot run there the reason. torch.compile starts afresh."""
    torch.compiler.reset()

    def eager(predictions: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        return eager_loss(predictions, targets, form).mean()

    providers: dict[str, Provider | str] = {
        "textbook": lambda predictions, targets: textbook_loss(predictions, targets, form).mean(),
        "eager": eager,
        "torch.compile": torch.compile(eager, fullgraph=True, dynamic=False),
    }
    if device.type == "cuda":
        # A function of its own: two compiled forms of one function would share its cache of compiled code.
        providers["torch.compile max-autotune"] = torch.compile(
            lambda predictions, targets: eager_loss(predictions, targets, form).mean(),
            fullgraph=True,
            dynamic=False,
            mode=MAX_AUTOTUNE,
        )
    for name in ("triton", "cuda") if device.type == "cuda" else ("cpu",):
        reason = why_unavailable(name, device.type)
        fused = functools.partial(multiview_loss, form=form, backend=name)
        providers[name] = fused if reason is None else f"not available: {reason}"
    return providers


def textbook_loss(
    predictions: Sequence[Tensor], targets: Sequence[Tensor], form: LossForm
) -> Tensor:
    """Loss of every sample, (B,), from lgamma and log(1 + cos) as papers print it, in at least float32."""
    dtype = torch.promote_types(predictions[0].dtype, torch.float32)
    dim = targets[0].shape[-1]
    b = (dim - 1) / 2
    pairs = [(v, g) for v in range(len(predictions)) for g in range(len(targets)) if v != g]
    target = [F.normalize(z.detach().to(dtype), dim=-1) for z in targets]
    direction = [F.normalize(p[:, :dim].to(dtype), dim=-1) for p in predictions]
    cosine = torch.stack([(direction[v] * target[g]).sum(-1) for v, g in pairs])
    if form.distribution == "cosine":
        return -2 / len(pairs) * cosine.sum(0)
    kappa = torch.stack(
        [form.scale * F.softplus(predictions[v][:, dim].to(dtype)) + form.minimum for v, _ in pairs]
    )
    uniform = math.lgamma(dim / 2) - math.log(2) - dim / 2 * math.log(math.pi)
    alpha = b + kappa
    log_normaliser = (
        (alpha + b) * math.log(2)
        + torch.lgamma(alpha)
        - torch.lgamma(alpha + b)
        + b * math.log(math.pi)
    )
    log_density = kappa * torch.log1p(cosine) - log_normaliser
    return -2 / len(pairs) * (log_density - uniform).sum(0)


@dataclass(frozen=True)
class Outcome:
    """A mean loss, and its gradient for every view (B, W)."""

    loss: float
    gradients: Sequence[Tensor]


def reference(
    predictions: Sequence[Tensor], targets: Sequence[Tensor], form: LossForm, dtype: torch.dtype
) -> Outcome:
    """What eager gives for inputs converted to `dtype`, in pieces of the batch: float64 temporaries need not fit at once."""
    batch = len(targets[0])
    rows = max(1, _CHUNK_ELEMENTS // (len(predictions) * targets[0].shape[1]))
    gradients = [torch.empty(p.shape, dtype=dtype, device=p.device) for p in predictions]
    total = 0.0
    for piece in (slice(start, start + rows) for start in range(0, batch, rows)):
        leaves = [p[piece].detach().to(dtype).requires_grad_() for p in predictions]
        loss = eager_loss(leaves, [z[piece].to(dtype) for z in targets], form).sum()
        for gradient, found in zip(
            gradients, torch.autograd.grad(loss / batch, leaves), strict=True
        ):
            gradient[piece] = found
        total += loss.item()
    return Outcome(total / batch, gradients)


def errors(found: Outcome, exact: Outcome) -> tuple[float, float]:
    """Errors of loss and gradient, relative to the largest exact value; NaN where anything is NaN."""
    difference, largest = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for ours, theirs in zip(found.gradients, exact.gradients, strict=True):
        rows = max(1, _CHUNK_ELEMENTS // ours.shape[1])
        for a, b in zip(ours.split(rows), theirs.split(rows), strict=True):
            difference = torch.maximum(
                difference, (a.double() - b).abs().max().cpu()
            )  # NaN wins in maximum
            largest = torch.maximum(largest, b.abs().max().cpu())
    loss = abs(found.loss - exact.loss) / max(abs(exact.loss), 1e-30)
    return loss, (difference / largest).item()


def allowed_errors(eager: tuple[float, float], dtype: torch.dtype) -> tuple[float, float]:
    """The repository's rule: at most twice the error of eager in the same dtype, or a few roundings of the result.

    The loss is float32 for every input dtype; the gradient is rounded once to `dtype`.
    """
    few = 4 * torch.finfo(torch.float32).eps
    return 2 * eager[0] + few, 2 * eager[1] + max(
        few, torch.finfo(dtype).eps if dtype != torch.float32 else 0
    )


def check(
    provider: Provider,
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    exact: Outcome,
    allowed: tuple[float, float],
) -> dict[str, Any]:
    """Run a provider once and hold it to `exact`.

    Returns:
        `correct`, `failure` (None or a line), `loss_error`, `gradient_error` (None where there is no number) and
        `first_call_seconds`, which for torch.compile is the time to compile loss and gradient.
    """
    try:
        start = time.perf_counter()
        loss, gradients = _loss_and_gradients(provider, predictions, targets)
        seconds = time.perf_counter() - start
        # The second result will most likely lie where the first did: what it leaves unwritten shows as NaN.
        while gradients:
            gradients.pop().fill_(math.nan)
        loss, gradients = _loss_and_gradients(provider, predictions, targets)
        loss_error, gradient_error = errors(Outcome(loss, gradients), exact)
    except Exception as error:  # no compiler, no memory, a broken kernel: a result like any other
        return failed(failure_reason(error))
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


def failed(reason: str) -> dict[str, Any]:
    """What `check` returns for a provider that gave no result."""
    return {
        "correct": False,
        "failure": reason,
        "loss_error": None,
        "gradient_error": None,
        "first_call_seconds": None,
    }


def _loss_and_gradients(
    provider: Provider, predictions: Sequence[Tensor], targets: Sequence[Tensor]
) -> tuple[float, list[Tensor]]:
    loss = provider(predictions, targets)
    return loss.item(), list(torch.autograd.grad(loss, list(predictions)))
