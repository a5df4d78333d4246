"""Tickets: counters on a GPU by which the last program of a launch recognises itself.

A ticket is 0 before and after a launch. Launches that may overlap need different ones. Launches of
one stream follow each other and share theirs; torch never destroys a stream or uses one in two
threads. A captured launch may be replayed on any stream and gets its own, cut from memory that is
already 0: clearing it in the graph would take as long as the loss of a small batch.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

_TICKETS = 2**20
"""Tickets of each GPU, 4 MB. Captured launches keep theirs: all benchmarks of the loss take some
100,000, a training run a few."""


class _Tickets:
    """The tickets of one GPU."""

    def __init__(self, device: torch.device) -> None:
        self._memory = torch.zeros(_TICKETS, dtype=torch.int32, device=device)
        torch.cuda.current_stream().synchronize()  # once: other streams will use the zeros
        self._taken = 0
        self._taking = threading.Lock()
        self._of_streams: dict[tuple[int, int], Tensor] = {}

    def take(self, capturing: bool, count: int = 1) -> Tensor:
        """`count` tickets for a launch on the current stream."""
        if capturing:
            return self._new(count)
        key = torch.cuda.current_stream().cuda_stream, count
        if key not in self._of_streams:
            self._of_streams[key] = self._new(count)
        return self._of_streams[key]

    def _new(self, count: int) -> Tensor:
        with self._taking:
            if self._taken + count > len(self._memory):
                return torch.zeros(count, dtype=torch.int32, device=self._memory.device)
            first, self._taken = self._taken, self._taken + count
        return self._memory[first : first + count]


_tickets: dict[int, _Tickets] = {}


def new_tickets(device: torch.device, count: int = 1) -> Tensor:
    """`count` tickets, int32, for a launch on the device's current stream."""
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    with torch.cuda.device(device):
        capturing = torch.cuda.is_current_stream_capturing()
        index = torch.cuda.current_device()
        if index not in _tickets:
            if capturing:  # the very first launch: memory cannot be set aside now
                return torch.zeros(count, dtype=torch.int32, device=device)
            _tickets[index] = _Tickets(device)
        return _tickets[index].take(capturing, count)


@torch.compiler.assume_constant_result
def reserve_tickets(device_type: str, index: int | None) -> None:
    """Set tickets aside while a graph is traced, before compiled code may run in a CUDA graph.

    torch.export calls this under its modes, which would make the memory fake.
    """
    if device_type == "cuda" and torch.cuda.is_available():
        with _disable_current_modes():
            index = torch.cuda.current_device() if index is None else index
            new_tickets(torch.device(device_type, index))
