"""Cost of a training step, part by part and with each kind of layers, against the network alone.

The floor is the same network's forward and backward on random tensors that lie on the device, without views, loss and
update, on a GPU as a graph: with PyTorch's layers, with torch.compile, and with the project's kernels. The step is measured
as training runs it, with its data; parts are differences of what was measured for growing pieces. Before a step is timed,
its losses on the first batches are held to those of a plain loop with torch's SGD on the same views.
"""

from __future__ import annotations

import itertools
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from vi_simsiam.config import Method
from vi_simsiam.data.cache import in_memory
from vi_simsiam.data.packed import PackedImages
from vi_simsiam.data.sources import FileSource
from vi_simsiam.engine.graph import GRAPH_PRIORITY

from . import pipeline_plots, pipeline_tables
from .harness import failure_reason, interleave
from .images import image_files
from .launches import Launches, launches_of
from .pipeline_targets import AT_HAND, COMPILED, KERNELS, NETWORK, STEP, pipeline_targets
from .step_parts import (
    Layers,
    Parts,
    StepCase,
    WholeStep,
    augmentation,
    batches,
    default_layers,
    image_count,
    peak_flops,
)
from .suite import Suite, SuiteOptions
from .timers import Timer, timer_for
from .view_cases import SMALL_IMAGES, ViewCase, view_cases

NAME = "step"
NOT_CAPTURED = "step, not captured"
EQUAL_PRIORITIES = "step, views as urgent as the network"
_LAYERS: tuple[Layers, ...] = ("torch, view by view", "torch", "torch.compile", "kernels")
YARDSTICK = NETWORK
_METHODS: tuple[Method, ...] = ("vi-simsiam", "simsiam")
PIECES = ("augmentation", "forward", "forward + loss", "forward + loss + backward", "optimiser")
_CHECKED_STEPS = 6
"""Enough that the last ones are replays: a step is checked and warmed up before it is recorded."""
_TOLERANCE: dict[str, dict[Method, float]] = {
    "cuda": {"vi-simsiam": 1e-3, "simsiam": 2.5e-3},
    "cpu": {"vi-simsiam": 1e-4, "simsiam": 1e-4},
}
"""Tolerance of the losses that are trained, which are of the order of a cosine for both methods. bfloat16 on a GPU makes up to 3e-4
and 1.6e-3 at 2x128, and another order of float32 sums on a CPU 2e-5; updates that are missed make more than twice the tolerance."""
_SHORT_SECONDS = {"cuda": 160.0, "cpu": 90.0}
_CASE_SECONDS = {"cuda": 8.0, "cpu": 40.0}
_SMALL_BATCH = 64
"""Largest batch of which another captured step is measured: it takes as much memory again."""
_GRAPH_BYTES = 10**9
"""Stands for the traffic of a step: two of them in a graph are enough that its own launch does not count."""


@dataclass(frozen=True)
class Options(SuiteOptions):
    """Options of `vi-simsiam bench step`."""

    only: str = ""
    """Only cases whose name contains this, such as 2x128 or "batch 64"; a name is "vi-simsiam 2x128+6x64 batch 64", views x size, local ones after the +. What no name contains lists all names."""
    rounds: int = 9
    """Measurements of everything; the median is reported."""
    kernels: bool = False
    """Count what a step launches with each kind of layers, by what it is for: a GPU's kernels, a CPU's operators."""


def step_cases(device_type: str, *, short: bool) -> tuple[StepCase, ...]:
    """The cases in the order in which they are measured, the telling ones first."""
    views: Sequence[ViewCase] = (SMALL_IMAGES,)
    if device_type == "cuda":
        views = view_cases("cuda", short=short)
    return tuple(StepCase(case, method) for method in _METHODS for case in views)


def run(
    options: Options,
    console: Console | None = None,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Measure the cases, print tables, and write the result file after each case if a folder is given.

    Args:
        options: what to measure.
        console: where to print.
        clock: the time in seconds, for the limit on --short.
    """
    suite = Suite(NAME, options, console)
    device = suite.device
    suite.result["peak_flops"] = peak_flops(device)
    timer = timer_for(device)
    limit = _SHORT_SECONDS[device.type]
    cases = step_cases(device.type, short=options.short)
    for case, used in suite.cases(cases, limit, clock):
        without = (
            f"left out: it compiles long, and --short had used {used * limit:.0f} s"
            if used > 0.35
            else None
        )
        images = _images(case, device.type)
        found = measure_case(
            case, images, device, timer, rounds=options.rounds, without_compile=without
        )
        timer.release()
        suite.add(found, pipeline_tables.step_case(found))
    if options.kernels:  # after all times: a profiler may slow down what follows
        for case, found in itertools.product(cases, suite.result["cases"]):
            if (
                case.name == found["name"]
                and options.only in case.name
                and not found.get("launches")
            ):
                found["launches"] = count_launches(case, found, device)
                suite.add(
                    found, *([pipeline_tables.launches_case(found)] if found["launches"] else [])
                )
    return suite.finish(pipeline_targets(suite.result), partial(pipeline_plots.draw, NAME))


def measure_case(
    case: StepCase,
    images: PackedImages,
    device: torch.device,
    timer: Timer,
    *,
    rounds: int,
    without_compile: str | None = None,
) -> dict[str, Any]:
    """Check the step and measure it, its pieces and the network alone, in turn; failures are recorded with the reason.

    Args:
        case: what to train.
        images: what to train on.
        device: where.
        timer: how pieces are timed.
        rounds: measurements of everything.
        without_compile: why the network is not compiled; None to compile it.

    Returns:
        The case, `flops` of the network's forward and backward, the losses of the plain loop, and under `providers` for each
        measured thing `correct`, `failure`, `losses` (whole steps), `time` (quartiles) and `mfu`: the network's operations over
        the time and the device's peak, None where that is not known.
    """
    flops, expected = None, None
    try:
        parts = Parts(case, device)
        flops = parts.flops(parts.random_views(0))
        checked = batches(images, case, device, _CHECKED_STEPS)
        expected = parts.plain_losses(checked)
        found = _measured(parts, images, checked, expected, timer, rounds, without_compile)
    except Exception as error:  # no memory for the network or its views
        found = {name: failed(failure_reason(error)) for name in (STEP, NETWORK)}
    peak = peak_flops(device)
    for name, values in found.items():
        if flops and peak and values["time"] is not None and name not in PIECES:
            values["mfu"] = flops / values["time"]["median_us"] * 1e6 / peak
    return {
        "name": case.name,
        "label": f"{case.method}, {case.views.label}, batch {case.views.batch}",
        "batch": case.views.batch,
        "views": case.views.views,
        "method": case.method,
        "flops": flops,
        "losses": expected,
        "yardstick": YARDSTICK,
        "providers": found,
        "phases": phases(found),
    }


def _measured(
    parts: Parts,
    images: PackedImages,
    checked: list[list[Tensor]],
    expected: list[float],
    timer: Timer,
    rounds: int,
    without_compile: str | None,
) -> dict[str, dict[str, Any]]:
    """Times of steps that train as the plain loop does, of their pieces and of the network alone."""
    kind = parts.device.type
    tolerance = _TOLERANCE[kind][parts.case.method] / parts.loss_scale
    found: dict[str, dict[str, Any]] = {}
    measures: dict[str, Callable[[], float]] = {}
    whole: list[WholeStep] = []
    variants = [STEP] if kind == "cpu" else [STEP, NOT_CAPTURED]
    if kind == "cuda" and parts.case.views.batch <= _SMALL_BATCH:
        variants.append(EQUAL_PRIORITIES)
    for name in variants:
        try:
            priority = GRAPH_PRIORITY if name == EQUAL_PRIORITIES else 0
            whole.append(
                WholeStep(parts, images, captured=name != NOT_CAPTURED, view_priority=priority)
            )
            found[name] = judge(whole[-1].losses(_CHECKED_STEPS), expected, tolerance)
        except Exception as error:
            found[name] = failed(failure_reason(error))
        if found[name]["correct"]:
            measures[name] = whole[-1].measure
    views = [parts.random_views(seed) for seed in range(2)]
    for layers in _layers(parts.device):
        name = _at_hand(layers, parts.device)
        found[name] = failed(without_compile if layers == "torch.compile" else None)
        if found[name]["failure"]:
            continue
        try:
            at_hand = parts.train_step(layers)
            found[name] = judge(parts.losses(at_hand, checked), expected, tolerance)
            if found[name]["correct"]:
                measures[name] = timer.prepare(at_hand, views, _GRAPH_BYTES)["time"]
        except Exception as error:
            found[name] = failed(failure_reason(error))
    for name, prepare in _calls(parts, images).items():
        found[name] = failed(without_compile if name == COMPILED else None)
        if found[name]["failure"]:
            continue
        try:
            call, sets = prepare(views)
            measures[name] = timer.prepare(call, sets, _GRAPH_BYTES)["time"]
        except Exception as error:
            found[name] = failed(failure_reason(error))
    times, failures = interleave(measures, rounds=rounds, seconds=_CASE_SECONDS[kind], least=3)
    for step in whole:
        step.close()
    for name, reason in failures.items():
        found[name].update(correct=False, failure=reason)
    for name, quartiles in times.items():
        found[name]["time"] = quartiles
    return found


def count_launches(
    case: StepCase, measured: Mapping[str, Any], device: torch.device
) -> dict[Layers, Launches]:
    """Launches of a step on views at hand, for each kind of layers that was measured; a profiler that fails is warned of."""
    found: dict[Layers, Launches] = {}
    for layers in _layers(device):
        if not measured["providers"].get(_at_hand(layers, device), {}).get("time"):
            continue
        try:
            parts = Parts(case, device)
            found[layers] = launches_of(
                partial(parts.train_step(layers), parts.random_views(0)), device
            )
        except Exception as error:
            warnings.warn(
                f"launches with the layers {layers!r} are not counted: {failure_reason(error)}",
                stacklevel=2,
            )
    return found


def _layers(device: torch.device) -> Sequence[Layers]:
    return _LAYERS if device.type == "cuda" else (default_layers(device),)


def _at_hand(layers: Layers, device: torch.device) -> str:
    return AT_HAND if layers == default_layers(device) else f"{AT_HAND}, {layers}"


def judge(losses: list[float], expected: list[float], tolerance: float) -> dict[str, Any]:
    """Hold the losses of a step to those of the plain loop."""
    apart = [abs(a - b) for a, b in zip(losses, expected, strict=True)]
    right = all(difference <= tolerance for difference in apart)  # a NaN is wrong, too
    reason = (
        None
        if right
        else f"wrong: losses {max(apart):.1e} from the plain loop's, allowed {tolerance:.1e}"
    )
    return {**failed(reason), "losses": losses}


def failed(reason: str | None) -> dict[str, Any]:
    """What is recorded without a time; with None as the reason nothing is wrong with it."""
    return {"correct": reason is None, "failure": reason, "losses": None, "time": None, "mfu": None}


def phases(found: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Microseconds of each part, from medians of growing pieces; None where a piece has none.

    "exposed augmentation" is what the step takes longer than on views at hand, "gaps" what that takes longer than its parts.
    """

    def median(name: str) -> float | None:
        times = found.get(name, {}).get("time")
        return None if times is None else float(times["median_us"])

    def difference(larger: float | None, *parts: float | None) -> float | None:
        return (
            None
            if larger is None or None in parts
            else larger - sum(part for part in parts if part is not None)
        )

    made, forward, with_loss, with_backward, optimiser = (median(piece) for piece in PIECES)
    at_hand = median(AT_HAND)
    return {
        "augmentation": made,
        "exposed augmentation": difference(median(STEP), at_hand),
        "forward": forward,
        "loss": difference(with_loss, forward),
        "backward": difference(with_backward, with_loss),
        "optimiser": optimiser,
        "gaps": difference(at_hand, with_backward, optimiser),
    }


def _calls(
    parts: Parts, images: PackedImages
) -> dict[str, Callable[[list[Any]], tuple[Callable[[Any], object], Sequence[Any]]]]:
    """What is timed by the timer: for random views, a function and what to call it with in turn."""

    def augmenting(views: list[Any]) -> tuple[Callable[[Any], object], Sequence[Any]]:
        call, table = augmentation(images, parts.case, parts.device)
        return call, [table]

    def network(layers: Layers, views: list[Any]) -> tuple[Callable[[Any], object], Sequence[Any]]:
        return parts.network_alone(layers), views

    alone: dict[str, Layers] = {NETWORK: "torch", COMPILED: "torch.compile"}
    if parts.default == "kernels":
        alone[KERNELS] = "kernels"
    return {
        **{name: partial(network, layers) for name, layers in alone.items()},
        PIECES[0]: augmenting,
        PIECES[1]: lambda views: (parts.forward, views),
        PIECES[2]: lambda views: (parts.forward_loss, views),
        PIECES[3]: lambda views: (parts.forward_loss_backward, views),
        PIECES[4]: lambda views: (parts.optimiser(), views),
    }


def _images(case: StepCase, device_type: str) -> PackedImages:
    """Generated images in memory, enough for an epoch of one measurement."""
    with tempfile.TemporaryDirectory() as folder:
        count = image_count(case.views.batch, device_type)
        paths = image_files("generated", Path(folder), count=count, sides=case.views.sides)
        return in_memory(FileSource(paths, name="benchmark"))
