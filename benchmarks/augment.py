"""How many views a second the input pipelines make: ours, torchvision v2, lightly's transforms and kornia.

What is compared is what a training loop gets: batches of float32 views on the device, from image files where the peer is
fed by files, with a DataLoader worker for each core. Our loader starts from decoded images, as it does in training: they
are decoded once, which the benchmark of training counts. Before ours is timed, its views are held to torchvision's
functions in float32 with the same parameters; peers draw their own, so theirs are only seen to be finite, of the right
shape, and of a similar mean and deviation, which are recorded.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from torch import Tensor

from vi_simsiam.config import AugmentConfig
from vi_simsiam.data.cache import in_memory
from vi_simsiam.data.decoding import cores
from vi_simsiam.data.sources import FileSource
from vi_simsiam.errors import InputError

from . import ours, peers, pipeline_plots, pipeline_tables
from .harness import failure_reason, interleave
from .images import image_files
from .pipeline_targets import pipeline_targets
from .suite import Suite, SuiteOptions
from .timers import Timer, timer_for
from .view_cases import ViewCase, view_cases

NAME = "augment"
OURS, RESIDENT = "vi-simsiam", "vi-simsiam, augmentation alone"
TORCHVISION, LIGHTLY = "torchvision v2", "lightly"
YARDSTICK = TORCHVISION
"""No code of this project: where it becomes slower from one result to another, the machine did."""

_SHORT_SECONDS = {"cuda": 100.0, "cpu": 60.0}
_CASE_SECONDS = {"cuda": 40.0, "cpu": 45.0}
"""No new round of a case begins after this long."""
_MEASURE_SECONDS = 0.7
"""About how long a peer with workers is timed for in one round."""
_BATCHES = {32: 48, 128: 12}
"""Batches of a CPU's epoch for each worker, by size of view, for about a second."""


class Provider(Protocol):
    """A way to make batches of views."""

    def sample(self) -> Sequence[Tensor]:
        """The views of one batch, each (B, 3, size, size)."""

    def measure(self) -> float:
        """Microseconds a batch."""

    def close(self) -> None:
        """End processes and give back memory."""


Providers = Mapping[str, Callable[[], Provider] | str]


@dataclass(frozen=True)
class Options(SuiteOptions):
    """Options of `vi-simsiam bench augment`."""

    only: str = ""
    """Only cases whose name contains this, such as 2x128 or "batch 64"; a name is "2x128+6x64 batch 64", views x size, local ones after the +. What no name contains lists all names."""
    rounds: int = 7
    """Measurements of every provider; the median is reported."""
    data: str = "generated"
    """generated, or folder:PATH for the images of a folder."""
    workers: int | None = None
    """Worker processes of every loader; None for one a core."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.workers is not None and self.workers < 1:
            raise InputError(f"workers: {self.workers} must be at least 1")


def run(
    options: Options,
    console: Console | None = None,
    *,
    providers: Callable[[ViewCase, Sequence[str], torch.device, int, Timer], Providers]
    | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Measure the cases, print tables, and write the result file after each case if a folder is given.

    Args:
        options: what to measure.
        console: where to print.
        providers: makes those of a case from image files, the device, the number of workers and a timer; None for all.
        clock: the time in seconds, for the limit on --short.
    """
    suite = Suite(NAME, options, console, peers.PEER_PACKAGES)
    workers = options.workers or cores()
    suite.result.update(
        workers=workers, data="generated" if options.data == "generated" else "folder"
    )
    timer = timer_for(suite.device)
    cases = view_cases(suite.device.type, short=options.short)
    for case, _ in suite.cases(cases, _SHORT_SECONDS[suite.device.type], clock):
        with tempfile.TemporaryDirectory() as folder:
            paths = image_files(
                options.data, Path(folder), count=image_count(case, workers), sides=case.sides
            )
            made = (providers or make_providers)(case, paths, suite.device, workers, timer)
            found = measure_case(
                case, made, seconds=_CASE_SECONDS[suite.device.type], rounds=options.rounds
            )
        timer.release()
        suite.add(found, pipeline_tables.augment_case(found))
    return suite.finish(pipeline_targets(suite.result), partial(pipeline_plots.draw, NAME))


def image_count(case: ViewCase, workers: int) -> int:
    """Images of an epoch: each worker makes the same number of batches after the first one."""
    return case.batch * (1 + workers * _BATCHES.get(case.size, 4))


def make_providers(
    case: ViewCase, paths: Sequence[str], device: torch.device, workers: int, timer: Timer
) -> dict[str, Callable[[], Provider] | str]:
    """Everything that makes views on `device`; the images of our loader are decoded here, outside all times."""
    policy, source = case.policy, FileSource(paths, name="benchmark")
    images = in_memory(source)

    def files(
        transform: Callable[[AugmentConfig], Callable[[Any], list[Tensor]]],
    ) -> Callable[[], Provider]:
        return lambda: peers.LoaderPeer(
            source,
            transform(policy),
            batch=case.batch,
            device=device,
            workers=workers,
            seconds=_MEASURE_SECONDS,
        )

    def resident(
        transform: Callable[[], Callable[[list[Tensor]], Sequence[Tensor]]],
    ) -> Callable[[], Provider]:
        some = paths[: case.batch]
        return lambda: peers.DevicePeer(
            transform(), peers.resident_images(some, case.sides, device), device
        )

    made: dict[str, Callable[[], Provider] | str] = {
        OURS: lambda: ours.LoaderViews(images, policy, case.batch, device, workers),
        RESIDENT: lambda: ours.AugmentedBytes(images, policy, case.batch, device, timer),
        TORCHVISION: files(peers.torchvision_transform),
        LIGHTLY: files(peers.lightly_transform),
        "kornia": resident(partial(peers.kornia_on_device, policy, device)),
    }
    if device.type == "cuda":
        made[f"{TORCHVISION} on the GPU"] = resident(partial(peers.torchvision_on_device, policy))
    return made


def measure_case(
    case: ViewCase, providers: Providers, *, seconds: float, rounds: int
) -> dict[str, Any]:
    """Check all providers and time those that are right, in turn; whatever fails is recorded with its reason.

    Returns:
        The case, and for every provider `correct`, `failure` (None or a line), `error` against torchvision's functions
        (ours), `mean` and `std` of the first view, `time` of a batch (quartiles) and `views_per_second`.
    """
    found: dict[str, dict[str, Any]] = {}
    alive: dict[str, Provider] = {}
    for name, make in providers.items():
        try:
            if isinstance(make, str):
                found[name] = failed(make)
                continue
            alive[name] = make()
            found[name] = judge(case, alive[name])
        except (
            Exception
        ) as error:  # not installed, no memory, a worker that died: a result like any other
            found[name] = failed(failure_reason(error))
    measures = {
        name: provider.measure for name, provider in alive.items() if found[name]["correct"]
    }
    times, failures = interleave(measures, rounds=rounds, seconds=seconds, least=3)
    for provider in alive.values():
        provider.close()
    for name, reason in failures.items():
        found[name].update(correct=False, failure=reason)
    for name, time_found in times.items():
        found[name].update(
            time=time_found, views_per_second=case.views / time_found["median_us"] * 1e6
        )
    return {
        "name": case.name,
        "label": f"{case.label}, batch {case.batch}",
        "batch": case.batch,
        "views": case.views,
        "sides": case.sides,
        "yardstick": YARDSTICK,
        "providers": found,
    }


def judge(case: ViewCase, provider: Provider) -> dict[str, Any]:
    """Look at one batch: its shapes and values, and for ours its error against torchvision's functions."""
    views = [view.float() for view in provider.sample()]
    policy = case.policy
    sizes = [policy.size] * 2 + [policy.local_size] * policy.local_views
    shapes = [tuple(view.shape) for view in views]
    if shapes != [(case.batch, 3, size, size) for size in sizes]:
        return failed(f"wrong: views of shapes {sorted(set(shapes))}")
    if not all(torch.isfinite(view).all() for view in views):
        return failed("wrong: views that are not finite")
    problem, error = None, None
    if isinstance(provider, ours.Checked):
        error = provider.errors(views)
        wrong = [f"{kind} {error[kind]:.1e}, allowed {limit:.0e}" for kind, limit in ours.ALLOWED.items()
                 if not error[kind] <= limit]  # fmt: skip
        problem = f"inaccurate: {'; '.join(wrong)}" if wrong else None
    return {
        **failed(problem),
        "error": error,
        "mean": views[0].mean().item(),
        "std": views[0].std().item(),
    }


def failed(reason: str | None) -> dict[str, Any]:
    """A provider without times; with None as the reason one that is right."""
    return {
        "correct": reason is None,
        "failure": reason,
        "error": None,
        "time": None,
        "views_per_second": None,
    }
