"""Whole trainings on one machine, ours and others': seconds, views per second, and kNN accuracy.

Every provider trains the same network on the same images, views, batches and epochs, once in each
round and in turn with the others. Ours is `vi-simsiam train` itself, with its run folder and
checkpoints. Shown apart are: decoding the images once (ours only; the others decode again in every
epoch), the cold start (everything before the loop is at full speed: building, starting workers,
compiling, capturing), and the evaluation, during which the clock is stopped.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from vi_simsiam.config import TrainConfig
from vi_simsiam.data.cache import pack
from vi_simsiam.data.datasets import Splits
from vi_simsiam.data.decoding import cores
from vi_simsiam.engine.forward import extract
from vi_simsiam.engine.knn import KnnConfig, classify
from vi_simsiam.engine.run import resolve_device, resolve_workers
from vi_simsiam.errors import InputError
from vi_simsiam.models import build_model
from vi_simsiam.text import counted

from .cases import ViewCase, labelled_images
from .harness import Suite, SuiteOptions, failed, failure_reason, quartiles
from .peers import PEER_PACKAGES
from .results import LIGHTLY, OURS, OURS_SIMSIAM
from .tables import train_case
from .train_peers import PROVIDERS, Recorder, Training, Trains

YARDSTICK = LIGHTLY
_ACCURACY_BELOW, _STANDARD_ERRORS = 0.1, 4
"""Allowed distance of SimSiam's kNN accuracy below the yardstick's: the larger of the two."""
_SHORT = {"cuda": (2560, 6), "cpu": (640, 2)}
"""Images and epochs of --short; on a GPU more, so that the workers of the others are busy."""


@dataclass(frozen=True)
class Options(SuiteOptions):
    """Options of `vi-simsiam bench train`; a run is one case."""

    only: str = ""
    """Only providers whose name contains this: vi-simsiam; vi-simsiam, method simsiam; plain
    PyTorch; tuned PyTorch; lightly."""
    rounds: int = 1
    """Trainings of every provider; the epochs of all of them are pooled."""
    data: str = "generated"
    """generated, or a data set with labels and validation images: fashion-mini, folder:PATH,
    pack:FILE, cifar10, imagenette or imagewoof."""
    data_root: Path = Path("data")
    """Where downloaded data sets are kept or looked for."""
    images: int | None = None
    """Train on so many images, evenly spread, and validate on as many; None for all."""
    size: int = 32
    """Side of the two global views, in pixels."""
    local_views: int = 0
    """Number of additional small views."""
    local_size: int = 64
    """Side of the local views, in pixels."""
    batch_size: int = 64
    epochs: int = 3
    """At least 2: the first has the cold start."""
    lr: float = 0.0125
    """Peak learning rate, with a cosine decay to 0."""
    workers: int | None = None
    """Worker processes of the others' loaders; None for one a core."""
    target_accuracy: float | None = None
    """Report the time until kNN accuracy reaches this, between 0 and 1; it is then measured ten
    times in a training."""

    least_rounds: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"epochs": 2, "workers": 0, "images": self.batch_size}
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise InputError(f"{name}: {value} must be at least {smallest}")
        if self.target_accuracy is not None and not 0 < self.target_accuracy < 1:
            raise InputError(f"target_accuracy: {self.target_accuracy} must lie between 0 and 1")

    @property
    def views(self) -> ViewCase:
        """The views of each image."""
        sides = (self.size, self.size)
        return ViewCase(self.batch_size, self.size, self.local_views, self.local_size, sides)


def run(options: Options) -> dict[str, Any]:
    """Train all providers, print the table, and write the result file if a folder is given."""
    if options.short:
        most, epochs = _SHORT[resolve_device(options.device).type]
        images = min(options.images or most, most)
        options = dataclasses.replace(options, images=images, epochs=epochs)
    wanted = {name: train for name, train in PROVIDERS.items() if options.only in name}
    if not wanted:
        there = ", ".join(map(repr, PROVIDERS))
        raise InputError(f"only: no provider's name contains {options.only!r}; there are {there}")
    suite = Suite("train", options, PEER_PACKAGES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        splits = labelled_images(
            options.data,
            options.data_root,
            folder / "images",
            images=options.images,
            side=options.size,
        )
        if len(splits.train) < options.batch_size:
            raise InputError(
                f"batch_size: {options.batch_size} must be at most {len(splits.train):,}, "
                "the number of training images"
            )
        found = measure_case(options, splits, folder, wanted, suite)
    suite.console.print(train_case(found))
    return suite.finish()


def measure_case(
    options: Options,
    splits: Splits,
    folder: Path,
    providers: Mapping[str, Trains],
    suite: Suite,
) -> dict[str, Any]:
    """Train every provider `options.rounds` times, in turn; failures are recorded with the reason.

    The case is added to the results after each training of the last round.

    Returns:
        The case, and for every provider `correct`, `failure`, `time` (quartiles of a step in epochs
        after the first), `views_per_second`, `total_seconds` (start to end of training),
        `cold_start_seconds` (the first epoch and all before it, above the time of an epoch),
        `training_seconds` (the rest), `caching_seconds` (ours), `evaluation_seconds`, `knn_top1`,
        `accuracies` (epochs, seconds, accuracy), `seconds_to_target`, `peak_bytes` beside resident
        images, and `captured` (ours on a GPU).
    """
    train, val, device = splits.train, splits.val, suite.device
    assert val is not None  # labelled_images refuses data without
    config = TrainConfig(
        data=splits.name,
        epochs=options.epochs,
        batch_size=options.batch_size,
        lr=options.lr,
        device=str(device),
        augment=options.views.policy,
    )
    started = time.perf_counter()
    pack(train, folder / "train.pack")
    caching = time.perf_counter() - started
    workers = cores() if options.workers is None else options.workers
    training = Training(config, train, folder / "train.pack", device, workers, folder / "run")
    readers = 0 if workers == 0 else resolve_workers(None, device)
    accuracy = partial(knn_top1, splits=splits, size=options.size, device=device, workers=readers)
    every = options.epochs if options.target_accuracy is None else max(1, options.epochs // 10)
    runs: dict[str, list[Recorder]] = {name: [] for name in providers}
    stopped = {**failed("stopped before its last training"), "time": None}
    found = {name: dict(stopped) for name in providers}
    data = Path(splits.name.removeprefix("folder:")).name
    extent = f"{counted(options.epochs, 'epoch')} of {counted(len(train), 'image')}"
    case = {
        "name": f"{data} {options.views.name}, {extent}",
        "label": f"{data}, {options.views.label}, batch {options.batch_size}, {extent}",
        "batch": options.batch_size,
        "views": options.views.views,
        "view_label": options.views.label,
        "data": data,
        "images": len(train),
        "epochs": options.epochs,
        "workers": workers,
        "target_accuracy": options.target_accuracy,
        "yardstick": YARDSTICK,
        "providers": found,
    }
    _warm_up(config, device)
    # The yardstick first: without its accuracy no speed counts.
    turn = sorted(providers, key=lambda name: name != YARDSTICK)
    for done in range(1, options.rounds + 1):
        last = done == options.rounds
        for name in turn:
            if len(runs[name]) == done - 1:  # none of its trainings failed
                torch.manual_seed(config.seed)
                recorder = Recorder(device, options.epochs, accuracy if last else None, every)
                try:
                    providers[name](training, recorder)
                    recorder.finish()
                    runs[name].append(recorder)
                    suite.say(f"round {done}: {name} trained in {recorder.total_seconds:.1f} s")
                except Exception as error:
                    found[name].update(failed(failure_reason(error)))
            if len(runs[name]) == options.rounds:
                found[name] = summary(runs[name], options, len(train) // options.batch_size)
                if name in (OURS, OURS_SIMSIAM):
                    found[name]["caching_seconds"] = caching
                refuse_worse(found, len(val))
            if last:
                suite.add(case)
    return case


def _warm_up(config: TrainConfig, device: torch.device) -> None:
    """Train a little, so that the first cold start does not include loading cuDNN and the like."""
    model, size = build_model(config).to(device), config.augment.size
    for dtype in (torch.float16, torch.bfloat16):
        views = torch.randn(2, 8, 3, size, size, device=device)
        with torch.autocast(device.type, dtype, enabled=device.type == "cuda"):
            model.loss(model(list(views)), "eager").backward()


def summary(runs: list[Recorder], options: Options, steps_per_epoch: int) -> dict[str, Any]:
    """The figures of a provider's trainings; see `measure_case`."""
    later = [b - a for run in runs for a, b in itertools.pairwise(run.epoch_ends)]
    times = quartiles([seconds / steps_per_epoch * 1e6 for seconds in later])
    total = statistics.median(run.total_seconds for run in runs)
    cold = statistics.median(run.epoch_ends[0] for run in runs) - statistics.median(later)
    accuracies = runs[-1].accuracies
    target = math.inf if options.target_accuracy is None else options.target_accuracy
    reached = (seconds for _, seconds, accuracy in accuracies if accuracy >= target)
    return {
        "correct": True,
        "failure": None,
        "time": times,
        "views_per_second": options.views.views / times["median_us"] * 1e6,
        "total_seconds": total,
        "cold_start_seconds": cold,
        "training_seconds": total - cold,
        "caching_seconds": None,
        "evaluation_seconds": runs[-1].evaluation_seconds,
        "knn_top1": accuracies[-1][2] if accuracies else None,
        "accuracies": accuracies,
        "seconds_to_target": next(reached, None),
        "peak_bytes": runs[-1].peak_bytes,
        "captured": runs[-1].captured,
    }


def refuse_worse(found: dict[str, dict[str, Any]], images: int) -> None:
    """Remove the times of trainings of SimSiam that learnt clearly less than the yardstick's.

    A training far below the others computes something else. VI-SimSiam is another method, so its
    accuracy is shown, but not compared. `images`, the number of validation images, gives the
    standard error of accuracies.
    """
    expected = found.get(YARDSTICK, {}).get("knn_top1")
    if expected is None:
        return
    error = math.sqrt(2 * expected * (1 - expected) / images)
    least = expected - max(_ACCURACY_BELOW, _STANDARD_ERRORS * error)
    for name, values in found.items():
        accuracy = values.get("knn_top1")
        if name != OURS and accuracy is not None and accuracy < least:
            reason = f"wrong: kNN top-1 {accuracy:.1%}, {YARDSTICK}'s {expected:.1%}"
            values.update(correct=False, failure=reason, time=None)


def knn_top1(
    backbone: nn.Module, *, splits: Splits, size: int, device: torch.device, workers: int
) -> float:
    """Share of the validation images that their 20 nearest training images classify correctly."""
    train, val = splits.train, splits.val
    assert val is not None  # labelled_images refuses data without
    features, labels = [], []
    for source in (train, val):
        features.append(extract(backbone, source, size=size, device=device, workers=workers))
        labels.append(torch.from_numpy(source.labels))
    predicted = classify(
        features[0].to(device),
        labels[0].to(device),
        features[1].to(device),
        classes=len(train.classes or ()),
        config=KnnConfig(k=min(KnnConfig().k, len(train))),
    )
    return (predicted.cpu() == labels[1]).double().mean().item()
