"""Timers: by the wall clock on a CPU, with a CUDA graph on a GPU; and timing in turn.

Both timers turn a call into measures: functions that measure once and return microseconds a call.
The "time" of a call is what the device needs for it; "host" is how long the CPU is busy launching
it, which bounds small batches in eager mode.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from vi_simsiam.engine.graph import CudaGraph

_WINDOW = 4e-3
_MOST_CALLS = 100
_Key = TypeVar("_Key", bound=Hashable)
_Set = TypeVar("_Set")
Measures = dict[str, Callable[[], float]]


def interleave(
    measures: Mapping[_Key, Callable[[], float]],
    *,
    rounds: int,
    seconds: float,
    least: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[dict[_Key, dict[str, float]], dict[_Key, str]]:
    """Take every measure once a round, in turn, so that all see the same machine.

    Measures return microseconds. No new round begins after `seconds`, but `least` are made.

    Returns:
        For each measure the quartiles; and for each that raised, the reason. A measure that raised
        is not taken again.
    """
    samples: dict[_Key, list[float]] = {key: [] for key in measures}
    failures: dict[_Key, str] = {}
    start = clock()
    for done in range(rounds):
        if done >= least and clock() - start > seconds:
            break
        for key, measure in measures.items():
            if key in failures:
                continue
            try:
                samples[key].append(measure())
            except Exception as error:
                failures[key] = failure_reason(error)
    times = {key: quartiles(values) for key, values in samples.items() if key not in failures}
    return times, failures


def timed_in_turn(
    found: dict[str, dict[str, Any]],
    measures: Mapping[str, Callable[[], float]],
    *,
    rounds: int,
    seconds: float,
) -> None:
    """Take the measures in turn and enter `time`, or the failure, into `found`, by provider."""
    times, failures = interleave(measures, rounds=rounds, seconds=seconds, least=3)
    for name, reason in failures.items():
        found[name].update(correct=False, failure=reason)
    for name, values in times.items():
        found[name]["time"] = values


def quartiles(values: list[float]) -> dict[str, float]:
    """Median and quartiles of times in microseconds; a single time is all three."""
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median_us": median, "lower_us": low, "upper_us": high, "rounds": len(values)}


def failed(reason: str | None, missing: Iterable[str]) -> dict[str, Any]:
    """Entry of a provider without figures; with None as the reason nothing is wrong with it."""
    return {"correct": reason is None, "failure": reason, **dict.fromkeys(missing)}


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
    """The timer of a device."""
    return CudaTimer(device) if device.type == "cuda" else Timer()
