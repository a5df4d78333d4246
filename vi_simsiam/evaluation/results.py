"""Result files of a run: how they are read, and their accuracies as a table and as lines."""

from __future__ import annotations

import base64
import contextlib
import os
import shlex
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from vi_simsiam.engine.checkpoint import last_step, load_last
from vi_simsiam.errors import InputError, RunWarning
from vi_simsiam.evaluation.forms import Accuracies, Uncertainty
from vi_simsiam.files import read_json
from vi_simsiam.text import counted

ACCURACIES = {"knn": "kNN", "linear": "linear", "logistic": "logistic"}
"""Result files with accuracies, each named like the command that writes it, and their titles."""
FEW_LABELS = 10
"""Labelled images of each class for the accuracy from few labels."""
_MEASURES = {
    "top1": "top-1", "top5": "top-5", "held_out_top1": "held-out top-1", "moved_top1": "moved",
}  # fmt: skip
_LINES = {
    "top1": "",
    "few_labels_top1": f" from {FEW_LABELS} labels a class",
    "moved_top1": " of moved images",
}
"""The accuracies with a line of their own, and what is added to its title."""


def read_result(
    run_folder: Path, name: str, notes: list[str] | None = None
) -> dict[str, Any] | None:
    """The content of RUN/`name`.json, of the form in `forms`; None without that file.

    A result of other weights than the last good checkpoint's is left out, too, with a RunWarning.
    Files of older versions have no step.

    Args:
        run_folder: a run folder.
        name: the command that writes the file.
        notes: a list that the text of the warning is added to.

    Raises:
        InputError: it cannot be read, or its content is not of that form.
    """
    path = run_folder / f"{name}.json"
    if not os.path.lexists(path):
        return None
    form = Uncertainty if name == "uncertainty" else Accuracies
    command = shlex.join(["vi-simsiam", name, str(run_folder)])
    try:
        result = cast(dict[str, Any], read_json(path, form, "run"))
    except InputError as error:
        raise InputError(f"{error}; {command} makes it again") from error
    step, last = result.get("step"), None
    with contextlib.suppress(InputError):  # no checkpoint that can be read
        if step is not None and step != last_step(run_folder):
            last = load_last(run_folder).step
    if last in (None, step):
        return result
    text = (
        f"{path} is left out: it is of step {step}, the run is at step {last}; "
        f"{command} makes it again"
    )
    warnings.warn(text, RunWarning, stacklevel=2)
    if notes is not None:
        notes.append(text)
    return None


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
    for encoder in dict.fromkeys(name for shares in measures.values() for name in shares):
        shares = (each.get(encoder) for each in measures.values())
        table.add_row(encoder, *("-" if x is None else f"{100 * x:.1f}" for x in shares))
    return table


def summary_lines(results: Mapping[str, dict[str, Any]]) -> list[str]:
    """Lines for results by title, such as "kNN top-1: 71.2 % (untrained 55.0 %, pixels 75.0 %)".

    One for each accuracy of the validation images, then those from few labels and those of moved
    images. A line ends with k if all training images vote.
    """
    return [
        _line(f"{title} top-1{added}", result, key)
        for key, added in _LINES.items()
        for title, result in results.items()
        if result.get(key)
    ]


def _line(title: str, result: dict[str, Any], key: str) -> str:
    top1 = {encoder: f"{100 * share:.1f} %" for encoder, share in result[key].items()}
    trained = top1.pop("trained")
    others = ", ".join(f"{encoder} {share}" for encoder, share in top1.items())
    line = f"{title}: {trained} ({others})"
    k = result.get("settings", {}).get("k")
    everyone = key != "few_labels_top1" and k is not None and k >= result["train_images"]
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
