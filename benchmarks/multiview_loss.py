"""The fused loss against eager PyTorch and torch.compile: loss alone, and loss with its gradient.

Before a provider is timed, its loss and gradient are compared with float64 by the rule of the
tests; one that is wrong, cannot run or runs out of memory is recorded with the reason and without a
time. The least that training needs is timed: the loss under no_grad ("forward"), and the loss with
the gradient of every view by torch.autograd.grad ("forward_backward"), for a seed gradient made
beforehand. Everything is compared with a copy of the bytes that must move, by PyTorch on the same
device and measured in turn with the providers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from torch import Tensor

from vi_simsiam.ops.multiview_loss import LossForm

from . import names
from .cases import MODES, Case, Inputs, cases_for, draw_inputs
from .providers import MISSING, Provider, allowed_errors, check, errors, make_providers, reference
from .suite import Suite, SuiteOptions
from .tables import loss_case
from .timers import Timer, failed, failure_reason, interleave, timer_for

_SHORT_SECONDS = {"cuda": 170.0, "cpu": 85.0}
_CASE_SECONDS = {"cuda": 1.5, "cpu": 3.0}
"""No new round of a case begins after this long in one mode; compiling comes on top."""


@dataclass(frozen=True)
class Options(SuiteOptions):
    """Options of `vi-simsiam bench loss`."""

    only: Annotated[
        str,
        tyro.conf.arg(
            help="Only cases whose name contains this, such as 256x2048, bfloat16 or cosine; a "
            'name is "power_spherical 256x2048 2x2 float32", batch x D, then views x targets. What '
            "no name contains lists all names."
        ),
    ] = ""


def run(
    options: Options,
    console: Console | None = None,
    *,
    providers: Callable[[LossForm, torch.device], dict[str, Provider | str]] = make_providers,
    timer: Timer | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Measure the cases, print tables, and write the result file after each case.

    Args:
        options: what to measure.
        console: where to print.
        providers: makes the providers of a case, or the reason for those that cannot run.
        timer: how to time; None for the device's default.
        clock: the time in seconds, for the limit on --short.
    """
    suite = Suite("multiview_loss", options, console)
    device = suite.device
    timer = timer or timer_for(device)
    limit = _SHORT_SECONDS[device.type]
    for case, used in suite.cases(cases_for(device.type, short=options.short), limit, clock):
        made = providers(case.form, device)
        if used > 0.35 and names.COMPILED[1] in made:
            made[names.COMPILED[1]] = (
                f"left out: it compiles longest, and --short had used {used * limit:.0f} s"
            )
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
        The case, the copy's times, and for every provider the entries of `providers.check` and, in
        each mode, None where it was not timed, or `failure`, or: `time` and on a GPU `host`
        (quartiles, see timers.py), `bytes_per_second` of the bytes that must move, `copy_share`
        (the copy's time over this one) and `peak_bytes` above the inputs.
    """
    copies: dict[str, dict[str, float] | None] = dict.fromkeys(MODES)
    found: dict[str, dict[str, Any]] = {}
    try:
        generator = torch.Generator(device).manual_seed(0)
        count = timer.distinct_bytes // case.least_bytes("forward") + 1
        sets = [draw_inputs(case, device, generator) for _ in range(count)]
        found = _checked(case, providers, sets[0])
        timer.release()
        correct = {
            name: provider
            for name, provider in providers.items()
            if not isinstance(provider, str) and found[name]["correct"]
        }
        for mode in MODES:
            try:
                copies[mode], times = _timed(case, mode, correct, sets, timer, rounds)
            except Exception as error:  # no memory for the copy
                times = {name: {"failure": failure_reason(error)} for name in correct}
            for name, values in times.items():
                found[name][mode] = values
            timer.release()
    except Exception as error:  # no memory for inputs or reference
        found = {name: failed(failure_reason(error), MISSING) for name in providers}
    timer.release()
    fields = ("name", "distribution", "batch", "dim", "views", "targets", "dtype")
    return {
        **{field: getattr(case, field) for field in fields},
        "least_bytes": {mode: case.least_bytes(mode) for mode in MODES},
        "copy": copies,
        "providers": {name: {**dict.fromkeys(MODES), **values} for name, values in found.items()},
    }


def _checked(
    case: Case, providers: dict[str, Provider | str], inputs: Inputs
) -> dict[str, dict[str, Any]]:
    """Compare every provider with float64, or record the reason why it cannot run."""
    given = inputs.predictions, inputs.targets
    exact = reference(*given, case.form, torch.float64)
    eager = errors(reference(*given, case.form, case.torch_dtype), exact)
    allowed = allowed_errors(eager, case.torch_dtype)
    return {
        name: failed(p, MISSING) if isinstance(p, str) else check(p, *given, exact, allowed)
        for name, p in providers.items()
    }


def _timed(
    case: Case,
    mode: str,
    providers: dict[str, Provider],
    sets: list[Inputs],
    timer: Timer,
    rounds: int,
) -> tuple[dict[str, float] | None, dict[str, dict[str, Any]]]:
    """Times of the copy and of every provider in one mode, all measured in turn."""
    nbytes, device = case.least_bytes(mode), sets[0].seed.device
    found: dict[str, dict[str, Any]] = {name: {} for name in providers}
    measures: dict[tuple[str, str], Callable[[], float]] = {}
    copies = _copy_sets(nbytes, device, timer.distinct_bytes)
    measures["copy", "time"] = timer.prepare(_copy, copies, nbytes)["time"]
    for name, provider in providers.items():
        call = partial(_forward if mode == "forward" else _forward_backward, provider)
        try:
            prepared = timer.prepare(call, sets, nbytes)
            found[name]["peak_bytes"] = timer.peak_bytes(partial(call, sets[0]))
        except Exception as error:
            found[name]["failure"] = failure_reason(error)
            continue
        measures.update({(name, metric): measure for metric, measure in prepared.items()})
    times, failures = interleave(measures, rounds=rounds, seconds=_CASE_SECONDS[device.type])
    for (name, _), reason in failures.items():
        if name in found:
            found[name]["failure"] = reason
    copy = times.get(("copy", "time"))
    for name, values in found.items():
        if "failure" in values:
            continue
        values.update(
            {metric: times[name, metric] for metric in ("time", "host") if (name, metric) in times}
        )
        median = values["time"]["median_us"]
        values["bytes_per_second"] = nbytes / median * 1e6
        values["copy_share"] = copy["median_us"] / median if copy is not None else None
    return copy, found


def _forward(provider: Provider, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        return provider(inputs.predictions, inputs.targets)


def _forward_backward(provider: Provider, inputs: Inputs) -> tuple[Tensor, ...]:
    # autograd.grad with a given seed times neither the accumulation nor torch's own fill.
    loss = provider(inputs.predictions, inputs.targets)
    return torch.autograd.grad(loss, inputs.predictions, inputs.seed)


def _copy(pair: tuple[Tensor, Tensor]) -> Tensor:
    return pair[1].copy_(pair[0])


def _copy_sets(
    nbytes: int, device: torch.device, distinct_bytes: int
) -> list[tuple[Tensor, Tensor]]:
    """Pairs whose copy reads and writes `nbytes` together; random, as zeros may move faster."""
    elements = max(1, nbytes // 8)
    return [
        (torch.rand(elements, device=device), torch.empty(elements, device=device))
        for _ in range(distinct_bytes // nbytes + 1)
    ]
