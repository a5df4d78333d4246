"""The fused loss against eager PyTorch and torch.compile: loss alone, and loss with its gradient.

A provider takes V predictions (B, W) and G targets (B, D) and returns the mean loss. Before it is
timed, its loss and gradient are compared with float64 by the rule of the tests; one that is wrong,
cannot run or runs out of memory is recorded with the reason and without a time. The least that
training needs is timed: the loss under no_grad ("forward"), and the loss with the gradient of every
view by torch.autograd.grad ("forward_backward"), for a seed gradient made beforehand. Everything is
compared with a copy of the bytes that must move, by PyTorch on the same device and measured in turn
with the providers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vi_simsiam.ops.backends import why_unavailable
from vi_simsiam.ops.multiview_loss import LossForm, eager_loss, multiview_loss

from . import harness
from .cases import BOTH, FORWARD, MODES, Case, Inputs, cases_for, draw_inputs
from .harness import Suite, SuiteOptions, Timer
from .peers import textbook_loss
from .results import COMPILED
from .tables import loss_case

Provider = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]

_FIGURES = ("loss_error", "gradient_error", "first_call_seconds", *MODES)
"""Figures of a provider; None where there is no result."""
_CHUNK_ELEMENTS = 2**24
_SHORT_SECONDS = {"cuda": 170.0, "cpu": 85.0}
_CASE_SECONDS = {"cuda": 1.5, "cpu": 3.0}
"""No new round of a case begins after this long in one mode; compiling comes on top."""


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


Outcome = tuple[float, Sequence[Tensor]]
"""A mean loss, and its gradient for every view (B, W)."""


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
    return total / batch, gradients


def errors(found: Outcome, exact: Outcome) -> dict[str, float]:
    """Errors of loss and gradient, relative to the largest exact value; they keep a NaN."""
    difference = largest = torch.zeros((), dtype=torch.float64)
    for ours, theirs in zip(found[1], exact[1], strict=True):
        worst = (ours.double() - theirs).abs().max().cpu()
        difference = torch.maximum(difference, worst)  # keeps a NaN
        largest = torch.maximum(largest, theirs.abs().max().cpu())
    loss = abs(found[0] - exact[0]) / max(abs(exact[0]), 1e-30)
    return {"loss error": loss, "gradient error": (difference / largest).item()}


def check(
    provider: Provider,
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    exact: Outcome,
    allowed: Mapping[str, float],
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
        found = errors((loss, gradients), exact)
    except Exception as error:  # no compiler, no memory, a broken kernel: a result like any other
        return harness.failed(harness.failure_reason(error))
    return {
        **harness.judged(found, allowed),
        **{
            name.replace(" ", "_"): value if math.isfinite(value) else None
            for name, value in found.items()
        },
        "first_call_seconds": seconds,
    }


def _loss_and_gradients(
    provider: Provider, predictions: Sequence[Tensor], targets: Sequence[Tensor]
) -> tuple[float, list[Tensor]]:
    loss = provider(predictions, targets)
    return loss.item(), list(torch.autograd.grad(loss, list(predictions)))


def run(options: Options) -> dict[str, Any]:
    """Measure the cases, print tables, and write the result file after each case."""
    suite = Suite("multiview_loss", options)
    device = suite.device
    timer = harness.timer_for(device)
    cases = cases_for(device.type, short=options.short)
    for case, left_out in suite.cases(cases, _SHORT_SECONDS[device.type]):
        made = make_providers(case.form, device)
        if left_out is not None and COMPILED[1] in made:
            made[COMPILED[1]] = left_out
        found = measure_case(case, device, made, timer, rounds=options.rounds)
        suite.add(found, loss_case(found))
    return suite.finish()


def measure_case(
    case: Case,
    device: torch.device,
    providers: dict[str, Provider | str],
    timer: Timer,
    *,
    rounds: int,
) -> dict[str, Any]:
    """Check and time all providers on one case; whatever fails is recorded with its reason.

    Returns:
        The case, the copy's times, and for every provider the entries of `check` and, in
        each mode, None where it was not timed, or `failure`, or: `time` and on a GPU `host`
        (quartiles, see harness.py), `bytes_per_second` of the bytes that must move, `copy_share`
        (the copy's time over this one) and `peak_bytes` above the inputs.
    """
    copies: dict[str, dict[str, float] | None] = dict.fromkeys(MODES)
    try:
        generator = torch.Generator(device).manual_seed(0)
        count = timer.distinct_bytes // case.least_bytes(FORWARD) + 1
        sets = [draw_inputs(case, device, generator) for _ in range(count)]
        exact = reference(*sets[0], case.form, torch.float64)
        eager = errors(reference(*sets[0], case.form, case.torch_dtype), exact)
        # The rule of the tests: twice the error of eager in the same dtype, plus a few roundings.
        # The loss is float32 for every dtype; the gradient is rounded once to it.
        few = 4 * torch.finfo(torch.float32).eps
        roundings = few, max(few, torch.finfo(case.torch_dtype).eps)
        allowed = {
            name: 2 * value + more
            for (name, value), more in zip(eager.items(), roundings, strict=True)
        }
        found = {
            name: harness.failed(p) if isinstance(p, str) else check(p, *sets[0], exact, allowed)
            for name, p in providers.items()
        }
        correct = {name: p for name, p in providers.items() if found[name]["correct"]}
        for mode in MODES:
            timer.release()
            try:
                times = _timed(case, mode, correct, sets, timer, rounds)
            except Exception as error:  # no memory for the copy
                reason = {"failure": harness.failure_reason(error)}
                times = {"copy": {}, **{name: dict(reason) for name in correct}}
            copies[mode] = times.pop("copy").get("time")
            for name, values in times.items():
                found[name][mode] = values
    except Exception as error:  # no memory for inputs or reference
        found = {name: harness.failed(harness.failure_reason(error)) for name in providers}
    timer.release()
    fields = ("name", "distribution", "batch", "dim", "views", "targets", "dtype")
    return {
        **{field: getattr(case, field) for field in fields},
        "least_bytes": {mode: case.least_bytes(mode) for mode in MODES},
        "copy": copies,
        "providers": {
            name: {**dict.fromkeys(_FIGURES), **values} for name, values in found.items()
        },
    }


def _timed(
    case: Case,
    mode: str,
    providers: dict[str, Any],
    sets: list[Inputs],
    timer: Timer,
    rounds: int,
) -> dict[str, dict[str, Any]]:
    """Figures of the copy and of every provider in one mode, all measured in turn."""
    nbytes, device = case.least_bytes(mode), sets[0][1][0].device
    seed = torch.ones((), device=device)
    found: dict[str, dict[str, Any]] = {"copy": {}}
    copies = _copy_sets(nbytes, device, timer.distinct_bytes)
    measures = {("copy", "time"): timer.prepare(_copy, copies, nbytes)["time"]}
    for name, provider in providers.items():
        call: Callable[[Inputs], object] = partial(_forward, provider)
        if mode == BOTH:
            call = partial(_forward_backward, provider, seed)
        try:
            prepared = timer.prepare(call, sets, nbytes)
            found[name] = {"peak_bytes": timer.peak_bytes(partial(call, sets[0]))}
            measures |= {(name, metric): measure for metric, measure in prepared.items()}
        except Exception as error:
            found[name] = {"failure": harness.failure_reason(error)}
    times, failures = harness.interleave(
        measures, rounds=rounds, seconds=_CASE_SECONDS[device.type]
    )
    for (name, metric), measured in times.items():
        found[name][metric] = measured
    for (name, _), reason in failures.items():
        found[name] = {"failure": reason}
    copy = found["copy"].get("time")
    for values in found.values():
        if "time" in values:
            median = values["time"]["median_us"]
            values["bytes_per_second"] = nbytes / median * 1e6
            values["copy_share"] = copy and copy["median_us"] / median
    return found


def _forward(provider: Provider, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        return provider(*inputs)


def _forward_backward(provider: Provider, seed: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
    # autograd.grad with a given seed times neither the accumulation nor torch's own fill.
    return torch.autograd.grad(provider(*inputs), inputs[0], seed)


def _copy(pair: tuple[Tensor, Tensor]) -> Tensor:
    return pair[1].copy_(pair[0])


def _copy_sets(
    nbytes: int, device: torch.device, distinct_bytes: int
) -> list[tuple[Tensor, Tensor]]:
    """Pairs whose copy reads and writes `nbytes` together; random, as zeros may move faster."""
    size, count = max(1, nbytes // 8), distinct_bytes // nbytes + 1
    return [
        (torch.rand(size, device=device), torch.empty(size, device=device)) for _ in range(count)
    ]
