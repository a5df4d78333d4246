"""The fused loss against eager PyTorch and torch.compile: loss alone, and loss with its gradient.

Before a provider is timed its loss and gradient are held to float64 by the rule of the tests; one that is wrong, cannot run
or runs out of memory is recorded with the reason and without a time. Timed is the least that training needs: the loss
under no_grad ("forward"), and the loss with the gradient of every view by torch.autograd.grad ("forward_backward"), for
a seed gradient made beforehand. Everything is compared with a copy, by PyTorch on the same device and measured in turn
with the providers, of the bytes that cannot be avoided.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from vi_simsiam.ops.multiview_loss import LossForm

from . import plots, report
from .cases import MODES, Case, Inputs, cases_for, draw_inputs
from .harness import failure_reason, interleave
from .providers import (
    COMPILED,
    Provider,
    allowed_errors,
    check,
    errors,
    failed,
    make_providers,
    reference,
)
from .suite import Suite, SuiteOptions
from .targets import targets
from .timers import Timer, timer_for

NAME = "multiview_loss"

_SHORT_SECONDS = {"cuda": 170.0, "cpu": 85.0}
_CASE_SECONDS = {"cuda": 1.5, "cpu": 3.0}
"""No new round of a case begins after this long in one mode; compiling comes on top."""


@dataclass(frozen=True)
class Options(SuiteOptions):
    """Options of `vi-simsiam bench loss`."""

    only: str = ""
    """Only cases whose name contains this, such as 256x2048, bfloat16 or cosine; a name is "power_spherical 256x2048 2x2 float32", batch x D, then views x targets. What no name contains lists all names."""


def run(
    options: Options,
    console: Console | None = None,
    *,
    providers: Callable[[LossForm, torch.device], dict[str, Provider | str]] = make_providers,
    timer: Timer | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Measure the cases, print tables, and write the result file after each case if a folder is given.

    Args:
        options: what to measure.
        console: where to print.
        providers: makes the providers of a case, or for those that cannot run the reason.
        timer: how to time; None for the device's own.
        clock: the time in seconds, for the limit on --short.
    """
    suite = Suite(NAME, options, console)
    device = suite.device
    timer = timer or timer_for(device)
    limit = _SHORT_SECONDS[device.type]
    for case, used in suite.cases(cases_for(device.type, short=options.short), limit, clock):
        made = providers(case.form, device)
        if used > 0.35 and COMPILED[1] in made:
            made[COMPILED[1]] = (
                f"left out: it compiles longest, and --short had used {used * limit:.0f} s"
            )
        found = measure_case(case, device, made, timer, rounds=options.rounds)
        suite.add(found, report.case_table(found))
    return suite.finish(targets(suite.result), plots.draw)


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
        The case, the copy's times, and for every provider what `providers.check` says and, in each mode, None where it was not
        timed, or `failure`, or: `time` and on a GPU `host` (quartiles, see timers.py), `bytes_per_second` of the bytes
        that cannot be avoided, `copy_share` (the copy's time over this one) and `peak_bytes` above the inputs.
    """
    copies: dict[str, dict[str, float] | None] = {}
    found: dict[str, dict[str, Any]] = {}
    try:
        generator = torch.Generator(device).manual_seed(0)
        sets = [
            draw_inputs(case, device, generator)
            for _ in range(timer.distinct_bytes // case.least_bytes("forward") + 1)
        ]
        found = _checked(case, providers, sets[0])
        timer.release()
        for mode in MODES:
            correct = {
                name: p
                for name, p in providers.items()
                if not isinstance(p, str) and found[name]["correct"]
            }
            try:
                copies[mode], times = _timed(case, mode, correct, sets, timer, rounds)
            except Exception as error:  # no memory for the copy
                reason = failure_reason(error)
                times = {name: {"failure": reason} for name in correct}
            for name, values in times.items():
                found[name][mode] = values
            timer.release()
    except Exception as error:  # no memory for inputs or reference
        found = {name: failed(failure_reason(error)) for name in providers}
    timer.release()
    return {
        "name": case.name,
        **{
            field: getattr(case, field)
            for field in ("distribution", "batch", "dim", "views", "targets", "dtype")
        },
        "least_bytes": {mode: case.least_bytes(mode) for mode in MODES},
        "copy": {mode: copies.get(mode) for mode in MODES},
        "providers": {name: {**dict.fromkeys(MODES), **values} for name, values in found.items()},
    }


def _checked(
    case: Case, providers: dict[str, Provider | str], inputs: Inputs
) -> dict[str, dict[str, Any]]:
    """Every provider held to float64, or the reason why it cannot run."""
    given = inputs.predictions, inputs.targets
    exact = reference(*given, case.form, torch.float64)
    allowed = allowed_errors(
        errors(reference(*given, case.form, case.torch_dtype), exact), case.torch_dtype
    )
    return {
        name: failed(p) if isinstance(p, str) else check(p, *given, exact, allowed)
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
        call = _forward(provider) if mode == "forward" else _forward_backward(provider)
        try:
            prepared = timer.prepare(call, sets, nbytes)
            found[name]["peak_bytes"] = timer.peak_bytes(lambda call=call: call(sets[0]))  # type: ignore[misc]
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


def _forward(provider: Provider) -> Callable[[Inputs], Tensor]:
    def call(inputs: Inputs) -> Tensor:
        with torch.no_grad():
            return provider(inputs.predictions, inputs.targets)

    return call


def _forward_backward(provider: Provider) -> Callable[[Inputs], tuple[Tensor, ...]]:
    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        # autograd.grad with a given seed: neither accumulation nor torch's own fill is timed, for any provider.
        return torch.autograd.grad(
            provider(inputs.predictions, inputs.targets), inputs.predictions, inputs.seed
        )

    return call


def _copy(pair: tuple[Tensor, Tensor]) -> Tensor:
    return pair[1].copy_(pair[0])


def _copy_sets(
    nbytes: int, device: torch.device, distinct_bytes: int
) -> list[tuple[Tensor, Tensor]]:
    """Pairs of which one copy reads and writes `nbytes` together; random, as zeros may move faster."""
    elements = max(1, nbytes // 8)
    return [
        (torch.rand(elements, device=device), torch.empty(elements, device=device))
        for _ in range(distinct_bytes // nbytes + 1)
    ]
