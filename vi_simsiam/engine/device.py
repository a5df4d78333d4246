"""Settings of the device that a training runs on, and its errors."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

import torch

from vi_simsiam.errors import TrainingError

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Numbers of options in glibc's malloc.h."""


def prepare(device: torch.device, *, deterministic: bool) -> None:
    """Set what the process needs before it trains on a device.

    Args:
        device: where it trains.
        deterministic: it will use `deterministic`.
    """
    if deterministic:  # cuBLAS reads it at its first use (NVIDIA, "Reproducibility")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if device.type == "cpu":
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the rest of this process; elsewhere do nothing.

    A step takes and frees tensors of tens of megabytes. By default each is returned to the system
    at once, which then clears its pages for the next one: at 2 x 128 pixels and batch 64 some
    230,000 pages a step, 18 % of its time. The process takes more memory, since the heap has gaps:
    2.3 instead of 2.1 GB at that size, at batch 128 3.6 instead of 2.9 GB. Tensors from 256 MB on
    are returned as before.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no C library of that kind
        options = ctypes.CDLL(None).mallopt
        options(_MMAP_THRESHOLD, 256 << 20)
        options(_TRIM_THRESHOLD, -1)  # never


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Let torch choose algorithms that give the same bits every time, and refuse others.

    The project's kernels do so anyway: their partial sums are added in a fixed order.
    """
    before = torch.are_deterministic_algorithms_enabled()
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)


@contextlib.contextmanager
def memory_errors(device: torch.device) -> Iterator[None]:
    """Turn a GPU's out-of-memory error into one line with the options that need less memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device)
        text = " ".join(str(error).split(". ")[:2])
        raise TrainingError(
            f"memory of {device}: {text} ({free / 1e9:.1f} of {total / 1e9:.1f} GB are free); "
            "a larger --accumulate, fewer --local-views or --data-memory host need less"
        ) from error
