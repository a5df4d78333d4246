"""Devices, and copies to them beside the computation."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from vi_simsiam.errors import InputError
from vi_simsiam.text import counted


class Transfers:
    """Page-locked memory and ordered asynchronous copies; on a CPU copies are immediate."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.device = device
        self.stream = torch.cuda.Stream(device) if self.cuda else None

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Allocate host memory that the device can read by itself, not initialised."""
        return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=self.cuda)

    def free_memory(self) -> int:
        """Return the bytes that can be allocated on a GPU; a CPU has no limit here."""
        return torch.cuda.mem_get_info(self.device)[0] if self.cuda else sys.maxsize

    def mark(self) -> Any:
        """Record an event after the work queued on the current stream so far."""
        return torch.cuda.current_stream(self.device).record_event() if self.cuda else None

    def copy(self, to: Tensor, given: Tensor, after: Any) -> Any:
        """Copy beside the current stream, after the event `after`; return the event of its end."""
        if self.stream is None:
            to.copy_(given)
            return None
        if after is not None:
            self.stream.wait_event(after)
        with torch.cuda.stream(self.stream):
            to.copy_(given, non_blocking=True)
        return self.stream.record_event()

    def wait(self, event: Any) -> None:
        """Make the current stream wait for the event."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def settle(self, event: Any) -> None:
        """Block until the event has happened."""
        if event is not None:
            event.synchronize()

    def done(self, event: Any) -> bool:
        """Return True if the event has happened."""
        return event is None or bool(event.query())


def find_device(name: torch.device | str) -> torch.device:
    """Return the CPU or a CUDA device with its number. Raises InputError if it does not exist."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device: {str(name)!r} is none of cpu, cuda, cuda:N")
    if device.type == "cpu":
        return device
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        found = counted(count, "CUDA device")
        raise InputError(f"device: {str(name)!r} is not here ({found} found)")
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.device("cuda", index)
