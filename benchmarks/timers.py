"""How one call is timed: by the wall clock on a CPU, under a CUDA graph of our own on a GPU.

Both timers turn a call into measures: functions that measure once and return microseconds a call. The "time" of a call is
what the device needs for it; "host" is how long the CPU is busy launching it, which bounds small batches in eager mode.
"""

from __future__ import annotations

import gc
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, TypeVar

import torch

from vi_simsiam.engine.graph import CudaGraph

_Set = TypeVar("_Set")
Measures = dict[str, Callable[[], float]]


class Timer(Protocol):
    """What the benchmark needs of a device."""

    distinct_bytes: int
    """The inputs that the timed calls rotate over must exceed this together."""

    def prepare(
        self, call: Callable[[_Set], object], sets: Sequence[_Set], nbytes: int
    ) -> Measures:
        """Warm up, and return the measures of `call` over `sets` in turn; one call moves at least `nbytes`."""

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        """Most memory in use during `call` above what was in use before; None where it is not known."""

    def release(self) -> None:
        """Give back memory that earlier measures held; they must not be used any more."""


class WallTimer:
    """Wall time on the CPU, of as many calls as take about four milliseconds."""

    distinct_bytes = 0
    _WINDOW = 4e-3
    _MOST_CALLS = 100

    def prepare(
        self, call: Callable[[_Set], object], sets: Sequence[_Set], nbytes: int
    ) -> Measures:
        """See `Timer`."""
        call(sets[0])
        start = time.perf_counter()
        call(sets[0])
        calls = math.ceil(
            self._WINDOW / max(time.perf_counter() - start, self._WINDOW / self._MOST_CALLS)
        )
        return {"time": partial(self._time, call, sets, calls)}

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        """Not known: PyTorch keeps no such count on a CPU."""
        return None

    def release(self) -> None:
        """Collect what only garbage still holds."""
        gc.collect()

    @staticmethod
    def _time(call: Callable[[_Set], object], sets: Sequence[_Set], calls: int) -> float:
        start = time.perf_counter()
        for i in range(calls):
            call(sets[i % len(sets)])
        return (time.perf_counter() - start) / calls * 1e6


class CudaTimer:
    """Kernel time from replays of a captured graph of many calls, and host time of calls in eager mode.

    All graphs share one memory pool, or the largest cases would need every provider's temporaries at once. That is
    safe because replays follow one another on one stream, and every call writes what it reads of the pool.
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
        """See `Timer`. One replay covers every set, and enough calls that its own launch does not count."""
        calls = max(len(sets), min(self._MOST_EXTRA_CALLS, math.ceil(self._LEAST_BYTES / nbytes)))
        graph = CudaGraph(self._device, beside=self._last)
        graph.warm(partial(self._calls, call, sets, self._WARM_UP))
        self._last = None  # nothing is to share a failed capture's memory
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
        """Return freed graphs' and tensors' memory to the device."""
        self._last = None
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    @staticmethod
    def _calls(call: Callable[[_Set], object], sets: Sequence[_Set], calls: int) -> None:
        """Results stay alive for one turn, so that successive calls write to different memory, not to one in the cache."""
        results: deque[object] = deque(maxlen=len(sets))
        for i in range(calls):
            results.append(call(sets[i % len(sets)]))

    @staticmethod
    def _replay(graph: CudaGraph, calls: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        graph.replay()  # busy while the host enqueues the timed replay: its launch latency stays out
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / calls * 1e3

    def _launch(self, call: Callable[[_Set], object], sets: Sequence[_Set]) -> float:
        torch.cuda.synchronize()  # an empty queue: a full one would make the host wait for the device
        start = time.perf_counter()
        for i in range(self._HOST_CALLS):
            call(sets[i % len(sets)])
        elapsed = time.perf_counter() - start
        torch.cuda.synchronize()
        return elapsed / self._HOST_CALLS * 1e6


def timer_for(device: torch.device) -> Timer:
    """The timer of a device."""
    return CudaTimer(device) if device.type == "cuda" else WallTimer()
