"""The fused loss against eager PyTorch and torch.compile: loss alone, and loss with its gradient.

A provider takes V predictions (B, W) and G targets (B, D) and returns the mean loss. The least that
training needs is timed: the loss under no_grad ("forward"), and the loss with the gradient of every
view by torch.autograd.grad ("forward_backward"), for a seed gradient made beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vi_simsiam.ops.backends import why_unavailable
from vi_simsiam.ops.multiview_loss import LossForm, eager_loss, multiview_loss

from . import modes
from .cases import BOTH, FORWARD, Case, Inputs, cases_for, draw_inputs
from .harness import Suite, SuiteOptions, Timer
from .modes import Operation, Outcome
from .peers import textbook_loss
from .results import COMPILED

Provider = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]

_CHUNK_ELEMENTS = 2**24
_SHORT_SECONDS = {"cuda": 170.0, "cpu": 85.0}


@dataclass(frozen=True)
class Options(SuiteOptions):
    """Options of `vi-simsiam bench loss`."""

    only: str = ""
    """Only cases whose name contains this, such as 256x2048, bfloat16 or cosine; a name is
    "power_spherical 256x2048 2x2 float32", batch x D, then views x targets. What no name contains
    lists all names."""


def make_providers(form: LossForm, device: torch.device) -> dict[str, Provider | str]:
    """All providers on `device`, or the reason for those that cannot run; resets torch.compile."""
    torch.compiler.reset()

    def eager(predictions: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        return eager_loss(predictions, targets, form).mean()

    providers: dict[str, Provider | str] = {
        "textbook": lambda predictions, targets: textbook_loss(predictions, targets, form).mean(),
        "eager": eager,
        COMPILED[0]: torch.compile(eager, fullgraph=True, dynamic=False),
    }
    if device.type == "cuda":
        # Another function, as two compiled forms of one would share its cache; and without CUDA
        # graphs by Inductor, as the benchmark captures every provider in the same way.
        providers[COMPILED[1]] = torch.compile(
            lambda predictions, targets: eager_loss(predictions, targets, form).mean(),
            fullgraph=True,
            dynamic=False,
            mode="max-autotune-no-cudagraphs",
        )
    for name in ("triton", "cuda") if device.type == "cuda" else ("cpu",):
        reason = why_unavailable(name, device.type)
        fused = partial(multiview_loss, form=form, backend=name)
        providers[name] = fused if reason is None else f"not available: {reason}"
    return providers


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
    return {"loss": [torch.tensor(total / batch, dtype=torch.float64)], "gradient": gradients}


def results(provider: Provider, inputs: Inputs) -> Outcome:
    """Loss of a provider, and its gradient for every view."""
    loss = provider(*inputs)
    return {"gradient": torch.autograd.grad(loss, inputs[0]), "loss": [loss.detach()]}


def run(options: Options) -> dict[str, Any]:
    """Measure the cases, see `modes.run`."""
    suite = Suite("multiview_loss", options)
    cases = cases_for(suite.device.type, short=options.short)
    return modes.run(
        suite,
        cases,
        _SHORT_SECONDS,
        lambda case: make_providers(case.form, suite.device),
        COMPILED[1],
        measure_case,
    )


def measure_case(
    case: Case,
    device: torch.device,
    providers: dict[str, Provider | str],
    timer: Timer,
    *,
    rounds: int,
) -> dict[str, Any]:
    """The case, with the figures of all providers, see `modes.measure`."""
    generator = torch.Generator(device).manual_seed(0)
    seed = torch.ones((), device=device)
    operation = Operation(
        ("loss", "gradient"),
        lambda: draw_inputs(case, device, generator),
        lambda inputs, dtype: reference(inputs[0], inputs[1], case.form, dtype),
        results,
        {FORWARD: _forward, BOTH: partial(_forward_backward, seed)},
    )
    fields = ("name", "distribution", "batch", "dim", "views", "targets", "dtype")
    return {
        **{field: getattr(case, field) for field in fields},
        **modes.measure(case, operation, providers, device, timer, rounds=rounds),
    }


def _forward(provider: Provider, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        return provider(*inputs)


def _forward_backward(seed: Tensor, provider: Provider, inputs: Inputs) -> tuple[Tensor, ...]:
    # autograd.grad with a given seed times neither the accumulation nor torch's own fill.
    return torch.autograd.grad(provider(*inputs), inputs[0], seed)
