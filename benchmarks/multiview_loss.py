"""The fused loss against eager PyTorch and torch.compile: loss alone, and loss with its gradient.

Before a provider is timed its loss and gradient are held to float64 by the rule of the tests; one that is wrong, cannot run
or runs out of memory is recorded with the reason and without a time. Timed is the least that training needs: the loss
under no_grad ("forward"), and the loss with the gradient of every view by torch.autograd.grad ("forward_backward"), for
a seed gradient made beforehand. Everything is compared with a copy, by PyTorch on the same device and measured in turn
with the providers, of the bytes that cannot be avoided.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from vi_simsiam.engine.run import resolve_device
from vi_simsiam.errors import InputError
from vi_simsiam.ops.multiview_loss import LossForm

from . import plots, report
from .cases import MODES, Case, Inputs, cases_for, draw_inputs
from .harness import failure_reason, interleave, provenance, read_result, result_path, write_result
from .providers import COMPILED, Provider, allowed_errors, check, errors, failed, make_providers, reference
from .targets import targets
from .timers import Timer, timer_for

NAME = "multiview_loss"

_SHORT_SECONDS = {"cuda": 170.0, "cpu": 85.0}
_CASE_SECONDS = {"cuda": 1.5, "cpu": 3.0}
"""No new round of a case begins after this long in one mode; compiling comes on top."""


@dataclass(frozen=True)
class Options:
    """Options of `vi-simsiam bench loss`."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    short: bool = False
    """Only the telling cases, within three minutes."""
    only: str = ""
    """Only cases whose name contains this, such as "256x2048" or "bfloat16"."""
    rounds: int = 15
    """Measurements of every provider, at least 3; the median is reported."""
    out: Path | None = None
    """Folder for OUT/DEVICE/multiview_loss.json and its plots; None to print only."""
    resume: bool = False
    """Keep the cases that the result file in --out already has from the same commit, device and versions."""

    def __post_init__(self) -> None:
        if self.rounds < 3:
            raise InputError(f"rounds: {self.rounds} must be at least 3")
        if self.resume and self.out is None:
            raise InputError("resume: say where the result file is with --out")


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
    console = console or Console()
    device = resolve_device(options.device)
    wanted = [case for case in cases_for(device.type, short=options.short) if options.only in case.name]
    if not wanted:
        raise InputError(f"only: no case's name contains {options.only!r}")
    path = None if options.out is None else result_path(options.out, NAME, device)
    result: dict[str, Any] = {"benchmark": NAME, "device_type": device.type, **provenance(device), "cases": []}
    if options.resume and path is not None and path.exists():
        result["cases"] = _kept(path, result)
    timer = timer or timer_for(device)
    limit = _SHORT_SECONDS[device.type] if options.short else math.inf
    start = clock()
    for case in wanted:
        if any(case.name == known["name"] for known in result["cases"]):
            continue
        used = clock() - start
        if used > 0.85 * limit:
            console.print(f"left out: {case.name}; --short has used {used:.0f} s")
            continue
        made = providers(case.form, device)
        if used > 0.35 * limit and COMPILED[1] in made:
            made[COMPILED[1]] = f"left out: it compiles longest, and --short had used {used:.0f} s"
        result["cases"].append(measure_case(case, device, made, timer, rounds=options.rounds))
        console.print(report.case_table(result["cases"][-1]))
        if path is not None:
            write_result(path, result)
    console.print(report.targets_table(targets(result)))
    if path is not None:
        for written in (path, *plots.draw(result, path.parent)):
            console.print(f"written: {written}", soft_wrap=True)
    return result


def measure_case(
    case: Case, device: torch.device, providers: dict[str, Provider | str], timer: Timer, *, rounds: int
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
            draw_inputs(case, device, generator) for _ in range(timer.distinct_bytes // case.least_bytes("forward") + 1)
        ]
        found = _checked(case, providers, sets[0])
        timer.release()
        for mode in MODES:
            correct = {name: p for name, p in providers.items() if not isinstance(p, str) and found[name]["correct"]}
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
        **{field: getattr(case, field) for field in ("distribution", "batch", "dim", "views", "targets", "dtype")},
        "least_bytes": {mode: case.least_bytes(mode) for mode in MODES},
        "copy": {mode: copies.get(mode) for mode in MODES},
        "providers": {name: {**dict.fromkeys(MODES), **values} for name, values in found.items()},
    }


def _checked(case: Case, providers: dict[str, Provider | str], inputs: Inputs) -> dict[str, dict[str, Any]]:
    """Every provider held to float64, or the reason why it cannot run."""
    given = inputs.predictions, inputs.targets
    exact = reference(*given, case.form, torch.float64)
    allowed = allowed_errors(errors(reference(*given, case.form, case.torch_dtype), exact), case.torch_dtype)
    return {
        name: failed(p) if isinstance(p, str) else check(p, *given, exact, allowed) for name, p in providers.items()
    }


def _timed(
    case: Case, mode: str, providers: dict[str, Provider], sets: list[Inputs], timer: Timer, rounds: int
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
        values.update({metric: times[name, metric] for metric in ("time", "host") if (name, metric) in times})
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
        return torch.autograd.grad(provider(inputs.predictions, inputs.targets), inputs.predictions, inputs.seed)

    return call


def _copy(pair: tuple[Tensor, Tensor]) -> Tensor:
    return pair[1].copy_(pair[0])


def _copy_sets(nbytes: int, device: torch.device, distinct_bytes: int) -> list[tuple[Tensor, Tensor]]:
    """Pairs of which one copy reads and writes `nbytes` together; random, as zeros may move faster."""
    elements = max(1, nbytes // 8)
    return [
        (torch.rand(elements, device=device), torch.empty(elements, device=device))
        for _ in range(distinct_bytes // nbytes + 1)
    ]


def _kept(path: Path, now: dict[str, Any]) -> list[dict[str, Any]]:
    """The cases of the result file at `path`, if it was measured as this run measures."""
    before = read_result(path, NAME)
    for name in ("commit", "device", "driver", "versions"):
        if before.get(name) != now[name]:
            raise InputError(f"resume: {path} was measured with {name} {before.get(name)}, now it is {now[name]}")
    return list(before["cases"])
