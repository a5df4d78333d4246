"""Views per second of the input pipelines: ours, torchvision v2, lightly's transforms and kornia.

The figures are those of a training loop: batches of float32 views on the device, from image files
where the peer reads files, with a DataLoader worker for each core. Our loader starts from decoded
images, as it does in training: they are decoded once, which the benchmark of training counts.
Before ours is timed, its views are compared with those of torchvision's functions in float32 with
the same parameters. Peers draw their own parameters, so that of their views only the shapes are
checked and that they are finite; mean and deviation are recorded.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from torch import Tensor

from vi_simsiam.data.cache import in_memory
from vi_simsiam.data.decoding import cores
from vi_simsiam.data.sources import FileSource
from vi_simsiam.errors import InputError

from . import names, ours, peers
from .images import image_files
from .peers import Provider
from .suite import Suite, SuiteOptions
from .tables import augment_case
from .timers import Timer, failed, failure_reason, timed_in_turn, timer_for
from .view_cases import ViewCase, view_cases

TORCHVISION = "torchvision v2"
YARDSTICK = TORCHVISION
"""Not code of this project: where it becomes slower between two results, the machine did."""

_SHORT_SECONDS = {"cuda": 100.0, "cpu": 60.0}
_CASE_SECONDS = {"cuda": 40.0, "cpu": 45.0}
"""No new round of a case begins after this long."""
_MEASURE_SECONDS = 0.7
"""Approximate time of a peer with workers in one round."""
_BATCHES = {32: 48, 128: 12}
"""Batches of an epoch for each worker on a CPU, by size of view, for about a second."""
_MISSING = ("error", "time", "views_per_second")


Providers = Mapping[str, Callable[[], Provider]]


@dataclass(frozen=True)
class Options(SuiteOptions):
    """Options of `vi-simsiam bench augment`."""

    only: Annotated[
        str,
        tyro.conf.arg(
            help='Only cases whose name contains this, such as 2x128 or "batch 64"; a name is '
            '"2x128+6x64 batch 64", views x size, local ones after the +. What no name contains '
            "lists all names."
        ),
    ] = ""
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


def run(options: Options, console: Console | None = None) -> dict[str, Any]:
    """Measure the cases, print tables, and write the result file after each case."""
    suite = Suite("augment", options, console, peers.PEER_PACKAGES)
    device, workers = suite.device, options.workers or cores()
    data = "generated" if options.data == "generated" else "folder"
    suite.result.update(workers=workers, data=data)
    timer = timer_for(device)
    cases = view_cases(device.type, short=options.short)
    for case, _ in suite.cases(cases, _SHORT_SECONDS[device.type]):
        with tempfile.TemporaryDirectory() as folder:
            count = image_count(case, workers)
            paths = image_files(options.data, Path(folder), count=count, sides=case.sides)
            made = make_providers(case, paths, device, workers, timer)
            seconds = _CASE_SECONDS[device.type]
            found = measure_case(case, made, seconds=seconds, rounds=options.rounds)
        timer.release()
        suite.add(found, augment_case(found))
    return suite.finish()


def image_count(case: ViewCase, workers: int) -> int:
    """Images of an epoch: each worker makes the same number of batches after the first one."""
    return case.batch * (1 + workers * _BATCHES.get(case.size, 4))


def make_providers(
    case: ViewCase, paths: Sequence[str], device: torch.device, workers: int, timer: Timer
) -> dict[str, Callable[[], Provider]]:
    """All providers on `device`; the images of our loader are decoded here, outside all times."""
    policy, source = case.policy, FileSource(paths, name="benchmark")
    images = in_memory(source)

    from_files = partial(
        peers.file_provider,
        source,
        batch=case.batch,
        device=device,
        workers=workers,
        seconds=_MEASURE_SECONDS,
    )

    def resident(call: Callable[[list[Tensor]], Sequence[Tensor]]) -> Provider:
        decoded = peers.resident_images(paths[: case.batch], case.sides, device)
        return peers.device_provider(call, decoded, device)

    made: dict[str, Callable[[], Provider]] = {
        names.OURS: lambda: ours.loader_views(images, policy, case.batch, device, workers),
        f"{names.OURS}, augmentation alone": lambda: ours.augmented_bytes(
            images, policy, case.batch, device, timer
        ),
        TORCHVISION: lambda: from_files(peers.torchvision_transform(policy)),
        names.LIGHTLY: lambda: from_files(peers.lightly_transform(policy)),
        "kornia": lambda: resident(peers.kornia_on_device(policy, device)),
    }
    if device.type == "cuda":
        made[f"{TORCHVISION} on the GPU"] = lambda: resident(peers.torchvision_on_device(policy))
    return made


def measure_case(
    case: ViewCase, providers: Providers, *, seconds: float, rounds: int
) -> dict[str, Any]:
    """Check all providers and time those that are right, in turn; failures are recorded.

    Returns:
        The case, and for every provider `correct`, `failure` (None or a line), `error` against
        torchvision's functions (ours), `mean` and `std` of the first view, `time` of a batch
        (quartiles) and `views_per_second`.
    """
    found: dict[str, dict[str, Any]] = {}
    alive: dict[str, Provider] = {}
    for name, make in providers.items():
        try:
            alive[name] = make()
            found[name] = judge(case, alive[name])
        except Exception as error:  # not installed, no memory, a worker that died
            found[name] = failed(failure_reason(error), _MISSING)
    measures = {
        name: provider.measure for name, provider in alive.items() if found[name]["correct"]
    }
    timed_in_turn(found, measures, rounds=rounds, seconds=seconds)
    for provider in alive.values():
        provider.close()
    for values in found.values():
        if values["time"] is not None:
            values["views_per_second"] = case.views / values["time"]["median_us"] * 1e6
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
    """Check the shapes and values of one batch, and its error where that is known."""
    sample, error = provider.sample()
    views = [view.float() for view in sample]
    policy = case.policy
    sizes = [policy.size] * 2 + [policy.local_size] * policy.local_views
    shapes = [tuple(view.shape) for view in views]
    if shapes != [(case.batch, 3, size, size) for size in sizes]:
        return failed(f"wrong: views of shapes {sorted(set(shapes))}", _MISSING)
    if not all(torch.isfinite(view).all() for view in views):
        return failed("wrong: views that are not finite", _MISSING)
    wrong = [
        f"{kind} {error[kind]:.1e}, allowed {limit:.0e}"
        for kind, limit in ours.ALLOWED.items()
        if error is not None and not error[kind] <= limit  # a NaN is wrong, too
    ]
    return {
        **failed(f"inaccurate: {'; '.join(wrong)}" if wrong else None, _MISSING),
        "error": error,
        "mean": views[0].mean().item(),
        "std": views[0].std().item(),
    }
