"""Launches of a step, counted by their purpose: a GPU's kernels, a CPU's operators."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import Any

import torch
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from vi_simsiam.ops.backends import extension
from vi_simsiam.text import markdown_grid

from .harness import synchronize
from .results import Case
from .tables import NOTHING, terminal_table, where

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
    if device.type == "cuda":
        synchronize(device)
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            step()
            synchronize(device)
        kernels = (event for event in profiler.events() if event.device_type.name == "CUDA")
        launched = [(event.name, event.time_range.elapsed_us()) for event in kernels]
    else:
        with _Operators() as operators:
            step()
        launched = operators.found
    totals: dict[str, dict[str, Any]] = {}
    for name, microseconds in launched:
        entry = {"kind": kind_of(name), "name": name, "count": 0, "us": 0.0}
        entry = totals.setdefault(name, entry)
        entry["count"] += 1
        entry["us"] += microseconds
    return sorted(totals.values(), key=lambda entry: -entry["us"])


def kind_of(name: str) -> str:
    """The purpose of a kernel or operator of that name."""
    fits = (kind for kind, words in KINDS.items() if re.search(words, name, re.IGNORECASE))
    return next(fits, OTHER)


def by_kind(found: Launches) -> dict[str, tuple[int, float]]:
    """Launches and microseconds of each kind that occurs, and of all."""
    totals = {"all": (0, 0.0)}
    for each in found:
        for kind in (each["kind"], "all"):
            count, us = totals.get(kind, (0, 0.0))
            totals[kind] = count + each["count"], us + each["us"]
    return totals


def _launches(case: Case) -> tuple[Sequence[str], list[Sequence[str]]]:
    """The head, with the kinds of layers, and a row for each kind of launch and for the sum."""
    columns = {layers: by_kind(found) for layers, found in case["launches"].items()}

    def cell(found: dict[str, tuple[int, float]], kind: str) -> str:
        return f"{found[kind][1]:,.0f} ({found[kind][0]})" if kind in found else "-"

    rows: list[Sequence[str]] = [
        (kind, *(cell(found, kind) for found in columns.values()))
        for kind in (*KINDS, OTHER, "all")
        if any(kind in found for found in columns.values())
    ]
    return (f"{case['label']}: microseconds (launches)", *columns), rows


def launches_case(case: Case) -> Table:
    """Launches of a step for the terminal."""
    (title, *layers), rows = _launches(case)
    return terminal_table(title, ["", *layers], rows)


def launches_markdown(result: dict[str, Any]) -> str:
    """Launches of a step on views at hand, by purpose: a table for each case with counts."""
    tables = [markdown_grid(*_launches(case)) for case in result["cases"] if case.get("launches")]
    return "\n\n".join([*tables, where(result)]) if tables else NOTHING


class _Operators(TorchDispatchMode):
    """Times every operator that computes, which allocations and views do not.

    PyTorch dispatches no call of the extension; those outside of an operator are timed as well.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, float]] = []
        self._depth = 0
        self._extension = extension()
        functions = vars(self._extension).items() if self._extension else ()
        self._functions = {name: each for name, each in functions if inspect.isbuiltin(each)}

    def __enter__(self) -> Any:
        for name, function in self._functions.items():
            setattr(self._extension, name, partial(self._timed, name, function))
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        for name, function in self._functions.items():
            setattr(self._extension, name, function)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aliases = (each.alias_info for each in func._schema.returns)
        views = any(alias is not None and not alias.is_write for alias in aliases)
        name = str(func.name())
        if views or "empty" in name or name.startswith("profiler::"):
            return func(*args, **(kwargs or {}))
        return self._timed(name, func, *args, **(kwargs or {}))

    def _timed(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._depth += 1
        start = perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            microseconds = (perf_counter() - start) * 1e6
            self._depth -= 1
            if self._depth == 0:
                self.found.append((name, microseconds))
