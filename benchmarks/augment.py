"""Views per second of the input pipelines: ours, torchvision v2, lightly's transforms and kornia.

The figures are those of a training loop: batches of float32 views on the device, from image files
where the peer reads files, with a DataLoader worker for each core. Our loader starts from decoded
images, as it does in training: they are decoded once, which the benchmark of training counts.
Before ours is timed, its views are compared with those of torchvision's functions in float32 with
the same parameters. Peers draw their own parameters, so that of their views only the shapes are
checked and that they are finite; mean and deviation are recorded.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vi_simsiam.config import IMAGENET_MEAN, IMAGENET_STD, AugmentConfig
from vi_simsiam.data.cache import in_memory
from vi_simsiam.data.decoding import cores
from vi_simsiam.data.device import byte_tensor
from vi_simsiam.data.loader import MultiViewLoader
from vi_simsiam.data.packed import PackedImages
from vi_simsiam.data.sources import FileSource
from vi_simsiam.data.views import add_offsets, draw_table
from vi_simsiam.errors import InputError
from vi_simsiam.ops.augment import ColourOperation, augment

from . import harness, peers
from .cases import ViewCase, image_files, view_cases
from .harness import Prepared, Suite, SuiteOptions, Timer
from .peers import Provider, colour_operations, torchvision_view
from .results import LIGHTLY, OURS
from .tables import augment_case

TORCHVISION = "torchvision v2"

_SHORT_SECONDS = {"cuda": 100.0, "cpu": 60.0}
_CASE_SECONDS = {"cuda": 40.0, "cpu": 45.0}
"""No new round of a case begins after this long."""
_BATCHES = {32: 48, 128: 12}
"""Batches of our epoch for each worker on a CPU, by size of view, for about a second. Peers with
workers, which are slower, make an eighth of them."""
_FIGURES = ("error", "views_per_second")
_ALLOWED = {"without hue": 1e-5, "with hue": 1e-4}
"""Largest allowed error of a view, in pixel values from 0 to 1."""
_CHECKED = 8
"""Samples of a batch that are compared."""
_SEED = 0
_SETS = 8
"""Number of batches that the augmentation alone is timed on, in turn."""


@dataclass(frozen=True)
class Options(SuiteOptions):
    """Options of `vi-simsiam bench augment`."""

    only: str = ""
    """Only cases whose name contains this, such as 2x128 or "batch 64"; a name is
    "2x128+6x64 batch 64", views x size, local ones after the +. What no name contains lists all
    names."""
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


def run(options: Options) -> dict[str, Any]:
    """Measure the cases, print tables, and write the result file after each case."""
    suite = Suite("augment", options, peers.PEER_PACKAGES)
    device, workers = suite.device, options.workers or cores()
    data = "generated" if options.data == "generated" else "folder"
    suite.result.update(workers=workers, data=data)
    timer = harness.timer_for(device)
    cases = view_cases(device.type, short=options.short)
    seconds = _CASE_SECONDS[device.type]
    for case, _ in suite.cases(cases, _SHORT_SECONDS[device.type]):
        # Each worker makes the same number of batches of an epoch after the first one.
        count = case.batch * (1 + workers * _batches(case))
        with tempfile.TemporaryDirectory() as folder:
            paths = image_files(options.data, Path(folder), count=count, sides=case.sides)
            made = make_providers(case, paths, device, workers, timer)
            found = measure_case(case, made, seconds=seconds, rounds=options.rounds)
        timer.release()
        suite.add(found, augment_case(found))
    return suite.finish()


def _batches(case: ViewCase) -> int:
    return _BATCHES.get(case.size, 4)


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
        turns=max(1, _batches(case) // 8),
    )

    def resident(call: Callable[[list[Tensor]], Sequence[Tensor]]) -> Provider:
        decoded = peers.resident_images(paths[: case.batch], case.sides, device)
        return peers.device_provider(call, decoded, device)

    made: dict[str, Callable[[], Provider]] = {
        OURS: lambda: loader_views(images, policy, case.batch, device, workers),
        f"{OURS}, augmentation alone": lambda: augmented_bytes(
            images, policy, case.batch, device, timer
        ),
        TORCHVISION: lambda: from_files(peers.torchvision_transform(policy)),
        LIGHTLY: lambda: from_files(peers.lightly_transform(policy)),
        "kornia": lambda: resident(peers.kornia_on_device(policy, device)),
    }
    if device.type == "cuda":
        made[f"{TORCHVISION} on the GPU"] = lambda: resident(peers.torchvision_on_device(policy))
    return made


def measure_case(
    case: ViewCase, providers: Mapping[str, Callable[[], Provider]], *, seconds: float, rounds: int
) -> dict[str, Any]:
    """Check all providers and time those that are right, in turn; failures are recorded.

    Returns:
        The case, and for every provider `correct`, `failure` (None or a line), `error` against
        torchvision's functions (ours), `mean` and `std` of the first view, `time` of a batch
        (quartiles) and `views_per_second`.
    """
    with contextlib.ExitStack() as stack:

        def prepared(make: Callable[[], Provider]) -> Prepared:
            provider = make()
            stack.callback(provider.close)
            return judge(case, provider), provider.measure

        prepare = {name: partial(prepared, make) for name, make in providers.items()}
        found = harness.timed_in_turn(prepare, _FIGURES, rounds=rounds, seconds=seconds)
    for values in found.values():
        if values["time"] is not None:
            values["views_per_second"] = case.views / values["time"]["median_us"] * 1e6
    return {
        "name": case.name,
        "label": f"{case.label}, batch {case.batch}",
        "batch": case.batch,
        "views": case.views,
        "sides": case.sides,
        "yardstick": TORCHVISION,
        "providers": found,
    }


def judge(case: ViewCase, provider: Provider) -> dict[str, Any]:
    """Check the shapes and values of one batch, and its error where that is known."""
    sample, error = provider.sample()
    views = [view.float() for view in sample]
    shapes = [tuple(view.shape) for view in views]
    if shapes != case.shapes:
        return harness.failed(f"wrong: views of shapes {sorted(set(shapes))}")
    if not all(torch.isfinite(view).all() for view in views):
        return harness.failed("wrong: views that are not finite")
    return {
        **(harness.failed(None) if error is None else harness.judged(error, _ALLOWED)),
        "error": error,
        "mean": views[0].mean().item(),
        "std": views[0].std().item(),
    }


def loader_views(
    images: PackedImages, policy: AugmentConfig, batch: int, device: torch.device, workers: int
) -> Provider:
    """Batches from `MultiViewLoader`, one epoch after another; `workers` processes on a CPU."""
    loader = MultiViewLoader(images, policy, batch, device, seed=_SEED, workers=workers)

    def sample() -> tuple[Sequence[Tensor], dict[str, float]]:
        batches = loader.epoch(0)
        first = next(batches)
        error = errors(first.views, images, policy, first.index.cpu().numpy())
        for _ in batches:  # the rest of the epoch warms up
            pass
        return first.views, error

    def measure() -> float:
        return peers.seconds_a_batch((batch.views for batch in loader), device) * 1e6

    return Provider(sample, measure, loader.close)


def augmented_bytes(
    images: PackedImages, policy: AugmentConfig, batch: int, device: torch.device, timer: Timer
) -> Provider:
    """The augmentation alone, on bytes and table rows that are on the device.

    On a CPU it has one thread, as in a worker of a loader.
    """
    pixels = byte_tensor(images.pixels).to(device)
    samples = [(np.arange(batch) + i * batch) % len(images) for i in range(_SETS)]
    tables = [torch.from_numpy(placed_table(images, policy, each)).to(device) for each in samples]
    out_bytes = batch * 12 * (2 * policy.size**2 + policy.local_views * policy.local_size**2)

    def views(table: Tensor) -> list[Tensor]:
        before = torch.get_num_threads()
        if device.type == "cpu":
            torch.set_num_threads(1)
        try:
            return augmented(pixels, policy, table)
        finally:
            torch.set_num_threads(before)

    def sample() -> tuple[Sequence[Tensor], dict[str, float]]:
        made = views(tables[0])
        return made, errors(made, images, policy, samples[0])

    return Provider(sample, timer.prepare(views, tables, out_bytes)["time"])


def augmented(
    pixels: Tensor, policy: AugmentConfig, table: Tensor, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """The views of the rows of a table: the global ones and, if there are any, the local ones."""
    made = list(augment(pixels, table[:2], policy.size, dtype=dtype))
    if policy.local_views:
        made += augment(pixels, table[2:], policy.local_size, dtype=dtype)
    return made


def placed_table(
    images: PackedImages, policy: AugmentConfig, samples: NDArray[np.int64]
) -> NDArray[np.int32]:
    """Table rows (V, B, 16) of images in epoch 0, with their offsets in `images`."""
    sides: Any = {"heights": images.heights[samples], "widths": images.widths[samples]}
    table = draw_table(policy, seed=_SEED, epoch=0, samples=samples, **sides)
    add_offsets(table, images.offsets[samples])
    return table


def errors(
    views: Sequence[Tensor], images: PackedImages, policy: AugmentConfig, samples: NDArray[np.int64]
) -> dict[str, float]:
    """Largest error of the first views of a batch of epoch 0 against torchvision's functions.

    Returns:
        The errors of the views without and with hue shifts, in pixel values from 0 to 1.
    """
    samples = samples[:_CHECKED]
    table = placed_table(images, policy, samples)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    worst = dict.fromkeys(_ALLOWED, 0.0)
    for rows, batch in zip(table, views, strict=True):
        for row, sample, view in zip(rows, samples, batch.float().cpu(), strict=False):
            exact = torchvision_view(images.image(int(sample)), row, view.shape[-1])
            error = (view * std + mean - exact).abs().max().item()
            kind = "with hue" if ColourOperation.HUE in colour_operations(row) else "without hue"
            worst[kind] = max(worst[kind], error) if error == error else error
    return worst
