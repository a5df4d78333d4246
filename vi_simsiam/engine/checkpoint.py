"""Checkpoints and other files, written whole or not at all."""

from __future__ import annotations

import contextlib
import io
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from rich.filesize import decimal
from torch import nn

from vi_simsiam.errors import InputError, TrainingError, UserError, is_full
from vi_simsiam.paths import printable


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


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Call `write` on a temporary file, and move that to `path` once it is on the disk.

    Raises:
        OSError: with `path`; also where `write` raises another error because of it.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    with naming(path, aside=temporary):
        try:
            with temporary.open("xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def naming(path: Path, *, aside: Path | None = None) -> Iterator[None]:
    """Give `path` to an OSError without a file (a full disk's, say), or with the file `aside`.

    A RuntimeError of torch.save that hides such an error is replaced, too.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(error, UserError) or not isinstance(cause, OSError) or not cause.strerror:
            raise
        if cause.filename is not None and cause.filename != str(aside):
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error


class _Size(io.BytesIO):
    """A file that only counts the bytes written to it."""

    written = 0

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self.written += size
        return size


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` to `path` atomically, indented."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, as `printable` UTF-8."""
    write_atomically(path, lambda file: file.write(printable(text).encode()))
