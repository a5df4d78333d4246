"""Providers of an operation, checked, then timed forward alone and forward with the gradient.

Before a provider is timed, its results are compared with float64 by the rule of the tests; one that
is wrong, cannot run or runs out of memory is recorded with the reason and without a time.
Everything is compared with a copy of the bytes that must move, by PyTorch on the same device and
measured in turn with the providers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from . import harness
from .cases import FORWARD, MODES
from .harness import Suite, Timer
from .tables import modes_case

_CASE_SECONDS = {"cuda": 1.5, "cpu": 3.0}
"""No new round of a case begins after this long in one mode; compiling comes on top."""

Outcome = Mapping[str, Sequence[Tensor]]
"""Results by kind, such as the gradients of all inputs."""


class Measured(Protocol):
    """A case."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the inputs."""

    def least_bytes(self, mode: str) -> int:
        """Bytes that must move."""


_Case = TypeVar("_Case", bound=Any)


class Operation(NamedTuple):
    """An operation on the inputs of a case. A provider is whatever `results` and `calls` take."""

    kinds: Sequence[str]
    """Kinds of results."""
    draw: Callable[[], Any]
    """Makes inputs, other ones at every call."""
    reference: Callable[[Any, torch.dtype], Outcome]
    """The results on inputs by plain PyTorch in a dtype."""
    results: Callable[[Any, Any], Outcome]
    """The results of a provider on inputs, in memory that may be overwritten."""
    calls: Mapping[str, Callable[[Any, Any], object]]
    """For each mode, what is timed of a provider on inputs."""


def errors(found: Outcome, exact: Outcome) -> dict[str, float]:
    """Errors of each kind of result, relative to its largest exact value; they keep a NaN."""
    relative = {}
    for kind, results in exact.items():
        difference = largest = torch.zeros((), dtype=torch.float64)
        for ours, theirs in zip(found[kind], results, strict=True):
            worst = (ours.double() - theirs).abs().max().cpu()
            difference = torch.maximum(difference, worst)  # keeps a NaN
            largest = torch.maximum(largest, theirs.abs().max().cpu())
        relative[f"{kind} error"] = (difference / largest.clamp(min=1e-30)).item()
    return relative


def allowed_errors(eager: Outcome, exact: Outcome) -> dict[str, float]:
    """The rule of the tests: twice the error of eager in the same dtype, plus a few roundings.

    Results are computed in float32 for every dtype, and rounded once to it.
    """
    few = 4 * torch.finfo(torch.float32).eps
    roundings = [max(few, torch.finfo(results[0].dtype).eps) for results in eager.values()]
    found = errors(eager, exact).items()
    return {name: 2 * value + more for (name, value), more in zip(found, roundings, strict=True)}


def check(
    run: Callable[[], Outcome], exact: Outcome, allowed: Mapping[str, float]
) -> dict[str, Any]:
    """Run a provider and compare its results with `exact`.

    Returns:
        `correct`, `failure` (None or a line), the errors (None where they are not finite) and
        `first_call_seconds`, for torch.compile with the compilation.
    """
    try:
        start = time.perf_counter()
        results = [result for found in run().values() for result in found]
        harness.synchronize(results[0].device)
        seconds = time.perf_counter() - start
        # The second results will most likely reuse this memory: what they leave unwritten is NaN.
        while results:
            results.pop().fill_(math.nan)
        found = errors(run(), exact)
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


def measure(
    case: Measured,
    operation: Operation,
    providers: Mapping[str, Any],
    device: torch.device,
    timer: Timer,
    *,
    rounds: int,
) -> dict[str, Any]:
    """Check and time all providers on one case; whatever fails is recorded with its reason.

    A provider that is a string is the reason why it cannot run.

    Returns:
        `least_bytes` of each mode, the copy's times, and for every provider the entries of `check`
        and, in each mode, None where it was not timed, or `failure`, or: `time` and on a GPU `host`
        (quartiles, see harness.py), `bytes_per_second` of the bytes that must move, `copy_share`
        (the copy's time over this one) and `peak_bytes` above the inputs.
    """
    copies: dict[str, dict[str, float] | None] = dict.fromkeys(MODES)
    try:
        count = timer.distinct_bytes // case.least_bytes(FORWARD) + 1
        sets = [operation.draw() for _ in range(count)]
        exact = operation.reference(sets[0], torch.float64)
        allowed = allowed_errors(operation.reference(sets[0], case.torch_dtype), exact)
        found = {
            name: harness.failed(each)
            if isinstance(each, str)
            else check(partial(operation.results, each, sets[0]), exact, allowed)
            for name, each in providers.items()
        }
        correct = {name: each for name, each in providers.items() if found[name]["correct"]}
        del exact
        for mode in MODES:
            timer.release()
            try:
                calls = {name: partial(operation.calls[mode], p) for name, p in correct.items()}
                times = _timed(calls, sets, case.least_bytes(mode), device, timer, rounds)
            except Exception as error:  # no memory for the copy
                reason = {"failure": harness.failure_reason(error)}
                times = {"copy": {}, **{name: dict(reason) for name in correct}}
            copies[mode] = times.pop("copy").get("time")
            for name, values in times.items():
                found[name][mode] = values
    except Exception as error:  # no memory for inputs or reference
        found = {name: harness.failed(harness.failure_reason(error)) for name in providers}
    timer.release()
    figures = (*(f"{kind}_error" for kind in operation.kinds), "first_call_seconds", *MODES)
    return {
        "least_bytes": {mode: case.least_bytes(mode) for mode in MODES},
        "copy": copies,
        "providers": {name: {**dict.fromkeys(figures), **values} for name, values in found.items()},
    }


def _timed(
    calls: Mapping[str, Callable[[Any], object]],
    sets: Sequence[Any],
    nbytes: int,
    device: torch.device,
    timer: Timer,
    rounds: int,
) -> dict[str, dict[str, Any]]:
    """Figures of the copy and of every provider in one mode, all measured in turn."""
    found: dict[str, dict[str, Any]] = {"copy": {}}
    copies = _copy_sets(nbytes, device, timer.distinct_bytes)
    measures = {("copy", "time"): timer.prepare(_copy, copies, nbytes)["time"]}
    for name, call in calls.items():
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


def run(
    suite: Suite,
    cases: Sequence[_Case],
    short_seconds: Mapping[str, float],
    make_providers: Callable[[_Case], dict[str, Any]],
    slowest: str,
    measure_case: Callable[..., dict[str, Any]],
) -> dict[str, Any]:
    """Measure the cases, print tables, and write the result file after each case.

    The provider `slowest` is the first that --short, of `short_seconds` by device, leaves out.
    """
    device = suite.device
    timer = harness.timer_for(device)
    for case, left_out in suite.cases(cases, short_seconds[device.type]):
        made = make_providers(case)
        if left_out is not None and slowest in made:
            made[slowest] = left_out
        found = measure_case(case, device, made, timer, rounds=suite.options.rounds)
        suite.add(found, modes_case(found))
    return suite.finish()
