"""kNN accuracies during a training, of an experiment's run or of a record."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

from vi_simsiam.data.cache import cached
from vi_simsiam.data.packed import PackedImages
from vi_simsiam.data.sources import ImageSource
from vi_simsiam.data.subsets import at_most
from vi_simsiam.engine.forward import extract
from vi_simsiam.engine.knn import KnnConfig, classify
from vi_simsiam.engine.run import open_splits, resolve_workers
from vi_simsiam.engine.train import Trainer
from vi_simsiam.experiments.forms import ProgressLine
from vi_simsiam.files import json_lines, read_lines, write_text

PROGRESS = "progress.jsonl"
_MOST = (4_000, 1_000)
COLUMNS = ("knn200", "knn200_epoch", "knn200_seconds")


def read_progress(folder: Path) -> list[dict[str, Any]]:
    """The kNN accuracies that were measured during a training."""
    lines, _ = read_lines(folder / PROGRESS, ProgressLine, "run")
    return cast(list[dict[str, Any]], lines)


class Progress:
    """A callback after every epoch that records kNN accuracy (k = 200, T = 0.1) over time.

    By default it uses at most 4,000 training and 1,000 validation images, drawn class by class, and
    its own time is not counted: the trainer's clock stands still between epochs. Lines go to
    RUN/progress.jsonl; those beyond the step that a resumed run starts from are dropped.

    Args:
        trainer: trainer of the run, before it starts.
        every: epochs between two measurements; the last epoch always has one.
        val: validation images, all of which are used with all training images; None for a part of
            the run's.
        clock: seconds that a measured accuracy took; None for those of training.
    """

    def __init__(
        self,
        trainer: Trainer,
        every: int,
        *,
        val: ImageSource | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.trainer, self.every = trainer, every
        self.clock = clock or (lambda: trainer.seconds)
        self.workers = resolve_workers(trainer.config.workers, trainer.device)
        most = _MOST if val is None else (None, None)
        source = open_splits(trainer.config).val if val is None else val
        assert source is not None
        whole, _ = cached(source, cache_dir=trainer.config.cache_dir, workers=self.workers)
        self.train, self.val = (
            cast(PackedImages, at_most(images, number))
            for images, number in zip((trainer.loader.source, whole), most, strict=True)
        )
        self.path = trainer.folder / PROGRESS
        before = read_progress(trainer.folder) if trainer.resume else []
        self.lines = [line for line in before if line["step"] <= trainer.step]
        ended = trainer.step > 0 and trainer.step % trainer.loader.steps_per_epoch == 0
        if ended and all(line["step"] != trainer.step for line in self.lines):
            self()  # the run was stopped in the last step of an epoch, before its accuracy

    def __call__(self) -> None:
        """Record the accuracy if it is due."""
        trainer = self.trainer
        epoch = trainer.step // trainer.loader.steps_per_epoch
        if epoch % self.every and epoch < trainer.config.epochs:
            return
        size, device, backbone = trainer.config.augment.size, trainer.device, trainer.model.backbone
        train, val = (
            extract(
                backbone,
                source,
                size=size,
                device=device,
                workers=self.workers,
                constants=trainer.config.augment.constants,
            ).to(device)
            for source in (self.train, self.val)
        )
        labels, classes = torch.from_numpy(self.train.labels).to(device), self.train.classes or ()
        predicted = classify(train, labels, val, classes=len(classes), config=KnnConfig(k=200))
        share = float((predicted.cpu() == torch.from_numpy(self.val.labels)).double().mean())
        values = (share, epoch, round(self.clock(), 3), trainer.step)
        self.lines.append(dict(zip((*COLUMNS, "step"), values, strict=True)))
        write_text(self.path, json_lines(self.lines))
