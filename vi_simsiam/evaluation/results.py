"""Result files of a run: how they are written and read, and their accuracies by measure."""

from __future__ import annotations

import base64
import binascii
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vi_simsiam.engine.checkpoint import write_json
from vi_simsiam.errors import InputError
from vi_simsiam.evaluation.features import FeatureSets
from vi_simsiam.info import versions
from vi_simsiam.text import counted

ACCURACIES = {"knn": "kNN", "linear": "linear", "logistic": "logistic"}
"""Result files with accuracies, each named like the command that writes it, and their titles."""
_MEASURES = {"top1": "top-1", "top5": "top-5", "held_out_top1": "held-out top-1"}


def write_result(
    name: str, features: FeatureSets, body: dict[str, Any], packages: tuple[str, ...]
) -> dict[str, Any]:
    """Write `body`, what it was measured on and versions to RUN/`name`.json; return the content."""
    result = {
        "evaluation": name,
        "data": features.data,
        "classes": len(features.classes),
        "train_images": len(features.train_labels),
        "val_images": len(features.val_labels),
        "unreadable_images": features.unreadable,
        "features": {encoder: feature.shape[1] for encoder, feature in features.train.items()},
        "device": features.device.type,
        **body,
        "versions": versions(packages),
    }
    write_json(features.path / f"{name}.json", result)
    return result


def read_result(run_folder: Path, name: str) -> dict[str, Any] | None:
    """The content of RUN/`name`.json, None without that file.

    Raises:
        InputError: it holds no JSON object.
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
    return content


def unusable(path: Path, problem: str) -> InputError:
    """The error for a result file that cannot be used, with the command that writes it again."""
    command = shlex.join(["vi-simsiam", path.stem, str(path.parent)])
    return InputError(f"run: {path} {problem}; {command} makes it again")


def accuracies(results: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Shares of encoders by measure, such as "kNN top-1", of results by their title."""
    return {
        f"{title} {label}": result[key]
        for title, result in results.items()
        for key, label in _MEASURES.items()
        if result.get(key)
    }


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
        packed = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(
            f"correct: {text[:20]!r} is not accepted; it must be base64 ({error})"
        ) from None
    needed = -(-count // 8)
    if len(packed) != needed:
        raise InputError(
            f"correct: {counted(len(packed), 'byte')} given for {counted(count, 'value')}; "
            f"{needed} must be given"
        )
    bits = np.unpackbits(np.frombuffer(packed, np.uint8), count=count)
    return torch.from_numpy(bits.astype(bool))
