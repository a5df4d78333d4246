"""Result files of a run: how they are read, and their accuracies as a table and as lines."""

from __future__ import annotations

import base64
import contextlib
import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from vi_simsiam.errors import InputError
from vi_simsiam.text import counted

ACCURACIES = {"knn": "kNN", "linear": "linear", "logistic": "logistic"}
"""Result files with accuracies, each named like the command that writes it, and their titles."""
_PARTS = ("calibration", "misclassification", "retrieval", "ood", "corruptions")
"""Parts of uncertainty.json."""
_MEASURES = {"top1": "top-1", "top5": "top-5", "held_out_top1": "held-out top-1"}


def read_result(run_folder: Path, name: str) -> dict[str, Any] | None:
    """The content of RUN/`name`.json, None without that file.

    Raises:
        InputError: it holds no JSON object, or lacks a part.
    """
    path = run_folder / f"{name}.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
    except ValueError as error:  # JSON and Unicode errors alike
        raise unusable(path, f"cannot be read ({error})") from error
    parts = _PARTS if name == "uncertainty" else ("top1",)
    if missing := [part for part in parts if part not in content]:
        raise unusable(path, f"lacks {', '.join(missing)}")
    return content


def unusable(path: Path, problem: str) -> InputError:
    """The error for a result file that cannot be used, with the command that writes it again."""
    command = shlex.join(["vi-simsiam", path.stem, str(path.parent)])
    return InputError(f"run: {path} {problem}; {command} makes it again")


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Name the result file whose content lacks what the block uses, as one edited by hand may."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        if isinstance(error, InputError):
            raise
        raise unusable(path, f"lacks a value ({error!r})") from error


def accuracies(results: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Shares of encoders by measure, such as "kNN top-1", of results by their title."""
    return {
        f"{title} {label}": result[key]
        for title, result in results.items()
        for key, label in _MEASURES.items()
        if result.get(key)
    }


def summary_table(results: dict[str, dict[str, Any]]) -> Table:
    """Every accuracy of results by title in per cent: a row per encoder, a column per measure."""
    measures = accuracies(results)
    table = Table("encoder")
    for measure in measures:
        table.add_column(measure, justify="right")
    for encoder in next(iter(measures.values())):
        table.add_row(encoder, *(f"{100 * shares[encoder]:.1f}" for shares in measures.values()))
    return table


def summary_line(title: str, result: dict[str, Any]) -> str:
    """One line for a result: "kNN top-1: 71.2 % (untrained 55.0 %, pixels 75.0 %)".

    It ends with k if all training images vote.
    """
    top1 = {encoder: f"{100 * share:.1f} %" for encoder, share in result["top1"].items()}
    others = ", ".join(f"{encoder} {top1[encoder]}" for encoder in ("untrained", "pixels"))
    line = f"{title} top-1: {top1['trained']} ({others})"
    k = result.get("settings", {}).get("k")
    everyone = k is not None and k >= result["train_images"]
    return f"{line} with k = {k}, all training images" if everyone else line


def pack_bits(bits: Tensor) -> str:
    """Booleans (N,) as base64 of their bytes: eight to a byte, the first in the highest bit.

    Result files store in this form which images were classified correctly, so that accuracies can
    be compared image by image.
    """
    return base64.b64encode(np.packbits(bits.cpu().numpy()).tobytes()).decode("ascii")


def unpack_bits(text: str, count: int) -> Tensor:
    """The inverse of `pack_bits`: `count` booleans, (count,) bool.

    Raises:
        InputError: `text` is not base64, or holds another number of values.
    """
    try:
        packed = np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
        if len(packed) != -(-count // 8):
            raise ValueError(f"{counted(len(packed), 'byte')}, a bit for each is needed")
    except ValueError as error:  # that of base64 is one
        raise InputError(
            f"correct: {text[:20]!r} is not {counted(count, 'value')} in base64 ({error})"
        ) from None
    return torch.from_numpy(np.unpackbits(packed, count=count).astype(bool))
