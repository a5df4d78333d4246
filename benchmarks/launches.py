"""Counts of what a training step launches, by purpose: kernels on a GPU, operators on a CPU.

Operators are those below autograd.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from time import perf_counter
from typing import Any

import torch
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from vi_simsiam.text import markdown_grid

from .ratios import Case
from .tables import NOTHING, terminal_table, where
from .timers import synchronize

Launches = list[dict[str, Any]]
"""For each name its `kind`, `count` and total microseconds `us`, longest first."""

OTHER = "everything else"
KINDS = {
    "augmentation": r"(resize|colour|blur_\w+)_kernel",
    "loss": r"multiview_loss|scale_gradient|power_spherical",
    "SGD": r"sgd",
    "fused by torch.compile": r"^triton_",
    "convolutions": (
        r"^(?!.*(batch_?norm|bn_[fb]w|max_pool))"
        r".*(conv|[wd]grad|fprop|cudnn|nhwc|nchw|blocks_of_pixels)"
    ),
    "linear layers": r"gemm|gemv|nvjet|cublas|splitk|cutlass|::\w*mm$|linear",
    "BatchNorm, addition, ReLU, max-pool": (
        r"batch_?norm|bn_[fb]w|^(statistics|normalise|single|sums|gradient|pool)_kernel"
        r"|CUDAFunctor_add|relu|threshold|clamp_(min|scalar)|max_pool|::add_?\b"
    ),
    "conversions and copies": r"copy|memcpy|memset",
}
"""Patterns of the names of each kind; the first that fits counts."""


def launches_of(step: Callable[[], object], device: torch.device) -> Launches:
    """Run a step twice, and count what the second launches: the first may compile."""
    step()
    if device.type != "cuda":
        with _Operators() as operators:
            step()
        return _added_up(operators.found)
    synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        synchronize(device)
    kernels = (event for event in profiler.events() if event.device_type.name == "CUDA")
    return _added_up((event.name, event.time_range.elapsed_us()) for event in kernels)


def _added_up(events: Iterable[tuple[str, float]]) -> Launches:
    """Names and microseconds of single launches, added up."""
    counts, times = Counter[str](), defaultdict[str, float](float)
    for name, microseconds in events:
        counts[name] += 1
        times[name] += microseconds
    longest = sorted(times.items(), key=lambda item: -item[1])
    return [
        {"kind": kind_of(name), "name": name, "count": counts[name], "us": us}
        for name, us in longest
    ]


def kind_of(name: str) -> str:
    """The purpose of a kernel or operator of that name."""
    fits = (kind for kind, words in KINDS.items() if re.search(words, name, re.IGNORECASE))
    return next(fits, OTHER)


def by_kind(found: Launches) -> dict[str, tuple[int, float]]:
    """Launches and microseconds of each kind that occurs."""
    totals: dict[str, tuple[int, float]] = {}
    for each in found:
        count, us = totals.get(each["kind"], (0, 0.0))
        totals[each["kind"]] = count + each["count"], us + each["us"]
    return totals


def launches_case(case: Case) -> Table:
    """Launches of a step for the terminal."""
    head, *rows = _launch_rows(case)
    return terminal_table(f"{case['label']}: {_COUNTED}", head, rows)


def launches_markdown(result: dict[str, Any]) -> str:
    """Launches of a step on views at hand, by purpose: a table for each case with counts."""
    tables = []
    for case in result["cases"]:
        if case.get("launches"):
            (_, *layers), *rows = _launch_rows(case)
            tables.append(markdown_grid((f"{case['label']}: {_COUNTED}", *layers), rows))
    return "\n\n".join([*tables, where(result)]) if tables else NOTHING


_COUNTED = "microseconds (launches)"


def _launch_rows(case: Case) -> list[Sequence[str]]:
    """The head, a row for each kind of launch, and the sum; a column for each kind of layers."""
    columns = {layers: by_kind(found) for layers, found in case["launches"].items()}
    for found in columns.values():
        found["all"] = (sum(n for n, _ in found.values()), sum(us for _, us in found.values()))
    rows = [
        (
            kind,
            *(
                f"{found[kind][1]:,.0f} ({found[kind][0]})" if kind in found else "-"
                for found in columns.values()
            ),
        )
        for kind in (*KINDS, OTHER, "all")
        if any(kind in found for found in columns.values())
    ]
    return [("", *columns), *rows]


class _Operators(TorchDispatchMode):
    """Times every operator that computes, which allocations and views do not."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, float]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = perf_counter()
        result = func(*args, **(kwargs or {}))
        name = str(func.name())
        aliases = (each.alias_info for each in func._schema.returns)
        views = any(alias is not None and not alias.is_write for alias in aliases)
        if not views and "empty" not in name and not name.startswith("profiler::"):
            self.found.append((name, (perf_counter() - start) * 1e6))
        return result
