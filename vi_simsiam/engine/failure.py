"""Trainings that fail: the batch whose loss was not finite, and a collapse.

The batch is described by failure.json in the run folder, without any pixels.
"""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

from vi_simsiam.config import TrainConfig
from vi_simsiam.data.packed import PackedImages
from vi_simsiam.data.views import Schedule
from vi_simsiam.engine.run import FAILURE
from vi_simsiam.errors import CollapsedError, InputError, TrainingError
from vi_simsiam.files import read_json, write_json

_LOSSES = 100
"""Losses before the failing one that are kept."""


class Failure(TypedDict):
    """The content of failure.json."""

    step: int
    """The step whose loss was not finite, counted from 1, and its epoch."""
    epoch: int
    seed: int
    checkpoint_step: int
    """Step of the last good checkpoint."""
    loss: str
    """The loss that is not finite: nan, inf or -inf."""
    losses: list[float]
    """Those of the steps before it since the last line of metrics."""
    images: list[int]
    """Numbers of the batch's images among those that can be read."""
    names: list[str]
    """Their places."""
    rows: list[list[list[int]]]
    """Rows of the table of views, see `data.views.draw_table`: (views, images, 16)."""


def failed(
    config: TrainConfig,
    images: PackedImages,
    first: int,
    losses: Tensor,
    checkpoint_step: int,
) -> Failure:
    """Describe the batch of all ranks at the first step whose loss is not finite.

    Args:
        config: of the run.
        images: its training images.
        first: number of steps before those of `losses`.
        losses: of one step after the other, (steps,); not all are finite.
        checkpoint_step: step of the last good checkpoint.
    """
    count = int(torch.isfinite(losses).int().argmin())
    *before, last = losses[: count + 1].tolist()
    schedule = Schedule(images, config.augment, batch_size=config.batch_size, seed=config.seed)
    epoch, inside = divmod(first + count, schedule.steps_per_epoch)
    samples = schedule.samples(epoch, inside, inside + 1)[0]
    return {
        "step": first + count + 1,
        "epoch": epoch + 1,
        "seed": config.seed,
        "checkpoint_step": checkpoint_step,
        "loss": str(last),
        "losses": before[-_LOSSES:],
        "images": samples.tolist(),
        "names": [images.describe(index) for index in samples.tolist()],
        "rows": schedule.table(epoch, samples).tolist(),
    }


def record(folder: Path, found: Failure) -> None:
    """Write RUN/failure.json. Where that fails (a full disk, say) the training's error counts."""
    with contextlib.suppress(OSError):
        write_json(folder / FAILURE, {**found})


def error(folder: Path, found: Failure, last_good: str) -> TrainingError:
    """The error that ends a training; `last_good` names its last good checkpoint."""
    return TrainingError(
        f"the loss is not finite at step {found['step']} (epoch {found['epoch']}); {last_good}; "
        "a lower learning rate or clip_norm may help; "
        f"vi-simsiam doctor {shlex.quote(str(folder))} --replay shows the images of that step"
    )


def collapsed(folder: Path, step: int) -> CollapsedError:
    """The error of a training that `stop_on` ends, saved at `step`."""
    named = shlex.quote(str(folder))
    return CollapsedError(
        f"the training has collapsed, saved at step {step}; vi-simsiam doctor {named} has a "
        f"remedy; to go on all the same: vi-simsiam train --out {named} --resume --stop-on None"
    )


def read(folder: Path) -> Failure | None:
    """The failure of a run; None where there is none.

    Raises:
        InputError: the file is damaged.
    """
    path = folder / FAILURE
    if not path.exists():
        return None
    found = read_json(path, Failure, "run")
    if not 0 <= found["checkpoint_step"] < found["step"]:
        raise InputError(f"run: {path} is damaged (its steps do not fit each other)")
    return found


def forget(folder: Path, step: int) -> None:
    """Remove the failure of a run that has come to `step`, and so past it."""
    try:
        found = read(folder)
    except InputError:
        return
    if found is not None and found["step"] <= step:
        (folder / FAILURE).unlink()
