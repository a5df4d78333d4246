"""kNN accuracies during the training of an experiment's run."""

from __future__ import annotations

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
COLUMNS = ("knn200", "knn200_epoch", "knn200_seconds")


def read_progress(folder: Path) -> list[dict[str, Any]]:
    """The kNN accuracies that were measured during a training."""
    lines, _ = read_lines(folder / PROGRESS, ProgressLine, "run")
    return cast(list[dict[str, Any]], lines)


class Progress:
    """A callback after every epoch that records kNN accuracy (k = 200, T = 0.1) over training time.

    It uses at most 4,000 training and 1,000 validation images, drawn class by class. Its own time
    is not counted: the trainer's clock stands still between epochs. Lines go to RUN/progress.jsonl;
    those beyond the step that a resumed run starts from are dropped.

    Args:
        trainer: trainer of the run, before it starts.
        every: epochs between two measurements; the last epoch always has one.
    """

    def __init__(self, trainer: Trainer, every: int) -> None:
        self.trainer, self.every = trainer, every
        splits = open_splits(trainer.config)
        assert splits.val is not None
        self.workers = resolve_workers(trainer.config.workers, trainer.device)

        def chosen(source: ImageSource, most: int) -> PackedImages:
            cache_dir = trainer.config.cache_dir
            whole, _ = cached(source, cache_dir=cache_dir, workers=self.workers, console=None)
            return cast(PackedImages, at_most(whole, most))

        self.train, self.val = chosen(splits.train, 4_000), chosen(splits.val, 1_000)
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
        values = (share, epoch, round(trainer.seconds, 3), trainer.step)
        self.lines.append(dict(zip((*COLUMNS, "step"), values, strict=True)))
        write_text(self.path, json_lines(self.lines))
