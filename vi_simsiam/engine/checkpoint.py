"""Checkpoints: written whole or not at all, read without executing anything."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from vi_simsiam.errors import InputError, TrainingError

_FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """The state after `step` optimiser steps; random numbers are keyed by position and need no state."""

    step: int
    seconds: float
    """Training time so far."""
    images: int
    """Number of training images: with another number a step stands for another place in the data."""
    model: dict[str, Any]
    optimizer: dict[str, Any]
    content: dict[str, Any] = field(default_factory=dict)
    """The images, see `data.content`; empty in a checkpoint of an older version."""

    def save(self, path: Path) -> None:
        """Write to `path` so that an interruption at any moment leaves the previous checkpoint or this one.

        Raises:
            TrainingError: it could not be written (a full disk, say); what was there is still there.
        """
        content = {"format": _FORMAT, **vars(self)}
        try:
            write_atomically(path, lambda file: torch.save(content, file))
        except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
            kept = "the one before is kept" if path.exists() else "there is none yet"
            raise TrainingError(f"the checkpoint {path} could not be written ({_line(error)}); {kept}") from error

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
            if content.pop("format") != _FORMAT:
                raise InputError(f"run: {path} was written by another version of vi-simsiam")
            return cls(**content)
        except InputError:
            raise
        except Exception as error:  # torch.load raises half a dozen unrelated types on damaged files
            raise InputError(f"run: {path} cannot be read: it is damaged or no checkpoint") from error

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
            raise InputError("run: the checkpoint does not fit the model that config.json describes") from error


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Call `write` on a temporary file beside `path`, then move it there once its bytes are on the disk."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` to `path` atomically, indented."""
    write_atomically(path, lambda file: file.write((json.dumps(content, indent=2) + "\n").encode()))
