"""When a training saves a checkpoint, and which ones are kept."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from vi_simsiam.config import TrainConfig
from vi_simsiam.engine import failure, run
from vi_simsiam.engine.checkpoint import (
    Checkpoint,
    add_checkpoint,
    checkpoints,
    remove_surplus,
)
from vi_simsiam.engine.distributed import World
from vi_simsiam.errors import InputError
from vi_simsiam.files import flush


class Saver:
    """The checkpoints of one training. Rank 0 writes them.

    Args:
        folder: the run folder; `run.check_folder` accepts it.
        config: of the run.
        world: the ranks that train together.
        found: the checkpoints in the folder before `last` was read.
        resume, overwrite: see `run.check_folder`.
        last: the checkpoint that the training goes on from; None at its start.

    Attributes:
        step: step of the last checkpoint.
        best_knn: the best kNN accuracy so far, None before one was measured.
    """

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        world: World,
        found: list[Path],
        *,
        resume: run.Resume,
        overwrite: bool,
        last: Checkpoint | None,
    ) -> None:
        self.folder, self._config, self._world = folder, config, world
        self._resume, self._overwrite = resume, overwrite
        self._found = found
        self.step = 0 if last is None else last.step
        self.best_knn = None if last is None else last.best_knn
        self._saved_at = time.monotonic()

    def check_again(self) -> None:
        """Check that no other training has used the folder since `found` was listed.

        Also removes surplus checkpoints that a killed training left: a run resumed at its last step
        saves nothing more.

        Raises:
            InputError: another one has used it.
        """
        run.check_folder(self.folder, resume=self._resume, overwrite=self._overwrite)
        if self._resume and checkpoints(self.folder) != self._found:
            raise InputError(
                f"resume: another training has used {self.folder} meanwhile; "
                "start this command again"
            )
        if self._resume:
            remove_surplus(self.folder, self.step, keep=self._config.keep)

    def due(self) -> bool:
        """True if it is time for another checkpoint, by rank 0's clock."""
        due = time.monotonic() - self._saved_at >= self._config.save_every
        return self._world.any_rank(due and self._world.is_main)

    def is_best(self, knn: float | None) -> bool:
        """True for a kNN accuracy above that of all checkpoints so far."""
        return knn is not None and (self.best_knn is None or knn > self.best_knn)

    def save(self, checkpoint: Checkpoint) -> None:
        """Save the state, as the best one, too, if its kNN accuracy is the best so far.

        Raises:
            TrainingError: it could not be written; the ones before are kept.
        """
        best = self.is_best(checkpoint.knn)
        self.best_knn = checkpoint.knn if best else self.best_knn
        checkpoint = dataclasses.replace(checkpoint, best_knn=self.best_knn)
        with self._world.together():
            if self._world.is_main:
                flush(self.folder / run.METRICS)  # a run that goes on needs the lines before
                add_checkpoint(self.folder, checkpoint, keep=self._config.keep, best=best)
                failure.forget(self.folder, checkpoint.step)
        self.step, self._saved_at = checkpoint.step, time.monotonic()
