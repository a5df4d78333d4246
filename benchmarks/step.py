"""Cost of a training step, part by part and with each kind of layers, against the network alone.

The floor is the same network's forward and backward on random tensors on the device, without views,
loss and update, on a GPU as a graph: with PyTorch's layers, with torch.compile, and with the
project's kernels. The step is measured as training runs it, with its data; parts are differences
between growing pieces. Before a step is timed, its losses on the first batches are compared with
those of a plain loop with torch's SGD on the same views, in float64 on a CPU.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vi_simsiam.config import Method
from vi_simsiam.data.cache import in_memory
from vi_simsiam.data.packed import PackedImages
from vi_simsiam.data.sources import FileSource
from vi_simsiam.engine.graph import GRAPH_PRIORITY

from . import harness
from .cases import SMALL_IMAGES, image_files, view_cases
from .harness import Prepared, Suite, SuiteOptions, Timer
from .launches import Launches, launches_case, launches_of
from .results import AT_HAND, NETWORK, NETWORK_COMPILED, NETWORK_KERNELS, STEP, step_with
from .step_parts import (
    STEPS,
    Layers,
    Parts,
    StepCase,
    WholeStep,
    peak_flops,
    training_layers,
)
from .tables import step_case

NOT_CAPTURED = "step, not captured"
EQUAL_PRIORITIES = "step, views as urgent as the network"
PIECES = ("augmentation", "forward", "forward + loss", "forward + loss + backward", "optimiser")
_METHODS: tuple[Method, ...] = ("vi-simsiam", "simsiam")
_CHECKED_STEPS = 6
"""Enough that the last ones are replays: a step is checked and warmed up before it is recorded."""
_TOLERANCE: dict[str, dict[Method, float]] = {
    "cuda": {"vi-simsiam": 1e-3, "simsiam": 2.5e-3},
    "cpu": {"vi-simsiam": 4e-4, "simsiam": 4e-4},
}
"""Tolerance of the scaled losses, which are of the order of a cosine for both methods.

bfloat16 on a GPU changes them by up to 3e-4 and 1.6e-3 at 2x128, and float32 on a CPU, with
PyTorch's layers as with ours, by up to 1.4e-4 in six steps, which amplify where a ReLU's input is
rounded to the other side of 0; missed updates change them by more than twice the tolerance.
"""
_FIGURES = ("losses", "mfu")
_SHORT_SECONDS = {"cuda": 160.0, "cpu": 90.0}
_CASE_SECONDS = {"cuda": 8.0, "cpu": 40.0}
_SMALL_BATCH = 64
"""Largest batch of which another captured step is measured: it takes as much memory again."""
_GRAPH_BYTES = 10**9
"""Assumed traffic of a step: two of them in a graph are enough to hide its own launch."""


@dataclass(frozen=True)
class Options(SuiteOptions):
    """Options of `vi-simsiam bench step`."""

    only: str = ""
    """Only cases whose name contains this, such as 2x128 or "batch 64"; a name is
    "vi-simsiam 2x128+6x64 batch 64", views x size, local ones after the +. What no name contains
    lists all names."""
    rounds: int = 9
    """Measurements of everything; the median is reported."""
    kernels: bool = False
    """Count what a step launches with each kind of layers, by what it is for: a GPU's kernels, a
    CPU's operators."""


def step_cases(device_type: str, *, short: bool) -> tuple[StepCase, ...]:
    """The cases in the order in which they are measured, the telling ones first."""
    on_gpu = device_type == "cuda"
    views = view_cases("cuda", short=short) if on_gpu else (SMALL_IMAGES,)
    return tuple(StepCase(case, method) for method in _METHODS for case in views)


def layers_at_hand(device: torch.device) -> dict[str, Layers]:
    """The kinds of layers of the step on views at hand, by name; training's come last.

    On a CPU torch.compile is measured on the network alone, as compiling takes long.
    """
    default = training_layers(device)
    kinds: list[Layers] = ["torch, view by view", "torch"]
    kinds += ["torch.compile"] if device.type == "cuda" else []
    return {step_with(layers, default): layers for layers in (*kinds, default)}


def layers_alone(device: torch.device) -> dict[str, Layers]:
    """The kinds of layers of the network alone, by name."""
    found: dict[str, Layers] = {NETWORK: "torch", NETWORK_COMPILED: "torch.compile"}
    if training_layers(device) == "kernels":
        found[NETWORK_KERNELS] = "kernels"
    return found


def run(options: Options) -> dict[str, Any]:
    """Measure the cases, print tables, and write the result file after each case."""
    suite = Suite("step", options)
    device = suite.device
    suite.result["peak_flops"] = peak_flops(device)
    timer = harness.timer_for(device)
    cases = step_cases(device.type, short=options.short)
    for case, left_out in suite.cases(cases, _SHORT_SECONDS[device.type]):
        images = _images(case, device.type)
        found = measure_case(case, images, device, timer, options.rounds, left_out)
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
        checked = parts.batches(images, _CHECKED_STEPS)
        expected = parts.plain_losses(checked)
        with contextlib.ExitStack() as stack:
            prepare = _providers(parts, images, checked, expected, timer, stack)
            for name in prepare if without_compile else ():
                if "torch.compile" in name:
                    prepare[name] = lambda: (harness.failed(without_compile), float)
            seconds = _CASE_SECONDS[device.type]
            found = harness.timed_in_turn(prepare, _FIGURES, rounds=rounds, seconds=seconds)
    except Exception as error:  # no memory for the network or its views
        none = dict.fromkeys((*_FIGURES, "time"))
        found = {
            name: none | harness.failed(harness.failure_reason(error)) for name in (STEP, NETWORK)
        }
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
        "yardstick": NETWORK,
        "providers": found,
        "phases": phases(found),
    }


def _providers(
    parts: Parts,
    images: PackedImages,
    checked: list[list[Tensor]],
    expected: list[float],
    timer: Timer,
    stack: contextlib.ExitStack,
) -> dict[str, Callable[[], Prepared]]:
    """Steps that are checked against the plain loop, their pieces, and the network alone."""
    kind = parts.device.type
    tolerance = _TOLERANCE[kind][parts.case.method] / parts.loss_scale
    views = [parts.random_views(seed) for seed in range(2)]

    def timed(call: Callable[[Any], object], sets: Sequence[Any] = views) -> Prepared:
        return harness.failed(None), timer.prepare(call, sets, _GRAPH_BYTES)["time"]

    def whole_step(name: str) -> Prepared:
        priority = GRAPH_PRIORITY if name == EQUAL_PRIORITIES else 0
        captured = name != NOT_CAPTURED
        step = WholeStep(parts, images, captured=captured, view_priority=priority)
        stack.callback(step.loader.close)
        return judge(step.losses(_CHECKED_STEPS), expected, tolerance), step.measure

    def at_hand(layers: Layers) -> Prepared:
        step = parts.train_step(layers)
        entry = judge(parts.losses(step, checked), expected, tolerance)
        return entry, timed(step)[1] if entry["correct"] else float

    def network_alone(layers: Layers) -> Prepared:
        return timed(parts.network_alone(layers))

    steps = [STEP, NOT_CAPTURED] if kind == "cuda" else [STEP]
    if kind == "cuda" and parts.case.views.batch <= _SMALL_BATCH:
        steps.append(EQUAL_PRIORITIES)
    pieces = (
        lambda: timed(*parts.augmentation(images)),
        lambda: timed(parts.forward),
        lambda: timed(parts.forward_loss),
        lambda: timed(parts.forward_loss_backward),
        lambda: timed(parts.optimiser()),
    )
    return {
        **{name: partial(whole_step, name) for name in steps},
        **{name: partial(at_hand, layers) for name, layers in layers_at_hand(parts.device).items()},
        **{
            name: partial(network_alone, layers)
            for name, layers in layers_alone(parts.device).items()
        },
        **dict(zip(PIECES, pieces, strict=True)),
    }


def count_launches(
    case: StepCase, measured: Mapping[str, Any], device: torch.device
) -> dict[Layers, Launches]:
    """Launches of a step on views at hand, for each kind of layers that was measured.

    Where counting fails, a warning gives the reason.
    """
    found: dict[Layers, Launches] = {}
    for name, layers in layers_at_hand(device).items():
        if not measured["providers"].get(name, {}).get("time"):
            continue
        try:
            parts = Parts(case, device)
            step = partial(parts.train_step(layers), parts.random_views(0))
            found[layers] = launches_of(step, device)
        except Exception as error:
            reason = harness.failure_reason(error)
            warnings.warn(
                f"launches with the layers {layers!r} are not counted: {reason}", stacklevel=2
            )
    return found


def judge(losses: list[float], expected: list[float], tolerance: float) -> dict[str, Any]:
    """Compare the losses of a step with those of the plain loop."""
    apart = [abs(a - b) for a, b in zip(losses, expected, strict=True)]
    reason = None
    if not all(difference <= tolerance for difference in apart):  # a NaN is wrong, too
        reason = f"wrong: losses {max(apart):.1e} from the plain loop's, allowed {tolerance:.1e}"
    return {**harness.failed(reason), "losses": losses}


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
    """Generated images in memory: on a CPU, which pauses between epochs, for one measurement."""
    with tempfile.TemporaryDirectory() as folder:
        count = case.views.batch * (1 + STEPS[device_type])
        paths = image_files("generated", Path(folder), count=count, sides=case.views.sides)
        return in_memory(FileSource(paths, name="benchmark"))
