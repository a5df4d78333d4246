"""Counts what one training step launches, by its purpose: a GPU's kernels, or on a CPU the operators below autograd."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from time import perf_counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from .peers import synchronize

Launches = list[dict[str, Any]]
"""For each name its `kind`, its `count` and the microseconds `us` of all its launches, longest first."""

OTHER = "everything else"
KINDS = {
    "augmentation": r"(resize|colour|blur_\w+)_kernel",
    "loss": r"multiview_loss|scale_gradient|power_spherical",
    "SGD": r"sgd",
    "fused by torch.compile": r"^triton_",
    "convolutions": r"^(?!.*(batch_?norm|bn_[fb]w|max_pool)).*(conv|[wd]grad|fprop|cudnn|nhwc|nchw|blocks_of_pixels)",
    "linear layers": r"gemm|gemv|nvjet|cublas|splitk|cutlass|::\w*mm$|linear",
    "BatchNorm, addition, ReLU, max-pool": (
        r"batch_?norm|bn_[fb]w|^(statistics|normalise|single|sums|gradient|pool)_kernel|CUDAFunctor_add|relu|threshold|clamp_(min|scalar)"
        r"|max_pool|::add_?\b"
    ),
    "conversions and copies": r"copy|memcpy|memset",
}
"""Patterns of the names of each kind; the first that fits counts."""


def launches_of(step: Callable[[], object], device: torch.device) -> Launches:
    """Run a step twice, and count what it launches the second time: the first one may compile."""
    step()
    if device.type != "cuda":
        with _Operators() as operators:
            step()
        return added_up(operators.found)
    synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        synchronize(device)
    kernels = (event for event in profiler.events() if event.device_type.name == "CUDA")
    return added_up((event.name, event.time_range.elapsed_us()) for event in kernels)


def added_up(events: Iterable[tuple[str, float]]) -> Launches:
    """Names and microseconds of single launches, added up."""
    counts, times = Counter[str](), defaultdict[str, float](float)
    for name, microseconds in events:
        counts[name] += 1
        times[name] += microseconds
    longest = sorted(times, key=lambda name: -times[name])
    return [
        {"kind": kind_of(name), "name": name, "count": counts[name], "us": times[name]}
        for name in longest
    ]


def kind_of(name: str) -> str:
    """The purpose of a kernel or operator of that name."""
    return next(
        (kind for kind, words in KINDS.items() if re.search(words, name, re.IGNORECASE)), OTHER
    )


def by_kind(found: Launches) -> dict[str, tuple[int, float]]:
    """Launches and microseconds of each kind that there is."""
    kinds = {kind: [each for each in found if each["kind"] == kind] for kind in (*KINDS, OTHER)}
    return {
        kind: (sum(each["count"] for each in group), sum(each["us"] for each in group))
        for kind, group in kinds.items()
        if group
    }


class _Operators(TorchDispatchMode):
    """Times every operator that computes: allocations and views are none."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, float]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = perf_counter()
        result = func(*args, **(kwargs or {}))
        name = str(func.name())
        views = any(
            each.alias_info is not None and not each.alias_info.is_write
            for each in func._schema.returns
        )
        if not views and "empty" not in name and not name.startswith("profiler::"):
            self.found.append((name, (perf_counter() - start) * 1e6))
        return result
