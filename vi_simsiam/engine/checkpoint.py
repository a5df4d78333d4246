"""Checkpoints of a training."""

from __future__ import annotations

import io
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal
from torch import nn

from vi_simsiam.errors import InputError, TrainingError, is_full
from vi_simsiam.files import write_atomically


@dataclass(frozen=True)
class Checkpoint:
    """The state after `step` optimiser steps; random numbers depend on the step alone."""

    step: int
    seconds: float
    """Training time so far."""
    images: int
    """Number of training images: with another number, a step means another position in the data."""
    model: dict[str, Any]
    optimizer: dict[str, Any]
    content: dict[str, Any] = field(default_factory=dict)
    """Description of the images, see `data.subsets`; empty in checkpoints of older versions."""

    def save(self, path: Path) -> None:
        """Write to `path`; an interruption leaves the previous checkpoint or this one.

        Raises:
            TrainingError: it could not be written (a full disk, say); the previous one is kept.
        """
        content = {"format": 1, **vars(self)}
        try:
            write_atomically(path, lambda file: torch.save(content, file))
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
            if isinstance(error, OSError) and is_full(error):
                size = _Size()
                torch.save(content, size)
                free = shutil.disk_usage(path.parent).free
                reason += f": it needs {decimal(size.written)}, {decimal(free)} are free"
            kept = "the one before is kept" if path.exists() else "there is none yet"
            text = f"the checkpoint {path} could not be written ({reason}); {kept}"
            raise TrainingError(text) from error

    @classmethod
    def load(cls, path: Path, device: torch.device) -> Checkpoint:
        """Read a checkpoint to `device`.

        Raises:
            InputError: there is none, or it cannot be read.
        """
        if not path.is_file():
            raise InputError(f"run: {path.parent} has no {path.name}")
        try:
            content = torch.load(path, map_location=device, weights_only=True)
            if content.pop("format") != 1:
                raise InputError(f"run: {path} was written by another version of vi-simsiam")
            return cls(**content)
        except InputError:
            raise
        except Exception as error:  # torch.load raises many unrelated types on damaged files
            text = f"run: {path} cannot be read: it is damaged or no checkpoint"
            raise InputError(text) from error

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Load the weights into `model`, and the momentum into `optimizer` if there is one.

        Raises:
            InputError: the checkpoint is of another model.
        """
        try:
            model.load_state_dict(self.model)
            if optimizer is not None:
                optimizer.load_state_dict(self.optimizer)
        except (RuntimeError, ValueError, KeyError) as error:
            text = "run: the checkpoint does not fit the model that config.json describes"
            raise InputError(text) from error


class _Size(io.BytesIO):
    """A file that only counts the bytes written to it."""

    written = 0

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self.written += size
        return size
