"""Shared by the tests of the benchmarks: providers, a scripted timer, and results."""

from __future__ import annotations

import copy
import functools
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from vi_simsiam.benchmarks import harness, multiview_loss
from vi_simsiam.benchmarks.cases import Case, draw_inputs
from vi_simsiam.benchmarks.multiview_loss import Provider
from vi_simsiam.ops.multiview_loss import LossForm, eager_loss

CPU = torch.device("cpu")
TINY = Case(3, 20)
MODES = ("forward", "forward_backward")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class ScriptedTimer(harness.Timer):
    """Gives every prepared call, in order, its time; the copy of a mode comes first.

    An exception is raised by the preparation, and a function takes the time.
    """

    def __init__(self, *microseconds: float | Exception | Callable[[], float]) -> None:
        self.script = list(microseconds)
        self.prepared = 0

    def prepare(
        self, call: Callable[[Any], object], sets: Sequence[Any], nbytes: int
    ) -> harness.Measures:
        call(sets[0])
        value = self.script[self.prepared % len(self.script)]
        self.prepared += 1
        if isinstance(value, Exception):
            raise value
        if callable(value):
            return {"time": value}
        return {"time": lambda: value, "host": lambda: value / 2}

    def peak_bytes(self, call: Callable[[], object]) -> int:
        return 1024

    def release(self) -> None:
        """Keep it: the collector takes longer than a case."""


def shown(*tables: object) -> str:
    file = io.StringIO()
    Console(file=file, width=300).print(*tables)
    return file.getvalue()


def given(form: LossForm, factor: float = 1.0) -> Provider:
    """Eager times a factor."""
    return lambda predictions, targets: factor * eager_loss(predictions, targets, form).mean()


def drawn(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    return draw_inputs(case, CPU, torch.Generator().manual_seed(0))


def scripted_result() -> dict[str, Any]:
    """A result of `bench loss`: cpu 10 us, eager 40 us, torch.compile 20 us, the copy 5 us."""
    return json.loads(_scripted_loss())  # type: ignore[no-any-return]


@functools.cache
def _scripted_loss() -> str:
    case = Case(64, 512)
    providers = dict.fromkeys(("eager", "torch.compile", "cpu"), given(case.form))
    timer = ScriptedTimer(5, 40, 20, 10)
    found = multiview_loss.measure_case(case, CPU, providers, timer, rounds=5)
    return json.dumps(_result("multiview_loss", "cpu", [found]))


def _result(benchmark: str, device_type: str, cases: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "benchmark": benchmark,
        "device_type": device_type,
        "device": "NVIDIA H200 (139 GiB, compute capability 9.0)",
        "driver": "1",
        "processor": "some, 2 cores",
        "date": "2026-01-01T00:00:00+00:00",
        "versions": {"torch": "2"},
        "workers": 16,
        "data": "generated",
        "cases": cases,
    }


def slower(
    result: dict[str, Any], factor: float, *, spread: float = 0.0, copied: float = 1.0
) -> dict[str, Any]:
    """The same result where cpu needs `factor` times as long, and the copy `copied` times."""
    changed = copy.deepcopy(result)
    for case in changed["cases"]:
        for mode in MODES:
            times = case["providers"]["cpu"][mode]["time"]
            times["median_us"] *= factor
            times["lower_us"], times["upper_us"] = (
                times["median_us"] * (1 + s * spread / 2) for s in (-1, 1)
            )
            case["copy"][mode]["median_us"] *= copied
    return changed


def scale(times: dict[str, float], factor: float) -> None:
    for quartile in ("median_us", "lower_us", "upper_us"):
        times[quartile] *= factor


def timed(microseconds: float, **extra: Any) -> dict[str, Any]:
    """Entry of a correct provider of input pipeline, step or training."""
    times = dict.fromkeys(("median_us", "lower_us", "upper_us"), microseconds) | {"rounds": 3}
    return {"correct": True, "failure": None, "time": times, **extra}


def scripted_pipeline(benchmark: str) -> dict[str, Any]:
    """A result of `bench augment`, `step` or `train`, with round figures as from a GPU."""
    cases = {"augment": _augment_cases, "step": _step_cases, "train": _train_cases}[benchmark]()
    return _result(benchmark, "cuda", cases)


def _augment_cases() -> list[dict[str, Any]]:
    def views(rate: float) -> dict[str, Any]:
        return timed(128 / rate * 1e6, views_per_second=rate, error=None, mean=0.0, std=1.0)

    missing = {"correct": False, "failure": "ImportError: kornia is not installed", "time": None}
    return [
        {
            "name": f"2x{size} batch 64",
            "label": f"2x{size}, batch 64",
            "yardstick": "lightly",
            "providers": {"vi-simsiam": views(rate), "lightly": views(1000.0), "kornia": missing},
        }
        for size, rate in ((128, 12000.0), (224, 4000.0))
    ]


def _step_cases() -> list[dict[str, Any]]:
    """The first one with our kernels and torch.compile."""
    layers = {
        "network alone": 2000.0,
        "network alone, kernels": 1000.0,
        "network alone, torch.compile": 1250.0,
        "step on views at hand, torch, view by view": 2060.0,
        "step on views at hand": 1030.0,
    }
    return [
        {
            "name": f"{method} 2x{size} batch 64",
            "label": f"{method}, 2x{size}, batch 64",
            "losses": [1.0],
            "yardstick": "network alone",
            "providers": {
                "step": timed(whole, mfu=0.4, losses=[1.0]),
                **{name: timed(time, mfu=0.42, losses=None) for name, time in others.items()},
            },
            "phases": {"augmentation": 100.0, "exposed augmentation": 20.0, "forward": 300.0},
        }
        for method, size, whole, others in (
            ("vi-simsiam", 128, 1050.0, layers),
            ("simsiam", 224, 1100.0, {"network alone": 1000.0}),
        )
    ]


def _train_cases() -> list[dict[str, Any]]:
    missing = dict.fromkeys(("caching_seconds", "seconds_to_target", "peak_bytes"))
    seconds = {"training_seconds": 200.0, "cold_start_seconds": 20.0, "evaluation_seconds": 30.0}

    def training(rate: float, **changed: Any) -> dict[str, Any]:
        figures = {"views_per_second": rate, "knn_top1": 0.79, **missing, **seconds, **changed}
        return timed(128 / rate * 1e6, **figures)

    ours = {"training_seconds": 110.0, "caching_seconds": 3.0, "seconds_to_target": 60.0}
    ours |= {"knn_top1": 0.8, "peak_bytes": 2e9}
    common = {"batch": 64, "images": 9469, "epochs": 200, "workers": 16}
    common |= {"target_accuracy": 0.75, "yardstick": "lightly"}
    return [
        {
            **common,
            "name": f"{data} {label}",
            "label": f"{data}, {label}",
            "data": data,
            "view_label": label,
            "providers": {
                "vi-simsiam": training(400.0, **ours),
                "vi-simsiam, method simsiam": training(400.0),
                "lightly": training(250.0),
            },
        }
        for data, label in (("imagenette-128", "2x128"), ("cifar10", "2x32"))
    ]
