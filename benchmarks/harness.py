"""Common parts of the benchmarks: options, cases and --short, resume; timers, and timing in turn.

Timers turn a call into measures: functions that measure once and return microseconds a call. The
"time" of a call is what the device needs for it; "host" is how long the CPU is busy launching it,
which bounds small batches in eager mode.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from rich.console import Console
from rich.table import Table

from vi_simsiam.engine.device import keep_freed_memory
from vi_simsiam.engine.graph import CudaGraph
from vi_simsiam.engine.run import resolve_device
from vi_simsiam.errors import InputError
from vi_simsiam.text import print_line

from . import plots
from .results import provenance, read_result, result_path, write_result
from .tables import terminal_table
from .targets import HEAD, targets_for

_WINDOW = 4e-3
_MOST_CALLS = 100
_Key = TypeVar("_Key", bound=Hashable)
_Set = TypeVar("_Set")
_Case = TypeVar("_Case", bound=Any)
Measures = dict[str, Callable[[], float]]


@dataclass(frozen=True)
class SuiteOptions:
    """Options of every benchmark that measures cases."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    short: bool = False
    """Only the telling cases, within a few minutes."""
    only: str = ""
    """Only cases whose name contains this. What no name contains lists all names."""
    rounds: int = 15
    """Measurements of every provider; the median is reported."""
    out: Path | None = None
    """Folder for OUT/DEVICE/BENCHMARK.json and its plots; None to print only."""
    resume: bool = False
    """Keep the cases that the result file in --out already has from the same commit, device and
    versions."""

    least_rounds: ClassVar[int] = 3

    def __post_init__(self) -> None:
        if self.rounds < self.least_rounds:
            raise InputError(f"rounds: {self.rounds} must be at least {self.least_rounds}")
        if self.resume and self.out is None:
            raise InputError("resume: say where the result file is with --out")


class Suite:
    """One run of the benchmark of that name; the result file names the versions of `packages`."""

    def __init__(
        self,
        benchmark: str,
        options: SuiteOptions,
        packages: Iterable[str] = (),
    ) -> None:
        self.options = options
        self.console = Console()
        self.device = resolve_device(options.device)
        self.path = options.out and result_path(options.out, benchmark, self.device)
        self.result: dict[str, Any] = {
            "benchmark": benchmark,
            "device_type": self.device.type,
            **provenance(self.device, packages),
            "cases": [],
        }
        if options.resume and self.path and self.path.exists():
            before = read_result(self.path, benchmark)
            for name in ("commit", "device", "driver", "versions"):
                old, new = before.get(name), self.result[name]
                if old != new:
                    raise InputError(
                        f"resume: {self.path} was measured with {name} {old}, now it is {new}"
                    )
            self.result["cases"] = list(before["cases"])

    def cases(self, cases: Sequence[_Case], seconds: float) -> Iterator[tuple[_Case, str | None]]:
        """Yield the cases, each with None or a reason to leave out what compiles longest.

        That is left out when a third of the limit of --short, `seconds`, is used up, and the other
        cases when it nearly is.

        Raises:
            InputError: --only fits none of them.
        """
        wanted = [case for case in cases if self.options.only in case.name]
        if not wanted:
            there = "with --short there are" if self.options.short else "there are"
            names = ", ".join(repr(case.name) for case in cases)
            raise InputError(
                f"only: no case's name contains {self.options.only!r}; {there} {names}"
            )
        limit = seconds if self.options.short else math.inf
        start = time.perf_counter()
        for case in wanted:
            if any(case.name == known["name"] for known in self.result["cases"]):
                continue
            used = time.perf_counter() - start
            if used > 0.85 * limit:
                self.say(f"left out: {case.name}; --short has used {used:.0f} s")
            elif used > 0.35 * limit:
                yield case, f"left out: it compiles longest, and --short had used {used:.0f} s"
            else:
                yield case, None

    def say(self, line: str) -> None:
        """Print a line as it is."""
        print_line(self.console, line)

    def add(self, found: dict[str, Any], *tables: Table) -> None:
        """Add the result of a case, or replace an earlier one of that name, and print tables."""
        cases = {case["name"]: case for case in self.result["cases"]} | {found["name"]: found}
        self.result["cases"] = list(cases.values())
        for table in tables:
            self.console.print(table)
        if self.path is not None:
            write_result(self.path, self.result)

    def finish(self) -> dict[str, Any]:
        """Print the targets, draw the plots beside the result file, and return its content."""
        kind = self.result["benchmark"], self.result["device_type"]
        if targets := targets_for(*kind, self.result["cases"]):
            self.console.print(terminal_table("targets", HEAD, targets, numbers=False))
        if self.path is not None:
            for written in (self.path, *plots.draw(self.result, self.path.parent)):
                self.say(f"written: {written}")
        return self.result


def interleave(
    measures: Mapping[_Key, Callable[[], float]], *, rounds: int, seconds: float, least: int = 5
) -> tuple[dict[_Key, dict[str, float]], dict[_Key, str]]:
    """Take every measure once a round, in turn, so that all see the same machine.

    Measures return microseconds. No new round begins after `seconds`, but `least` are made.

    Returns:
        For each measure the quartiles; and for each that raised, the reason. A measure that raised
        is not taken again.
    """
    samples: dict[_Key, list[float]] = {key: [] for key in measures}
    failures: dict[_Key, str] = {}
    start = time.perf_counter()
    for done in range(rounds):
        if done >= least and time.perf_counter() - start > seconds:
            break
        for key in [key for key in measures if key not in failures]:
            try:
                samples[key].append(measures[key]())
            except Exception as error:
                failures[key] = failure_reason(error)
    times = {key: quartiles(values) for key, values in samples.items() if key not in failures}
    return times, failures


Prepared = tuple[dict[str, Any], Callable[[], float]]
"""The entry of a provider in the results, with `correct` and `failure`; and its measure."""


def timed_in_turn(
    prepare: Mapping[str, Callable[[], Prepared]],
    figures: Sequence[str],
    *,
    rounds: int,
    seconds: float,
) -> dict[str, dict[str, Any]]:
    """Prepare all providers and time those that are right, in turn; failures are recorded.

    Returns:
        For each provider its entry, `time` (quartiles), and None for the other `figures`.
    """
    found: dict[str, dict[str, Any]] = {}
    measures: dict[str, Callable[[], float]] = {}
    for name, make in prepare.items():
        try:
            entry, measure = make()
        except Exception as error:  # not installed, no memory, a worker that died
            entry = failed(failure_reason(error))
        found[name] = {**dict.fromkeys((*figures, "time")), **entry}
        if entry["correct"]:
            measures[name] = measure
    times, failures = interleave(measures, rounds=rounds, seconds=seconds, least=3)
    for name, reason in failures.items():
        found[name].update(failed(reason))
    for name, values in times.items():
        found[name]["time"] = values
    return found


def quartiles(values: list[float]) -> dict[str, float]:
    """Median and quartiles of times in microseconds; a single time is all three."""
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median_us": median, "lower_us": low, "upper_us": high, "rounds": len(values)}


def failed(reason: str | None) -> dict[str, Any]:
    """Entry of a provider without figures; with None as the reason nothing is wrong with it."""
    return {"correct": reason is None, "failure": reason}


def judged(errors: Mapping[str, float], allowed: Mapping[str, float]) -> dict[str, Any]:
    """Entry of a provider with these errors."""
    wrong = [
        f"{name} {errors[name]:.1e}, allowed {limit:.1e}"
        for name, limit in allowed.items()
        if not errors[name] <= limit  # a NaN is wrong, too
    ]
    return failed(f"inaccurate: {'; '.join(wrong)}" if wrong else None)


def failure_reason(error: BaseException) -> str:
    """One line for the result file, with paths relative to the working folder.

    Running out of memory inside a graph capture surfaces as the capture's own error.
    """
    cause: BaseException | None = error
    while cause is not None:
        no_memory = isinstance(cause, torch.OutOfMemoryError | MemoryError)
        if no_memory or "can't allocate memory" in str(cause):
            return "out of memory"
        cause = cause.__cause__ or cause.__context__
    lines = [line for line in str(error).splitlines() if line.strip()]
    reason = f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
    return reason.replace(f"{Path.cwd()}/", "")


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Timer:
    """Timing on one kind of device; on a CPU by the wall clock, for about four milliseconds."""

    distinct_bytes = 0
    """The inputs that the timed calls rotate over must be larger than this together."""

    def prepare(
        self, call: Callable[[_Set], object], sets: Sequence[_Set], nbytes: int
    ) -> Measures:
        """Warm up, and return the measures of `call` on each of `sets` in turn.

        A call moves at least `nbytes`.
        """
        call(sets[0])
        start = time.perf_counter()
        call(sets[0])
        seconds = time.perf_counter() - start
        calls = math.ceil(_WINDOW / max(seconds, _WINDOW / _MOST_CALLS))
        return {"time": partial(self._time, call, sets, calls)}

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        """Peak memory during `call` above that in use before; None on a CPU."""
        return None

    def release(self) -> None:
        """Free the memory of earlier measures, which must not be used any more."""
        gc.collect()

    @staticmethod
    def _time(call: Callable[[_Set], object], sets: Sequence[_Set], calls: int) -> float:
        start = time.perf_counter()
        for i in range(calls):
            call(sets[i % len(sets)])
        return (time.perf_counter() - start) / calls * 1e6


class CudaTimer(Timer):
    """Kernel time from replays of a captured graph of many calls; host time from eager calls.

    All graphs share one memory pool, or the largest cases would need every provider's temporaries
    at once. That is safe because replays follow one another on one stream, and every call writes
    what it reads from the pool.
    """

    _WARM_UP = 3
    _LEAST_BYTES = 2 * 10**9
    _MOST_EXTRA_CALLS = 16
    _HOST_CALLS = 4

    def __init__(self, device: torch.device) -> None:
        if device.index is not None:
            torch.cuda.set_device(device)  # events and replays below belong to the current device
        self.distinct_bytes = 3 * torch.cuda.get_device_properties(device).L2_cache_size
        self._device = device
        self._last: CudaGraph | None = None

    def prepare(
        self, call: Callable[[_Set], object], sets: Sequence[_Set], nbytes: int
    ) -> Measures:
        """See `Timer`. A replay covers all sets, and enough calls to hide its own launch."""
        calls = max(len(sets), min(self._MOST_EXTRA_CALLS, math.ceil(self._LEAST_BYTES / nbytes)))
        graph = CudaGraph(self._device, beside=self._last)
        graph.warm(partial(self._calls, call, sets, self._WARM_UP))
        self._last = None  # the memory of a failed capture must not be shared
        graph.record(partial(self._calls, call, sets, calls))
        self._last = graph
        graph.replay()
        torch.cuda.synchronize()
        return {
            "time": partial(self._replay, graph, calls),
            "host": partial(self._launch, call, sets),
        }

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        """See `Timer`."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def release(self) -> None:
        """See `Timer`."""
        self._last = None
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    @staticmethod
    def _calls(call: Callable[[_Set], object], sets: Sequence[_Set], calls: int) -> None:
        """Keep results for one turn, so that successive calls do not write to memory in cache."""
        results: deque[object] = deque(maxlen=len(sets))
        for i in range(calls):
            results.append(call(sets[i % len(sets)]))

    @staticmethod
    def _replay(graph: CudaGraph, calls: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        graph.replay()  # keeps the GPU busy until the timed replay is enqueued
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / calls * 1e3

    def _launch(self, call: Callable[[_Set], object], sets: Sequence[_Set]) -> float:
        torch.cuda.synchronize()  # with a full queue the host would wait for the device
        start = time.perf_counter()
        for i in range(self._HOST_CALLS):
            call(sets[i % len(sets)])
        elapsed = time.perf_counter() - start
        torch.cuda.synchronize()
        return elapsed / self._HOST_CALLS * 1e6


def timer_for(device: torch.device) -> Timer:
    """The timer of a device; on a CPU freed memory is kept, as in training."""
    if device.type == "cuda":
        return CudaTimer(device)
    keep_freed_memory()
    return Timer()
