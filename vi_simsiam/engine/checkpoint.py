"""Checkpoints of a training: tensors (safetensors) and JSON, covered by a checksum.

A run folder holds the last ones, checkpoint-STEP.safetensors, and the one with the best kNN
accuracy, checkpoint-best.safetensors. Their metadata are

    vi_simsiam   JSON: the numbers of `Checkpoint`, and the format
    crc32        CRC-32 of the whole file, with zeros in place of these eight digits

and their tensors are model.NAME, momentum.NAME for trained parameters, and losses. CRC-32 finds
damage, not forgery; every name, dtype and shape is checked against the model before it is used.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import torch
from rich.filesize import decimal
from torch import Tensor, nn

from vi_simsiam.checks import NOT_NEGATIVE, at_least
from vi_simsiam.data.subsets import Content
from vi_simsiam.errors import InputError, RunWarning, TrainingError, is_full
from vi_simsiam.files import parse_json, read_bytes, write_atomically

BEST = "checkpoint-best.safetensors"
FORMER = "checkpoint.pt"
"""The one checkpoint of a run by version 0.1, format 1."""
_FORMAT = 2
_NAME = re.compile(r"checkpoint-(\d{8}|[1-9]\d{8,17})\.safetensors")
_METADATA, _CHECKSUM = "vi_simsiam", "crc32"
_DIGITS = 8
_MOST_BYTES = 1 << 40


class _DamagedError(InputError):
    """Bits of a checkpoint have changed, or it was cut off."""


class _State(TypedDict):
    """The JSON in a checkpoint."""

    format: int
    step: Annotated[int, NOT_NEGATIVE]
    seconds: Annotated[float, NOT_NEGATIVE]
    images: Annotated[int, at_least(1)]
    content: Content
    knn: float | None
    best_knn: float | None
    config: NotRequired[dict[str, Any]]


@dataclass(frozen=True)
class Checkpoint:
    """The state after `step` optimiser steps; random numbers depend on the step alone."""

    step: int
    seconds: float
    """Training time so far."""
    images: int
    """Number of training images: with another number, a step means another position in the data."""
    model: dict[str, Tensor]
    momentum: dict[str, Tensor] = field(default_factory=dict)
    """By the parameter's name; in format 1 by its number among the trained parameters."""
    losses: Tensor = field(default_factory=lambda: torch.zeros(0))
    """Losses of the last steps, which are in no line of the metrics yet, float32."""
    content: dict[str, Any] = field(default_factory=dict)
    """Description of the images, see `data.subsets`; empty in checkpoints of older versions."""
    knn: float | None = None
    """The last kNN accuracy measured during training."""
    best_knn: float | None = None
    """The best one."""
    config: dict[str, Any] = field(default_factory=dict)
    """The run's configuration, see `TrainConfig.to_dict`; empty in files of older versions."""

    def save(self, path: Path) -> None:
        """Write to `path`; an interruption leaves the file that is there or this one.

        Raises:
            TrainingError: it could not be written (a full disk, say).
        """
        encoded = self._encoded()
        try:
            write_atomically(path, lambda file: file.writelines(encoded))
        except OSError as error:
            reason = error.strerror or str(error)
            if is_full(error):
                free = shutil.disk_usage(path.parent).free
                reason += f": it needs {decimal(sum(map(len, encoded)))}, {decimal(free)} are free"
            others = checkpoints(path.parent)
            kept = "the one before is kept" if others else "there is none yet"
            text = f"the checkpoint {path} could not be written ({reason}); {kept}"
            raise TrainingError(text) from error

    def _encoded(self) -> list[memoryview]:
        """The parts of the file: what is before the checksum, the checksum, and the rest."""
        from safetensors.torch import save

        numbers = {name: x for name, x in vars(self).items() if name in _State.__annotations__}
        parts = {"model": self.model, "momentum": self.momentum}
        tensors = {f"{part}.{name}": x for part, all in parts.items() for name, x in all.items()}
        tensors["losses"] = self.losses
        metadata = {_METADATA: json.dumps({"format": _FORMAT, **numbers}), _CHECKSUM: "0" * _DIGITS}
        encoded = save({k: x.cpu().contiguous() for k, x in tensors.items()}, metadata)
        place, whole = _checksum_place(encoded), memoryview(encoded)
        checksum = memoryview(b"%08x" % zlib.crc32(encoded))
        return [whole[:place], checksum, whole[place + _DIGITS :]]

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read a checkpoint to the CPU.

        Raises:
            InputError: it cannot be read, is damaged, or was written by another version.
        """
        content = read_bytes(path, "run", most=_MOST_BYTES)
        try:
            decode = cls._former if path.name == FORMER else cls._decoded
            return decode(path, content)
        except (InputError, MemoryError):
            raise
        except Exception as error:  # readers of tensors raise many unrelated types
            text = f"run: {path} cannot be read: it is damaged or no checkpoint"
            raise _DamagedError(text) from error

    @classmethod
    def _decoded(cls, path: Path, content: bytes) -> Checkpoint:
        from safetensors.torch import load

        place = _checksum_place(content)
        found = zlib.crc32(b"0" * _DIGITS, zlib.crc32(content[:place]))
        found = zlib.crc32(memoryview(content)[place + _DIGITS :], found)
        if content[place : place + _DIGITS] != b"%08x" % found:
            raise ValueError("checksum")
        encoded = _header(content)["__metadata__"][_METADATA]
        if parse_json(encoded, dict[str, Any])["format"] > _FORMAT:
            raise InputError(f"run: {path} was written by a later version of vi-simsiam")
        state = parse_json(encoded, _State)
        tensors = load(content)
        parts: dict[str, Any] = {"model": {}, "momentum": {}}
        losses = tensors.pop("losses")
        for name, tensor in tensors.items():
            part, _, inside = name.partition(".")
            parts[part][inside] = tensor
        if state["format"] != _FORMAT or losses.shape != (losses.numel(),):
            raise ValueError("format")
        if losses.dtype != torch.float32 or len(losses) > state["step"]:
            raise ValueError("losses")
        return cls(losses=losses, **parts, **_numbers(state))

    @classmethod
    def _former(cls, path: Path, content: bytes) -> Checkpoint:
        """Read format 1: an archive of torch with the state of torch's optimiser."""
        with zipfile.ZipFile(io.BytesIO(content)) as archive:  # torch.load ignores the checksums
            if archive.testzip() is not None:
                raise ValueError("checksum")
        saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if saved.pop("format") != 1:
            raise InputError(f"run: {path} is of an unknown version of vi-simsiam")
        states = saved.pop("optimizer").get("state", {})
        momentum = {str(number): each["momentum_buffer"] for number, each in states.items()}
        state = {name: saved[name] for name in ("step", "seconds", "images")}
        described = {**state, "content": saved.get("content", {})}
        for tensor in (*saved["model"].values(), *momentum.values()):
            if type(tensor) is not Tensor or tensor.layout != torch.strided:
                raise ValueError("tensors")
        unset = {"format": 1, "knn": None, "best_knn": None}
        checked = parse_json(json.dumps({**described, **unset}), _State)
        return cls(model=saved["model"], momentum=momentum, **_numbers(checked))

    def restore(self, model: nn.Module, momentum: Mapping[str, Tensor] | None = None) -> None:
        """Copy the weights into `model` and, if it is given, the momentum into `momentum`.

        Args:
            model: of the same configuration.
            momentum: the optimiser's buffers by the parameters' names, in the parameters' order.

        Raises:
            InputError: the checkpoint is of another model.
        """
        own = [(model.state_dict(), self.model)]
        if momentum is not None:
            numbers = {str(number): name for number, name in enumerate(momentum)}
            own.append((dict(momentum), {numbers.get(k, k): x for k, x in self.momentum.items()}))
        for here, saved in own:
            if _shapes(here) != _shapes(saved):
                raise InputError(
                    "run: the checkpoint does not fit the model that config.json describes"
                )
        with torch.no_grad():
            for here, saved in own:
                for name, tensor in here.items():
                    tensor.copy_(saved[name])


def checkpoint_path(folder: Path, step: int) -> Path:
    """The file of a step's checkpoint in a run folder."""
    return folder / f"checkpoint-{step:08d}.safetensors"


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a run folder, the last one first; the best one is no part of them."""
    steps = {int(m[1]): m[0] for m in map(_NAME.fullmatch, _names(folder)) if m is not None}
    found = [folder / name for _, name in sorted(steps.items(), reverse=True)]
    return found + [folder / FORMER] * (folder / FORMER).is_file()


def last_step(folder: Path) -> int | None:
    """The step of the last checkpoint in a run folder, damaged or not; None without any.

    Raises:
        InputError: it is of version 0.1, which has the step inside, and cannot be read.
    """
    for path in checkpoints(folder):
        match = _NAME.fullmatch(path.name)
        return Checkpoint.load(path).step if match is None else int(match[1])
    return None


def load_last(folder: Path) -> Checkpoint:
    """The last checkpoint in a run folder that is not damaged.

    A RunWarning names the one after it that is.

    Raises:
        InputError: there is none, or it cannot be read for another reason.
    """
    damaged: _DamagedError | None = None
    for path in checkpoints(folder):
        try:
            found = Checkpoint.load(path)
        except _DamagedError as error:
            damaged = damaged or error
            continue
        if damaged is not None:
            reason = str(damaged).removeprefix("run: ")
            text = f"{reason}; the one before it is used, {path.name} (step {found.step})"
            warnings.warn(text, RunWarning, stacklevel=2)
        return found
    raise damaged or InputError(f"run: {folder} has no checkpoint")


def load_best(folder: Path) -> Checkpoint:
    """The checkpoint with the best kNN accuracy during training.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    if not (folder / BEST).is_file():
        raise InputError(f"checkpoint: {folder} has no {BEST}; runs with --knn-every have one")
    return Checkpoint.load(folder / BEST)


def add_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int, best: bool) -> None:
    """Save one more checkpoint, and remove all but the last `keep`.

    Args:
        folder: the run folder.
        checkpoint: the state; files of later steps are removed.
        keep: number of checkpoints that stay, besides the best one.
        best: save it as the best one, too.

    Raises:
        TrainingError: it could not be written; those that are there are kept.
    """
    if best:  # first: a run that goes on from this step does not measure it again
        checkpoint.save(folder / BEST)
    checkpoint.save(checkpoint_path(folder, checkpoint.step))
    found = checkpoints(folder)
    for other in found[: found.index(checkpoint_path(folder, checkpoint.step))]:
        other.unlink(missing_ok=True)  # it was damaged
    remove_surplus(folder, checkpoint.step, keep=keep)


def remove_surplus(folder: Path, step: int, *, keep: int) -> None:
    """Keep the checkpoint of this step, which is good, and the `keep - 1` before it."""
    found, good = checkpoints(folder), checkpoint_path(folder, step)
    for other in found[found.index(good) + keep :] if good in found else ():
        other.unlink(missing_ok=True)


def _names(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []


def _numbers(state: _State) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name != "format"}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Any, ...]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _header(content: bytes) -> dict[str, Any]:
    length = int.from_bytes(content[:8], "little")
    return parse_json(content[8 : 8 + length], dict[str, Any])


def _checksum_place(content: bytes) -> int:
    """The place of the checksum's digits in the header of a file."""
    before = b'"%s":"' % _CHECKSUM.encode()
    end = 8 + int.from_bytes(content[:8], "little")
    return content.index(before, 8, end) + len(before)
