"""What every result file says beside its figures, and how it is written."""

from __future__ import annotations

import base64
import binascii
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vi_simsiam.engine.checkpoint import write_json
from vi_simsiam.errors import InputError
from vi_simsiam.evaluation.features import FeatureSets
from vi_simsiam.info import versions
from vi_simsiam.text import counted


def write_result(
    name: str, features: FeatureSets, body: dict[str, Any], packages: tuple[str, ...]
) -> dict[str, Any]:
    """Write what was evaluated, `body`, and the versions of `packages` to RUN/`name`.json; return its content."""
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


def pack_bits(bits: Tensor) -> str:
    """Truth values (N,) bool as text: eight to a byte, the first in the highest bit, and the bytes in base64.

    Result files keep with it which images were classified correctly, so that accuracies can be compared image by image.
    """
    return base64.b64encode(np.packbits(bits.cpu().numpy()).tobytes()).decode("ascii")


def unpack_bits(text: str, count: int) -> Tensor:
    """The inverse of `pack_bits`: `count` truth values as (count,) bool.

    Raises:
        InputError: `text` is no base64, or of another number of values.
    """
    try:
        packed = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(
            f"correct: {text[:20]!r} is not accepted; it must be base64 ({error})"
        ) from None
    if len(packed) != -(-count // 8):
        raise InputError(
            f"correct: {counted(len(packed), 'byte')} given for {counted(count, 'value')}; {-(-count // 8)} must be given"
        )
    return torch.from_numpy(
        np.unpackbits(np.frombuffer(packed, np.uint8), count=count).astype(bool)
    )
