"""Cost of a training step, part by part and with each kind of layers, against the network alone.

The floor is the same network's forward and backward on random tensors on the device, without views,
loss and update, on a GPU as a graph: with PyTorch's layers, with torch.compile, and with the
project's kernels. The step is measured as training runs it, with its data; parts are differences
between growing pieces. Before a step is timed, its losses on the first batches are compared with
those of a plain loop with torch's SGD on the same views.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from torch import Tensor

from vi_simsiam.config import Method
from vi_simsiam.data.cache import in_memory
from vi_simsiam.data.packed import PackedImages
from vi_simsiam.data.sources import FileSource
from vi_simsiam.engine.graph import GRAPH_PRIORITY

from .launches import Launches, launches_case, launches_of
from .names import AT_HAND, NETWORK, NETWORK_COMPILED, NETWORK_KERNELS, STEP
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
from .suite import Suite, SuiteOptions, only_cases
from .tables import step_case
from .timers import Timer, failed, failure_reason, timed_in_turn, timer_for
from .view_cases import SMALL_IMAGES, image_files, view_cases

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
"""Tolerance of the scaled losses, which are of the order of a cosine for both methods.

bfloat16 on a GPU changes them by up to 3e-4 and 1.6e-3 at 2x128, and another order of float32 sums
on a CPU by 2e-5; missed updates change them by more than twice the tolerance.
"""
_MISSING = ("losses", "time", "mfu")
_SHORT_SECONDS = {"cuda": 160.0, "cpu": 90.0}
_CASE_SECONDS = {"cuda": 8.0, "cpu": 40.0}
_SMALL_BATCH = 64
"""Largest batch of which another captured step is measured: it takes as much memory again."""
_GRAPH_BYTES = 10**9
"""Assumed traffic of a step: two of them in a graph are enough to hide its own launch."""


@dataclass(frozen=True)
class Options(SuiteOptions):
    """Options of `vi-simsiam bench step`."""

    only: Annotated[
        str,
        only_cases(
            '2x128 or "batch 64"',
            '"vi-simsiam 2x128+6x64 batch 64", views x size, local ones after the +',
        ),
    ] = ""
    rounds: int = 9
    """Measurements of everything; the median is reported."""
    kernels: Annotated[
        bool,
        tyro.conf.arg(
            help="Count what a step launches with each kind of layers, by what it is for: "
            "a GPU's kernels, a CPU's operators."
        ),
    ] = False


def step_cases(device_type: str, *, short: bool) -> tuple[StepCase, ...]:
    """The cases in the order in which they are measured, the telling ones first."""
    on_gpu = device_type == "cuda"
    views = view_cases("cuda", short=short) if on_gpu else (SMALL_IMAGES,)
    return tuple(StepCase(case, method) for method in _METHODS for case in views)


def run(options: Options, console: Console | None = None) -> dict[str, Any]:
    """Measure the cases, print tables, and write the result file after each case."""
    suite = Suite("step", options, console)
    device = suite.device
    suite.result["peak_flops"] = peak_flops(device)
    timer = timer_for(device)
    limit = _SHORT_SECONDS[device.type]
    cases = step_cases(device.type, short=options.short)
    for case, used in suite.cases(cases, limit):
        without = None
        if used > 0.35:
            without = f"left out: it compiles long, and --short had used {used * limit:.0f} s"
        images, rounds = _images(case, device.type), options.rounds
        found = measure_case(case, images, device, timer, rounds=rounds, without_compile=without)
        timer.release()
        suite.add(found, step_case(found))
    if options.kernels:  # after all times: a profiler may slow down what follows
        measured = {found["name"]: found for found in suite.result["cases"]}
        for case in cases:
            found = measured.get(case.name, {})
            if found and options.only in case.name and not found.get("launches"):
                found["launches"] = count_launches(case, found, device)
                suite.add(found, *([launches_case(found)] if found["launches"] else []))
    return suite.finish()


def measure_case(
    case: StepCase,
    images: PackedImages,
    device: torch.device,
    timer: Timer,
    *,
    rounds: int,
    without_compile: str | None = None,
) -> dict[str, Any]:
    """Check the step and measure it, its pieces and the network alone, in turn.

    Where `without_compile` is a reason, the network is not compiled.

    Returns:
        The case, `flops` of the network's forward and backward, the losses of the plain loop, and
        under `providers` for each thing measured `correct`, `failure`, `losses` (whole steps),
        `time` (quartiles) and `mfu`: the network's operations over the time and the device's peak,
        None where that is not known.
    """
    flops, expected = None, None
    try:
        parts = Parts(case, device)
        flops = parts.flops(parts.random_views(0))
        checked = batches(images, case, device, _CHECKED_STEPS)
        expected = parts.plain_losses(checked)
        found = _measured(parts, images, checked, expected, timer, rounds, without_compile)
    except Exception as error:  # no memory for the network or its views
        found = {name: failed(failure_reason(error), _MISSING) for name in (STEP, NETWORK)}
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


_Prepared = tuple[list[float] | None, Callable[[], Callable[[], float]]]
"""The losses of a step, None for a part of it; and a function that prepares the measure."""


def _measured(
    parts: Parts,
    images: PackedImages,
    checked: list[list[Tensor]],
    expected: list[float],
    timer: Timer,
    rounds: int,
    without_compile: str | None,
) -> dict[str, dict[str, Any]]:
    """Times of steps that train as the plain loop does, of their pieces and of the network."""
    device = parts.device
    cuda = device.type == "cuda"
    tolerance = _TOLERANCE[device.type][parts.case.method] / parts.loss_scale
    whole: list[WholeStep] = []
    views = [parts.random_views(seed) for seed in range(2)]

    def timed(call: Callable[[Any], object], sets: Sequence[Any] = views) -> _Prepared:
        return None, lambda: timer.prepare(call, sets, _GRAPH_BYTES)["time"]

    def whole_step(name: str) -> _Prepared:
        priority = GRAPH_PRIORITY if name == EQUAL_PRIORITIES else 0
        captured = name != NOT_CAPTURED
        step = WholeStep(parts, images, captured=captured, view_priority=priority)
        whole.append(step)
        return step.losses(_CHECKED_STEPS), lambda: step.measure

    def at_hand(layers: Layers) -> _Prepared:
        step = parts.train_step(layers)
        return parts.losses(step, checked), timed(step)[1]

    def network_alone(layers: Layers) -> _Prepared:
        return timed(parts.network_alone(layers))

    steps = [STEP, NOT_CAPTURED] if cuda else [STEP]
    if cuda and parts.case.views.batch <= _SMALL_BATCH:
        steps.append(EQUAL_PRIORITIES)
    alone: dict[str, Layers] = {NETWORK: "torch", NETWORK_COMPILED: "torch.compile"}
    if parts.default == "kernels":
        alone[NETWORK_KERNELS] = "kernels"
    prepare: dict[str, Callable[[], _Prepared]] = {
        **{name: partial(whole_step, name) for name in steps},
        **{_at_hand(layers, device): partial(at_hand, layers) for layers in _layers(device)},
        **{name: partial(network_alone, layers) for name, layers in alone.items()},
        PIECES[0]: lambda: timed(*augmentation(images, parts.case, device)),
        PIECES[1]: lambda: timed(parts.forward),
        PIECES[2]: lambda: timed(parts.forward_loss),
        PIECES[3]: lambda: timed(parts.forward_loss_backward),
        PIECES[4]: lambda: timed(parts.optimiser()),
    }
    found: dict[str, dict[str, Any]] = {}
    measures: dict[str, Callable[[], float]] = {}
    for name, make in prepare.items():
        found[name] = failed(without_compile if "torch.compile" in name else None, _MISSING)
        if found[name]["failure"]:
            continue
        try:
            losses, ready = make()
            if losses is not None:
                found[name] = judge(losses, expected, tolerance)
            if found[name]["correct"]:
                measures[name] = ready()
        except Exception as error:
            found[name] = failed(failure_reason(error), _MISSING)
    timed_in_turn(found, measures, rounds=rounds, seconds=_CASE_SECONDS[device.type])
    for step in whole:
        step.close()
    return found


def count_launches(
    case: StepCase, measured: Mapping[str, Any], device: torch.device
) -> dict[Layers, Launches]:
    """Launches of a step on views at hand, for each kind of layers that was measured.

    Where counting fails, a warning gives the reason.
    """
    found: dict[Layers, Launches] = {}
    for layers in _layers(device):
        if not measured["providers"].get(_at_hand(layers, device), {}).get("time"):
            continue
        try:
            parts = Parts(case, device)
            step = partial(parts.train_step(layers), parts.random_views(0))
            found[layers] = launches_of(step, device)
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
    """Compare the losses of a step with those of the plain loop."""
    apart = [abs(a - b) for a, b in zip(losses, expected, strict=True)]
    reason = None
    if not all(difference <= tolerance for difference in apart):  # a NaN is wrong, too
        reason = f"wrong: losses {max(apart):.1e} from the plain loop's, allowed {tolerance:.1e}"
    return {**failed(reason, _MISSING), "losses": losses}


def phases(found: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Microseconds of each part, from medians of growing pieces; None where a piece has none.

    "exposed augmentation" is the time of the step above that on views at hand, and "gaps" the time
    of the latter above its parts.
    """

    def median(name: str) -> float:
        times = found.get(name, {}).get("time")
        return math.nan if times is None else float(times["median_us"])

    made, forward, with_loss, with_backward, optimiser = map(median, PIECES)
    at_hand = median(AT_HAND)
    parts = {
        "augmentation": made,
        "exposed augmentation": median(STEP) - at_hand,
        "forward": forward,
        "loss": with_loss - forward,
        "backward": with_backward - with_loss,
        "optimiser": optimiser,
        "gaps": at_hand - (with_backward + optimiser),
    }
    return {name: None if math.isnan(value) else value for name, value in parts.items()}


def _images(case: StepCase, device_type: str) -> PackedImages:
    """Generated images in memory, enough for an epoch of one measurement."""
    with tempfile.TemporaryDirectory() as folder:
        count = image_count(case.views.batch, device_type)
        paths = image_files("generated", Path(folder), count=count, sides=case.views.sides)
        return in_memory(FileSource(paths, name="benchmark"))
